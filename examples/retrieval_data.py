"""Retrieval data in memory, and the readers for the layouts that the example takes.

One type, :class:`RetrievalData`, holds texts and relevance judgements. It is filled from a BEIR folder
(:func:`load_beir`), from data sets laid out as the published MS MARCO distillation sets are (:func:`load_msmarco`)
or from docstrings (``python_docs.py``). Every reader refuses what it cannot read with a :class:`UsageError` that says
what was expected, what came and what to do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from st_m3se.core.errors import FormatError
from st_m3se.data.qrels import read_qrels

SPLITS = ("train", "dev", "test")

Qrels = dict[str, dict[str, int]]


class UsageError(Exception):
    """Something the user gave cannot be used; the message says what was expected, what came and the remedy."""


@dataclass
class RetrievalData:
    """Documents, queries and the judgements of three disjoint sets of queries.

    Attributes:
        name: what the data is, for messages and results.
        corpus: document id -> text.
        queries: query id -> text.
        qrels: for each of "train", "dev" and "test": query id -> {document id: relevance > 0}.
        notes: what the reader did that the user should know, such as a split made by hash.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, Qrels]
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise :class:`UsageError` where a judgement names an unknown text or a split that is needed is empty."""
        for split, judged in self.qrels.items():
            unknown = [query for query in judged if query not in self.queries]
            if unknown:
                raise UsageError(
                    f"{self.name}: the {split} judgements name {len(unknown)} queries that have no text, such as "
                    f"{unknown[0]!r}. Every judged query must be in queries.jsonl: add it or remove its judgements."
                )
            missing = {document for relevant in judged.values() for document in relevant} - self.corpus.keys()
            if missing:
                raise UsageError(
                    f"{self.name}: the {split} judgements name {len(missing)} documents that are not in the corpus, "
                    f"such as {min(missing)!r}. Add them to corpus.jsonl or remove their judgements."
                )
        for split in ("train", "test"):
            if not self.qrels.get(split):
                raise UsageError(
                    f"{self.name}: expected {split} queries with a relevant document, found none. Check the qrels: "
                    "tab-separated query id, document id, relevance, with a relevance above 0."
                )


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine, in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def split_by_hash(qrels: Qrels, *, dev: float, test: float, key: dict[str, str] | None = None) -> dict[str, Qrels]:
    """Split judged queries into train, dev and test by a hash of their id (or of ``key[id]``)."""
    parts: dict[str, Qrels] = {split: {} for split in SPLITS}
    for query, relevant in qrels.items():
        fraction = hash_fraction(key[query] if key else query)
        split = "test" if fraction < test else "dev" if fraction < test + dev else "train"
        parts[split][query] = relevant
    return parts


def _read_jsonl(path: Path) -> Iterable[dict[str, object]]:
    if not path.is_file():
        raise UsageError(
            f"Expected the file {path.name} in the BEIR folder {path.parent}, found none. A BEIR folder holds "
            "corpus.jsonl, queries.jsonl and qrels/test.tsv (and qrels/train.tsv, qrels/dev.tsv where there are any)."
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number}: expected one JSON object per line, got {error}.") from error
            if not isinstance(row, dict) or "_id" not in row or "text" not in row:
                keys = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise UsageError(f'{path}, line {number}: expected the keys "_id" and "text", got {keys}.')
            yield row


def _read_texts(path: Path) -> dict[str, str]:
    """Read ``_id`` and ``text``, with the ``title`` (where there is one) in front of the text."""
    texts: dict[str, str] = {}
    for row in _read_jsonl(path):
        identifier = str(row["_id"])
        if identifier in texts:
            raise UsageError(f"{path}: the id {identifier!r} occurs twice. Ids must be unique: rename or drop one.")
        parts = (str(row.get("title") or "").strip(), str(row["text"] or "").strip())
        texts[identifier] = " ".join(part for part in parts if part)
    if not texts:
        raise UsageError(f"{path} is empty: expected at least one line with _id and text.")
    return texts


def _read_qrels(path: Path) -> Qrels:
    """What is relevant, by query; read as everywhere in the package."""
    try:
        judged = read_qrels(path)
    except FormatError as error:
        raise UsageError(str(error)) from error
    found = {
        str(query): {str(document): grade for document, grade in grades.items() if grade > 0}
        for query, grades in judged.items()
    }
    return {query: relevant for query, relevant in found.items() if relevant}


def load_beir(folder: Path) -> RetrievalData:
    """Read a BEIR folder; where train or test judgements are missing, split those there are by hash and say so."""
    if not folder.is_dir():
        raise UsageError(
            f"--data {folder}: expected a BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv), found no such "
            "folder. Give its path, or 'python' for the documentation of this Python, or 'msmarco'."
        )
    corpus, queries = _read_texts(folder / "corpus.jsonl"), _read_texts(folder / "queries.jsonl")
    paths = {split: folder / "qrels" / f"{split}.tsv" for split in SPLITS}
    qrels = {split: _read_qrels(path) if path.is_file() else {} for split, path in paths.items()}
    if not any(path.is_file() for path in paths.values()):
        raise UsageError(
            f"{folder}: expected relevance judgements in qrels/train.tsv, qrels/dev.tsv or qrels/test.tsv, found none "
            "of them. Write at least one: a header, then query id, document id, relevance, separated by tabs."
        )
    notes: list[str] = []
    if not qrels["train"] or not qrels["test"]:
        found = [split for split in SPLITS if qrels[split]]
        pooled: Qrels = {}
        for split in SPLITS:
            for query, relevant in qrels[split].items():
                pooled.setdefault(query, {}).update(relevant)
        qrels = split_by_hash(pooled, dev=0.15, test=0.35)
        notes.append(
            f"only {' and '.join(found) or 'no'} judgements: their {len(pooled)} queries were split by a hash of the "
            f"query id into {len(qrels['train'])} train, {len(qrels['dev'])} dev and {len(qrels['test'])} test queries"
        )
    else:
        notes.extend(_separate_splits(qrels))
    data = RetrievalData(folder.resolve().name, corpus, queries, qrels, notes)
    data.check()
    return data


def _separate_splits(qrels: dict[str, Qrels]) -> list[str]:
    """Take test queries out of dev and train, and give dev a share of train where there is no dev set."""
    notes = []
    for split, later in (("dev", ("test",)), ("train", ("dev", "test"))):
        shared = [query for query in qrels[split] if any(query in qrels[other] for other in later)]
        for query in shared:
            del qrels[split][query]
        if shared:
            notes.append(f"{len(shared)} {split} queries are also {' or '.join(later)} queries: left out of {split}")
    if not qrels["dev"]:
        parts = split_by_hash(qrels["train"], dev=0.1, test=0.0)
        if parts["dev"] and parts["train"]:
            qrels["train"], qrels["dev"] = parts["train"], parts["dev"]
            notes.append(
                f"no dev judgements: {len(qrels['dev'])} train queries, chosen by a hash, are held out instead"
            )
    return notes
