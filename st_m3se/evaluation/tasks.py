"""What a system is asked when it ranks the documents of a set, and where its answer goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from st_m3se.core.findings import Finding
from st_m3se.core.scored_list import ScoredList
from st_m3se.data.texts import Texts
from st_m3se.evaluation.data import EvaluationSet
from st_m3se.retrieval.scoring import score_candidates
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["Ranker", "Task", "best_first", "ids_of", "score_pairs"]


@dataclass
class Task:
    """One system on one set.

    Attributes:
        evaluation_set: The set.
        folder: The system's folder for this set; the ranking goes to ``folder / "run"``.
        depth: Documents per query, at most, where the corpus is searched.
        exclude_same_id: Whether the document with the query's own id is no result, unless it is judged for the query.
        batch_size: Texts that an encoder encodes at once.
        cache_dir: Where embeddings of a corpus are kept.
        show_progress_bar: Show progress.
        first: The first stage's ranking, for a re-ranker.
        seconds: What took how long, filled in by the ranker; without a step that an earlier process did in part.
        findings: What was unusual, filled in by the ranker.
    """

    evaluation_set: EvaluationSet
    folder: Path
    depth: int
    exclude_same_id: bool
    batch_size: int
    cache_dir: Path
    show_progress_bar: bool
    first: TeacherScores | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The store to write."""
        return self.folder / "run"

    @property
    def texts(self) -> tuple[Texts, Texts]:
        """Queries and corpus.

        Raises:
            ValueError: If it is a set of ids only.
        """
        queries, corpus = self.evaluation_set.queries, self.evaluation_set.corpus
        if queries is None or corpus is None:
            raise ValueError(f"the set {self.evaluation_set.name} has ids only, and this system needs texts.")
        return queries, corpus

    @property
    def search_settings(self) -> dict[str, Any]:
        """What a search depends on; nothing where the candidates are given."""
        if self.evaluation_set.candidates is not None:
            return {}
        return {"depth": self.depth, "exclude_same_id": self.exclude_same_id}

    def write(self, rows: Iterable[ScoredList], description: dict[str, Any]) -> None:
        """Write the ranking."""
        TeacherScores.from_rows(rows, self.output, manifest={"source": description}, overwrite=True)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the seconds of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


class Ranker(Protocol):
    """A system that is loaded.

    Attributes:
        kind: "bm25", "bi-encoder", "sparse encoder", "multi-vector encoder", "re-ranker" or "run".
        description: All that its rankings depend on, as JSON holds it.
    """

    kind: str
    description: dict[str, Any]

    def inputs(self, task: Task) -> dict[str, Any]:
        """What else the ranking of this set depends on, besides the description and the set."""

    def rank(self, task: Task) -> None:
        """Write the ranking of the set's queries to ``task.output``."""


def score_pairs(model: Any, task: Task, candidates: TeacherScores, step: str, **options: Any) -> TeacherScores:
    """Score candidates, going on where an earlier process ended; see :func:`~st_m3se.score_candidates`."""
    queries, corpus = task.texts
    folder = task.folder / "scores"
    begun = folder.exists()
    with task.timed(step):
        scored: TeacherScores = score_candidates(
            model, candidates, queries, corpus, folder, show_progress_bar=task.show_progress_bar, **options
        )
    if begun:
        del task.seconds[step]
    return scored


def best_first(row: ScoredList) -> ScoredList:
    """A list by falling score, equal scores in their order."""
    order = np.argsort(-np.asarray(row.scores, dtype=np.float32), kind="stable").tolist()
    return row._replace(
        document_ids=[row.document_ids[place] for place in order], scores=[row.scores[place] for place in order]
    )


def ids_of(corpus: Texts) -> pa.Array:
    """The ids of a corpus in one piece, however long they are together."""
    ids = corpus.ids
    return (ids.cast(pa.large_string()) if pa.types.is_string(ids.type) else ids).combine_chunks()
