"""The task that all systems of `reproduce_paper.py` share: texts, judgements, lists to train on, lists to re-rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from st_m3se import find_candidates
from st_m3se.data.texts import Texts
from st_m3se.distillation.data import Qrels, in_hash_order, open_data
from st_m3se.distillation.python_docs import load_python_docs
from st_m3se.evaluation import per_query
from st_m3se.scores import TeacherScores

MEASURES = ("RR@10", "nDCG@10")
SPLITS = ("train", "test")
RELEVANT = 30.0  # the score of a relevant document where nobody teaches: softmax makes it one against 1e-13


@dataclass(frozen=True)
class Task:
    """Texts, judgements and lists.

    Attributes:
        name: The data's.
        queries: Texts of all queries.
        corpus: The documents.
        qrels: Of the measured queries, "train" and "test".
        runs: The measured lists of both splits: what BM25 finds, so that a relevant document that it misses counts 0
            for every system alike, with its scores.
        lists: Training lists: query to documents, the relevant ones first.
        relevant: Of each training query, how many of its list's documents are relevant.
    """

    name: str
    queries: Texts
    corpus: Texts
    qrels: dict[str, Qrels]
    runs: dict[str, TeacherScores]
    lists: dict[str, list[str]]
    relevant: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """A hash of all that trainings and measures take from the data."""
        content = [
            self.queries.fingerprint,
            self.corpus.fingerprint,
            self.qrels,
            {split: self.candidates(split) for split in SPLITS},
            self.lists,
            self.relevant,
        ]
        return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def candidates(self, split: str) -> dict[str, list[str]]:
        """The documents to re-rank, by query."""
        return {str(row.query_id): [str(d) for d in row.document_ids] for row in self.runs[split] if row.document_ids}

    def measured(self, split: str, store: TeacherScores) -> dict[str, np.ndarray]:
        """Each measure for each query of a split, in the order of its judgements."""
        queries = list(self.qrels[split])
        return per_query(store, self.qrels[split], MEASURES, query_ids=queries, exclude_same_id=False)

    def ceiling(self, split: str) -> float:
        """The share of queries whose list holds a relevant document: what no re-ranking can exceed."""
        lists = self.candidates(split)
        return float(np.mean([bool(judged.keys() & lists.get(q, [])) for q, judged in self.qrels[split].items()]))

    def rows(self, scores: TeacherScores | None) -> list[dict[str, Any]]:
        """The training lists: with a teacher's scores, or with :data:`RELEVANT` and 0."""
        rows = []
        for query, documents in self.lists.items():
            positives = [place < self.relevant[query] for place in range(len(documents))]
            given = [RELEVANT * positive for positive in positives]
            if scores is not None:
                row = scores[query]
                known = dict(zip(row.document_ids, row.scores, strict=True))
                given = [known[document] for document in documents]
            rows.append(
                {
                    "query": self.queries[query],
                    "documents": self.corpus.take(documents),
                    "scores": given,
                    "positives": positives,
                }
            )
        return rows

    def student_dataset(self, scores: TeacherScores | None) -> Dataset:
        """Rows for the distillation losses."""
        return Dataset.from_list(self.rows(scores))

    def cross_encoder_dataset(self) -> Dataset:
        """The same lists for ListNetLoss."""
        return Dataset.from_list(
            [{"query": row["query"], "documents": row["documents"], "labels": row["scores"]} for row in self.rows(None)]
        )


def open_task(
    data: str, folder: Path, *, train_queries: int, measured_queries: int, depth: int, list_size: int
) -> Task:
    """Open a BEIR folder, or "python" for the running Python's documentation, and find the candidates.

    Args:
        data: Which.
        folder: Where the candidates are kept.
        train_queries: Training queries, at most.
        measured_queries: Queries of each split that are measured, at most; in "train" from those trained on.
        depth: Documents to re-rank.
        list_size: Documents of a training list, the relevant ones among them.
    """
    source = load_python_docs() if data == "python" else open_data(data)
    train = in_hash_order(list(source.qrels["train"]))[:train_queries]
    test = in_hash_order(list(source.qrels["test"]))[:measured_queries]
    chosen = {"train": train[:measured_queries], "test": test}
    queries, corpus = source.queries, source.corpus
    run = _run([*train, *test], queries, corpus, folder, max(depth, 2 * list_size))
    lists, relevant = {}, {}
    for query in train:
        good = list(source.qrels["train"][query])[: list_size // 2]
        known = source.qrels["train"][query]
        bad = [str(d) for d in run[query].document_ids if d not in known][: list_size - len(good)]
        if bad:
            lists[query], relevant[query] = [*good, *bad], len(good)
    if not lists:
        raise ValueError(
            f"{data}: BM25 finds no candidate for any training query. Do they share words with the corpus?"
        )
    runs = {split: _cut(run, names, depth, folder / f"{split}-run") for split, names in chosen.items()}
    qrels = {split: {query: source.qrels[split][query] for query in names} for split, names in chosen.items()}
    return Task(source.name, queries, corpus, qrels, runs, lists, relevant)


def _run(asked: Sequence[str], queries: Texts, corpus: Texts, folder: Path, depth: int) -> TeacherScores:
    texts = dict(zip(asked, queries.take(asked), strict=True))
    return find_candidates(texts, corpus, ["bm25"], folder / "bm25", depth=depth, overwrite=True)


def _cut(run: TeacherScores, queries: Sequence[str], depth: int, folder: Path) -> TeacherScores:
    rows = ((row.query_id, row.document_ids[:depth], row.scores[:depth]) for row in run.select(queries))
    return TeacherScores.from_rows(rows, folder, manifest={"teacher": "bm25"}, overwrite=True)


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each measure."""
    return {measure: float(found.mean()) for measure, found in values.items()}
