"""How a batch's rows, distinct and sorted by length, become embeddings in training: packed, or in chunks.

A batch of documents is as wide as its longest row, and most of it is padding. Packed rows have none; where the model
does not allow that, rows of about one length run through it together at that length. Both give the same embeddings for
a fraction of the work. Gradients are those of the plain way up to rounding; under dropout each piece draws its own
masks, as each column does there, and a text that stands in several lists has one embedding, not one per copy.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import NoneType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from st_m3se.encoding.host import (
    CachedLossMixin,
    RandContext,
    has_static_embedding_input,
    merging_disabled,
    validate_mini_batch_num_tokens,
)
from st_m3se.encoding.packing import Features, Packed, attention_apart, is_compiled, is_sharded
from st_m3se.encoding.rows import columns_needed, is_sliceable, slice_rows, why_not_sliceable

__all__ = [
    "TRIM_EVERY",
    "CachedEncoding",
    "check_caching",
    "check_student",
    "encode",
    "give_memory_back",
    "is_multi_vector",
    "widened",
    "with_tasks",
]

logger = logging.getLogger(__name__)

# Tokens (padding included) in one forward pass: enough to keep a CPU's cores or a GPU busy with a small model, and no
# more than the caches hold of a layer.
CHUNK_TOKENS = 2048
CUDA_CHUNK_TOKENS = 16384
# What one more forward and backward pass costs, in tokens: launches, and adding up the weights' gradients. Measured on
# a CPU with a 6-layer, 384-wide model (14 to 36); on a GPU it is an estimate from the time that launches take.
CHUNK_COST = 32
CUDA_CHUNK_COST = 2048
# Mini-batches of a cached loss on a CPU between two calls of give_memory_back. A step of 8,192 documents, 4,096 tokens
# a mini-batch, peaked at 1,190 MiB with a call at each, 1,478 at every second, 1,526 at every fourth, and 2,036 with
# none. A call at each cost a tenth of the time.
TRIM_EVERY = 2
# Without padding nothing is gained by cutting on a GPU, except temporary memory.
CUDA_PACKED_TOKENS = 65536


def check_student(loss: str, model: Any) -> None:
    """Refuse a student that has no embeddings to compare.

    Args:
        loss: The name of the loss, for the message.
        model: What was given as the student.

    Raises:
        ValueError: If it is none that this loss could train.
    """
    plain = getattr(model, "_orig_mod", model)
    if isinstance(plain, CrossEncoder):
        raise ValueError(
            f"{loss} compares embeddings of queries and documents, and a CrossEncoder reads both together and has "
            "none: make a SentenceTransformer, SparseEncoder or MultiVectorEncoder the student, or train the "
            "CrossEncoder with the losses of sentence_transformers.cross_encoder."
        )
    if not isinstance(plain, nn.Module) or not hasattr(plain, "similarity_fn_name"):
        hint = " Wrap the trunk: SentenceTransformer(name)." if isinstance(plain, (str, PreTrainedModel)) else ""
        raise ValueError(
            f"{loss} expects a SentenceTransformer, SparseEncoder or MultiVectorEncoder as the student, whose "
            f"embeddings it can compare, got {type(plain).__name__}.{hint}"
        )
    outputs = [getattr(module, "module_output_name", "sentence_embedding") for module in plain.children()]
    if not isinstance(plain, MultiVectorEncoder) and "sentence_embedding" not in outputs:
        raise ValueError(
            f"{loss} compares one embedding per text, and the modules of this {type(plain).__name__} make {outputs} "
            "only: append a Pooling module (SpladePooling for a SparseEncoder), or make it a MultiVectorEncoder."
        )


def check_caching(model: nn.Module, mini_batch_num_tokens: int | None) -> None:
    """Refuse a token budget that is not positive, or a model whose features cannot be split.

    Raises:
        ValueError: In either case.
    """
    if mini_batch_num_tokens is not None and type(mini_batch_num_tokens) is not int:
        raise ValueError(f"mini_batch_num_tokens must be a number of tokens, an int, got {mini_batch_num_tokens!r}.")
    validate_mini_batch_num_tokens(mini_batch_num_tokens)
    if mini_batch_num_tokens is not None and has_static_embedding_input(model):
        raise ValueError(
            "mini_batch_num_tokens splits a batch into mini-batches of rows, and the features of a StaticEmbedding "
            "model have no rows to split. Such a model needs no gradient caching: leave mini_batch_num_tokens=None."
        )


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_memory_back() -> None:
    """Return to the system what mini-batches have freed, where the C library is glibc.

    No two mini-batches ask for blocks of quite the same sizes, and glibc keeps the gaps that the next one cannot fill:
    over 120 mini-batches memory grew by half or more, which is what caching gradients is there to prevent.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=16)
def _say_once(reason: str) -> None:
    logger.warning(
        "Note: the texts of a batch go through the model as they come, not sorted by length and cut into chunks, "
        f"because of their features: {reason}. The loss and gradients are the same either way."
    )


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


def _pieces(lengths: NDArray[np.int64], budget: int) -> list[tuple[int, int]]:
    """Cut rows into ranges of about equal numbers of tokens, ``budget`` or somewhat more at most."""
    ends = lengths.cumsum()
    count = max(1, round(int(ends[-1]) / budget))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="right").tolist()
    return [(begin, end) for begin, end in itertools.pairwise([0, *cuts, len(lengths)]) if begin < end]


def _word_embedding(model: nn.Module) -> nn.Embedding | None:
    """The plain trainable table of the tokens' embeddings, where an uncompiled model has exactly one."""
    tables: dict[int, nn.Module] = {}
    for module in model.modules():
        if is_compiled(module):
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


