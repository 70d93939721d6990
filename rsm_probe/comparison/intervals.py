"""How well similarities separate two kinds of pairs (AUROC, d'), and means over images, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsm_probe.arrays import real_array
from rsm_probe.checks import require_seed, require_whole
from rsm_probe.comparison.statistics import check_level
from rsm_probe.errors import ComparisonError

# Comparisons of two pairs made at once.
_BLOCK = 4 * 2**20


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Compute the area under the ROC curve: the probability that a positive pair is more similar than a negative one.

    Args:
        positive: similarities of pairs that should be similar, (P,).
        negative: similarities of pairs that should not be similar, (Q,).

    Returns:
        A value in [0, 1], 0.5 by chance; ties count half. NaN if one kind has no pairs.

    Raises:
        ComparisonError: similarities that are NaN or not real numbers.
    """
    first, second = _known(positive, "positive"), _known(negative, "negative")
    if not (first.size and second.size):
        return float("nan")
    ordered = np.sort(second)
    below, up_to = (np.searchsorted(ordered, first, side) for side in ("left", "right"))
    return float((below + up_to).sum() / (2 * first.size * second.size))


def auroc_samples(
    positive: np.ndarray,
    negative: np.ndarray,
    weights_positive: np.ndarray,
    weights_negative: np.ndarray,
    *,
    block: int = _BLOCK,
) -> np.ndarray:
    """Compute the AUROC in weighted samples of the pairs, such as bootstrap samples of images.

    Args:
        positive: see `auroc`, (P,).
        negative: see `auroc`, (Q,).
        weights_positive: how often each positive pair counts in each sample, (R, P).
        weights_negative: how often each negative pair counts in each sample, (R, Q).
        block: number of comparisons made at once.

    Returns:
        Shape (R,); NaN if a sample has no pairs of one kind.

    Raises:
        ComparisonError: similarities that are NaN or not real numbers, or weights of a wrong shape.
    """
    first, second = _known(positive, "positive"), _known(negative, "negative")
    counts = [
        real_array(part, name, ComparisonError).astype(np.float32)
        for part, name in ((weights_positive, "weights_positive"), (weights_negative, "weights_negative"))
    ]
    shapes = [part.shape for part in counts]
    if any(len(shape) != 2 for shape in shapes) or shapes != [(shapes[0][0], len(p)) for p in (first, second)]:
        raise ComparisonError(
            f"weights have shapes (samples, {len(first)}) and (samples, {len(second)}), found {shapes[0]} and "
            f"{shapes[1]}"
        )
    won = np.zeros(len(counts[0]))
    step = max(1, block // max(1, first.size))
    for start in range(0, second.size, step):
        part = second[start : start + step]
        wins = (first[:, None] > part).astype(np.float32) + np.float32(0.5) * (first[:, None] == part)
        won += np.einsum("rp,rp->r", counts[0], counts[1][:, start : start + step] @ wins.T, dtype=np.float64)
    total = counts[0].sum(axis=1, dtype=np.float64) * counts[1].sum(axis=1, dtype=np.float64)
    return np.divide(won, total, out=np.full(len(won), np.nan), where=total > 0)


def d_prime(positive: np.ndarray, negative: np.ndarray) -> float:
    """Compute d': the difference of the means of two kinds of pairs over their root mean variance; NaN if undefined.

    Raises:
        ComparisonError: similarities that are NaN or not real numbers.
    """
    first, second = _known(positive, "positive"), _known(negative, "negative")
    if min(len(first), len(second)) < 2:
        return float("nan")
    spread = np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    return float((first.mean() - second.mean()) / spread) if spread > 0 else float("nan")


def draw_weights(count: int, repeats: int, seed: int = 0) -> np.ndarray:
    """Draw `count` images with replacement, `repeats` times; return how often each occurs, (repeats, count).

    Raises:
        ComparisonError: `count` below 1, `repeats` below 2, or an invalid seed.
    """
    require_whole(count, "the number of images to draw from", 1, ComparisonError)
    require_whole(repeats, "repeats", 2, ComparisonError)
    require_seed(seed, "seed", ComparisonError)
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), repeats)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the percentiles that enclose the central share `level` of bootstrap samples; NaN samples are ignored.

    Raises:
        ComparisonError: `level` out of range.
    """
    check_level(level)
    known = real_array(samples, "samples", ComparisonError).astype(np.float64)
    known = known[~np.isnan(known)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values: np.ndarray,
    repeats: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: Sequence[str] | np.ndarray | None = None,
) -> tuple[float, float, float]:
    """Compute a mean over images and its bootstrap interval.

    To compare two conditions on the same images, pass the differences, so that both use the same draws.

    Args:
        values: one value per image, (N,); NaN values are ignored.
        repeats: number of draws.
        level: level of the interval, in (0, 1).
        seed: seed of the draws.
        groups: one name per image, (N,). Images of a group, such as frames of one scene, are not independent and are
            drawn together.

    Returns:
        The mean and the lower and upper end of its interval; NaN without values.

    Raises:
        ComparisonError: `repeats` or `level` out of range, an invalid seed, or values or groups of a wrong shape.
    """
    every = real_array(values, "values", ComparisonError).astype(np.float64)
    names = np.arange(len(every)) if groups is None else np.asarray(groups)
    if every.ndim != 1 or names.shape != every.shape:
        raise ComparisonError(f"values and groups have shape (N,), found {every.shape} and {names.shape}")
    known = every[~np.isnan(every)]
    if not known.size:
        return float("nan"), float("nan"), float("nan")
    group_numbers = np.unique(names[~np.isnan(every)], return_inverse=True)[1]
    drawn = draw_weights(int(group_numbers.max()) + 1, repeats, seed)
    samples = (drawn @ np.bincount(group_numbers, known)) / (drawn @ np.bincount(group_numbers))
    return float(known.mean()), *interval(samples, level)


def _known(similarities: np.ndarray, name: str) -> np.ndarray:
    """Flatten similarities and reject NaN, which would silently sort above all others."""
    values = real_array(similarities, name, ComparisonError).ravel()
    if np.isnan(values).any():
        raise ComparisonError(f"{name} holds NaN, which is neither more nor less similar than anything")
    return values
