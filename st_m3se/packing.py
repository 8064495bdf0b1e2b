"""Rows without any padding: the tokens of all of them as one sequence, in which attention keeps the rows apart.

What a flash attention package does for sentence-transformers' own unpadded path, here for models that were loaded
without one, on CPUs too: the features take that path's form, and attention is PyTorch's own, over rows of equal length
on a CPU, and by its variable-length kernels on a GPU (5 times as fast there as the public way to them, nested tensors).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

__all__ = ["attention_apart", "pack", "packable"]

Features = dict[str, Any]

NAME = "st_m3se_packed"
# Trunks of transformers in which tokens meet in attention alone, all of it bidirectional, unbiased and through the
# attention interface. Others (sliding windows, relative positions, causal models) take padded chunks.
TRUNKS = frozenset({"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"})
AFTER = (Pooling, Dense, Normalize, Dropout, LayerNorm)
"""Modules that work on flattened features or on sentence embeddings."""
KNOWN_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "modality", "prompt_length"})


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each row of a packed sequence: ``[1, heads, T, width]`` each, rows sorted by length."""
    tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, width]
    if query.is_cuda:
        rows = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        if query.dtype in (torch.float16, torch.bfloat16):
            out = torch.ops.aten._flash_attention_forward(*tensors, *rows, dropout, False, False, scale=scaling)[0]
            return out.unsqueeze(0), None
        tensors = [tensor.unsqueeze(0) for tensor in tensors]
        return torch.ops.aten._efficient_attention_forward(*tensors, None, *rows, dropout, 0, True, scale=scaling)[
            0
        ], None
    widths, counts = torch.unique_consecutive(cu_seq_lens_q.diff(), return_counts=True)
    shapes = list(zip(counts.tolist(), widths.tolist(), strict=True))
    sizes = [count * width for count, width in shapes]
    parts = [
        [
            torch.unflatten(part, 0, shape).transpose(1, 2)
            for part, shape in zip(torch.split(tensor, sizes), shapes, strict=True)
        ]
        for tensor in tensors
    ]
    outs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs]).unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of the packed attention: none, as the rows' ends say it all."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _has_kernels(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's variable-length attention runs for this trunk on this device; a CPU needs none."""
    if device.type != "cuda":
        return device.type == "cpu"
    width = config.hidden_size // config.num_attention_heads
    recent = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and dtype != torch.float64 and width % 8 == 0 and width <= 128


def _transformer(model: nn.Module) -> Transformer | None:
    """The first module of a model whose rows can be packed."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if type(model) is not SentenceTransformer:
        return None
    modules: list[Any] = list(model.children())
    first, *others = modules
    if type(first) is not Transformer or not all(type(module) in AFTER for module in others):
        return None
    trunk, config = first.model, first.model.config
    fits = (
        first.backend == "torch"
        and first.transformer_task == "feature-extraction"
        and config.model_type in TRUNKS
        and type(trunk).__module__.startswith("transformers.")
        and config._attn_implementation == "sdpa"
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "chunk_size_feed_forward", 0)
        and not config.output_attentions
        and not config.output_hidden_states
        # Activations that are computed again in the backward pass would be by the model's usual attention.
        and not any(getattr(module, "gradient_checkpointing", False) for module in trunk.modules())
        and not any(map(_compiled, model.modules()))
    )
    return first if fits else None


def packable(model: nn.Module, features: Features, widths: list[int]) -> bool:
    """Whether these rows, sorted by width, may be packed: a known trunk, and padding on the right alone."""
    transformer = _transformer(model)
    if transformer is None or not widths or not {"input_ids", "attention_mask"} <= set(features) <= KNOWN_KEYS:
        return False
    mask, trunk = features["attention_mask"], transformer.model
    if not _has_kernels(trunk.config, mask.device, trunk.dtype):
        return False
    if min(widths) < 1 or int(mask.sum()) != sum(widths):  # no tokens at all, padding on the left or inside
        return False
    padding = transformer._infer_flatten_position_offset() - 1
    # RoBERTa skips the padding token when it counts positions, even where a text spells it out.
    return padding < 0 or not bool((features["input_ids"].eq(padding) & mask.bool()).any())


def pack(model: nn.Module, features: Features, widths: list[int], begin: int, end: int) -> Features:
    """The rows from ``begin`` to ``end`` as sentence-transformers flattens them for a flash attention."""
    transformer = _transformer(model)
    assert transformer is not None  # packable() has seen to it
    width = widths[end - 1]
    mask = features["attention_mask"][begin:end, :width].bool()
    positions = torch.arange(width, device=mask.device) + transformer._infer_flatten_position_offset()
    lengths = torch.tensor([0, *widths[begin:end]], device=mask.device)
    ends = lengths.cumsum(0).to(torch.int32)
    packed = {
        key: value[begin:end, :width][mask].unsqueeze(0) if key in ("input_ids", "token_type_ids") else value
        for key, value in features.items()
        if key != "attention_mask"
    }
    return packed | {
        "position_ids": positions.expand_as(mask)[mask].unsqueeze(0),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": width,
        "max_length_k": width,
    }


@contextmanager
def attention_apart(model: nn.Module) -> Iterator[None]:
    """Let the model's attention keep packed rows apart while in this context."""
    transformer = _transformer(model)
    assert transformer is not None
    config = transformer.model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before
