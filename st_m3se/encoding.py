"""How a batch's texts become embeddings in training: distinct rows, sorted by length, chunked, each at its own width.

A batch of documents is as wide as its longest row, and most of it is padding. Rows of about one length, run through
the model together at that length, give the same embeddings for a fraction of the work. Gradients are those of the
plain way up to rounding; under dropout each chunk draws its own masks, as each column does there, and a text that
stands in several lists has one embedding, not one per copy.

The private parts of sentence-transformers that this needs are imported here and nowhere else.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from st_m3se.packing import attention_apart, pack, packable

try:
    from sentence_transformers.base.losses.gradcache import (
        CachedLossMixin,
        RandContext,
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
    "RandContext",
    "check_caching",
    "distinct_rows",
    "encode",
    "has_tokens",
    "is_sliceable",
    "merge_columns",
    "slice_rows",
    "sort_by_length",
]

Features = dict[str, Any]

logger = logging.getLogger(__name__)

# Tokens (padding included) in one forward pass: enough to keep a CPU's cores or a GPU busy with a small model, and no
# more than the caches hold of a layer.
CHUNK_TOKENS = 2048
CUDA_CHUNK_TOKENS = 16384
# What one more forward and backward pass costs, in tokens: launches, and adding up the weights' gradients. Measured on
# a CPU with a 6-layer, 384-wide model (14 to 36); on a GPU it is an estimate from the time that launches take.
CHUNK_COST = 32
CUDA_CHUNK_COST = 2048
# Without padding nothing is gained by cutting on a GPU, except temporary memory.
CUDA_PACKED_TOKENS = 65536


def check_caching(model: nn.Module, mini_batch_num_tokens: int | None) -> None:
    """Refuse a token budget that is not positive, or a model whose features cannot be split.

    Raises:
        ValueError: In either case.
    """
    if mini_batch_num_tokens is not None and type(mini_batch_num_tokens) is not int:
        raise ValueError(f"mini_batch_num_tokens must be a number of tokens, an int, got {mini_batch_num_tokens!r}.")
    _validate_mini_batch_num_tokens(mini_batch_num_tokens)
    if mini_batch_num_tokens is not None and has_static_embedding_input(model):
        raise ValueError(
            "mini_batch_num_tokens splits a batch into mini-batches of rows, and the features of a StaticEmbedding "
            "model have no rows to split. Such a model needs no gradient caching: leave mini_batch_num_tokens=None."
        )


def _why_not_sliceable(features: Features) -> str | None:
    mask = features.get("attention_mask")
    if "cu_seq_lens_q" in features:
        return "they are flattened for an attention that needs no padding"
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return "they have no attention mask of one row per text (StaticEmbedding has none)"
    for key, value in features.items():
        if key != "prompt_length" and isinstance(value, Tensor) and (value.ndim == 0 or len(value) != len(mask)):
            return f"{key!r} does not have one row per text (images)"
    return None


def has_tokens(features: Features) -> bool:
    """Whether these features hold one padded row of token ids per text."""
    return "input_ids" in features and _why_not_sliceable(features) is None


def is_sliceable(features: Features) -> bool:
    """Whether rows of these features can be picked and reordered: one padded row per text, and nothing else.

    Flattened features (unpadded attention), StaticEmbedding's token stream and images are not, and neither is
    anything while a wrapper loss such as AdaptiveLayerLoss, which hands state on through the feature dict, forbids
    new feature dicts.
    """
    return not _MERGING_DISABLED.get() and _why_not_sliceable(features) is None


@lru_cache(maxsize=16)
def _say_once(reason: str) -> None:
    logger.warning(
        "Note: the texts of a batch go through the model as they come, not sorted by length and cut into chunks, "
        f"because of their features: {reason}. The loss and gradients are the same either way."
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


def _widths(mask: Tensor) -> Tensor:
    """The columns that each row needs, int64 ``[rows]``: left padding counts, as positions are counted from it."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.bool() * columns).amax(1)


def sort_by_length(features: Features) -> tuple[Features, Tensor]:
    """Sort the rows by the columns that they need, up to their last token.

    Returns:
        The sorted features, and int64 ``[rows]``: where each row went.
    """
    order = _widths(features["attention_mask"]).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return _take(features, order), place


def slice_rows(features: Features, begin: int, end: int, width: int | None = None) -> Features:
    """The features of the rows from ``begin`` to ``end``, cut to ``width`` columns."""
    columns = features["attention_mask"].shape[1]
    return {
        key: value
        if not isinstance(value, Tensor) or key == "prompt_length"
        else value[begin:end, :width]
        if value.ndim > 1 and value.shape[1] == columns
        else value[begin:end]
        for key, value in features.items()
    }


