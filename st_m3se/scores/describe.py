"""What a store holds, in figures, and what is wrong with a table of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from st_m3se.core.ragged import list_values, offsets, owners
from st_m3se.scores.store import ScoredLists

__all__ = ["Histogram", "ScoreRange", "ScoreSummary", "describe"]

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
            f"  {low:10.4g} .. {high:10.4g}  {count:>12,}  {'#' * round(BAR * count / most)}"
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


class ScoreRange:
    """The lowest and highest of scores as they pass, which begin with ``low`` and ``high``.

    They show a sigmoid's outputs: the commonest mistake with teacher scores, since the host gives them.
    """

    def __init__(self, low: float = np.inf, high: float = -np.inf) -> None:
        self.low, self.high = low, high

    def add(self, scores: np.ndarray) -> None:
        """Take in scores; what is not finite is left out."""
        finite = scores[np.isfinite(scores)]
        if len(finite):
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def warning(self, manifest: Mapping[str, Any]) -> str | None:
        """What to say where all scores lie in [0, 1] and the manifest does not say why; None where all is well.

        Fused ranks, calibrated ensembles and cosines lie there by nature, and raw scores of a weak model by chance.
        """
        source = manifest.get("source")
        by_nature = (
            manifest.get("scale") == "margin"
            or (isinstance(source, Mapping) and "merged_by" in source)
            or any(name in str(manifest.get("activation")) for name in ("similarity", "identity"))
        )
        if by_nature or not 0.0 <= self.low < self.high <= 1.0:
            return None
        return (
            "all scores lie in [0, 1], as a sigmoid's outputs do, which CrossEncoder.predict and mine_hard_negatives "
            "give: it squeezes the margins between good documents away. Score with activation_fn=torch.nn.Identity(), "
            "as st-m3se score does, or make logits of them: st-m3se combine STORE OUT --calibration logit. (If they "
            "are cosines, give the manifest the activation 'cosine similarity'.)"
        )


class _Tally:
    """Moments in a first pass, counts in a second."""

    def __init__(self) -> None:
        self.count, self.low, self.high, self.sum, self.squares = 0, np.inf, -np.inf, 0.0, 0.0
        self.edges, self.counts = np.zeros(0), np.zeros(0, dtype=np.int64)

    def measure(self, values: np.ndarray) -> None:
        if len(values):
            wide = values.astype(np.float64)
            self.count += len(wide)
            self.low, self.high = min(self.low, wide.min()), max(self.high, wide.max())
            self.sum, self.squares = self.sum + wide.sum(), self.squares + np.square(wide).sum()

    def add(self, values: np.ndarray, bins: int) -> None:
        if len(values):
            counts, self.edges = np.histogram(values.astype(np.float64), bins, (self.low, self.high))
            self.counts = counts + self.counts if len(self.counts) else counts

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
    scores, margins, lengths, positives, covered = _Tally(), _Tally(), _Tally(), 0, 0
    with tqdm(
        total=2 * len(store), desc="Describing", unit=" rows", disable=None if show_progress_bar else True
    ) as bar:
        for table in store.tables():
            values, counts = list_values(table, "scores")
            scores.measure(values[np.isfinite(values)])
            lengths.measure(counts)
            found = _margins(table, qrels)
            margins.measure(found[0])
            positives, covered = positives + found[1], covered + found[2]
            bar.update(len(table))
        for table in store.tables():
            values, _ = list_values(table, "scores")
            scores.add(values[np.isfinite(values)], bins)
            margins.add(_margins(table, qrels)[0], bins)
            bar.update(len(table))
    summary = ScoreSummary(lengths.count, int(lengths.sum), {}, scores.histogram(), margins.histogram())
    if lengths.count:
        summary.list_lengths = {"min": lengths.low, "mean": lengths.sum / lengths.count, "max": lengths.high}
    if (warning := ScoreRange(scores.low, scores.high).warning(store.manifest)) is not None:
        summary.warnings.append(warning)
    if summary.scores > scores.count:
        summary.warnings.append(f"{summary.scores - scores.count:,} scores are missing or not finite.")
    if qrels is not None:
        summary.positives, summary.covered = positives, covered
        if positives and not covered:
            summary.warnings.append(
                "no positive has a score: are the ids of the qrels strings and the store's integers?"
            )
    return summary


def _margins(table: pa.Table, qrels: Mapping[Any, Mapping[Any, int]] | None) -> tuple[np.ndarray, int, int]:
    """The margins, see :class:`ScoreSummary`, and how many documents are relevant, and have a score."""
    values, counts = list_values(table, "scores")
    if qrels is None:
        counts = counts[counts > 0]
        if not len(counts):
            return values[:0], 0, 0
        filled, owner = np.where(np.isfinite(values), values, -np.inf), owners(counts)
        best = np.maximum.reduceat(filled, offsets(counts)[:-1])[owner]
        highest = np.flatnonzero(filled == best)
        first = highest[np.unique(owner[highest], return_index=True)[1]]
        with np.errstate(invalid="ignore"):  # of a list without a finite score
            margins = np.delete(best - filled, first)
        return margins[np.isfinite(margins)], 0, 0
    parts, relevant_count, covered = [values[:0]], 0, 0
    queries, documents = table.column("query_id").to_pylist(), table.column("document_ids").to_pylist()
    for query_id, listed, (start, stop) in zip(queries, documents, pairwise(offsets(counts).tolist()), strict=True):
        scores = values[start:stop]
        relevant = {document for document, grade in qrels.get(query_id, {}).items() if grade > 0}
        flags = np.array([document in relevant for document in listed or []], dtype=bool)  # a row may lack its list
        relevant_count, covered = relevant_count + len(relevant), covered + int(flags.sum())
        if len(flags) == len(scores):
            margins = np.subtract.outer(scores[flags], scores[~flags]).ravel()
            parts.append(margins[np.isfinite(margins)])
    return np.concatenate(parts), relevant_count, covered
