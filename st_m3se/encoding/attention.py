"""Attention in which the tokens of a packed sequence see their own row alone, registered with transformers.

On a GPU these are PyTorch's variable-length kernels, called directly: the public way to them, nested tensors, took 5
times as long. On a CPU it is PyTorch's fused attention over rows of equal length; where attention weights are dropped
there is no fused one, and the plain one keeps some 12 bytes of every weight for the backward pass, so that the square
of a text's length decides how much memory a step takes. Ours keeps one byte, draws cheaper, and stays in the caches.
It also takes a bias by relative position, as MPNet and T5 have it; and where tokens see near ones alone, long rows are
cut into blocks, so that work grows with their length and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

__all__ = ["NAME", "Pattern", "attend", "has_kernels"]

NAME = "st_m3se_packed"
# Attention weights at a time, on a CPU: 1 MiB in float32, which its caches hold. A quarter and four times as many
# measured the same within noise; all at once, up to 1.4 times as long.
BLOCK = 2**18
Shapes = list[tuple[int, int]]
"""How many rows of which length follow each other in a packed sequence."""


class Pattern(NamedTuple):
    """Which tokens of its row a token sees."""

    causal: bool = False
    """Not those after it."""
    reach: int | None = None
    """None farther away than this."""

    def seen(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of the tokens at ``columns`` those at ``rows`` see: bool, as the two broadcast."""
        apart = rows - columns
        seen = apart >= 0 if self.causal else torch.ones_like(apart, dtype=torch.bool)
        return seen if self.reach is None else seen & (apart.abs() <= self.reach)

    def of_row(self, width: int) -> Tensor | None:
        """Bool ``[width, width]``, or None where all is seen."""
        if not self.causal and (self.reach is None or self.reach >= width - 1):
            return None
        places = torch.arange(width)
        return self.seen(places[:, None], places)


ALL = Pattern()


def has_kernels(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed attention runs for a trunk of this configuration on this device, in this precision."""
    if device.type != "cuda":
        return device.type == "cpu"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capability = torch.cuda.get_device_capability(device)
    half = dtype in (torch.float16, torch.bfloat16)
    # The flash kernels' gradient of wider heads needs the shared memory of these.
    widest = 256 if half and capability in ((8, 0), (9, 0)) else 128
    # The kernels of full precision know no window around a token.
    windows = getattr(config, "sliding_window", None) is not None
    recent = torch.version.hip is None and capability >= (8, 0)
    return recent and dtype != torch.float64 and width % 8 == 0 and width <= widest and (half or not windows)


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


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """Attention weights, in float32 where queries and keys are in half precision.

    Args:
        query: ``[rows, heads, length, width]``, scaled.
        key: The same.
        bias: Added to the products: ``[heads, length, length]`` or longer, or None.
        seen: bool ``[length, length]``, or None: all are.
    """
    products = query @ key.transpose(2, 3)
    if bias is not None:
        length = products.shape[3]
        products = products + bias[:, :length, :length].to(torch.promote_types(products.dtype, bias.dtype))
    if seen is not None:
        products = products.masked_fill(~seen, -torch.inf)
    return products.softmax(3, dtype=torch.promote_types(products.dtype, torch.float32))


class _Attended(torch.autograd.Function):
    """Attention with dropout or a bias over ``[T, heads, width]``.

    The weights are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        shapes: Shapes,
        dropout: float,
        scale: float,
        pattern: Pattern,
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        masks = []
        for tokens, shape in _blocks(shapes, query.shape[1]):
            q, k, v = (_by_head(tensor[tokens], shape) for tensor in (query, key, value))
            weights = _weights(q * scale, k, bias, pattern.of_row(shape[1]))
            if dropout:
                kept = _kept(weights.shape, dropout)
                masks.append(kept)
                weights = weights.mul_(kept.to(weights.dtype))
            _by_head(out[tokens], shape).copy_((weights.to(v.dtype) @ v).div_(1 - dropout))
        ctx.save_for_backward(query, key, value, bias, out, *masks)
        ctx.options = shapes, dropout, scale, pattern
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, *masks = ctx.saved_tensors
        shapes, dropout, scale, pattern = ctx.options
        (of_out,) = gradients
        of_query, of_key, of_value = (
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value)
        )
        of_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        # The mean of the weights' gradients under the weights, which softmax's gradient takes off, from its end.
        mean = (of_out * out).sum(2, keepdim=True)
        of_out = of_out / (1 - dropout)
        for place, (tokens, shape) in enumerate(_blocks(shapes, query.shape[1])):
            q, k, v, g, m = (
                _by_head(tensor[tokens], shape).contiguous() for tensor in (query, key, value, of_out, mean)
            )
            q = q * scale
            weights = _weights(q, k, bias, pattern.of_row(shape[1]))
            of_weights = (g @ v.transpose(2, 3)).to(weights.dtype)
            if dropout:
                kept = masks[place].to(weights.dtype)
                of_weights.mul_(kept)
            of_weights.sub_(m).mul_(weights)
            if of_bias is not None:
                of_bias[:, : shape[1], : shape[1]] += of_weights.sum(0)
            of_products = of_weights.to(q.dtype)
            _by_head(of_query[tokens], shape).copy_((of_products @ k).mul_(scale))
            _by_head(of_key[tokens], shape).copy_(of_products.transpose(2, 3) @ q)
            weights = weights.mul_(kept) if dropout else weights
            _by_head(of_value[tokens], shape).copy_(weights.to(g.dtype).transpose(2, 3) @ g)
        return of_query, of_key, of_value, of_bias, None, None, None, None


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float | None) -> Tensor:
    """Fused attention of near tokens in long rows, ``[rows, heads, length, width]``: block by block.

    A block of as many tokens as one reaches sees itself and the block on either side.
    """
    reach, length = pattern.reach or 1, query.shape[2]
    blocks = -(-length // reach)
    q = F.pad(query, (0, 0, 0, blocks * reach - length))
    q = torch.unflatten(q.flatten(0, 1), 1, (blocks, reach))
    around = (0, 0, reach, (blocks + 1) * reach - length)
    k, v = (
        F.pad(tensor, around).flatten(0, 1).unfold(1, 3 * reach, reach).transpose(2, 3) for tensor in (key, value)
    )  # [rows * heads, blocks, 3 * reach, width]
    first = torch.arange(0, blocks * reach, reach)[:, None, None]
    places, others = first + torch.arange(reach)[:, None], first - reach + torch.arange(3 * reach)
    seen = pattern.seen(places, others) & (others >= 0) & (others < length)
    seen |= places >= length  # what is left of the last block sees anything, and nobody looks at it
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None], scale=scale)  # fused for four dimensions alone
    return torch.unflatten(out.flatten(1, 2)[:, :length], 0, query.shape[:2])


