"""Bootstrap draws of images and of subjects, and the variances that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from rsm_probe.brains.ceilings import ceilings
from rsm_probe.comparison.protocol import Measure
from rsm_probe.comparison.resampling import drawn_images

Draw = Literal["both", "images", "subjects"]
# What is drawn -> the kinds of draws that its variance follows from, in the order of `corrected_variance`.
KINDS: dict[str, tuple[str, ...]] = {
    "both": ("both", "subjects", "images"),
    "subjects": ("subjects",),
    "images": ("images",),
}


class Drawn(NamedTuple):
    """Values in draws.

    Attributes:
        means: of each model over the subjects, (kinds of draws, repeats, R).
        ceilings: lower and upper end, (kinds of draws, repeats, 2); NaN where there are none.
    """

    means: np.ndarray
    ceilings: np.ndarray


def drawn_values(
    models: np.ndarray,
    subjects: np.ndarray,
    measure: Measure,
    draw: Draw,
    repeats: int,
    seed: int,
    workers: int,
    on_repeat: Callable[[int], object],
    fixed: np.ndarray,
) -> Drawn:
    """Compute values in bootstrap draws; "both" uses the same images and subjects in its three kinds of draws.

    Args:
        models: RSMs (R, N, N).
        subjects: RSMs over the same images, (K, N, N).
        measure: a measure, which can weight images if these are drawn.
        draw: what is drawn with replacement.
        repeats: number of draws.
        seed: seed of the draws.
        workers: number of threads; values do not depend on it.
        on_repeat: called with 1 after each draw.
        fixed: values of the measure between all models and subjects in the rows and the subjects in the columns,
            (R + K, K).
    """
    kinds, count = KINDS[draw], len(subjects)
    with_ceiling = measure.averages is not None and count > 1
    images = drawn_images([models.shape[-1]], measure, repeats, seed) if "images" in kinds else None
    rng = np.random.default_rng([seed, count])
    times = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(repeats)])
    # Subjects beside models, because ceilings follow from the values among them.
    everyone = np.concatenate([models, subjects])
    in_draw = measure.over_draws(everyone, subjects) if images else lambda weights: fixed
    once, ready = np.ones((1, count)), measure.ready(subjects)
    result = Drawn(np.empty((len(kinds), repeats, len(models))), np.full((len(kinds), repeats, 2), np.nan))

    def compute(number: int) -> None:
        drawn = times[number : number + 1]
        weights = None if images is None else images(number, 0).weights
        values = fixed if weights is None else in_draw(weights)
        # Kind of draw -> how often subjects count, and whether images do as drawn.
        how = {"both": (drawn, True), "subjects": (drawn, False), "images": (once, True)}
        for place, kind in enumerate(kinds):
            counts, by_images = how[kind]
            result.means[place, number] = (values if by_images else fixed)[: len(models)] @ (counts[0] / count)
        if with_ceiling:
            for by_images in {how[kind][1] for kind in kinds}:
                taken = [place for place, kind in enumerate(kinds) if how[kind][1] == by_images]
                counts = np.concatenate([how[kinds[place]][0] for place in taken])
                among = (values if by_images else fixed)[len(models) :]
                ends = ceilings(ready, counts, measure, weights if by_images else None, among)
                result.ceilings[taken, number] = ends
            if count == 2:  # every draw of subjects with a lower end holds both, so it does not vary as it would
                result.ceilings[[kind != "images" for kind in kinds], number, 0] = np.nan
        on_repeat(1)

    # Threads of BLAS inside of ours would fight for the same cores.
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(compute, range(repeats)):
            pass
    return result


def corrected_variance(samples: np.ndarray, images: int, subjects: int) -> np.ndarray:
    """Estimate a variance over images, over subjects, or over both.

    Bootstrap variances are too small by `(n - 1) / n`. One of draws of images and subjects together counts their own
    noise, which cannot be told from their interaction, three times. The corrected estimate combines the variances
    `v` of three kinds of draws, as rsatoolbox does (Schütt et al. 2023):
    `K/(K-1) v_subjects + N/(N-1) v_images - K N / ((K-1) (N-1)) (v_both - v_subjects - v_images)`, at least as large as
    either of the first two terms, and at most `v_both`.

    Args:
        samples: values in draws, (kinds of draws, repeats, ...), of the kinds in `KINDS`; draws with NaN are left out.
        images: N, or 0 if images were not drawn.
        subjects: K, or 0 if subjects were not drawn.

    Returns:
        Shape (...).
    """
    defined = ~np.isnan(samples)
    number = defined.sum(axis=1)
    mean = np.where(defined, samples, 0.0).sum(axis=1) / np.maximum(number, 1)
    squares = np.where(defined, (samples - mean[:, None]) ** 2, 0.0).sum(axis=1)
    variances = np.where(number > 1, squares / np.maximum(number - 1, 1), np.nan)
    if len(variances) == 1:
        drawn = images or subjects
        return np.asarray(variances[0] * drawn / (drawn - 1))
    both, by_subjects, by_images = variances
    more = subjects / (subjects - 1), images / (images - 1)
    estimate = more[0] * by_subjects + more[1] * by_images - more[0] * more[1] * (both - by_subjects - by_images)
    return np.minimum(np.maximum(np.maximum(estimate, more[0] * by_subjects), more[1] * by_images), both)
