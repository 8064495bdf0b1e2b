"""How an encoder puts the documents of a set in order: by search, or of given candidates by their similarities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from st_m3se.core.scored_list import ScoredList
from st_m3se.data.texts import Texts
from st_m3se.encoding.positions import check_length
from st_m3se.evaluation.systems import Encoder
from st_m3se.evaluation.tasks import Task, best_first, ids_of, score_pairs
from st_m3se.retrieval import models as encoders
from st_m3se.retrieval.embeddings import embed_corpus
from st_m3se.retrieval.fingerprint import model_fingerprint
from st_m3se.retrieval.models import embed_documents, embed_queries, encoder_kind, model_kind, take_rows
from st_m3se.retrieval.search import search
from st_m3se.retrieval.sources import Pairs

__all__ = ["EncoderRanker", "load_encoder", "pair_scorer"]

PAIRS = 4_096  # compared together


class EncoderRanker:
    """Exact search with embeddings that stay on disk; of given candidates, their similarities to the query."""

    def __init__(self, source: Encoder, name: str, device: str | None) -> None:
        model = self._model = load_encoder(source, device)
        self.kind: str = encoder_kind(model)
        self.description: dict[str, Any] = {
            "model": str(source.model) if isinstance(source.model, (str, Path)) else name,
            "revision": getattr(model.config, "_commit_hash", None) or source.revision,
            "fingerprint": model_fingerprint(model),
            "similarity": str(model.similarity_fn_name),
            "max_length": getattr(model, "max_seq_length", None),
            "prompts": dict(model.prompts),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }

    def inputs(self, task: Task) -> dict[str, Any]:
        """The search's settings."""
        return task.search_settings

    def rank(self, task: Task) -> None:
        """Search, or score the candidates."""
        if task.evaluation_set.candidates is None:
            self._search(task)
            return
        label = f"{self.description['model']}, {self.description['fingerprint']}"
        scorer = pair_scorer(self._model, task.batch_size)
        scored = score_pairs(scorer, task, task.evaluation_set.candidates, "encode and compare", name=label)
        task.write(map(best_first, scored), self.description)

    def _search(self, task: Task) -> None:
        queries, corpus = task.texts
        options: dict[str, Any] = {"batch_size": task.batch_size, "show_progress_bar": task.show_progress_bar}
        embeddings = embed_corpus(self._model, corpus, task.cache_dir, **options)
        task.seconds["encode corpus"] = embeddings.seconds
        with task.timed("encode queries"):
            encoded = embed_queries(self._model, [text for _, texts in queries.batches() for text in texts], **options)
        same = Pairs.of_same_ids(queries, corpus, task.evaluation_set.qrels)
        with task.timed("search"):
            found = search(
                encoded,
                embeddings,
                task.depth,
                similarity=str(self._model.similarity_fn_name),
                excluded=(same.queries, same.documents) if task.exclude_same_id else None,
            )
        task.write(_lists(queries, corpus, found.rows, found.scores), self.description)


def _lists(queries: Texts, corpus: Texts, rows: np.ndarray, scores: np.ndarray) -> Iterator[ScoredList]:
    """Search results as lists of ids."""
    ids = ids_of(corpus)
    for place, query in enumerate(queries):
        there = rows[place] >= 0
        yield ScoredList(query, ids.take(pa.array(rows[place][there])).to_pylist(), scores[place][there].tolist())


def load_encoder(source: Encoder, device: str | None) -> Any:
    """The model, in evaluation mode, with the options of its own.

    Raises:
        ValueError: If an option does not go with it.
    """
    if isinstance(source.model, (str, Path)):
        model = encoders.load_encoder(
            str(source.model),
            kind=source.kind,
            device=device,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    else:
        model = source.model
        changes = (source.kind, source.query_prompt, source.document_prompt, source.max_length, source.dtype)
        if any(change is not None for change in changes):
            raise ValueError(
                "kind, prompts, max_length and dtype are for an encoder by name or folder; this one is loaded already: "
                "set them on the model."
            )
        if device is not None:
            model.to(device)
    if source.max_length is not None:
        if model_kind(model) == "multi-vector":
            raise ValueError(
                "a multi-vector encoder has a query_length and a document_length, so max_length does not say which: "
                "load it with the lengths you want, and pass the model."
            )
        check_length(model, source.max_length, "max_length")
        model.max_seq_length = source.max_length
    for task, prompt in (("query", source.query_prompt), ("document", source.document_prompt)):
        if prompt is not None:
            model.prompts = {**model.prompts, task: prompt}
    if source.dtype is not None:
        model.to(getattr(torch, source.dtype))
    return model.eval()


def pair_scorer(model: Any, batch_size: int) -> Callable[[list[tuple[str, str]]], np.ndarray]:
    """A function of (query, document) pairs that gives the model's similarities; it encodes each distinct text once."""

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        columns = []
        for place, embed in enumerate((embed_queries, embed_documents)):
            texts = [pair[place] for pair in pairs]
            places = {text: row for row, text in enumerate(dict.fromkeys(texts))}
            columns.append((embed(model, list(places), batch_size=batch_size), [places[text] for text in texts]))
        scores = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(pairs), PAIRS):
            left, right = (take_rows(embeddings, rows[start : start + PAIRS]) for embeddings, rows in columns)
            with torch.inference_mode():
                scores.append(model.similarity_pairwise(left, right).float().cpu().numpy())
        return np.concatenate(scores)

    return score
