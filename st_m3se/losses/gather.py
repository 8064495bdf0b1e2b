"""In-batch negatives: which documents of the batch, or of all processes' batches, a query may be compared with."""

from __future__ import annotations

import torch
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor

from st_m3se.encoding import Features


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
        documents: ``[U, dim]``, this process's; U may differ between processes.
        keys: int64 ``[U]``, from :func:`text_keys`.

    Returns:
        ``[V, dim]`` embeddings, int64 ``[V]`` numbers that are equal for equal texts and -1 for padding, and where
        this process's documents begin.
    """
    counts = all_gather(torch.tensor([len(documents)], device=documents.device))
    width = int(counts.max())
    padding = width - len(documents)
    everyone = all_gather_with_grad(torch.cat([documents, documents.new_zeros(padding, documents.shape[1])]))
    all_keys = all_gather(torch.cat([keys, keys.new_zeros(padding)]))
    real = (torch.arange(width, device=keys.device) < counts[:, None]).flatten()
    numbers = torch.unique(all_keys, return_inverse=True)[1].masked_fill(~real, -1)
    return everyone, numbers, get_rank() * width


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
