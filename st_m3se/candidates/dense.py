"""Candidates by exact search with a bi-encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_m3se.candidates.job import Found, Job
from st_m3se.evaluation.search import Search

__all__ = ["describe_model", "model_name", "search_dense"]


def model_name(model: SentenceTransformer) -> str:
    """What a model calls itself, as far as it knows."""
    data = model.model_card_data
    return str(data.model_id or data.base_model or getattr(model.tokenizer, "name_or_path", "") or "unnamed")


def describe_model(model: SentenceTransformer, name: str) -> dict[str, Any]:
    """For the manifest of a run."""
    return {
        "name": name,
        "similarity": str(model.similarity_fn_name),
        "max_length": model.max_seq_length,
        "prompts": dict(model.prompts),
    }


def search_dense(model: SentenceTransformer, name: str, job: Job) -> Found:
    """The best documents for each query, the corpus encoded chunk by chunk."""
    from tqdm.auto import tqdm

    one_chunk = len(job.corpus) <= job.chunk_size
    texts = [text for _, batch in job.queries.batches() for text in batch]
    search = Search(
        _encode(model.encode_query, texts, job, job.show_progress_bar),
        job.depth,
        similarity=str(model.similarity_fn_name),
        excluded=(job.excluded.queries, job.excluded.documents),
        excluded_documents=np.flatnonzero(job.everywhere),
        wanted=(job.wanted.queries, job.wanted.documents),
    )
    bar = tqdm(
        total=len(job.corpus),
        desc=f"Search with {Path(name).name}",
        unit=" documents",
        disable=not job.show_progress_bar or one_chunk,
    )
    with bar:
        for _, batch in job.corpus.batches(job.chunk_size):
            search.add(_encode(model.encode_document, batch, job, job.show_progress_bar and one_chunk))
            bar.update(len(batch))
    rows, scores = search.result()
    return Found(rows, scores, search.wanted_scores)


def _encode(encode: Callable[..., torch.Tensor], texts: list[str], job: Job, show_progress_bar: bool) -> torch.Tensor:
    return encode(texts, batch_size=job.batch_size, convert_to_tensor=True, show_progress_bar=show_progress_bar)
