"""A small BEIR folder with graded judgements, and models of each kind on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from evaluation.encoders import CORPUS, QUERIES, make_encoder

DOCUMENTS = list(CORPUS)
QRELS = {
    query: {DOCUMENTS[place]: 2, DOCUMENTS[(place + 1) % 16]: 1, DOCUMENTS[(place + 5) % 16]: 0}
    for place, query in enumerate(QUERIES)
}


def write_set(
    folder: Path,
    queries: Mapping[str, str] = QUERIES,
    corpus: Mapping[str, str] = CORPUS,
    qrels: Mapping[str, Mapping[str, int]] = QRELS,
) -> Path:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("queries", queries), ("corpus", corpus)):
        title = {"title": ""} if name == "corpus" else {}  # which beir's search cannot do without
        lines = [json.dumps({"_id": key, **title, "text": text}) + "\n" for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = [f"{query}\t{document}\t{grade}\n" for query, judged in qrels.items() for document, grade in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8")
    return folder


def save_encoder(kind: str, checkpoint: Path, folder: Path, *, shift: float = 0.0) -> Path:
    """A saved encoder; ``shift`` makes another one of it."""
    model = make_encoder(kind, checkpoint)
    if shift:
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += shift * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder
