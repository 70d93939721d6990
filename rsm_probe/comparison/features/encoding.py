"""Encoding scores: how well features of a layer predict responses, such as those of voxels, to held-out images.

A ridge regression is fitted for each response unit, and judged on images that took part in neither the fit nor the
choice of its penalty. scikit-learn does the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rsm_probe.arrays import real_array
from rsm_probe.checks import brief, listed, require_whole
from rsm_probe.comparison.features.inputs import finite_array, pooled
from rsm_probe.errors import ComparisonError

# For standardised features, whose squares sum to the number of images times that of features.
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-3, 8, 12))
# Spreads below this share of the largest response or feature are rounding noise.
_SPREAD = 1e-12
# Correlations over fewer images are 1 or -1.
_FEWEST = 3
# Parts of the groups within which penalties are compared.
_INNER_FOLDS = 5

Read = Literal["pooled", "flattened"]
Score = Literal["r", "r2"]


@dataclass(frozen=True, eq=False)
class EncodingScores:
    """How well features predict each response unit on held-out images.

    Attributes:
        scores: mean over folds, (U,); NaN for units that are constant over the held-out images of a fold.
        by_fold: scores of each fold, (F, U).
        penalties: penalty of each unit in each fold, (F, U).
        predictions: responses (N, U), each predicted by the regression that did not see its image.
        folds: number of the fold that held out each image, (N,).
    """

    scores: np.ndarray
    by_fold: np.ndarray
    penalties: np.ndarray
    predictions: np.ndarray
    folds: np.ndarray

    def __repr__(self) -> str:
        defined = self.scores[~np.isnan(self.scores)]
        mean = f"mean {defined.mean():.3f} over {len(defined)} units" if len(defined) else "no unit has a score"
        return f"EncodingScores({mean}, {len(self.by_fold)} folds, {len(self.folds)} images)"


def encoding_scores(
    features: Any,
    responses: Any,
    *,
    read: Read | None = None,
    score: Score = "r",
    folds: int = 5,
    groups: Sequence[Any] | np.ndarray | None = None,
    penalties: Sequence[float] = PENALTIES,
    seed: int = 0,
) -> EncodingScores:
    """Predict responses from features by ridge regressions with cross-validation (Naselaris et al. 2011).

    Images are divided into folds. For each fold, features are standardised to mean 0 and variance 1 over the images of
    the other folds. On these images, `w = argmin |y - b - X w|^2 + penalty |w|^2` (Hoerl & Kennard 1970) is fitted for
    each unit with each penalty, and the penalty with the least squared error in a second cross-validation within them
    is used: one image is left out at a time, or, if there are groups, a fifth of the groups. The images of the fold are
    then predicted and scored, and scores are averaged over folds. A score is not taken over the predictions of all
    folds together: the mean of the fitted images is low where that of a fold is high, which would make scores of
    unrelated responses negative.

    Args:
        features: features (N, P), tokens (N, S, C), or a `Representation`, of which the tokens are taken.
        responses: responses (N, U) to the same images in the same order, or (N,) of one unit.
        read: how tokens become features: "pooled", their mean over locations (C features), or "flattened", all of them
            (S * C features). Required for tokens, and only allowed for them.
        score: "r", the Pearson correlation between responses and predictions, or "r2", the coefficient of determination
            `1 - |y - prediction|^2 / |y - mean(y)|^2` over the held-out images, which is negative for predictions worse
            than their mean.
        folds: number of folds, at least 2, each of at least 3 images. Images are assigned at random.
        groups: one name per image, (N,). Images of a group, such as frames of one scene, are held out together.
        penalties: penalties to choose from, above 0; by default 12, from 10^-3 to 10^8.
        seed: seed of the folds, in [0, 2^32).

    Returns:
        Scores of each unit, in [-1, 1] for "r" and up to 1 for "r2", with penalties and predictions. A fold with the
        same prediction for all of its images has r = 0.

    Example:
        >>> import numpy as np
        >>> from rsm_probe.comparison import encoding_scores
        >>> rng = np.random.default_rng(0)
        >>> tokens = rng.normal(size=(100, 4, 6))    # 100 images, 4 locations, 6 channels
        >>> voxels = tokens.mean(axis=1) @ rng.normal(size=(6, 2)) + 0.1 * rng.normal(size=(100, 2))
        >>> encoding_scores(tokens, voxels, read="pooled").scores.round(1)
        array([1., 1.])

    Raises:
        ComparisonError: wrong shapes, different numbers of images, non-finite values, features that are the same for
            all images, tokens without `read`, other arguments out of range, or too few images or groups for the folds.
    """
    x, y = _read(features, read), _responses(responses)
    if len(x) != len(y):
        raise ComparisonError(f"there are features of {len(x)} images and responses to {len(y)}; they must be the same")
    if score not in ("r", "r2"):
        raise ComparisonError(f"score is 'r' or 'r2', found {brief(score)}")
    choices = _penalties(penalties)
    names = _groups(groups, len(x))
    require_whole(folds, "folds", 2, ComparisonError)
    require_whole(seed, "seed", 0, ComparisonError, most=2**32 - 1)
    exponents = np.frexp(np.abs(y).max(axis=0))[1]
    units = np.ldexp(y, -exponents)
    fold_of = np.empty(len(x), dtype=np.int64)
    predictions = np.empty_like(y)
    by_fold, used = [], []
    for number, (train, test) in enumerate(_splits(len(x), names, folds, seed)):
        fitted, penalty = _predict(x[train], units[train], x[test], choices, None if names is None else names[train])
        by_fold.append(_score(units[test], fitted, score))
        used.append(penalty)
        fold_of[test] = number
        predictions[test] = np.ldexp(fitted, exponents)
    scores = np.mean(by_fold, axis=0)
    _warn_undefined(scores, np.ptp(units, axis=0) <= _SPREAD)
    return EncodingScores(scores, np.stack(by_fold), np.stack(used), predictions, fold_of)


def ridge_encoding(features: Any, responses: Any, **options: Any) -> float:
    """Average encoding scores over response units; see `encoding_scores`.

    Not symmetric: the first representation predicts the second.

    Args:
        features: features (N, P), tokens (N, S, C) with `read`, or a `Representation`.
        responses: responses (N, U) to the same images in the same order, or (N,).
        options: as for `encoding_scores`.

    Returns:
        Mean over the units for which the score is defined.

    Example:
        >>> import numpy as np
        >>> from rsm_probe.comparison import ridge_encoding
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(200, 3))
        >>> round(ridge_encoding(x, x @ rng.normal(size=(3, 4))), 3)
        1.0

    Raises:
        ComparisonError: as `encoding_scores`; or no unit has a score.
    """
    scores = encoding_scores(features, responses, **options).scores
    if np.isnan(scores).all():
        raise ComparisonError("all responses are constant over the held-out images of a fold, so no unit has a score")
    return float(np.nanmean(scores))


def _read(features: Any, read: Read | None) -> np.ndarray:
    """Features (N, P) of which the largest is about 1."""
    if read not in (None, "pooled", "flattened"):
        raise ComparisonError(f"read is 'pooled' or 'flattened', found {brief(read)}")
    array = real_array(getattr(features, "tokens", features), "the features", ComparisonError)
    if array.ndim == 3 and read is None:
        _, locations, channels = array.shape
        raise ComparisonError(
            f"tokens have shape {array.shape}; say read='pooled' for their mean over locations ({channels} features) "
            f"or read='flattened' for all of them ({locations * channels} features)"
        )
    if array.ndim != 3 and read is not None:
        raise ComparisonError(f"read={read!r} is for tokens (N, S, C), but the features have shape {array.shape}")
    if read == "pooled":
        array = pooled(array)
    elif read == "flattened":
        array = finite_array(array, "the tokens", "(N, S, C)").reshape(len(array), -1)
    else:
        array = finite_array(array, "the features", "(N, P)")
    # A power of two, here and for responses: squares stay finite, and held-out images change no bit of a fit.
    array = np.ldexp(array, -np.frexp(np.abs(array).max())[1])
    if (np.ptp(array, axis=0) <= _SPREAD).all():
        raise ComparisonError("the features are the same for all images, so they predict nothing")
    return array


def _responses(responses: Any) -> np.ndarray:
    array = real_array(responses, "the responses", ComparisonError)
    if array.ndim not in (1, 2):
        raise ComparisonError(f"the responses have shape {array.shape}; expected (N, U), or (N,) of one unit")
    return finite_array(array[:, None] if array.ndim == 1 else array, "the responses", "(N, U)")


def _penalties(penalties: Any) -> np.ndarray:
    choices = real_array(penalties, "penalties", ComparisonError).astype(np.float64)
    if choices.ndim != 1 or not choices.size or not (np.isfinite(choices) & (choices > 0)).all():
        raise ComparisonError(f"penalties are one or more numbers above 0, found {brief(penalties)}")
    return np.unique(choices)


def _groups(groups: Sequence[Any] | np.ndarray | None, images: int) -> np.ndarray | None:
    """Number of the group of each image."""
    if groups is None:
        return None
    try:
        names = np.asarray(groups)
        numbers = np.unique(names, return_inverse=True)[1]
    except (TypeError, ValueError) as problem:
        raise ComparisonError(f"groups must be names of one type, one per image: {problem}") from None
    if names.shape != (images,):
        raise ComparisonError(f"groups has shape {names.shape}; expected one name for each of {images} images")
    if (names != names).any():  # NaN, which stands for a missing name
        raise ComparisonError(f"groups holds NaN, first for image {int((names != names).argmax())}")
    return numbers


def _splits(images: int, groups: np.ndarray | None, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images to fit and held-out images of every fold."""
    from sklearn.model_selection import GroupKFold, KFold

    if groups is not None and groups.max() + 1 < folds:
        raise ComparisonError(f"there are {groups.max() + 1} groups of images for {folds} folds; use fewer folds")
    if images < folds * _FEWEST:
        raise ComparisonError(
            f"{images} images are too few for {folds} folds of at least {_FEWEST} images each; use fewer folds"
        )
    if groups is None:
        yield from KFold(folds, shuffle=True, random_state=seed).split(np.empty(images))
        return
    for train, test in GroupKFold(folds, shuffle=True, random_state=seed).split(np.empty(images), groups=groups):
        if len(np.unique(groups[train])) < 2:
            raise ComparisonError("there are too few groups of images to choose penalties within them; use more groups")
        if len(test) < _FEWEST:
            raise ComparisonError(
                f"the groups leave a fold of {len(test)} images, where {_FEWEST} are needed; use fewer folds"
            )
        yield train, test


