"""Rows without any padding: the tokens of all of them as one sequence, in which attention keeps the rows apart.

What a flash attention package does for sentence-transformers' own unpadded path, here for models that were loaded
without one, on CPUs too: the features take that path's form, and attention is that of :mod:`st_m3se.attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling
from torch import nn

from st_m3se.attention import NAME, has_kernels

__all__ = ["Features", "Packed", "attention_apart", "is_compiled", "pack", "packable"]

Features = dict[str, Any]

# Trunks of transformers in which tokens meet in attention alone, all of it bidirectional, unbiased and through the
# attention interface. Others (sliding windows, relative positions, causal models) take padded chunks.
TRUNKS = frozenset(
    {
        "bert",
        "camembert",
        "data2vec-text",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "jina_embeddings_v3",
        "nomic_bert",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)
AFTER = (Pooling, Dense, Normalize, Dropout, LayerNorm)
"""Modules that work on flattened features or on sentence embeddings."""
OF_TOKENS = ("input_ids", "token_type_ids")
KNOWN_KEYS = frozenset({*OF_TOKENS, "attention_mask", "modality", "prompt_length", "task"})


class Packed(dict[str, Any]):
    """Features of rows as sentence-transformers flattens them for a flash attention.

    Args:
        features: Those of all rows: ``input_ids``, ``position_ids`` and ``token_type_ids`` of shape ``[1, T]``, and
            what is not of tokens.
        lengths: The tokens of each row, on the CPU.
    """

    def __init__(self, features: Features, lengths: NDArray[np.int64]) -> None:
        ends = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        ends = ends.to(features["input_ids"].device, non_blocking=True)
        longest = int(lengths.max(initial=0))
        rows = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        super().__init__(features | rows)
        self.lengths = lengths

    def rows(self, begin: int, end: int) -> Packed:
        """The features of the rows from ``begin`` to ``end``."""
        first = int(self.lengths[:begin].sum())
        last = first + int(self.lengths[begin:end].sum())
        of_tokens = (*OF_TOKENS, "position_ids")
        features = {key: value[:, first:last] if key in of_tokens else value for key, value in self.items()}
        return Packed(features, self.lengths[begin:end])


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has this module."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _unwrapped(model: nn.Module) -> Any:
    """The model in the wrapper that a trainer may have put around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _transformer(model: nn.Module) -> Any:
    """The first module of a :func:`packable` model."""
    return next(_unwrapped(model).children())


def packable(model: nn.Module, features: Features) -> bool:
    """Whether the rows of these padded features may be packed, as far as the model and the features' kinds go."""
    plain = _unwrapped(model)
    if type(plain) is not SentenceTransformer or not {"input_ids", "attention_mask"} <= set(features) <= KNOWN_KEYS:
        return False
    modules: list[Any] = list(plain.children())
    first, *others = modules
    if type(first) is not Transformer or not all(type(module) in AFTER for module in others):
        return False
    trunk, config = first.model, first.model.config
    return (
        first.backend == "torch"
        and first.transformer_task == "feature-extraction"
        and config.model_type in TRUNKS
        and type(trunk).__module__.startswith("transformers.")
        and config._attn_implementation == "sdpa"
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "chunk_size_feed_forward", 0)
        and not config.output_attentions
        and not config.output_hidden_states
        and has_kernels(config, features["input_ids"].device, trunk.dtype)
        # Activations that are computed again in the backward pass would be by the model's usual attention.
        and not any(vars(module).get("gradient_checkpointing") for module in trunk.modules())
        and not any(map(is_compiled, plain.modules()))
    )


def pack(
    model: nn.Module, features: Features, ids: NDArray[np.int64], mask: NDArray[np.bool_], rows: NDArray[np.int64]
) -> Packed | None:
    """Pack rows of features that are :func:`packable`.

    Args:
        model: The model that they are for.
        features: The padded features.
        ids: Their ``input_ids``, on the CPU.
        mask: Their ``attention_mask``, on the CPU.
        rows: Which rows to pack, in order.

    Returns:
        The packed rows, or None where padding is not on the right alone, or a text spells out the padding token,
        which RoBERTa skips when it counts positions.
    """
    offset = _transformer(model)._infer_flatten_position_offset()
    columns = np.arange(mask.shape[1])
    lengths = mask.sum(1)
    if not len(rows) or lengths.min() < 1 or not np.array_equal(mask, columns < lengths[:, None]):
        return None
    if offset > 0 and bool(((ids == offset - 1) & mask).any()):
        return None
    lengths = lengths[rows]
    position = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    tokens = torch.from_numpy(np.repeat(rows * mask.shape[1], lengths) + position)
    tokens = tokens.to(features["input_ids"].device, non_blocking=True)
    packed = {
        key: value.flatten()[tokens].unsqueeze(0) if key in OF_TOKENS else value
        for key, value in features.items()
        if key != "attention_mask"
    }
    return Packed(packed | {"position_ids": (tokens % mask.shape[1] + offset).unsqueeze(0)}, lengths)


@contextmanager
def attention_apart(model: nn.Module) -> Iterator[None]:
    """Let the model's attention keep packed rows apart while in this context."""
    config = _transformer(model).model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before