def _multi_vector_encoder(model: Any) -> Any:
    """The MultiVectorEncoder in whatever wrapper a trainer has put around it; None: it is another model."""
    while not isinstance(model, (MultiVectorEncoder, NoneType)):
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return model


def is_multi_vector(model: Any) -> bool:
    """Whether this is a MultiVectorEncoder, in whatever wrapper."""
    return _multi_vector_encoder(model) is not None


def with_tasks(loss: str, model: Any, columns: list[Features]) -> list[Features]:
    """Columns that say which of them are queries, as a multi-vector model needs to know.

    Args:
        loss: The name of the loss, for the message.
        model: A multi-vector model.
        columns: Features, the queries first; a task that a collator has set stays.

    Raises:
        ValueError: If the queries were not expanded though the model expands queries.
    """
    columns = [{"task": "document" if place else "query"} | column for place, column in enumerate(columns)]
    expansion = getattr(next(_multi_vector_encoder(model).children()), "query_expansion", None)
    queries = columns[0]
    if expansion is not None and queries["task"] == "query" and "query_expansion_positions" not in queries:
        raise ValueError(
            f"{loss}: the model expands each query to {expansion['length']} tokens, and these queries were "
            "preprocessed without the task 'query', so that they are not expanded: the student would be trained on "
            "other queries than it is used with. Pass the collator preprocess_fn=model.preprocess itself, or "
            "router_mapping={'query': 'query', 'documents': 'document'}."
        )
    return columns


def _embed(model: nn.Module, features: Features) -> Tensor:
    """The embeddings of one piece."""
    if not is_multi_vector(model):
        embeddings: Tensor = model(features)["sentence_embedding"]
        return embeddings
    out = model(features, task=features.get("task"))
    mask = out["attention_mask"].unsqueeze(2).to(out["token_embeddings"].dtype)
    return torch.cat([out["token_embeddings"], mask], dim=2)


def widened(pieces: Sequence[Tensor], width: int = 0) -> Tensor:
    """All rows of several pieces; those with tokens as wide as the widest or as ``width`` tokens."""
    if pieces[0].ndim == 2:
        return torch.cat(list(pieces))
    width = max(width, *(piece.shape[1] for piece in pieces))
    return torch.cat([F.pad(piece, (0, 0, 0, width - piece.shape[1])) for piece in pieces])


def encode(model: nn.Module, features: Features) -> list[Tensor]:
    """Embed features whose rows are sorted by length, piece by piece, with gradients if they are enabled.

    Args:
        model: A SentenceTransformer, or the wrapper that the trainer puts around it.
        features: The features of ``U`` rows, from :func:`~st_m3se.encoding.rows.in_order`; what cannot be sliced goes
            through the model in one piece. So does everything where weights are sharded: processes that meet in each
            forward pass must run equally many.

    Returns:
        The pieces' embeddings ``[u, dim]``, in order; together ``U`` rows. Those of a multi-vector model are
        ``[u, tokens, dim + 1]``, each piece as wide as its longest row; the last number of a token is 1 where it is
        scored, else 0.
    """
    if isinstance(features, Packed):
        budget = CUDA_PACKED_TOKENS if features["input_ids"].is_cuda else CHUNK_TOKENS
        cuts = [(0, len(features.lengths))] if is_sharded(model) else _pieces(features.lengths, budget)
        pieces: list[Features] = [features.rows(*piece) for piece in cuts]
        with _words_looked_up_once(model, pieces), attention_apart(model):
            # Plain dicts: accelerate makes new ones of their type under mixed precision.
            return [_embed(model, dict(piece)) for piece in pieces]
    if not is_sliceable(features):
        if not merging_disabled():
            _say_once(why_not_sliceable(features) or "")
        return [_embed(model, features)]
    if is_sharded(model):
        return [_embed(model, features)]
    widths = columns_needed(features).tolist()
    on_gpu = features["attention_mask"].is_cuda
    budget, cost = (CUDA_CHUNK_TOKENS, CUDA_CHUNK_COST) if on_gpu else (CHUNK_TOKENS, CHUNK_COST)
    chunks = [
        slice_rows(features, begin, end, max(1, *widths[begin:end])) for begin, end in _chunks(widths, budget, cost)
    ]
    with _words_looked_up_once(model, chunks):
        return [_embed(model, chunk) for chunk in chunks]


class CachedEncoding(CachedLossMixin):
    """A gradient cache whose mini-batches are encoded as everything else here is."""

    mini_batch_size = 1  # CachedLossMixin asks for it; the token budget decides
    _mini_batches = 0

    def forward_cached(self, sentence_features: Iterable[Features], labels: Any = None) -> Tensor:
        """The three steps of gradient caching.

        Raises:
            ValueError: If the weights are sharded.
        """
        if is_sharded(self.model):
            raise ValueError(
                f"mini_batch_num_tokens={self.mini_batch_num_tokens} runs as many forward passes as a process's own "
                "texts need. A model sharded by FSDP or DeepSpeed ZeRO-3 must run equally many on every process: "
                "training would hang. Leave mini_batch_num_tokens=None and save memory with "
                "gradient_checkpointing=True in the training arguments, or train without sharding, under DDP."
            )
        return super().forward_cached(sentence_features, labels)

    def embed_minibatch(
        self,
        sentence_feature: Features,
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed a mini-batch of the gradient cache; the tokens alive are the mini-batch's, whatever its chunks."""
        features = slice_rows(sentence_feature, begin, end)
        if with_grad and all(value.device.type == "cpu" for value in features.values() if isinstance(value, Tensor)):
            self._mini_batches += 1
            if self._mini_batches % TRIM_EVERY == 0:
                give_memory_back()
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*features.values()) if copy_random_state else None
            return widened(encode(self.model, features)), state
