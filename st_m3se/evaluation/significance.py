"""Whether a difference between two systems is more than chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from st_m3se.core.extras import require

__all__ = ["Comparison", "compare", "confidence_intervals", "resamples"]

BLOCK_NUMBERS = 1 << 21  # drawn at once: 16 MiB of float64


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


def confidence_intervals(
    values: Mapping[str, np.ndarray], *, level: float = 0.95, n_resamples: int = 9999, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap confidence intervals of the means over queries: percentiles of the means of resampled queries.

    The systems share the draws, which take most of the time; each interval is the one that the system would get alone.

    Args:
        values: System name to float64 ``[queries]``, of one measure; the same queries in the same order.
        level: How often such an interval holds the true mean.
        n_resamples: Samples, of as many queries, drawn with replacement.
        seed: Of the draws.

    Raises:
        ValueError: If there is no value, one is not finite, or an option is out of its range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
    columns = _checked(values)
    return dict(zip(values, _intervals(np.stack(columns, axis=1), level, n_resamples, seed), strict=True))


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

    The paired randomisation test asks how often the mean difference would be at least as large if, query by query,
    chance decided which of the two systems got which value (Smucker, Allan and Carterette, CIKM 2007). With few queries
    all
    ``2 ** queries`` ways are counted, else ``n_resamples`` are drawn, with one added to both counts. Holm's correction
    is over the pairs of this one call; correct by hand where conclusions are drawn over several measures or sets.

    scipy's ``permutation_test`` and ``bootstrap`` draw anew for every pair, which takes minutes for ten systems and
    7,000 queries; here all pairs share the draws.

    Args:
        values: System name to float64 ``[queries]``, the same queries in the same order; of several seeds their mean.
        measure: For the result.
        baseline: A system's name, or None for all pairs in their order.
        alpha: The chance of one or more false findings in the whole family; intervals have the level ``1 - alpha``
            each, uncorrected.
        n_resamples: Of the randomisation test and of the bootstrap.
        seed: Of both.

    Raises:
        ValueError: If the systems have different numbers of queries, or none, or a value is not finite, or there is no
            such baseline.
    """
    if baseline is not None and baseline not in values:
        raise ValueError(f"there is no system {baseline!r}; there are {', '.join(values)}.")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}.")
    _check_resamples(n_resamples)
    columns = dict(zip(values, _checked(values), strict=True))
    if baseline is None:
        pairs = list(combinations(columns, 2))
    else:
        pairs = [(baseline, other) for other in columns if other != baseline]
    if not pairs:
        return []
    differences = np.stack([columns[second] - columns[first] for first, second in pairs], axis=1)
    randomised = _randomisation(differences, n_resamples, seed)
    intervals = _intervals(differences, 1 - alpha, n_resamples, seed)
    corrected = _holm(randomised)
    return [
        Comparison(
            measure=measure,
            first=first,
            second=second,
            difference=float(columns[second].mean() - columns[first].mean()),
            interval=intervals[place],
            randomisation_p=float(randomised[place]),
            t_p=_t_test(differences[:, place]),
            holm_p=float(corrected[place]),
            significant=bool(corrected[place] <= alpha),
        )
        for place, (first, second) in enumerate(pairs)
    ]


def _checked(values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    columns = [np.asarray(column, dtype=np.float64) for column in values.values()]
    for name, column in zip(values, columns, strict=True):
        if column.ndim != 1 or not len(column):
            raise ValueError(f"{name} must have one value for each query, got an array of shape {column.shape}.")
        if not np.isfinite(column).all():
            place = int(np.isfinite(column).argmin())
            raise ValueError(f"{name} has a value that is not finite, first at place {place}.")
    if len(lengths := {len(column) for column in columns}) > 1:
        raise ValueError(
            f"the systems have {sorted(lengths)} queries: they are compared on the same ones, with 0 where a system "
            "found nothing."
        )
    return columns


def resamples(queries: int, n_resamples: int, seed: int, size: int = 0) -> Iterator[np.ndarray]:
    """The draws of every bootstrap here: how often each query is drawn, with replacement.

    Args:
        queries: How many there are, and how many each sample draws.
        n_resamples: Samples in all.
        seed: The same one gives the same samples, in whatever blocks they come.
        size: Numbers that the caller needs for each sample, if more than ``queries``: blocks are so small that these
            fit in memory.

    Yields:
        float64 ``[samples, queries]``, a block at a time.
    """
    _check_resamples(n_resamples)
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK_NUMBERS // max(queries, size))
    for start in range(0, n_resamples, step):
        rows = min(step, n_resamples - start)
        drawn = rng.integers(0, queries, size=(rows, queries)) + np.arange(rows)[:, None] * queries
        yield np.bincount(drawn.ravel(), minlength=rows * queries).reshape(rows, queries).astype(np.float64)


def _check_resamples(n_resamples: int) -> None:
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")


def _randomisation(differences: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Two-sided p for each column of ``[queries, pairs]``."""
    queries, pairs = differences.shape
    exact = queries < 60 and 1 << queries <= n_resamples
    total = 1 << queries if exact else n_resamples
    # Sums that are equal in exact arithmetic differ in their last digits, by the order of the additions.
    least = np.abs(differences.sum(axis=0)) - 1e-12 * np.abs(differences).sum(axis=0)
    rng = np.random.default_rng(seed)
    extreme = np.zeros(pairs, dtype=np.int64)
    step = max(1, BLOCK_NUMBERS // queries)
    for start in range(0, total, step):
        rows = min(step, total - start)
        flips: np.ndarray
        if exact:
            flips = (np.arange(start, start + rows)[:, None] >> np.arange(queries)) & 1
        else:
            packed = rng.integers(0, 256, size=(rows, -(-queries // 8)), dtype=np.uint8)
            flips = np.unpackbits(packed, axis=1, count=queries)
        signs = 1.0 - 2.0 * flips
        extreme += (np.abs(signs @ differences) >= least).sum(axis=0)
    p: np.ndarray = extreme / total if exact else (extreme + 1) / (total + 1)
    return p


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction: the smallest of m times m, the next times m - 1, and so on, never falling."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def _intervals(columns: np.ndarray, level: float, n_resamples: int, seed: int) -> list[tuple[float, float]]:
    """Percentile intervals of the mean of each column of ``[queries, series]``."""
    # Around the first query's value: the mean of equal values is then exactly that value.
    shift = columns[0]
    centred = columns - shift
    means = [times @ centred / len(columns) for times in resamples(len(columns), n_resamples, seed)]
    ends = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0) + shift
    return [(float(low), float(high)) for low, high in ends.T]


def _t_test(differences: np.ndarray) -> float:
    """Two-sided p of the paired t-test; what scipy leaves undefined is 1 without a difference, 0 with an equal one."""
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():
        return 0.0 if len(differences) > 1 and differences[0] != 0 else 1.0
    return float(require("scipy.stats", "eval").ttest_1samp(differences, 0.0).pvalue)
