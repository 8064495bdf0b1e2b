"""Evaluation sets: queries, corpus and judgements, with or without a run to re-rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from st_m3se.scores.store import TeacherScores
from st_m3se.texts import Texts

__all__ = ["EvaluationSet", "Finding", "open_set", "qrels_set"]

Judgements = dict[str, dict[str, int]]


class Finding(NamedTuple):
    """Something unusual in a set, and what is done about it.

    Attributes:
        kind: What it is, such as "empty documents".
        count: How many.
        examples: The first three ids.
        effect: What was done, for the report.
    """

    kind: str
    count: int
    examples: tuple[str, ...]
    effect: str


@dataclass(frozen=True)
class EvaluationSet:
    """What systems are evaluated on.

    Attributes:
        name: For tables.
        split: "test", "dev", ...
        queries: Exactly the evaluated queries, in the order of ``query_ids``; None for a set of ids only. Ids are str.
        corpus: The documents; None for a set of ids only.
        qrels: The evaluated queries' judgements: query id to document id to grade; above 0 is relevant.
        candidates: The run to re-rank, of evaluated queries only, best first; or None.
        findings: What was unusual.
    """

    name: str
    split: str
    queries: Texts | None
    corpus: Texts | None
    qrels: Judgements
    candidates: TeacherScores | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def query_ids(self) -> tuple[str, ...]:
        """The evaluated queries in the order of the judgements."""
        return tuple(self.qrels)

    @property
    def form(self) -> Literal["retrieval", "re-ranking"]:
        """Whether the corpus is searched, or given candidates are put in order."""
        return "retrieval" if self.candidates is None else "re-ranking"

    @property
    def fingerprint(self) -> str:
        """A hash of queries, corpus, judgements and candidates: 32 hexadecimal digits, equal wherever they lie."""
        raise NotImplementedError


def open_set(
    source: str | Path,
    *,
    name: str | None = None,
    split: str = "test",
    run: str | Path | TeacherScores | None = None,
    qrels: str | Path | Mapping[str, Mapping[str, int]] | None = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
) -> EvaluationSet:
    """Open a BEIR folder, or a BEIR set by its name, which is downloaded once."""
    raise NotImplementedError


def qrels_set(
    qrels: str | Path | Mapping[str, Mapping[str, int]],
    *,
    name: str,
    split: str = "test",
    run: str | Path | TeacherScores | None = None,
    queries: Any = None,
    corpus: Any = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
) -> EvaluationSet:
    """A set from its parts: judgements, a run to re-rank, and where there are any, texts."""
    raise NotImplementedError
