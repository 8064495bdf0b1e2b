"""Ready teacher scores: a store, a file in any published format, or an MS MARCO set of texts and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from retrieval_data import Qrels, RetrievalData, UsageError, hash_fraction, split_by_hash

from st_m3se.scores import TeacherScores, convert

CONFIGS = {
    "train": ("query_id", "document_ids", "scores"),
    "queries": ("query_id", "text"),
    "documents": ("document_id", "text"),
}


def open_scores(path: Path, folder: Path) -> TeacherScores:
    """Open a store with string ids, or convert whatever else ``st-m3se convert`` reads into one at ``folder``."""
    if path.is_dir():
        store = TeacherScores.open(path)
        if pa.types.is_string(store.query_ids().type):
            return store
    convert(path, folder, destination_format="store", id_type="str", overwrite=True)
    return TeacherScores.open(folder)


def load_msmarco(source: str, queries: int, dev: int, test: int, folder: Path) -> tuple[RetrievalData, TeacherScores]:
    """Load passages, queries and published teacher scores (configs ``documents``, ``queries``, ``train``).

    A sample of the queries is taken, in an order fixed by a hash. The corpus holds the documents of their lists. The
    published layout puts the relevant passage first, so document 0 is taken as the relevant one.

    Args:
        source: a data set on the hub, or a local folder laid out the same way.
        queries: how many training queries to take.
        dev: how many queries to hold out for the check of the teacher.
        test: how many queries to hold out for the final table.
        folder: where to put the store of the sample's scores.
    """
    from datasets import load_dataset

    parts = {}
    for config, columns in CONFIGS.items():
        try:
            parts[config] = load_dataset(source, config, split="train")
        except Exception as error:  # the hub's clients raise a dozen kinds
            raise UsageError(
                f"--msmarco {source}: expected a data set with the configs train (query_id, document_ids, scores), "
                f"queries (query_id, text) and documents (document_id, text); loading {config!r} failed: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
                "Without a network, name a local copy with --msmarco FOLDER, or use --data DIR or --data python."
            ) from error
        if missing := [column for column in columns if column not in parts[config].column_names]:
            raise UsageError(
                f"--msmarco {source}: the config {config!r} has the columns {parts[config].column_names}, without "
                f"{', '.join(missing)}. Rename them as in lightonai/ms-marco-en-bge."
            )
    query_ids = [str(query) for query in parts["train"]["query_id"]]
    order = sorted(range(len(query_ids)), key=lambda row: hash_fraction(query_ids[row]))[: queries + dev + test]
    folder.mkdir(parents=True, exist_ok=True)
    sample = folder / "sample.parquet"
    parts["train"].select_columns(list(CONFIGS["train"])).select(order).to_parquet(sample)
    scores = open_scores(sample, folder / "sample")
    relevant: Qrels = {str(row.query_id): {str(row.document_ids[0]): 1} for row in scores if row.document_ids}
    texts = _texts(parts["queries"], "query_id", set(relevant))
    wanted = {str(document) for row in scores for document in row.document_ids}
    corpus = _texts(parts["documents"], "document_id", wanted)
    if lost := (set(relevant) - texts.keys()) | (wanted - corpus.keys()):
        raise UsageError(
            f"--msmarco {source}: the scores name {len(lost)} ids that have no text, such as {min(lost)!r}. The three "
            "configs must come from one data set."
        )
    share = queries + dev + test
    qrels = split_by_hash(relevant, dev=dev / share, test=test / share)
    notes = [
        f"{len(relevant)} queries sampled; document 0 of each list is taken as relevant; the corpus is their lists' "
        "documents"
    ]
    data = RetrievalData(source, corpus, texts, qrels, notes)
    data.check()
    return data, scores


def _texts(part: Any, column: str, wanted: set[str]) -> dict[str, str]:
    rows = [row for row, identifier in enumerate(part[column]) if str(identifier) in wanted]
    return {str(row[column]): str(row["text"]) for row in part.select(rows)}
