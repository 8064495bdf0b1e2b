"""What a store holds, in figures, and what is wrong with a table of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from st_m3se.scores.shard import list_lengths
from st_m3se.scores.sigmoid import ScoreRange
from st_m3se.scores.store import ScoredLists

__all__ = ["Histogram", "ScoreSummary", "describe"]

BAR = 40


@dataclass
class Histogram:
    """Counts of values between edges; there is one edge more than counts."""

    edges: list[float]
    counts: list[int]
    mean: float
    std: float

    def __str__(self) -> str:
        most = max(self.counts, default=0) or 1
        return "\n".join(
            f"  {low:10.3f} .. {high:10.3f}  {count:>12,}  {'#' * round(BAR * count / most)}"
            for low, high, count in zip(self.edges, self.edges[1:], self.counts, strict=False)
        )


@dataclass
class ScoreSummary:
    """What :meth:`TeacherScores.describe` finds.

    Attributes:
        queries: Rows.
        scores: Scores in all.
        list_lengths: "min", "mean" and "max" documents per query.
        score_histogram: Of all scores; None for an empty store.
        margin_histogram: Of the margins: each positive's score minus each negative's where qrels are given, and else
            the highest score of a list minus each of the others. None where there is none.
        positives: Relevant pairs in the qrels of the store's queries.
        covered: How many of them have a score.
        warnings: What should be looked at before training.
    """

    queries: int = 0
    scores: int = 0
    list_lengths: dict[str, float] = field(default_factory=dict)
    score_histogram: Histogram | None = None
    margin_histogram: Histogram | None = None
    positives: int | None = None
    covered: int | None = None
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.queries:,} queries, {self.scores:,} scores"]
        if self.list_lengths:
            lines.append("documents per query: {min:g} to {max:g}, mean {mean:.1f}".format(**self.list_lengths))
        if self.positives is not None and self.covered is not None:
            share = f" ({self.covered / self.positives:.1%})" if self.positives else ""
            lines.append(f"positives with a score: {self.covered:,} of {self.positives:,}{share}")
        for name, histogram in (("scores", self.score_histogram), ("margins", self.margin_histogram)):
            if histogram is not None:
                lines += [f"{name}: mean {histogram.mean:.3f}, std {histogram.std:.3f}", str(histogram)]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


class _Tally:
    """Moments in a first pass, counts in a second."""

    def __init__(self) -> None:
        self.count, self.low, self.high, self.sum, self.squares = 0, np.inf, -np.inf, 0.0, 0.0
        self.edges = np.zeros(0)
        self.counts = np.zeros(0, dtype=np.int64)

    def measure(self, values: np.ndarray) -> None:
        if len(values):
            wide = values.astype(np.float64)
            self.count += len(wide)
            self.low, self.high = min(self.low, wide.min()), max(self.high, wide.max())
            self.sum += wide.sum()
            self.squares += np.square(wide).sum()

    def start(self, bins: int) -> None:
        if self.count:
            self.edges = np.histogram_bin_edges(np.array([self.low, self.high]), bins=bins)
            self.counts = np.zeros(bins, dtype=np.int64)

    def add(self, values: np.ndarray) -> None:
        if self.count and len(values):
            self.counts += np.histogram(values.astype(np.float64), bins=self.edges)[0]

    def histogram(self) -> Histogram | None:
        if not self.count:
            return None
        mean = self.sum / self.count
        deviation = float(np.sqrt(max(0.0, self.squares / self.count - mean**2)))
        return Histogram(self.edges.tolist(), self.counts.tolist(), float(mean), deviation)


def describe(
    store: ScoredLists,
    qrels: Mapping[Any, Mapping[Any, int]] | None = None,
    *,
    bins: int = 20,
    show_progress_bar: bool = False,
) -> ScoreSummary:
    """Read the store twice and summarise it; see :class:`ScoreSummary`.

    Args:
        store: The scores.
        qrels: Query id to document id to relevance, above 0 is relevant; ids of the store's types.
        bins: Bars of each histogram.
        show_progress_bar: Show one, on standard error.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    summary = ScoreSummary(positives=None if qrels is None else 0, covered=None if qrels is None else 0)
    scores, margins, lengths = _Tally(), _Tally(), _Tally()
    bar = tqdm(total=2 * len(store), desc="Describing", unit=" rows", disable=None if show_progress_bar else True)
    for table in store.tables():
        values, counts = _scores(table)
        bar.update(len(counts))
        summary.queries += len(counts)
        finite = values[np.isfinite(values)]
        scores.measure(finite)
        lengths.measure(counts)
        margins.measure(_margins(table, values, counts, qrels, summary))
    scores.start(bins)
    margins.start(bins)
    for table in store.tables():
        values, counts = _scores(table)
        bar.update(len(counts))
        scores.add(values[np.isfinite(values)])
        margins.add(_margins(table, values, counts, qrels, None))
    bar.close()
    summary.scores = int(lengths.sum)
    if lengths.count:
        summary.list_lengths = {"min": lengths.low, "mean": lengths.sum / lengths.count, "max": lengths.high}
    summary.score_histogram, summary.margin_histogram = scores.histogram(), margins.histogram()
    if (warning := ScoreRange(scores.low, scores.high).warning(store.manifest)) is not None:
        summary.warnings.append(warning)
    if summary.scores > scores.count:
        summary.warnings.append(f"{summary.scores - scores.count:,} scores are missing or not finite.")
    if summary.positives and not summary.covered:
        summary.warnings.append("no positive has a score: are the ids of the qrels strings and the store's integers?")
    return summary


def _scores(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    lists = table.column("scores").combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), list_lengths(lists)


def _margins(
    table: pa.Table,
    values: np.ndarray,
    counts: np.ndarray,
    qrels: Mapping[Any, Mapping[Any, int]] | None,
    summary: ScoreSummary | None,
) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(counts)])
    if qrels is None:
        kept = np.flatnonzero(counts > 1)
        if not len(kept):
            return np.zeros(0, dtype=np.float32)
        filled = np.where(np.isfinite(values), values, -np.inf)
        parts = []
        for row in kept:
            scores = filled[starts[row] : starts[row + 1]]
            best = int(scores.argmax())
            parts.append(np.delete(scores[best] - scores, best))
        margins = np.concatenate(parts)
        return np.asarray(margins[np.isfinite(margins)])
    parts = [np.zeros(0, dtype=np.float32)]
    queries = table.column("query_id").to_pylist()
    documents = table.column("document_ids").combine_chunks()
    for place, query_id in enumerate(queries):
        relevant = {document for document, grade in qrels.get(query_id, {}).items() if grade > 0}
        if not relevant:
            continue
        listed = documents[place].as_py() or []  # a row without a list has no document
        flags = np.fromiter((document in relevant for document in listed), dtype=bool)
        if summary is not None and summary.positives is not None and summary.covered is not None:
            summary.positives += len(relevant)
            summary.covered += int(flags.sum())
        scores = values[starts[place] : starts[place + 1]]
        if len(flags) == len(scores):
            margins = np.subtract.outer(scores[flags], scores[~flags]).ravel()
            parts.append(margins[np.isfinite(margins)])
    return np.concatenate(parts)
