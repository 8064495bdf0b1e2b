"""Candidates by exact search with a bi-encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_m3se.candidates.job import Found, Job

__all__ = ["describe_model", "model_name", "search_dense"]

SIMILARITIES = 1 << 25  # what is compared at once of queries x a chunk of documents: 128 MB


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
    """The best documents for each query: a running top k over chunks of the corpus."""
    from tqdm.auto import tqdm

    found = Found.nothing(job)
    one_chunk = len(job.corpus) <= job.chunk_size
    texts = [text for _, batch in job.queries.batches() for text in batch]
    queries = _encode(model.encode_query, texts, job, job.show_progress_bar)
    best = torch.full((len(texts), job.depth), -torch.inf, device=queries.device)
    rows = torch.full((len(texts), job.depth), -1, dtype=torch.long, device=queries.device)
    bar = tqdm(
        total=len(job.corpus),
        desc=f"Search with {Path(name).name}",
        unit=" documents",
        disable=not job.show_progress_bar or one_chunk,
    )
    start = 0
    for _, batch in job.corpus.batches(job.chunk_size):
        documents = _encode(model.encode_document, batch, job, job.show_progress_bar and one_chunk)
        stop = start + len(batch)
        step = max(1, SIMILARITIES // len(batch))
        for first in range(0, len(texts), step):
            part = slice(first, min(first + step, len(texts)))
            similarities = model.similarity(queries[part], documents).float()
            if not torch.isfinite(similarities).all():
                raise ValueError(
                    f"{name} gives similarities that are not finite, for documents {start + 1} to {stop} of "
                    "the corpus among others. In half precision large dot products overflow: load it in float32."
                )
            pairs, inner, columns = job.wanted.within(part, start, stop)
            found.wanted[pairs] = similarities[inner, columns].cpu().numpy()
            _, inner, columns = job.excluded.within(part, start, stop)
            similarities[inner, columns] = -torch.inf
            similarities[:, np.flatnonzero(job.everywhere[start:stop])] = -torch.inf
            values, places = _top(similarities, job.depth)
            # Those of earlier chunks stand first, and the sort is stable: equal ones keep the order of the corpus.
            values, order = torch.cat([best[part], values], dim=1).sort(dim=1, descending=True, stable=True)
            known = torch.cat([rows[part], places + start], dim=1).gather(1, order)
            best[part], rows[part] = values[:, : job.depth], known[:, : job.depth]
        start = stop
        bar.update(len(batch))
    bar.close()
    there = torch.isfinite(best)
    found.rows[:] = rows.where(there, -1).cpu().numpy()
    found.scores[:] = best.where(there, 0.0).cpu().numpy()
    return found


def _encode(encode: Callable[..., torch.Tensor], texts: list[str], job: Job, show_progress_bar: bool) -> torch.Tensor:
    return encode(texts, batch_size=job.batch_size, convert_to_tensor=True, show_progress_bar=show_progress_bar).float()


def _top(similarities: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best ``depth`` of each row and their columns, best first, equal ones by column."""
    depth = min(depth, similarities.shape[1])
    values, columns = similarities.topk(depth, dim=1)
    # topk takes any of those that tie for the last place, and gives equal ones in any order.
    tied = (similarities >= values[:, -1:]).sum(dim=1) > depth
    if tied.any():
        ordered, places = similarities[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = ordered[:, :depth], places[:, :depth]
    columns, order = columns.sort(dim=1)
    values, again = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, again)
