"""The greatest logit of each word in each row of tokens, without the logits of all tokens: what SPLADE pools.

The logits of 2,048 tokens over a vocabulary of 30,522 words are 250 MB in single precision, and PyTorch keeps several
such tensors until the backward pass. Here a block of words at a time is compared with all tokens, and what is kept is
the number of the token whose logit is the greatest. The gradient flows to that token alone, and only where the logit
is positive: for most words and rows it is not, so that the backward pass is two products with a sparse matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["max_logits"]

# Logits at a time: 4 MiB in single precision; 256 MiB on a GPU. From half to four times as many measured the same.
BLOCK = 2**20
CUDA_BLOCK = 2**26


class _MaxLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, shapes: list[tuple[int, int]]) -> Tensor:
        rows, words = sum(count for count, _ in shapes), len(weight)
        greatest = hidden.new_empty(rows, words)
        token = torch.empty(rows, words, dtype=torch.int32, device=hidden.device)
        step = max(1, (CUDA_BLOCK if hidden.is_cuda else BLOCK) // len(hidden))
        for begin in range(0, words, step):
            block = slice(begin, begin + step)
            logits = weight[block] @ hidden.T  # tokens last: the greatest is found in a third of the time
            row, at = 0, 0
            for count, width in shapes:
                of_rows = torch.unflatten(logits[:, at : at + count * width], 1, (count, width))
                values, places = of_rows.max(2)
                greatest[row : row + count, block] = values.T
                first = torch.arange(at, at + count * width, width, device=hidden.device)
                token[row : row + count, block] = (places + first).T.to(torch.int32)
                row, at = row + count, at + count * width
        ctx.save_for_backward(hidden, weight, token)
        return greatest if bias is None else greatest.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, token = ctx.saved_tensors
        (gradient,) = gradients
        row, word = gradient.nonzero(as_tuple=True)
        tokens, values = token[row, word].long(), gradient[row, word]
        of_hidden = _times(tokens, word, values, len(hidden), weight)
        of_weight = _times(word, tokens, values, len(weight), hidden) if ctx.needs_input_grad[1] else None
        return of_hidden, of_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None, None


def _times(rows: Tensor, columns: Tensor, values: Tensor, count: int, dense: Tensor) -> Tensor:
    """A sparse matrix of ``count`` rows times a dense one, in single precision at least."""
    dtype = torch.promote_types(dense.dtype, torch.float32)
    sparse = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values.to(dtype), (count, len(dense)), check_invariants=False
    )
    product: Tensor = torch.sparse.mm(sparse, dense.to(dtype)).to(dense.dtype)
    return product


def max_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor) -> Tensor:
    """The greatest logit of each word in each row.

    Args:
        hidden: ``[T, dim]``, the tokens of all rows, one row after the other.
        weight: ``[words, dim]``, of the linear layer that makes logits.
        bias: ``[words]``, or None.
        lengths: int ``[rows]``, the tokens of each row, at least one.

    Returns:
        ``[rows, words]``.
    """
    widths, counts = torch.unique_consecutive(lengths, return_counts=True)
    shapes = list(zip(counts.tolist(), widths.tolist(), strict=True))
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    greatest: Tensor = _MaxLogits.apply(hidden, weight, bias, shapes)  # type: ignore[no-untyped-call]
    return greatest
