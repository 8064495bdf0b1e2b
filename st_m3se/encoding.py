"""How a batch's texts become embeddings in training: distinct rows, sorted by length, chunked, each at its own width.

A batch of documents is as wide as its longest row, and most of it is padding. Rows of about one length, run through
the model together at that length, give the same embeddings for a fraction of the work.

The two private parts of sentence-transformers that this needs are imported here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    from sentence_transformers.base.losses.gradcache import (
        CachedLossMixin,
        _create_minibatch,
        _validate_mini_batch_num_tokens,
        has_static_embedding_input,
    )
    from sentence_transformers.base.losses.merged_forward import _MERGING_DISABLED, merge_feature_batches
except ImportError as error:
    raise ImportError(
        "st-m3se builds on the gradient caching and column merging of sentence-transformers 6.x, which this version "
        "of sentence-transformers lacks. Install one that has them: pip install 'sentence-transformers>=6.2,<7'."
    ) from error

__all__ = [
    "CachedLossMixin",
    "check_caching",
    "distinct_rows",
    "encode",
    "is_sliceable",
    "merge_columns",
    "sort_by_length",
]

Features = dict[str, Any]

# Tokens (padding included) in one forward pass. Enough to keep a CPU's cores or a GPU busy with a small model, and
# few enough that rows of unlike lengths do not meet in one chunk.
CHUNK_TOKENS = 2048
CUDA_CHUNK_TOKENS = 16384


def check_caching(model: nn.Module, mini_batch_num_tokens: int | None) -> None:
    """Refuse a token budget that is not positive, or a model whose features cannot be split.

    Raises:
        ValueError: In either case.
    """
    _validate_mini_batch_num_tokens(mini_batch_num_tokens)
    if mini_batch_num_tokens is not None and has_static_embedding_input(model):
        raise ValueError(
            "mini_batch_num_tokens splits a batch into mini-batches of rows, and the features of a StaticEmbedding "
            "model have no rows to split. Such a model needs no gradient caching: leave mini_batch_num_tokens=None."
        )


def is_sliceable(features: Features) -> bool:
    """Whether rows of these features can be picked and reordered: one padded row per text, and nothing else.

    Flattened features (unpadded attention), StaticEmbedding's token stream and images are not, and neither is
    anything while a wrapper loss such as AdaptiveLayerLoss, which hands state on through the feature dict, forbids
    new feature dicts.
    """
    mask = features.get("attention_mask")
    if _MERGING_DISABLED.get() or "cu_seq_lens_q" in features or not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    return all(
        key == "prompt_length" or not isinstance(value, Tensor) or (value.ndim > 0 and len(value) == len(mask))
        for key, value in features.items()
    )


def merge_columns(columns: Sequence[Features]) -> Features | None:
    """Concatenate the features of several columns of ``Q`` texts, column after column.

    Returns:
        The features of ``len(columns) * Q`` rows, or None where the columns cannot be joined or sliced.
    """
    if len(columns) == 1:
        merged: Features | None = columns[0]
    elif not all(is_sliceable(column) for column in columns):
        return None
    else:
        merged = merge_feature_batches(list(columns))
    return merged if merged is not None and is_sliceable(merged) else None


def _take(features: Features, rows: Tensor) -> Features:
    return {
        key: value[rows] if isinstance(value, Tensor) and key != "prompt_length" else value
        for key, value in features.items()
    }


def distinct_rows(features: Features) -> tuple[Features, Tensor]:
    """Keep one of each set of rows with equal tokens.

    Returns:
        The features of the ``U`` distinct rows, and int64 ``[rows]``: which of them each row is.
    """
    mask = features["attention_mask"].bool()
    if "input_ids" not in features:
        return features, torch.arange(len(mask), device=mask.device)
    # Tokens first, padding behind: columns that were padded on the left to their own widths agree only then.
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    tokens = features["input_ids"].masked_fill(~mask, -1).gather(1, order)
    distinct, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    rows = torch.arange(len(tokens), device=tokens.device)
    first = rows.new_full((len(distinct),), len(tokens)).scatter_reduce_(0, inverse, rows, "amin")
    return _take(features, first), inverse


def sort_by_length(features: Features) -> tuple[Features, Tensor]:
    """Sort the rows by their number of tokens.

    Returns:
        The sorted features, and int64 ``[rows]``: where each row went.
    """
    order = features["attention_mask"].sum(1).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return _take(features, order), place


def _chunks(lengths: list[int], budget: int) -> list[tuple[int, int]]:
    """Cut rows sorted by length into ranges whose padded tokens stay within ``budget`` (a lone long row may not)."""
    ranges, begin = [], 0
    for row, length in enumerate(lengths):
        if row > begin and (row - begin + 1) * length > budget:
            ranges.append((begin, row))
            begin = row
    return [*ranges, (begin, len(lengths))]


def encode(model: nn.Module, features: Features) -> list[Tensor]:
    """Embed features whose rows are sorted by length, chunk by chunk, with gradients.

    Args:
        model: A SentenceTransformer, or the wrapper that the trainer puts around it.
        features: The features of ``U`` rows; what cannot be sliced goes through the model in one piece.

    Returns:
        The chunks' embeddings ``[u, dim]``, in order; together ``U`` rows.
    """
    if not is_sliceable(features):
        return [model(features)["sentence_embedding"]]
    mask = features["attention_mask"]
    budget = CUDA_CHUNK_TOKENS if mask.is_cuda else CHUNK_TOKENS
    ranges = _chunks(mask.sum(1).tolist(), budget)
    return [model(_create_minibatch(features, begin, end))["sentence_embedding"] for begin, end in ranges]
