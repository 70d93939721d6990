"""A shortlist of candidates by pooled vectors, from a FAISS index."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from rsm_probe.errors import ComparisonError


def pooled_candidates(
    queries: Tensor, images: Tensor, count: int, own: tuple[np.ndarray, np.ndarray] | None, centred: bool
) -> list[np.ndarray]:
    """The images whose means over locations are most similar to each query's, by cosine similarity.

    Args:
        queries: means over locations (N, C).
        images: those of the database (M, C).
        count: candidates per query; fewer where the database is smaller.
        own: groups of queries and images; images of the query's own group are left out.
        centred: subtract the mean of the database.

    Returns:
        The numbers of the candidates of each query.

    Raises:
        ComparisonError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ComparisonError("FAISS is not installed; pip install 'rsm-probe[faiss]'") from error
    mean = images.mean(dim=0) if centred else 0.0
    sides = []
    for pooled in (queries, images):
        rows = (pooled - mean).cpu().numpy()
        sides.append((rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)).astype(np.float32))
    index = faiss.IndexFlatIP(sides[1].shape[1])
    index.add(sides[1])
    # Search also returns images of a query's own group; ask for enough that their removal leaves `count`.
    most = 0 if own is None else int(np.bincount(own[1]).max())
    numbers = index.search(sides[0], min(count + most, len(images)))[1]
    if own is None:
        return list(numbers)
    return [row[own[1][row] != group][:count] for row, group in zip(numbers, own[0], strict=True)]
