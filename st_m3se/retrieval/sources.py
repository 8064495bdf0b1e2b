"""What every source of candidates is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short
from st_m3se.data.qrels import is_own_document
from st_m3se.data.texts import Texts

__all__ = ["Found", "Job", "Pairs", "rows_of"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query's row and a document's row, in the order of the queries."""

    queries: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def range(self, query: int) -> slice:
        """The pairs of one query."""
        return slice(*np.searchsorted(self.queries, [query, query + 1]).tolist())

    def with_pairs(self, others: Pairs) -> Pairs:
        """Both, without repetition."""
        both = np.stack(
            [np.concatenate([self.queries, others.queries]), np.concatenate([self.documents, others.documents])]
        )
        return Pairs(*np.unique(both, axis=1))

    @classmethod
    def of(cls, lists: Mapping[Any, Collection[Id]], queries: Texts, corpus: Texts, name: str) -> Pairs:
        """The pairs whose query is among the queries and whose document is in the corpus: others do no harm."""
        known = [query for query in lists if query in queries]
        if lists and not known:
            first = next(iter(lists))
            raise FormatError(
                f"none of the {len(lists)} queries of {name}, first {short(first)} ({type(first).__name__}), is among "
                f"{queries!r}: they would have no effect."
            )
        ids = [document for query in known for document in lists[query]]
        documents = corpus.find(ids)
        if len(ids) and (documents < 0).all():
            rows_of(ids, corpus, name)
        rows = np.repeat(queries.rows(known), [len(lists[query]) for query in known])
        return cls(*np.unique(np.stack([rows, documents])[:, documents >= 0], axis=1))

    @classmethod
    def of_same_ids(cls, queries: Texts, corpus: Texts, judged: Mapping[Any, Container[Any]]) -> Pairs:
        """Each query and the document that has its id, where there is one and it is not judged for the query."""
        pairs = [
            (row, value)
            for row, value in enumerate(queries)
            if value in corpus and is_own_document(value, value, judged.get(value, ()))
        ]
        return cls(np.array([row for row, _ in pairs], dtype=np.int64), corpus.rows([value for _, value in pairs]))


@dataclass(frozen=True)
class Job:
    """The search that is to be done.

    Args:
        queries: What is searched for.
        corpus: Where.
        depth: Documents per query, at most.
        excluded: Documents that are not for a query.
        everywhere: [documents], True where one is excluded for all queries.
        wanted: Pairs whose scores are asked for whether they are among the best or not.
        batch_size: Texts that a model encodes at once.
        chunk_size: Documents whose embeddings are held at a time.
        show_progress_bar: Show progress.
    """

    queries: Texts
    corpus: Texts
    depth: int
    excluded: Pairs
    everywhere: np.ndarray
    wanted: Pairs
    batch_size: int
    chunk_size: int
    show_progress_bar: bool


@dataclass(frozen=True)
class Found:
    """The answer: per query the best documents, best first, equal ones in the order of the corpus.

    Args:
        rows: [queries, depth] int32, the documents' rows; -1 where there are no more.
        scores: [queries, depth] float32.
        wanted: [pairs] float32, the score of each wanted pair.
    """

    rows: np.ndarray
    scores: np.ndarray
    wanted: np.ndarray

    @classmethod
    def nothing(cls, job: Job) -> Found:
        """An answer to be filled in."""
        shape = len(job.queries), job.depth
        return cls(np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(len(job.wanted), np.float32))


def rows_of(ids: Collection[Id], corpus: Texts, name: str) -> np.ndarray:
    """The documents' rows; of those that are missing the error says who named them."""
    try:
        return corpus.rows(list(ids))
    except FormatError as error:
        raise FormatError(f"{name}: {error.message}") from None