def _predict(
    x: np.ndarray, y: np.ndarray, held_out: np.ndarray, penalties: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit responses (M, U), and predict those to held-out images; the penalty of each unit (U,)."""
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(x)
    x, held_out = scaler.transform(x), scaler.transform(held_out)
    if x.shape[1] > len(x):
        x, held_out = _on_principal_axes(x, held_out)
    model: Any
    if groups is None:
        model = RidgeCV(penalties, alpha_per_target=True).fit(x, y)
        used = model.alpha_
    else:
        splits = list(GroupKFold(min(_INNER_FOLDS, len(np.unique(groups)))).split(x, groups=groups))
        # All penalties of all units at once, so that each part takes one decomposition.
        targets = np.tile(y, len(penalties))
        several = Ridge(np.repeat(penalties, y.shape[1]), solver="svd")
        predictions = cross_val_predict(several, x, targets, cv=splits).reshape(targets.shape)
        errors = ((predictions - targets) ** 2).sum(axis=0).reshape(len(penalties), -1)
        used = penalties[errors.argmin(axis=0)]
        model = Ridge(used, solver="svd").fit(x, y)
    return model.predict(held_out).reshape(len(held_out), -1), np.broadcast_to(used, y.shape[1:])


def _on_principal_axes(x: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates on the axes that images (M, P) span, at most M: ridge regressions predict the same from them."""
    variances, vectors = np.linalg.eigh(x @ x.T)
    above = variances > variances[-1] * len(x) * np.finfo(np.float64).eps
    if not above.any():  # the features of these images are the same
        return x[:, :1], held_out[:, :1]
    vectors, lengths = vectors[:, above], np.sqrt(variances[above])
    return vectors * lengths, held_out @ x.T @ vectors / lengths


def _score(responses: np.ndarray, predictions: np.ndarray, score: Score) -> np.ndarray:
    """Scores of the units (U,) over the images of a fold."""
    y, prediction = responses - responses.mean(axis=0), predictions - predictions.mean(axis=0)
    constant = np.ptp(responses, axis=0) <= _SPREAD
    if score == "r2":
        errors, total = ((responses - predictions) ** 2).sum(axis=0), (y**2).sum(axis=0)
        return np.where(constant, np.nan, 1 - errors / np.where(constant, 1.0, total))
    scale = np.linalg.norm(y, axis=0) * np.linalg.norm(prediction, axis=0)
    varies = ~constant & (np.ptp(predictions, axis=0) > _SPREAD)
    r = np.divide((y * prediction).sum(axis=0), scale, out=np.zeros_like(scale), where=varies)
    return np.where(constant, np.nan, np.clip(r, -1.0, 1.0))


def _warn_undefined(scores: np.ndarray, constant: np.ndarray) -> None:
    undefined = np.flatnonzero(np.isnan(scores))
    if len(undefined):
        everywhere = "all images" if constant[undefined].all() else "the held-out images of a fold; use fewer folds"
        warnings.warn(
            f"the score is undefined (NaN) for {len(undefined)} of {len(scores)} units, whose responses are constant "
            f"over {everywhere}: units {listed(undefined.tolist())}",
            stacklevel=3,
        )