def _chunks(widths: list[int], budget: int, cost: int) -> list[tuple[int, int]]:
    """Cut rows sorted by width into the ranges of least work: padded tokens, and ``cost`` for each range.

    Dynamic programming over where the last range begins. Padded tokens of a range stay within ``budget``; a lone
    long row may not.
    """
    rows = np.arange(len(widths))
    least = np.zeros(len(widths) + 1)
    begins = [0] * (len(widths) + 1)
    for end, width in enumerate(widths, start=1):
        first = max(0, min(end - 1, end - budget // max(width, 1)))
        work = least[first:end] + (end - rows[first:end]) * width
        best = int(work.argmin())
        least[end], begins[end] = work[best] + cost, first + best
    ranges, end = [], len(widths)
    while end:
        ranges.append((begins[end], end))
        end = begins[end]
    return ranges[::-1]


def _pieces(widths: list[int], budget: int) -> list[tuple[int, int]]:
    """Cut rows into ranges of about equal numbers of tokens, ``budget`` or somewhat more at most."""
    ends = np.cumsum(widths)
    count = max(1, round(int(ends[-1]) / budget))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right").tolist()
    return [(begin, end) for begin, end in itertools.pairwise([0, *cuts, len(widths)]) if begin < end]


def _word_embedding(model: nn.Module) -> nn.Embedding | None:
    """The plain trainable table of the tokens' embeddings, where an uncompiled model has exactly one."""
    tables: dict[int, nn.Module] = {}
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return None
        if isinstance(module, PreTrainedModel):
            try:
                table = module.get_input_embeddings()
            except NotImplementedError:
                return None
            tables[id(table)] = table
    if len(tables) != 1:
        return None
    (table,) = tables.values()
    if type(table) is not nn.Embedding or type(table.weight) is not nn.Parameter or not table.weight.requires_grad:
        return None
    return None if table.max_norm is not None or table.sparse or table.scale_grad_by_freq else table


@contextmanager
def _words_looked_up_once(model: nn.Module, chunks: list[Features]) -> Iterator[None]:
    """Let all chunks share one lookup of their tokens' embeddings.

    The gradient of a lookup is as large as the table, 30,000 rows in BERT: made, and added up, once per chunk it
    costs more than everything else that a chunk adds. A model that looks up anything but the chunk's own ids is left
    alone.
    """
    table = _word_embedding(model) if len(chunks) > 1 and torch.is_grad_enabled() else None
    if table is None or not all("input_ids" in chunk for chunk in chunks):
        yield
        return
    ids = {id(chunk["input_ids"]): place for place, chunk in enumerate(chunks)}
    found: list[Tensor] = []

    def look_up(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        place = ids.get(id(args[0])) if args else None
        if place is None:
            return None
        if not found:
            tokens = torch.cat([chunk["input_ids"].flatten() for chunk in chunks])
            sizes = [chunk["input_ids"].numel() for chunk in chunks]
            found.extend(torch.split(F.embedding(tokens, table.weight, table.padding_idx), sizes))
        return found[place].view_as(output)

    handle = table.register_forward_hook(look_up, prepend=True)  # what others do to the words comes after
    try:
        yield
    finally:
        handle.remove()


def encode(model: nn.Module, features: Features) -> list[Tensor]:
    """Embed features whose rows are sorted by length, chunk by chunk, with gradients if they are enabled.

    Args:
        model: A SentenceTransformer, or the wrapper that the trainer puts around it.
        features: The features of ``U`` rows; what cannot be sliced goes through the model in one piece.

    Returns:
        The chunks' embeddings ``[u, dim]``, in order; together ``U`` rows.
    """
    if not is_sliceable(features):
        if not _MERGING_DISABLED.get():
            _say_once(_why_not_sliceable(features) or "")
        return [model(features)["sentence_embedding"]]
    widths = _widths(features["attention_mask"]).tolist()
    cuda = features["attention_mask"].is_cuda
    if packable(model, features, widths):
        pieces = [
            pack(model, features, widths, begin, end)
            for begin, end in _pieces(widths, CUDA_PACKED_TOKENS if cuda else CHUNK_TOKENS)
        ]
        with _words_looked_up_once(model, pieces), attention_apart(model):
            return [model(piece)["sentence_embedding"] for piece in pieces]
    budget, cost = (CUDA_CHUNK_TOKENS, CUDA_CHUNK_COST) if cuda else (CHUNK_TOKENS, CHUNK_COST)
    chunks = [
        slice_rows(features, begin, end, max(1, *widths[begin:end])) for begin, end in _chunks(widths, budget, cost)
    ]
    with _words_looked_up_once(model, chunks):
        return [model(chunk)["sentence_embedding"] for chunk in chunks]
