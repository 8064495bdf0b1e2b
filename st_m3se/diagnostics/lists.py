"""The lists over which scorers are compared: the same documents of the same queries for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short
from st_m3se.data.qrels import is_own_document
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["JudgedLists"]


@dataclass(frozen=True, eq=False)
class JudgedLists:
    """Candidate lists with their positives and negatives, one behind the other.

    A positive is a document that is judged relevant; all others of a list are negatives, judged or not, as they are in
    training. Every list has at least one of each. Make them with :meth:`of`.

    Attributes:
        query_ids: The queries, ``[Q]``.
        document_ids: The documents of all lists, ``[N]``.
        positives: bool ``[N]``.
        lengths: int ``[Q]``, documents per list; they sum to N.
        left_out: What was left out and how many, for the report.
    """

    query_ids: tuple[Id, ...]
    document_ids: tuple[Id, ...]
    positives: np.ndarray
    lengths: np.ndarray
    left_out: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        candidates: TeacherScores | Mapping[Any, Sequence[Any]],
        qrels: Mapping[Any, Mapping[Any, int]],
        *,
        scored_by: Mapping[str, TeacherScores] | None = None,
        min_relevance: int = 1,
        exclude_same_id: bool = True,
        max_queries: int | None = None,
        seed: int = 0,
    ) -> JudgedLists:
        """Join candidates and judgements.

        Args:
            candidates: A store, whose scores are ignored; or query id to document ids.
            qrels: Query id to document id to relevance.
            scored_by: Stores of scores that are there already, by name. A document that one of them has not scored is
                left out for every scorer.
            min_relevance: The relevance from which a document is a positive. TREC's deep learning tracks mean 2.
            exclude_same_id: Leave out the document that has the query's own id, unless it is judged for the
                query: where queries are documents as well, it would be a negative that every scorer puts first.
            max_queries: Take so many queries, drawn at random; None takes all.
            seed: For that draw.

        Raises:
            FormatError: If the ids of two inputs are of different types, or no list is left.
        """
        if max_queries is not None and max_queries < 1:
            raise ValueError(f"max_queries must be at least 1, got {max_queries}.")
        if min_relevance < 1:
            raise ValueError(f"min_relevance must be at least 1, got {min_relevance}.")
        stores = dict(scored_by or {})
        _check_types(candidates, qrels, stores)
        rows: Iterable[tuple[Id, Sequence[Id]]] = (
            ((row.query_id, row.document_ids) for row in candidates)
            if isinstance(candidates, TeacherScores)
            else candidates.items()
        )
        left_out: Counter[str] = Counter()
        kept: list[tuple[Id, list[Id], list[bool]]] = []
        for query, listed in rows:
            judged = qrels.get(query, {})
            relevant = {document for document, grade in judged.items() if grade >= min_relevance}
            if not relevant:
                left_out["queries without a relevant document in the judgements"] += 1
                continue
            documents = [d for d in listed if not (exclude_same_id and is_own_document(query, d, judged))]
            left_out["documents with the id of their query"] += len(listed) - len(documents)
            for name, store in stores.items():
                known = set(store[query].document_ids) if query in store else set()
                missing = sum(d not in known for d in documents)
                what = f"documents that {name} has not scored"
                if query not in store:
                    what, missing = f"queries that {name} has not scored", 1
                left_out[what] += missing
                documents = [d for d in documents if d in known]
            flags = [document in relevant for document in documents]
            if any(flags) and not all(flags):
                kept.append((query, documents, flags))
            else:
                which = "another" if any(flags) else "a relevant"
                left_out[f"queries without {which} document in their list"] += 1
        if not kept:
            found = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
            raise FormatError(
                "no list has both a relevant and another document, so there is nothing to compare"
                f"{f' ({found})' if found else ''}. Are the ids of candidates and judgements the same ones, and are "
                "the relevant documents among the candidates (st-m3se candidates --include-positives)?"
            )
        if max_queries is not None and len(kept) > max_queries:
            chosen = np.random.default_rng(seed).choice(len(kept), max_queries, replace=False)
            left_out["queries not drawn"] = len(kept) - max_queries
            kept = [kept[place] for place in sorted(chosen.tolist())]
        return cls(
            tuple(query for query, _, _ in kept),
            tuple(document for _, documents, _ in kept for document in documents),
            np.array([flag for _, _, flags in kept for flag in flags], dtype=bool),
            np.array([len(documents) for _, documents, _ in kept], dtype=np.int64),
            {what: count for what, count in left_out.items() if count},
        )

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def owner(self) -> np.ndarray:
        """Which list each document belongs to: int ``[N]``."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def split(self, values: Sequence[Any]) -> Iterator[tuple[Id, Sequence[Any]]]:
        """Each query, and its part of what there is one of for each document."""
        ends = np.cumsum(self.lengths).tolist()
        for query, end, length in zip(self.query_ids, ends, self.lengths.tolist(), strict=True):
            yield query, values[end - length : end]

    def by_query(self) -> dict[Id, list[Id]]:
        """Query id to document ids, as scorers take them."""
        return {query: list(documents) for query, documents in self.split(self.document_ids)}

    def qrels(self) -> dict[Id, dict[Id, int]]:
        """The positives of these lists, as judgements."""
        pairs = list(zip(self.document_ids, self.positives.tolist(), strict=True))
        return {query: {document: 1 for document, flag in own if flag} for query, own in self.split(pairs)}

    def scores(self, store: TeacherScores) -> np.ndarray:
        """A store's scores of these documents, in their order: float64 ``[N]``.

        Raises:
            FormatError: If one is missing or not finite.
        """
        values: list[float] = []
        for query, documents in self.by_query().items():
            given: dict[Id, float] = {}
            if query in store:
                row = store[query]
                given = dict(zip(row.document_ids, row.scores, strict=True))
            if missing := [document for document in documents if document not in given]:
                raise FormatError(
                    f"{store!r} lacks {len(missing)} of the {len(documents)} documents of query {short(query)}, first "
                    f"{short(missing[0])}. Score the same candidates, or name the store in scored_by."
                )
            values += [given[document] for document in documents]
        result = np.array(values, dtype=np.float64)
        if not np.isfinite(result).all():
            raise FormatError(f"{store!r} has scores that are not finite: they have no place in a density.")
        return result


def _check_types(
    candidates: TeacherScores | Mapping[Any, Sequence[Any]],
    qrels: Mapping[Any, Mapping[Any, int]],
    stores: Mapping[str, TeacherScores],
) -> None:
    first = next(((query, document) for query, judged in qrels.items() for document in judged), None)
    if first is None:
        raise FormatError("there are no judgements, so no document is known to be relevant.")
    wanted = tuple(type(value) for value in first)
    found = {f"the scores {name}": store.id_types for name, store in stores.items()}
    if isinstance(candidates, TeacherScores):
        found["the candidates"] = candidates.id_types
    elif (row := next(((q, d) for q, listed in candidates.items() for d in listed), None)) is not None:
        found["the candidates"] = type(row[0]), type(row[1])
    for name, types in found.items():
        if types != wanted:
            kinds = " and ".join(
                f"{kind.__name__} {what} ids" for kind, what in zip(types, ("query", "document"), strict=True)
            )
            raise FormatError(
                f"{name}: these have {kinds}, and the judgements {wanted[0].__name__} and {wanted[1].__name__}: they "
                "would never match. `st-m3se convert STORE OUT --ids str` (or int) converts them."
            )
