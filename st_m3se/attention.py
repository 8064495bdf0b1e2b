"""Attention in which the tokens of a packed sequence see their own row alone, registered with transformers.

On a GPU these are PyTorch's variable-length kernels, called directly: the public way to them, nested tensors, took 5
times as long. On a CPU it is PyTorch's fused attention over rows of equal length; where attention weights are dropped
there is no fused one, and the plain one keeps some 12 bytes of every weight for the backward pass, so that the square
of a text's length decides how much memory a step takes. Ours keeps one byte, draws cheaper, and stays in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

__all__ = ["NAME", "has_kernels"]

NAME = "st_m3se_packed"
# Attention weights at a time, on a CPU: 1 MiB in float32, which its caches hold. A quarter and four times as many
# measured the same within noise; all at once, up to 1.4 times as long.
BLOCK = 2**18
Shapes = list[tuple[int, int]]
"""How many rows of which length follow each other in a packed sequence."""


def has_kernels(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed attention runs for a trunk of this configuration on this device."""
    if device.type != "cuda":
        return device.type == "cpu"
    width = config.hidden_size // config.num_attention_heads
    recent = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and dtype != torch.float64 and width % 8 == 0 and width <= 128


def _blocks(shapes: Shapes, heads: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Tokens and their shape, [rows, length], for pieces of at most ``BLOCK`` attention weights or one row."""
    begin = 0
    for count, width in shapes:
        step = max(1, BLOCK // (heads * width * width))
        for first in range(0, count, step):
            rows = min(step, count - first)
            yield slice(begin, begin + rows * width), (rows, width)
            begin += rows * width


def _by_head(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """``[rows * length, heads, width]`` -> ``[rows, heads, length, width]``, a view."""
    return torch.unflatten(tensor, 0, shape).transpose(1, 2)


def _kept(shape: torch.Size, dropout: float) -> Tensor:
    """1 where a weight is kept, else 0: int8, drawn from 32 random bits each, in a quarter of bernoulli_'s time."""
    count = shape.numel()
    bits = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)[:count]
    return (bits >= int(dropout * 2**32) - 2**31).view(torch.int8).view(shape)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """Attention weights, in float32 where queries and keys are in half precision."""
    products = query @ key.transpose(2, 3)
    return products.softmax(3, dtype=torch.promote_types(products.dtype, torch.float32))


class _Dropped(torch.autograd.Function):
    """Attention with dropout over ``[T, heads, width]``; the weights are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shapes: Shapes, dropout: float, scale: float
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        masks = []
        for tokens, shape in _blocks(shapes, query.shape[1]):
            q, k, v = (_by_head(tensor[tokens], shape) for tensor in (query, key, value))
            weights = _weights(q * scale, k)
            kept = _kept(weights.shape, dropout)
            masks.append(kept)
            _by_head(out[tokens], shape).copy_((weights.mul_(kept.to(weights.dtype)).to(v.dtype) @ v).div_(1 - dropout))
        ctx.save_for_backward(query, key, value, out, *masks)
        ctx.options = shapes, dropout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *masks = ctx.saved_tensors
        shapes, dropout, scale = ctx.options
        (of_out,) = gradients
        of_query, of_key, of_value = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
        )
        # The mean of the weights' gradients under the weights, which softmax's gradient takes off, from its end.
        mean = (of_out * out).sum(2, keepdim=True)
        of_out = of_out / (1 - dropout)
        for (tokens, shape), kept in zip(_blocks(shapes, query.shape[1]), masks, strict=True):
            q, k, v, g, m = (
                _by_head(tensor[tokens], shape).contiguous() for tensor in (query, key, value, of_out, mean)
            )
            q = q * scale
            weights = _weights(q, k)
            kept = kept.to(weights.dtype)
            of_weights = (g @ v.transpose(2, 3)).to(weights.dtype).mul_(kept).sub_(m).mul_(weights).to(q.dtype)
            _by_head(of_query[tokens], shape).copy_((of_weights @ k).mul_(scale))
            _by_head(of_key[tokens], shape).copy_(of_weights.transpose(2, 3) @ q)
            _by_head(of_value[tokens], shape).copy_(weights.mul_(kept).to(g.dtype).transpose(2, 3) @ g)
        return of_query, of_key, of_value, None, None, None


def _on_cpu(tensors: list[Tensor], shapes: Shapes, dropout: float, scale: float | None) -> Tensor:
    """``[T, heads, width]`` each."""
    if 0 < dropout < 1:
        scale = tensors[0].shape[2] ** -0.5 if scale is None else scale
        dropped: Tensor = _Dropped.apply(*tensors, shapes, dropout, scale)  # type: ignore[no-untyped-call]
        return dropped
    sizes = [count * width for count, width in shapes]
    groups = [
        [_by_head(part, shape) for part, shape in zip(torch.split(tensor, sizes), shapes, strict=True)]
        for tensor in tensors
    ]
    outs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale) for q, k, v in zip(*groups, strict=True)
    ]
    return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])


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
    """Attention within each row of a packed sequence: ``[1, heads, T, width]`` each -> ``[1, T, heads, width]``.

    Several heads of the query may share one of the key and value.
    """
    if key.shape[1] < query.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    tensors = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, width]
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        # Rotary positions leave queries and keys in float32; PyTorch's own attention is cast under autocast, not ours.
        tensors = [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]
    if not query.is_cuda:
        widths, counts = torch.unique_consecutive(cu_seq_lens_q.diff(), return_counts=True)
        shapes = list(zip(counts.tolist(), widths.tolist(), strict=True))
        return _on_cpu(tensors, shapes, dropout, scaling).unsqueeze(0), None
    rows = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        out = torch.ops.aten._flash_attention_forward(*tensors, *rows, dropout, False, False, scale=scaling)[0]
        return out.unsqueeze(0), None
    tensors = [tensor.unsqueeze(0) for tensor in tensors]
    return torch.ops.aten._efficient_attention_forward(*tensors, None, *rows, dropout, 0, True, scale=scaling)[0], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of the packed attention: none, as the rows' ends say it all."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
