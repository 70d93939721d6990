"""Which of two models explains the subjects better."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from rsm_probe.brains.corrections import Correction, corrected
from rsm_probe.brains.draws import corrected_variance
from rsm_probe.brains.evaluation import t_interval, t_test
from rsm_probe.errors import ComparisonError, look_up

if TYPE_CHECKING:
    import xarray as xr


def differences(
    evaluation: xr.Dataset, pairs: Sequence[tuple[str, str]] | None = None, correction: Correction | None = "fdr"
) -> xr.Dataset:
    """Compare models by their means over subjects, in the same draws of images and subjects.

    Args:
        evaluation: what `evaluate` returned.
        pairs: labels of the models to compare, as in the coordinate `rsm`; by default all pairs.
        correction: how `p_corrected` accounts for the number of pairs: "fdr" bounds the expected share of wrong ones
            among the differences called significant (Benjamini & Hochberg 1995), "holm" the probability of any wrong
            one (Holm 1979); None leaves p-values as they are.

    Returns:
        Dimension `pair` with coordinates `rsm_a` and `rsm_b`: `difference`, the mean of a minus that of b; its standard
        error `std` by the corrected bootstrap (Schütt et al. 2023); the t interval `low`, `high`; the two-sided `p` of
        a t test; `p_corrected`.

    Example:
        >>> import numpy as np, rsm_probe
        >>> truth, other = np.random.default_rng(0).normal(size=(2, 30, 5))
        >>> models = {name: rsm_probe.RSM.from_array(x @ x.T) for name, x in (("right", truth), ("wrong", other))}
        >>> subjects = rsm_probe.brains.simulated_subjects(models["right"], subjects=6, noise=1.0)
        >>> evaluation = rsm_probe.brains.evaluate(models, subjects, repeats=200)
        >>> difference = rsm_probe.brains.differences(evaluation, [("right", "wrong")])
        >>> bool(difference["low"][0] > 0)
        True

    Raises:
        ComparisonError: no pair, an unknown model, or an unknown correction.
    """
    import xarray as xr

    numbers = {str(label): number for number, label in enumerate(evaluation["rsm"].values)}
    compared = list(combinations(numbers, 2)) if pairs is None else [_pair(pair) for pair in pairs]
    if not compared:
        raise ComparisonError("no pair of models was given")
    first, second = ([look_up(pair[side], numbers, "model", ComparisonError) for pair in compared] for side in (0, 1))
    means, draws = evaluation["mean"].values, evaluation["draws"].values
    difference = means[first] - means[second]
    drawn = evaluation.attrs["draw"]
    sizes = [0 if drawn == other else int(evaluation.attrs[name]) for name, other in _OTHER]
    variance = np.concatenate(
        [
            corrected_variance(draws[..., first[part]] - draws[..., second[part]], *sizes)
            for part in (slice(start, start + _HELD) for start in range(0, len(compared), _HELD))
        ]
    )
    std, dof = np.sqrt(variance), int(evaluation.attrs["dof"])
    low, high = t_interval(difference, std, dof, float(evaluation.attrs["level"]))
    p = t_test(difference, std, dof)
    columns = {"difference": difference, "std": std, "low": low, "high": high, "p": p}
    columns["p_corrected"] = corrected(p, correction)
    coordinates = {"rsm_a": ("pair", [a for a, _ in compared]), "rsm_b": ("pair", [b for _, b in compared])}
    return xr.Dataset({name: ("pair", data) for name, data in columns.items()}, coords=coordinates).assign_attrs(
        {**evaluation.attrs, "correction": correction or "none"}
    )


# Number of pairs whose draws are held at once.
_HELD = 500
# Attribute with a number -> what is drawn if that does not count.
_OTHER = (("images", "subjects"), ("subjects", "images"))


def _pair(pair: Any) -> tuple[str, str]:
    if isinstance(pair, str) or len(pair) != 2:
        raise ComparisonError(f"a pair holds the labels of two models, found {pair!r}")
    return str(pair[0]), str(pair[1])
