"""How much of a teacher's lead a student has closed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from st_m3se.core.shape import check_shape
from st_m3se.diagnostics.lists import JudgedLists
from st_m3se.diagnostics.separation import Estimate
from st_m3se.evaluation.measures import per_query
from st_m3se.evaluation.significance import resamples
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["ClosedShare", "closed_share", "share_of_gap"]

SHAPE = {"measure": str, "names": [str], "share": (float, None)}
SHAPE |= {key: [float] for key in ("before", "after", "teacher", "gap")}


def percent(share: float) -> str:
    """A share in per cent, without a minus in front of 0."""
    return f"{round(share, 2) + 0.0:.0%}"


@dataclass(frozen=True)
class ClosedShare:
    """How far a student has come from where it was to where its teacher is.

    Attributes:
        measure: In what.
        names: The scorers: (student before, student after, teacher).
        before: The mean over the queries, with its interval; ``after`` and ``teacher`` likewise.
        gap: ``teacher - before``, the lead that there was to close.
        share: ``(after - before) / (teacher - before)``; None where the teacher was not ahead.
        interval: Of the share; None where the interval of the gap reaches down to 0, since a share of nothing has none.
    """

    measure: str
    names: tuple[str, str, str]
    before: Estimate
    after: Estimate
    teacher: Estimate
    gap: Estimate
    share: float | None
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        means = (estimate.value for estimate in (self.before, self.after, self.teacher))
        start, end, lead = (f"{round(mean, 3) + 0.0:.3f}" for mean in means)
        values = f"{self.measure} {start} -> {end}, teacher {lead}"
        if self.share is None:
            return f"{values}: the teacher is not ahead of the student's start, so there is no gap to close"
        if self.interval is None:
            return f"{values}: {percent(self.share)} of a lead ({self.gap}) that cannot be told from chance"
        low, high = self.interval
        return f"{values}: {percent(self.share)} of the teacher's lead closed [{percent(low)}, {percent(high)}]"

    @classmethod
    def of(cls, content: dict[str, Any]) -> ClosedShare:
        """From its JSON."""
        check_shape(content, SHAPE, "gap")
        estimates = {name: Estimate(*content[name]) for name in ("before", "after", "teacher", "gap")}
        before, after, teacher = content["names"]
        low, high = map(float, content["interval"] or (0, 0))
        return cls(
            measure=content["measure"],
            names=(before, after, teacher),
            share=content["share"],
            interval=None if content["interval"] is None else (low, high),
            **estimates,
        )


def closed_share(
    lists: JudgedLists,
    stores: Mapping[str, TeacherScores],
    names: tuple[str, str, str],
    *,
    measure: str = "RR@10",
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ClosedShare:
    """The closed share of the teacher's lead, re-ranking the lists.

    Args:
        lists: The lists and their positives.
        stores: Scores by name.
        names: Of the stores of the student before, the student after, and the teacher.
        measure: Any name of ir_measures: "RR@10", "nDCG@10", "AP" ...
        n_resamples: Bootstrap draws of queries.
        confidence: What share of the draws an interval holds.
        seed: For the draws.

    Raises:
        ImportError: Without ir_measures (extra ``eval``).
    """
    qrels = {str(query): {str(d): grade for d, grade in judged.items()} for query, judged in lists.qrels().items()}
    queries = [str(query) for query in lists.query_ids]
    values = [
        per_query(stores[name], qrels, [measure], query_ids=queries, exclude_same_id=False)[measure] for name in names
    ]
    return share_of_gap(np.stack(values), measure, names, n_resamples=n_resamples, confidence=confidence, seed=seed)


def share_of_gap(
    values: np.ndarray,
    measure: str,
    names: tuple[str, str, str],
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ClosedShare:
    """The closed share of values per query: float ``[3, Q]``, of the student before and after, and of the teacher.

    Intervals hold a share of ``confidence`` of ``n_resamples`` bootstrap draws of queries.
    """
    queries = values.shape[1]
    drawn = np.concatenate([counts @ values.T / queries for counts in resamples(queries, n_resamples, seed)])
    tails = (1 - confidence) / 2, (1 + confidence) / 2

    def estimate(value: float, draws: np.ndarray) -> Estimate:
        low, high = np.quantile(draws, tails)
        return Estimate(value, float(low), float(high))

    means = values.mean(axis=1).tolist()
    before, after, teacher = (estimate(mean, drawn[:, place]) for place, mean in enumerate(means))
    gaps = drawn[:, 2] - drawn[:, 0]
    gap = estimate(teacher.value - before.value, gaps)
    interval = None
    if gap.low > 0:
        shares = (drawn[:, 1] - drawn[:, 0])[gaps > 0] / gaps[gaps > 0]
        low, high = np.quantile(shares, tails)
        interval = float(low), float(high)
    share = (after.value - before.value) / gap.value if gap.value > 0 else None
    return ClosedShare(measure, names, before, after, teacher, gap, share, interval)
