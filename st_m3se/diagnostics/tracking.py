"""The documents whose scores are followed while a model trains, and the record of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from st_m3se.core.errors import FormatError
from st_m3se.core.findings import report
from st_m3se.core.ids import Id
from st_m3se.data.collection import Collection
from st_m3se.data.texts import Texts
from st_m3se.scores.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["HEADER", "Evolution", "TrackedList", "track"]

HEADER = ("step", "epoch", "query_id", "document_id", "positive", "score")


class TrackedList(NamedTuple):
    """A query and those of its documents that are followed."""

    query_id: Id
    query: str
    document_ids: tuple[Id, ...]
    documents: tuple[str, ...]
    positives: tuple[bool, ...]


def track(
    candidates: TeacherScores | Mapping[Any, Sequence[Any]] | str | Path,
    queries: Texts | Mapping[Any, Any] | Dataset | str | Path,
    corpus: Texts | Mapping[Any, Any] | Dataset | str | Path,
    qrels: Mapping[Any, Mapping[Any, int]] | str | Path,
    *,
    num_queries: int = 1,
    num_positives: int = 5,
    num_negatives: int = 5,
    seed: int = 0,
) -> list[TrackedList]:
    """Draw queries, and positives and negatives of each, to be followed.

    Every query that has enough positives and negatives is as likely as another, then likewise among the documents of a
    query. Where no query has that many, which is the rule where each query has one relevant document, those with the
    most are drawn from.

    Args:
        candidates: Where negatives are drawn from: a store, its path, or query id to document ids.
        queries: The texts of the queries, whatever :meth:`Texts.open` takes.
        corpus: The documents, likewise.
        qrels: Query id to document id to relevance, or a file, TREC or BEIR. Positives are those above 0 that are in
            the corpus, among the candidates or not; negatives all other candidates.
        num_queries: How many queries.
        num_positives: Positives of each, at most.
        num_negatives: Negatives of each, at most.
        seed: For the draws.

    Raises:
        FormatError: If no query has both a positive and a negative, or a text is missing.
    """
    if min(num_queries, num_positives, num_negatives) < 1:
        raise ValueError("num_queries, num_positives and num_negatives must be at least 1.")
    if isinstance(candidates, (str, Path)):
        candidates = TeacherScores.open(candidates)
    opened = Collection.open(queries=queries, corpus=corpus, qrels=qrels)
    (queries, corpus), qrels = opened.texts, opened.qrels or {}
    report("track", opened.findings)
    lists: Any = candidates
    store = isinstance(candidates, TeacherScores)
    rows = ((row.query_id, row.document_ids) for row in lists) if store else lists.items()

    def parts(query: Id, listed: Sequence[Id]) -> tuple[list[Id], list[Id]]:
        positives = [document for document, grade in qrels.get(query, {}).items() if grade > 0 and document in corpus]
        relevant = set(positives)
        return positives, [document for document in listed if document not in relevant]

    most, richest = 0, list[Id]()
    for query, listed in rows:
        positives, negatives = parts(query, listed)
        found = min(len(positives), num_positives) + min(len(negatives), num_negatives)
        if positives and negatives and found >= most:
            richest = richest if found == most else []
            richest.append(query)
            most = found
    if not richest:
        raise FormatError(
            "no query has both a relevant document in the corpus and another candidate, so there is nothing to "
            "follow. Are the ids of candidates, judgements and texts the same ones?"
        )
    chooser = random.Random(seed)
    tracked = []
    for query in chooser.sample(richest, min(num_queries, len(richest))):
        positives, negatives = parts(query, lists[query].document_ids if store else lists[query])
        chosen = chooser.sample(positives, min(num_positives, len(positives)))
        flags = [True] * len(chosen)
        chosen += chooser.sample(negatives, min(num_negatives, len(negatives)))
        flags += [False] * (len(chosen) - len(flags))
        tracked.append(TrackedList(query, queries[query], tuple(chosen), tuple(corpus.take(chosen)), tuple(flags)))
    return tracked


@dataclass(frozen=True, eq=False)
class Evolution:
    """The scores of followed documents over the steps of a training.

    Attributes:
        name: The model's, for titles.
        steps: The steps at which they were taken, int ``[T]``.
        query_ids: The query of each document, ``[D]``.
        document_ids: ``[D]``.
        positives: bool ``[D]``.
        scores: float ``[T, D]``.
        queries: The texts of the queries by id, as far as they are known.
    """

    name: str
    steps: np.ndarray
    query_ids: tuple[str, ...]
    document_ids: tuple[str, ...]
    positives: np.ndarray
    scores: np.ndarray
    queries: dict[str, str]

    @classmethod
    def read(cls, path: str | Path, name: str | None = None) -> Evolution:
        """Read the CSV that :class:`~st_m3se.diagnostics.ScoreEvolutionCallback` writes, of a training under way too.

        Raises:
            FormatError: If it is none, or holds no whole record.
        """
        path = Path(path)
        records, count = read_records(path)
        if not count:
            raise FormatError("there is no whole record of the followed documents in it.", file=str(path))
        about = path.with_suffix(".json")
        try:
            known = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
            queries = {str(each["query_id"]): str(each["query"]) for each in known.get("tracked", [])}
            name = name or str(known.get("name") or path.stem)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"this does not describe the record beside it: {error!r:.200}. Delete it, and the record is read "
                "without names and texts.",
                file=str(about),
            ) from None
        first = records[:count]
        return cls(
            name,
            records["step"][::count].to_numpy(np.int64),
            tuple(first["query_id"]),
            tuple(first["document_id"]),
            (first["positive"] == "1").to_numpy(),
            records["score"].to_numpy(np.float64).reshape(-1, count),
            queries,
        )

    def to_frame(self) -> pd.DataFrame:
        """The scores, a row each: model, step, query_id, document_id, positive, score."""
        count = len(self.document_ids)
        columns = {
            "model": self.name,
            "step": np.repeat(self.steps, count),
            "query_id": self.query_ids * len(self.steps),
            "document_id": self.document_ids * len(self.steps),
            "positive": np.tile(self.positives.astype(int), len(self.steps)),
            "score": self.scores.ravel(),
        }
        return pd.DataFrame(columns)


def read_records(path: Path) -> tuple[pd.DataFrame, int]:
    """The whole records of such a CSV one behind the other, as texts, and how many documents each of them has.

    A record that a kill has cut short, which can only be the last one, is left out.

    Raises:
        FormatError: If the file is not such a CSV.
    """
    try:
        text = path.read_text(encoding="utf-8")
        whole = StringIO(text[: text.rfind("\n") + 1])  # without a torn last line
        records = pd.read_csv(whole, dtype=str, keep_default_na=False)
        if tuple(records.columns) != HEADER:
            raise FormatError(f"expected the columns {', '.join(HEADER)}.", file=str(path), line=1)
        steps = records["step"].astype(np.int64).to_numpy()
        records["score"].astype(np.float64)
    except (ValueError, OverflowError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"this is not a record of scores: {error}.", file=str(path)) from None
    count = int((steps == steps[:1]).sum())
    times = len(records) // count if count else 0
    records = records[: times * count]
    table = records.to_numpy().reshape(times, count, len(HEADER))
    if (table[:, :, 2:5] != table[:1, :, 2:5]).any() or (table[:, :, 0] != table[:, :1, 0]).any():
        raise FormatError(
            "this is not a record of scores: the documents are not those of the first step everywhere.", file=str(path)
        )
    return records, count
