"""The lists that `training_step.py` trains on: of real texts, or of random words with MS MARCO's lengths."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MEAN_TOKENS, SPREAD, QUERY_TOKENS = 60, 0.45, 8  # of the synthetic set: log-normal, SPREAD of the logarithm


@dataclass(frozen=True)
class Lists:
    """What a batch is made of: a query, its documents and their teacher scores, per row."""

    queries: list[str]
    documents: list[list[str]]
    scores: list[list[float]]

    def rows(self) -> list[dict[str, Any]]:
        """As `DistillationCollator` takes them."""
        keys = ("query", "documents", "scores")
        return [
            dict(zip(keys, row, strict=True)) for row in zip(self.queries, self.documents, self.scores, strict=True)
        ]

    def columns(self) -> list[dict[str, Any]]:
        """As the stock collator takes them, one column per document."""
        return [
            {"query": row["query"]}
            | {f"document_{place}": text for place, text in enumerate(row["documents"], start=1)}
            | {"label": row["scores"]}
            for row in self.rows()
        ]

    def parts(self, count: int) -> list[Lists]:
        """The lists in ``count`` batches."""
        cuts = np.array_split(np.arange(len(self.queries)), count)
        return [
            Lists(*([values[i] for i in cut] for values in (self.queries, self.documents, self.scores))) for cut in cuts
        ]


def jsonl(path: Path) -> Iterable[dict[str, Any]]:
    """The rows of a file."""
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def real_lists(folder: Path, queries: int, documents: int, seed: int) -> Lists:
    """Random queries, each with a relevant document and its best BM25 candidates, no text twice in the batch."""
    import bm25s  # type: ignore[import-untyped]

    texts = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in jsonl(folder / "corpus.jsonl")}
    asked = {row["_id"]: row["text"] for row in jsonl(folder / "queries.jsonl")}
    relevant: dict[str, set[str]] = {}
    for name in ("train", "test"):
        path = folder / "qrels" / f"{name}.tsv"
        if path.exists() and not relevant:
            for line in path.read_text(encoding="utf-8").splitlines()[1:]:
                query, document, grade = line.split("\t")
                if float(grade) > 0 and document in texts:
                    relevant.setdefault(query, set()).add(document)
    rng = np.random.default_rng(seed)
    ids = [str(query) for query in rng.permutation(sorted(relevant)) if query in asked]
    corpus = list(texts)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts.values()), show_progress=False), show_progress=False)
    used: set[str] = set()
    chosen, lists = [], []
    for query in ids:
        if len(lists) == queries:
            break
        found, _ = index.retrieve(
            bm25s.tokenize([asked[query]], show_progress=False), k=min(20 * documents, len(corpus)), show_progress=False
        )
        known = relevant[query]
        candidates = [sorted(known)[0], *(corpus[place] for place in found[0] if corpus[place] not in known)]
        row: list[str] = []
        for candidate in candidates:
            if texts[candidate] not in used and texts[candidate] not in row and len(row) < documents:
                row.append(texts[candidate])
        if len(row) == documents:
            used.update(row)
            chosen.append(asked[query])
            lists.append(row)
    if len(lists) < queries:
        raise SystemExit(f"{folder.name} has only {len(lists)} queries with {documents} documents of their own.")
    return Lists(chosen, lists, _scores(queries, documents, rng))


def synthetic_lists(words: list[str], queries: int, documents: int, seed: int) -> Lists:
    """Texts of random words of one token each, with log-normal lengths."""
    rng = np.random.default_rng(seed)

    def text(mean: float) -> str:
        length = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)
        return " ".join(rng.choice(words, max(1, round(length) - 2)))  # two tokens are [CLS] and [SEP]

    return Lists(
        [text(QUERY_TOKENS) for _ in range(queries)],
        [[text(MEAN_TOKENS) for _ in range(documents)] for _ in range(queries)],
        _scores(queries, documents, rng),
    )


def _scores(queries: int, documents: int, rng: np.random.Generator) -> list[list[float]]:
    scores: list[list[float]] = np.sort(rng.normal(0, 4, (queries, documents)))[:, ::-1].tolist()
    return scores


def half_repeated(lists: Lists) -> Lists:
    """The second half of each list becomes the first half of the next query's list."""
    half = len(lists.documents[0]) // 2
    shifted = lists.documents[1:] + lists.documents[:1]
    rows = [own[: len(own) - half] + other[:half] for own, other in zip(lists.documents, shifted, strict=True)]
    return Lists(lists.queries, rows, lists.scores)
