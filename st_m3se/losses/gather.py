"""In-batch negatives: which documents of the batch, or of all processes' batches, a query may be compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor

from st_m3se.encoding.rows import Features

NO_KEY, NO_DOCUMENT = -1, -2
"""Padding of ``Known``: equal to no key, nor to each other."""


class Known(NamedTuple):
    """What is known to be relevant, by 64-bit keys of texts and ids that are the same on every process."""

    queries: Tensor  # int64 [Q], equal for one query in several rows
    relevant: Tensor  # int64 [Q, R], keys of documents, NO_KEY for padding
    documents: Tensor  # int64 [K], the keys of the batch's documents, some with several
    rows: Tensor  # int64 [K], the document that each key is of


def text_keys(features: Features) -> Tensor:
    """A 64-bit key per row of tokens, the same on every process whatever the padding: int64 ``[U]``."""
    mask = features["attention_mask"].bool()
    tokens = features["input_ids"].masked_fill(~mask, 0)
    # Multiplication by fixed random weights, modulo 2^64: one pass on any device, and a collision needs luck of 2^-64.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (tokens.shape[1] + 1,), generator=generator).to(tokens.device)
    keys: Tensor = ((tokens + 1) * weights[mask.cumsum(1)]).masked_fill(~mask, 0).sum(1)
    return keys


def gather_documents(documents: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, int]:
    """Join the documents of all processes, with gradients flowing back to where each was encoded.

    Args:
        documents: ``[U, dim]``, this process's, or ``[U, tokens, dim]``; U and the tokens may differ between processes.
        keys: int64 ``[U]``, from :func:`text_keys`.

    Returns:
        ``[V, dim]`` or ``[V, tokens, dim]`` embeddings, int64 ``[V]`` numbers that are equal for equal texts and -1 for padding, and where
        this process's documents begin.
    """
    sizes = all_gather(torch.tensor([documents.shape[:2]], device=documents.device))
    counts, (width, tokens) = sizes[:, 0], sizes.amax(0).tolist()
    padding = width - len(documents)
    if documents.ndim == 3:
        documents = F.pad(documents, (0, 0, 0, tokens - documents.shape[1]))
    everyone = all_gather_with_grad(torch.cat([documents, documents.new_zeros(padding, *documents.shape[1:])]))
    all_keys = all_gather(torch.cat([keys, keys.new_zeros(padding)]))
    real = (torch.arange(width, device=keys.device) < counts[:, None]).flatten()
    numbers = torch.unique(all_keys, return_inverse=True)[1].masked_fill(~real, -1)
    return everyone, numbers, get_rank() * width


def gather_known(known: Known, begin: int) -> Known:
    """What all processes know, with this one's documents from row ``begin`` on."""
    sizes = all_gather(known.queries.new_tensor([[*known.relevant.shape, len(known.documents)]]))
    queries, width, documents = sizes.amax(0).tolist()
    missing, shorter = queries - len(known.queries), documents - len(known.documents)
    return Known(
        all_gather(F.pad(known.queries, (0, missing), value=NO_KEY)),
        all_gather(F.pad(known.relevant, (0, width - known.relevant.shape[1], 0, missing), value=NO_KEY)),
        all_gather(F.pad(known.documents, (0, shorter), value=NO_DOCUMENT)),
        all_gather(F.pad(known.rows + begin, (0, shorter))),
    )


def not_relevant(known: Known, queries: Tensor, count: int) -> Tensor:
    """Which of ``count`` documents no row of the batch knows to be relevant to a query: bool ``[Q, count]``.

    Args:
        known: What is known, to this process or to all.
        queries: int64 ``[Q]``, the keys of the queries.
        count: The number of documents.
    """
    keys, of_document = torch.unique(known.documents, return_inverse=True)
    place = torch.searchsorted(keys, known.relevant).clamp(max=len(keys) - 1)
    in_row = ~unlisted(place, keys[place] == known.relevant, len(keys))
    of_query = (queries[:, None] == known.queries).float() @ in_row.float() > 0
    return unlisted(known.rows.expand(len(queries), -1), of_query[:, of_document], count)


def unlisted(index: Tensor, mask: Tensor, count: int) -> Tensor:
    """Which of ``count`` distinct documents are not in a query's own list: bool ``[Q, count]``.

    Args:
        index: int64 ``[Q, D]``, the list of each query as numbers of documents.
        mask: bool ``[Q, D]``, True for real documents.
        count: The number of documents.
    """
    listed = torch.zeros(len(index), count, dtype=torch.int8, device=index.device)
    # amax, so that a masked entry, whose index is arbitrary, does not undo a real one.
    return ~listed.scatter_reduce_(1, index, mask.to(torch.int8), "amax").bool()


def unlisted_texts(numbers: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Which documents of all processes may join a query's list as negatives: those whose text is not in it.

    Args:
        numbers: int64 ``[V]``, equal for equal texts, less than V; -1 for padding.
        index: int64 ``[Q, D]``, the list of each query as rows of the documents.
        mask: bool ``[Q, D]``, True for real documents.

    Returns:
        bool ``[Q, V]``. Of several copies of a text only the first may join.
    """
    texts = len(numbers)
    real = numbers >= 0
    slot = numbers.clamp(min=0)
    rows = torch.arange(texts, device=index.device)
    first = torch.full_like(rows, texts).scatter_reduce_(0, slot, rows.masked_fill(~real, texts), "amin")
    return unlisted(slot[index], mask, texts)[:, slot] & real & (first[slot] == rows)
