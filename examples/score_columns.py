"""The columns of published teacher scores: query_id, document_ids, scores; and MS MARCO sets made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from retrieval_data import Qrels, RetrievalData, UsageError, hash_fraction, split_by_hash

COLUMNS = ("query_id", "document_ids", "scores")


def as_list(value: Any, where: str) -> list[Any]:
    """A list, also where the data set stores it as a string such as "[1, 2]"."""
    if isinstance(value, str):
        try:
            value = json.loads(value.replace("'", '"'))
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: expected a list, or a list written as a string, got {value[:60]!r}.") from error
    if not isinstance(value, list):
        raise UsageError(f"{where}: expected a list, got {type(value).__name__}.")
    return value


def rows_to_run(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Turn rows of query_id, document_ids and scores into {query id: {document id: score}}; ids become strings."""
    run: dict[str, dict[str, float]] = {}
    for number, row in enumerate(rows):
        if missing := [column for column in COLUMNS if column not in row]:
            raise UsageError(
                f"{name}: expected the columns {', '.join(COLUMNS)}, found {', '.join(row)}: {', '.join(missing)} "
                "missing. Rename or add them."
            )
        where = f"{name}, row {number}"
        ids, scores = as_list(row["document_ids"], where), as_list(row["scores"], where)
        if len(ids) != len(scores):
            raise UsageError(f"{where}: expected as many scores as document_ids, got {len(scores)} and {len(ids)}.")
        run[str(row["query_id"])] = {
            str(d): math.nan if s is None else float(s) for d, s in zip(ids, scores, strict=True)
        }
    return run


def load_msmarco(source: str, queries: int, dev: int, test: int) -> tuple[RetrievalData, dict[str, dict[str, float]]]:
    """Load passages, queries and published teacher scores (configs ``documents``, ``queries``, ``train``).

    A sample of the queries is taken, in an order fixed by a hash. The corpus holds the documents of their lists. The
    published layout puts the relevant passage first, so document 0 is taken as the relevant one.

    Args:
        source: a data set on the hub, or a local folder laid out the same way.
        queries: how many training queries to take.
        dev: how many queries to hold out for the check of the teacher.
        test: how many queries to hold out for the final table.
    """
    from datasets import load_dataset

    parts = {}
    for config in ("train", "queries", "documents"):
        try:
            parts[config] = load_dataset(source, config, split="train")
        except Exception as error:  # the hub's clients raise a dozen kinds
            raise UsageError(
                f"--msmarco {source}: expected a data set with the configs train (query_id, document_ids, scores), "
                f"queries (query_id, text) and documents (document_id, text); loading {config!r} failed: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
                "Without a network, name a local copy with --msmarco FOLDER, or use --data DIR or --data python."
            ) from error
    for config, columns in (
        ("train", COLUMNS),
        ("queries", ("query_id", "text")),
        ("documents", ("document_id", "text")),
    ):
        if missing := [column for column in columns if column not in parts[config].column_names]:
            raise UsageError(
                f"--msmarco {source}: the config {config!r} has the columns {parts[config].column_names}, without "
                f"{', '.join(missing)}. Rename them as in lightonai/ms-marco-en-bge."
            )
    query_ids = [str(query) for query in parts["train"]["query_id"]]
    order = sorted(range(len(query_ids)), key=lambda row: hash_fraction(query_ids[row]))[: queries + dev + test]
    scores = rows_to_run(parts["train"].select(order), f"{source} (train)")
    wanted = {document for listed in scores.values() for document in listed}
    texts = _texts(parts["queries"], "query_id", set(scores))
    corpus = _texts(parts["documents"], "document_id", wanted)
    if lost := (set(scores) - texts.keys()) | (wanted - corpus.keys()):
        raise UsageError(
            f"--msmarco {source}: the scores name {len(lost)} ids that have no text, such as {min(lost)!r}. The three "
            "configs must come from one data set."
        )
    relevant: Qrels = {query: {next(iter(listed)): 1} for query, listed in scores.items() if listed}
    total = max(len(relevant), 1)
    qrels = split_by_hash(relevant, dev=dev / (queries + dev + test), test=test / (queries + dev + test))
    notes = [
        f"{total} queries sampled; document 0 of each list is taken as relevant; the corpus is their lists' documents"
    ]
    data = RetrievalData(source, corpus, texts, qrels, notes)
    data.check()
    return data, scores


def _texts(part: Any, column: str, wanted: set[str]) -> dict[str, str]:
    rows = [row for row, identifier in enumerate(part[column]) if str(identifier) in wanted]
    return {str(row[column]): str(row["text"]) for row in part.select(rows)}
