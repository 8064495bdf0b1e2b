"""Whether a difference between two systems is more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Comparison", "compare", "confidence_interval"]


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same queries, by one measure.

    Attributes:
        measure: The measure's name.
        first: The baseline, or the one that comes first.
        second: The other.
        difference: Mean of ``second`` minus mean of ``first``: above 0 the second is better.
        interval: Bootstrap confidence interval of ``difference``.
        randomisation_p: Two-sided p of the paired randomisation test.
        t_p: Two-sided p of the paired t-test.
        holm_p: ``randomisation_p`` after Holm's correction over all comparisons made together.
        significant: Whether ``holm_p <= alpha``.
    """

    measure: str
    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    randomisation_p: float
    t_p: float
    holm_p: float
    significant: bool


def confidence_interval(
    values: np.ndarray, *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean over queries."""
    raise NotImplementedError


def compare(
    values: Mapping[str, np.ndarray],
    measure: str,
    *,
    baseline: str | None = None,
    alpha: float = 0.05,
    n_resamples: int = 9999,
    seed: int = 0,
) -> list[Comparison]:
    """Compare systems pairwise on the same queries: all pairs, or with a ``baseline`` each of the others to it.

    Args:
        values: System name to float64 ``[queries]``, the same queries in the same order.
        measure: For the result.
        baseline: A system's name, or None for all pairs in their order.
        alpha: The family-wise error rate; the intervals have the level ``1 - alpha``.
        n_resamples: Of the randomisation test and the bootstrap.
        seed: Of both.
    """
    raise NotImplementedError
