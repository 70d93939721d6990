"""What a page shows of RSMs: images sorted by label, pairs whose rank changes most, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sorted_by_label(labels: Sequence[str], most: int) -> np.ndarray:
    """Indices of images sorted by label, at most `most` of them, evenly spread over that order."""
    order = np.array(sorted(range(len(labels)), key=lambda k: labels[k]))
    return order if len(order) <= most else order[np.linspace(0, len(order) - 1, most).round().astype(int)]


def rank_shares(rsm: np.ndarray) -> np.ndarray:
    """The rank of each pair of images as a share, from 0 for the least similar pair to 1 for the most similar one.

    Args:
        rsm: similarities (N, N), symmetric.

    Returns:
        Shape (N, N), symmetric; ties share their mean rank. The diagonal is NaN.
    """
    from scipy.stats import rankdata

    rows, columns = np.triu_indices(len(rsm), 1)
    ranks = rankdata(rsm[rows, columns]) - 1
    shares = np.full(rsm.shape, np.nan)
    shares[rows, columns] = shares[columns, rows] = ranks / max(1, len(ranks) - 1)
    return shares


def changed_pairs(difference: np.ndarray, count: int) -> list[tuple[int, int]]:
    """The pairs with the largest positive difference, in which no image occurs twice.

    Args:
        difference: differences of ranks (N, N), symmetric.
        count: number of pairs, at most.

    Returns:
        Pairs (a, b) with a < b, the largest difference first.
    """
    rows, columns = np.triu_indices(len(difference), 1)
    values = difference[rows, columns]
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for k in np.argsort(-values, kind="stable"):
        a, b = int(rows[k]), int(columns[k])
        if len(pairs) == count or not values[k] > 0:
            break
        if not used & {a, b}:
            pairs.append((a, b))
            used |= {a, b}
    return pairs


def neighbours(rsm: np.ndarray, query: int, count: int) -> list[int]:
    """The images that are most similar to one image, without itself, most similar first."""
    order = np.argsort(-rsm[query], kind="stable")
    return [int(image) for image in order if image != query][:count]


def query_images(labels: Sequence[str], count: int) -> list[int]:
    """Images whose neighbours are shown: of different labels, evenly spread over these, as far as there are."""
    first = {label: k for k, label in reversed(list(enumerate(labels)))}
    candidates = [first[label] for label in sorted(first)]
    if len(candidates) < count:
        candidates += [k for k in range(len(labels)) if k not in candidates]
    numbers = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
    return [candidates[k] for k in numbers]
