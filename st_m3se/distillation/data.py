"""The texts to distil on, and who is held out: queries to train on, to choose by (dev) and to report (test)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.data.collection import Collection, qrels_files
from st_m3se.data.download import download_set
from st_m3se.data.qrels import read_qrels
from st_m3se.data.texts import Texts
from st_m3se.retrieval.queries import GENERATED

__all__ = ["SPLITS", "DistillationData", "Qrels", "hash_fraction", "in_hash_order", "open_data", "split_by_hash"]

SPLITS = ("train", "dev", "test")
DEV_SHARE, TEST_SHARE = 0.15, 0.35  # of judged queries that no split is given for
UNJUDGED_DEV, UNJUDGED_TEST = 0.1, 0.2
ENOUGH_DEV = 50  # queries of a tenth or, of few, a quarter: fewer tell a teacher from a student by luck alone

Qrels = dict[str, dict[str, int]]
"""Query id to document id to relevance above 0; of a query without judgements, nothing."""


@dataclass
class DistillationData:
    """Documents, queries, and three disjoint sets of queries with what is relevant to them.

    Attributes:
        name: For messages and results.
        corpus: The documents, ids as str.
        queries: All queries, ids as str.
        qrels: Of "train", "dev" and "test": query to relevant documents; without judgements of a split, to none.
        notes: What was done that the user should know, such as a split made by hash.
        unjudged: Queries of no split: nobody judged them, and there are judged ones to train on.
    """

    name: str
    corpus: Texts
    queries: Texts
    qrels: dict[str, Qrels]
    notes: list[str] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)

    def judged(self, split: str) -> bool:
        """Whether the queries of a split have judgements."""
        return any(self.qrels[split].values())

    def train_on_unjudged(self) -> None:
        """Make training queries of those that nobody judged: a teacher can say what is relevant to them."""
        self.qrels["train"] |= {query: {} for query in self.unjudged}
        self.unjudged = []

    def cut(self, sizes: Mapping[str, int | None]) -> None:
        """Keep at most so many queries of each split, judged ones first, in an order fixed by a hash."""
        for split, size in sizes.items():
            chosen = sorted(in_hash_order(self.qrels[split]), key=lambda query: not self.qrels[split][query])[:size]
            self.qrels[split] = {query: self.qrels[split][query] for query in chosen}

    @property
    def sizes(self) -> dict[str, int]:
        """Queries by split."""
        return {split: len(self.qrels[split]) for split in SPLITS}


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine, in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def in_hash_order(ids: Iterable[str]) -> list[str]:
    """Ids in an order that is arbitrary yet fixed, so that the first n of them are a fair sample."""
    return sorted(ids, key=hash_fraction)


def split_by_hash(qrels: Qrels, *, dev: float, test: float, key: Mapping[str, str] | None = None) -> dict[str, Qrels]:
    """Split queries into train, dev and test by a hash of their id, or of ``key[id]``.

    Without a key, queries that were made from a document go with it: its other queries resemble them.
    """
    key = key or {q: next(iter(found)) for q, found in qrels.items() if q.startswith(GENERATED) and found}
    parts: dict[str, Qrels] = {split: {} for split in SPLITS}
    for query, relevant in qrels.items():
        fraction = hash_fraction(key.get(query, query))
        split = "test" if fraction < test else "dev" if fraction < test + dev else "train"
        parts[split][query] = relevant
    return parts


def open_data(source: str | Path) -> DistillationData:
    """Open a BEIR folder, or a BEIR set by its name, and hold out queries where it has no split for them.

    - Without judgements of train or test queries: queries that nobody judged are the training queries, where there are
      at least as many as judged ones, and the judged ones are held out. Else the judged ones are split by a hash.
    - Without dev judgements some training queries are held out.
    - Without any judgements some queries are held out all the same: to see how far the student follows the teacher.

    Raises:
        FormatError: If a file is missing or cannot be read, or there are too few queries.
    """
    whole = Collection.open(source, id_type="str")
    queries, corpus = whole.texts
    notes = [str(finding) for finding in whole.findings]
    data = DistillationData(whole.name, corpus, queries, {split: {} for split in SPLITS}, notes)
    folder = Path(source) if Path(source).is_dir() else download_set(str(source))
    paths = qrels_files(folder)
    for split, path in paths.items():
        data.qrels[split] = _known(data, split, read_qrels(path))
    if paths and not any(data.qrels.values()):
        raise FormatError("no query has a relevant document, with a grade above 0, in the corpus.", file=str(folder))
    _hold_out(data)
    for split in ("train", "test"):
        if not data.qrels[split]:
            raise FormatError(
                f"{len(queries)} queries are too few: none is left for the {split} split. Some dozens are the least, "
                "some hundreds teach something.",
                file=str(folder),
            )
    return data


def _known(data: DistillationData, split: str, judged: Mapping[Any, Mapping[Any, int]]) -> Qrels:
    """What is relevant to whom, of queries and documents that there are; the rest is noted."""
    relevant = {str(q): {str(d): grade for d, grade in grades.items() if grade > 0} for q, grades in judged.items()}
    relevant = {query: grades for query, grades in relevant.items() if grades}
    there = dict(zip(relevant, data.queries.find(list(relevant)) >= 0, strict=True))
    documents = list(dict.fromkeys(document for grades in relevant.values() for document in grades))
    known = {d for d, row in zip(documents, data.corpus.find(documents).tolist(), strict=True) if row >= 0}
    kept = {q: {d: grade for d, grade in relevant[q].items() if d in known} for q in relevant if there[q]}
    if lost := [query for query in relevant if not there[query]]:
        data.notes.append(f"{len(lost)} judged {split} queries have no text, such as {lost[0]!r}: left out")
    if absent := [document for document in documents if document not in known]:
        data.notes.append(
            f"{len(absent)} relevant documents of {split} queries are not in the corpus, such as {absent[0]!r}: left "
            "out"
        )
    return {query: grades for query, grades in kept.items() if grades}


def _hold_out(data: DistillationData) -> None:
    """Fill the splits that are missing, and keep them disjoint."""
    qrels, notes = data.qrels, data.notes
    given = [split for split in SPLITS if qrels[split]]
    pooled: Qrels = {}
    for split in SPLITS:
        for query, relevant in qrels[split].items():
            pooled.setdefault(query, {}).update(relevant)
    unjudged: Qrels = {str(query): {} for query in data.queries if query not in pooled}
    if not given:
        data.qrels = split_by_hash(unjudged, dev=UNJUDGED_DEV, test=UNJUDGED_TEST)
        notes.append(
            f"no judgements: {data.sizes['dev']} dev and {data.sizes['test']} test queries are held out to see how far "
            "the student follows the teacher; how good either is cannot be measured"
        )
    elif not qrels["train"] and len(unjudged) >= len(pooled):
        held = qrels if qrels["dev"] and qrels["test"] else split_by_hash(pooled, dev=0.3, test=0.7)
        data.qrels = {"train": unjudged, "dev": held["dev"], "test": held["test"]}
        _separate(data)
        notes.append(
            f"no train judgements: the {len(unjudged)} queries without judgements are the training queries, and the "
            f"teacher is their only label; judged are {data.sizes['dev']} dev and {data.sizes['test']} test queries"
        )
    elif not qrels["train"] or not qrels["test"]:
        data.qrels = split_by_hash(pooled, dev=DEV_SHARE, test=TEST_SHARE)
        sizes = data.sizes
        notes.append(
            f"only {' and '.join(given)} judgements: their {len(pooled)} queries were split by a hash of the query id "
            f"into {sizes['train']} train, {sizes['dev']} dev and {sizes['test']} test queries"
        )
    else:
        _separate(data)
        if not qrels["dev"]:
            share = max(0.1, min(0.25, ENOUGH_DEV / len(qrels["train"])))
            parts = split_by_hash(qrels["train"], dev=share, test=0.0)
            if parts["dev"] and parts["train"]:
                qrels["train"], qrels["dev"] = parts["train"], parts["dev"]
                notes.append(
                    f"no dev judgements: {len(qrels['dev'])} train queries, chosen by a hash, are held out instead"
                )
    if any(data.qrels["train"].values()):
        data.unjudged = list(unjudged)


def _separate(data: DistillationData) -> None:
    """Take test queries out of dev and train, and dev queries out of train."""
    for split, later in (("dev", ("test",)), ("train", ("dev", "test"))):
        part = data.qrels[split]
        if shared := [query for query in part if any(query in data.qrels[other] for other in later)]:
            data.qrels[split] = {query: relevant for query, relevant in part.items() if query not in set(shared)}
            data.notes.append(
                f"{len(shared)} {split} queries are also {' or '.join(later)} queries: left out of {split}"
            )