def _fused(query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, dropout: float, scale: float | None) -> Tensor:
    """PyTorch's attention over rows of equal length: ``[rows, heads, length, width]`` each."""
    length = query.shape[2]
    if pattern.reach is None or pattern.reach >= length - 1:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, is_causal=pattern.causal
        )
    if length > 4 * max(pattern.reach, 16) and not dropout:
        return _in_blocks(query, key, value, pattern, scale)
    mask = pattern.of_row(length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def _on_cpu(
    tensors: list[Tensor],
    shapes: Shapes,
    dropout: float,
    scale: float | None,
    pattern: Pattern = ALL,
    bias: Tensor | None = None,
) -> Tensor:
    """``[T, heads, width]`` each; the bias is ``[heads, length, length]`` for the longest row, or longer."""
    if bias is not None or 0 < dropout < 1:
        scale = tensors[0].shape[2] ** -0.5 if scale is None else scale
        attended: Tensor = _Attended.apply(*tensors, bias, shapes, dropout, scale, pattern)  # type: ignore[no-untyped-call]
        return attended
    sizes = [count * width for count, width in shapes]
    groups = [
        [_by_head(part, shape) for part, shape in zip(torch.split(tensor, sizes), shapes, strict=True)]
        for tensor in tensors
    ]
    outs = [_fused(q, k, v, pattern, dropout, scale) for q, k, v in zip(*groups, strict=True)]
    return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])


def attend(
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
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each row of a packed sequence: ``[1, heads, T, width]`` each -> ``[1, T, heads, width]``.

    Several heads of the query may share one of the key and value. A token sees those less than ``sliding_window`` away,
    and a position bias is ``[1, heads, length, length]`` for the longest row, or longer.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    pattern = Pattern(causal, None if sliding_window is None else sliding_window - 1)
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
        bias = None if position_bias is None else position_bias[0]
        return _on_cpu(tensors, shapes, dropout, scaling, pattern, bias).unsqueeze(0), None
    rows = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    if tensors[0].dtype in (torch.float16, torch.bfloat16):
        windows = {}
        if pattern.reach is not None and pattern.reach < max_length_q - 1:
            windows = {"window_size_left": pattern.reach, "window_size_right": 0 if causal else pattern.reach}
        out = torch.ops.aten._flash_attention_forward(*tensors, *rows, dropout, causal, False, scale=scaling, **windows)
        return out[0].unsqueeze(0), None
    tensors = [tensor.unsqueeze(0) for tensor in tensors]
    efficient = torch.ops.aten._efficient_attention_forward
    return efficient(*tensors, None, *rows, dropout, int(causal), True, scale=scaling)[0], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of the packed attention: none, as the rows' ends say it all."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _no_mask)
