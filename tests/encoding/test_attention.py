"""Attention over packed rows is attention over each row, with dropout that keeps as many weights as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from st_m3se.encoding import attention
from st_m3se.encoding.attention import ALL, Pattern, _Attended, _kept, _on_cpu

SHAPES = [(3, 1), (2, 4), (1, 7)]
"""Three rows of one token, two of four, one of seven."""


def tensors(seed: int = 0) -> list[Tensor]:
    """Queries, keys and values ``[T, heads, width]``, as a trunk hands them over: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(rows * width for rows, width in SHAPES)
    return [
        torch.randn(2, count, 4, dtype=torch.float64, generator=generator).transpose(0, 1).requires_grad_()
        for _ in range(3)
    ]


PATTERNS = [ALL, Pattern(causal=True), Pattern(reach=1), Pattern(causal=True, reach=2)]


def row_by_row(
    tensors: list[Tensor], kept: list[Tensor], dropout: float, pattern: Pattern, bias: Tensor | None, shapes: Any
) -> Tensor:
    """The definition: softmax of scaled products of what is seen in each row, weights dropped, the rest scaled up."""
    out, begin, masks = [], 0, iter(kept)
    for rows, width in shapes:
        for _ in range(rows):
            q, k, v = (tensor[begin : begin + width].transpose(0, 1) for tensor in tensors)
            products = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
            products = products if bias is None else products + bias[:, :width, :width]
            reach = width if pattern.reach is None else pattern.reach
            hidden = [[abs(i - j) > reach or (pattern.causal and j > i) for j in range(width)] for i in range(width)]
            weights = torch.softmax(products.masked_fill(torch.tensor(hidden), -torch.inf), 2)
            out.append((weights * next(masks) / (1 - dropout) @ v).transpose(0, 1))
            begin += width
    return torch.cat(out)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block", [1, 20, 2**18])
def test_each_row_is_its_own(
    monkeypatch: pytest.MonkeyPatch, dropout: float, block: int, pattern: Pattern, with_bias: bool
) -> None:
    """Values and gradients by the definition, with the same weights dropped, whatever the blocks."""
    monkeypatch.setattr(attention, "BLOCK", block)
    drawn: list[Tensor] = []

    def draw(shape: Any, share: float) -> Tensor:
        drawn.append(_kept(shape, share))
        return drawn[-1]

    monkeypatch.setattr(attention, "_kept", draw)
    torch.manual_seed(0)
    mine, plain = tensors(), tensors()
    biases = [torch.linspace(-2, 2, 128, dtype=torch.float64).view(2, 8, 8).sin().requires_grad_() for _ in range(2)]
    out = _on_cpu(mine, SHAPES, dropout, None, pattern, biases[0] if with_bias else None)
    kept = [row for mask in drawn for row in mask] if dropout else [torch.ones(1)] * 6
    expected = row_by_row(plain, kept, dropout, pattern, biases[1] if with_bias else None, SHAPES)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(mine + biases[:with_bias], plain + biases[1 : 1 + with_bias], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [65, 96, 127])
def test_long_rows_in_blocks_are_whole_rows(length: int, causal: bool) -> None:
    """Prevents a token at a block's edge from missing its neighbours, or the last block from seeing the padding."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2 * length, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    mine, plain = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    pattern, shapes = Pattern(causal, 7), [(2, length)]
    out = _on_cpu(mine, shapes, 0.0, None, pattern)
    expected = row_by_row(plain, [torch.ones(1)] * 2, 0.0, pattern, None, shapes)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_gradient_is_that_of_finite_differences() -> None:
    bias = torch.randn(2, 7, 7, dtype=torch.float64, requires_grad=True)

    def attend(*args: Tensor) -> Tensor:
        torch.manual_seed(1)
        out: Tensor = _Attended.apply(*args, SHAPES, 0.2, 0.5, Pattern(True, 3))  # type: ignore[no-untyped-call]
        return out

    assert torch.autograd.gradcheck(attend, [*tensors(), bias])


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.999])
def test_as_many_weights_are_dropped_as_it_says(dropout: float) -> None:
    """Within 5 standard deviations, and in no pattern from one weight to the next."""
    torch.manual_seed(0)
    dropped = 1.0 - _kept(torch.Size([1001, 999]), dropout).double()
    spread = (dropout * (1 - dropout) / dropped.numel()) ** 0.5
    assert abs(float(dropped.mean()) - dropout) < 5 * spread
    pairs = (dropped[:, 1:] - dropout) * (dropped[:, :-1] - dropout)
    assert abs(float(pairs.mean())) < 5 * dropout * (1 - dropout) / dropped.numel() ** 0.5


def test_half_precision_is_near_the_fused_attention() -> None:
    mine = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors()]
    out = _on_cpu(mine, SHAPES, 1e-9, None)  # the dropping path, with nothing dropped
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, _on_cpu(mine, SHAPES, 0.0, None), rtol=0.02, atol=0.02)
    out.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.bfloat16 for tensor in mine)


def kept(heads: int, length: int, dropout: float, pattern: Pattern) -> list[Tensor]:
    """What attention over one row, with four numbers per head, keeps until the backward pass."""
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    given = [torch.randn(length, heads, 4, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        _on_cpu(given, [(1, length)], dropout, None, pattern)
    return saved


def test_a_weight_keeps_a_byte_until_the_backward_pass() -> None:
    """Prevents the square of a text's length from taking 12 bytes and more of each weight."""
    weights, tokens = 2 * 64 * 64, 4 * 2 * 64 * 4 * 4
    assert sum(tensor.nbytes for tensor in kept(2, 64, 0.1, Pattern())) == weights + tokens


def test_near_tokens_of_long_rows_keep_no_weights() -> None:
    """Prevents PyTorch's plain attention: each of a block's 16 tokens has 48 weights in every head."""
    assert max(tensor.numel() for tensor in kept(8, 512, 0.0, Pattern(reach=16))) < 8 * 512 * 48


def test_dropping_everything_is_the_fused_attention_s_business() -> None:
    query = torch.randn(4, 2, 4)
    expected = F.scaled_dot_product_attention(*[query.transpose(0, 1)] * 3, dropout_p=1.0).transpose(0, 1)
    torch.testing.assert_close(_on_cpu([query] * 3, [(1, 4)], 1.0, None), expected, equal_nan=True)
