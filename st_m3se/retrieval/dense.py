"""Candidates by exact search with an encoder, dense, sparse or multi-vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from st_m3se.retrieval.models import CHUNK, embed_documents, embed_queries, model_kind
from st_m3se.retrieval.search import Search
from st_m3se.retrieval.sources import Found, Job

__all__ = ["search_dense"]


def search_dense(model: Any, name: str, job: Job) -> Found:
    """The best documents for each query, the corpus encoded chunk by chunk."""
    from tqdm.auto import tqdm

    chunk_size = min(job.chunk_size, CHUNK[model_kind(model)])
    one_chunk = len(job.corpus) <= chunk_size
    texts = [text for _, batch in job.queries.batches() for text in batch]
    search = Search(
        embed_queries(model, texts, batch_size=job.batch_size, show_progress_bar=job.show_progress_bar),
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
        for _, batch in job.corpus.batches(chunk_size):
            search.add(
                embed_documents(
                    model,
                    batch,
                    batch_size=job.batch_size,
                    show_progress_bar=job.show_progress_bar and one_chunk,
                )
            )
            bar.update(len(batch))
    rows, scores = search.result()
    return Found(rows, scores, search.wanted_scores)
