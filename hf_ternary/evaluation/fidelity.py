"""Fidelity: agreement of two models' embeddings of the same texts, without labels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 10
MAX_TEXTS = 5000  # neighbour overlap compares every text with every other


def fidelity(student: NDArray[Any], teacher: NDArray[Any], seed: int = 42) -> dict[str, float | int | None]:
    """Mean cosine between two models' embeddings, and how many of a text's ten nearest neighbours they share.

    Neighbours are by cosine, the text itself left out, among the same texts (a seeded draw of 5,000 where there are more:
    overlap depends on how many there are).

    Args:
        student: float [texts, dimensions], one row a distinct text.
        teacher: float [texts, dimensions of the teacher], rows in the same order.
        seed: of the draw.

    Returns:
        `texts`, `cosine` (None where the dimensions differ), `overlap_at_10` (None for ten texts or fewer).

    Raises:
        ValueError: the numbers of rows differ.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student rows and {len(teacher)} teacher rows; both must embed the same texts")
    same_width = student.shape[1] == teacher.shape[1]
    return {
        "texts": len(student),
        "cosine": float(np.mean(1 - paired_cosine_distances(student, teacher))) if same_width else None,
        "overlap_at_10": _overlap(student, teacher, seed) if len(student) > NEIGHBOURS else None,
    }


def _overlap(student: NDArray[Any], teacher: NDArray[Any], seed: int) -> float:
    if len(student) > MAX_TEXTS:
        drawn = np.random.default_rng(seed).choice(len(student), MAX_TEXTS, replace=False)
        student, teacher = student[drawn], teacher[drawn]
    pairs = zip(_neighbours(student), _neighbours(teacher), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in pairs])) / NEIGHBOURS


def _neighbours(embeddings: NDArray[Any]) -> NDArray[np.int64]:
    # kneighbors() without a query leaves each point itself out.
    index = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(embeddings)
    return index.kneighbors(return_distance=False)
