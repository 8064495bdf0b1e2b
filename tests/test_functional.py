"""The losses as functions of score tensors, against hand arithmetic, plain-loop references and their own invariances.

Each test's docstring names the silent failure that it prevents: a run that goes on and trains on the wrong number.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_m3se.functional import (
    all_margins_mse_loss,
    contrastive_loss,
    coupled_rank_distil_loss,
    m3se_loss,
    margin_mse_loss,
    plackett_luce_loss,
    rank_distil_loss,
    score_mse_loss,
    softmax_cross_entropy_loss,
)

NAN, INF = math.nan, math.inf
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
REDUCTIONS = ["mean", "sum", "none"]
JUNK = [NAN, INF, -INF, 3e30, -3e30]
"""What padding may hold."""

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
"""The same examples at each run; `deadline` would time the first, cold call."""


# Batches, and one common view of the losses


@dataclass(frozen=True)
class Batch:
    """Score tensors `[Q, D]` and their flags."""

    student: Tensor
    teacher: Tensor
    positives: Tensor | None = None
    mask: Tensor | None = None

    @property
    def flags(self) -> tuple[Tensor, Tensor]:
        """Positives and mask with their defaults written out."""
        column = torch.arange(self.student.shape[1]).expand(self.student.shape)
        return (
            column == 0 if self.positives is None else self.positives,
            column >= 0 if self.mask is None else self.mask,
        )

    def take(self, rows: slice) -> Batch:
        """The batch of some of the queries."""
        return Batch(*(None if part is None else part[rows] for part in self.parts))  # type: ignore[arg-type]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.student, self.teacher, self.positives, self.mask


@dataclass(frozen=True)
class Loss:
    """One loss with its options fixed: the function under test beside its reference."""

    name: str
    call: Callable[..., Tensor]
    """(student, teacher, positives, mask, reduction) -> loss"""
    reference: Callable[..., float | None]
    """(student, teacher, positives, mask) of one query -> loss, or None where it is not defined"""
    gap: float = 1.0
    """Distance of neighbouring teacher scores in random batches. At 300 every sample is the same ranking."""
    uses_teacher: bool = True
    uses_positives: bool = False
    squares: bool = False

    def __call__(self, batch: Batch, reduction: str = "mean") -> Tensor:
        return self.call(*batch.parts, reduction)

    def rows(self, batch: Batch) -> list[float | None]:
        """The reference's loss of each query."""
        parts = (batch.student.detach(), batch.teacher.detach(), *batch.flags)
        return [self.reference(*row) for row in zip(*(part.tolist() for part in parts), strict=True)]


def on_positives(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of scores and positives in the common form."""

    def call(student: Tensor, teacher: Tensor, positives: Tensor | None, mask: Tensor | None, reduction: Any) -> Tensor:
        return function(student, teacher, positives=positives, mask=mask, reduction=reduction)

    return call


def on_scores(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A loss of scores alone in the common form."""

    def call(student: Tensor, teacher: Tensor, positives: Tensor | None, mask: Tensor | None, reduction: Any) -> Tensor:
        return function(student, teacher, mask=mask, reduction=reduction, **options)

    return call


def without_teacher(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of student scores and positives in the common form."""

    def call(student: Tensor, teacher: Tensor, positives: Tensor | None, mask: Tensor | None, reduction: Any) -> Tensor:
        return function(student, positives=positives, mask=mask, reduction=reduction)

    return call


def seeded_coupled(top_k: int | None) -> Callable[..., Tensor]:
    """The sampled loss in the common form, with the same noise at each call."""

    def call(student: Tensor, teacher: Tensor, positives: Tensor | None, mask: Tensor | None, reduction: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return coupled_rank_distil_loss(
            student, teacher, top_k=top_k, num_samples=3, generator=generator, mask=mask, reduction=reduction
        )

    return call


def rankings_of(batch: Batch) -> Tensor:
    """For each query its documents by falling teacher score, padding last."""
    rows = zip(batch.teacher.tolist(), batch.flags[1].tolist(), strict=True)
    return torch.tensor([oracles.full_ranking(teacher, mask) for teacher, mask in rows])


def teacher_ranked_plackett_luce(top_k: int | None) -> Callable[..., Tensor]:
    """The loss of given rankings in the common form: the ranking is the teacher's own."""

    def call(student: Tensor, teacher: Tensor, positives: Tensor | None, mask: Tensor | None, reduction: Any) -> Tensor:
        rankings = rankings_of(Batch(student, teacher, positives, mask))
        return plackett_luce_loss(student, rankings, top_k=top_k, mask=mask, reduction=reduction)

    return call


def without_positives(reference: Callable[..., float | None], **options: Any) -> Callable[..., float | None]:
    """A reference that does not look at positives in the common form."""

    def row(student: list[float], teacher: list[float], positives: list[bool], mask: list[bool]) -> float | None:
        return reference(student, teacher, mask, **options)

    return row


def plackett_luce_reference(top_k: int | None) -> Callable[..., float | None]:
    """The reference of `teacher_ranked_plackett_luce`."""

    def row(student: list[float], teacher: list[float], positives: list[bool], mask: list[bool]) -> float | None:
        return oracles.plackett_luce(student, oracles.full_ranking(teacher, mask), mask, top_k)

    return row


def softmax_case(name: str, **options: float) -> Loss:
    reference = without_positives(oracles.softmax_cross_entropy, **options)
    return Loss(name, on_scores(softmax_cross_entropy_loss, **options), reference)


def rank_distil_case(match: str, **options: Any) -> Loss:
    call = on_scores(rank_distil_loss, match=match, **options)
    reference = without_positives(oracles.rank_distil, match=match, **options)
    name = "-".join(["rank_distil", match, *map(str, options.values())])
    return Loss(name, call, reference, squares=match == "score")


def coupled_case(top_k: int | None) -> Loss:
    reference = without_positives(oracles.most_probable_rank_distil, top_k=top_k)
    return Loss(f"coupled-{top_k}", seeded_coupled(top_k), reference, gap=300.0)


def plackett_luce_case(top_k: int | None) -> Loss:
    call, reference = teacher_ranked_plackett_luce(top_k), plackett_luce_reference(top_k)
    return Loss(f"plackett_luce-{top_k}", call, reference, uses_teacher=False)


M3SE = Loss("m3se", on_positives(m3se_loss), oracles.m3se, uses_positives=True, squares=True)
MARGIN_MSE = Loss("margin_mse", on_positives(margin_mse_loss), oracles.margin_mse, uses_positives=True, squares=True)
SCORE_MSE = Loss("score_mse", on_scores(score_mse_loss), without_positives(oracles.score_mse), squares=True)
SOFTMAX = softmax_case("softmax")
WARM_SOFTMAX = softmax_case("softmax-0.5-2.0", student_temperature=0.5, teacher_temperature=2.0)
ALL_MARGINS = Loss(
    "all_margins_mse", on_scores(all_margins_mse_loss), without_positives(oracles.all_margins_mse), squares=True
)
TOP_MARGINS = Loss(
    "all_margins_mse-3.0",
    on_scores(all_margins_mse_loss, top_temperature=3.0),
    without_positives(oracles.all_margins_mse, top_temperature=3.0),
    squares=True,
)
CONTRASTIVE = Loss(
    "contrastive", without_teacher(contrastive_loss), oracles.contrastive, uses_positives=True, uses_teacher=False
)
BINARY = rank_distil_case("binary", top_k=2)
SCORE = rank_distil_case("score", top_k=2)
COUPLED = coupled_case(None)
LOSSES = [
    M3SE,
    MARGIN_MSE,
    SCORE_MSE,
    ALL_MARGINS,
    TOP_MARGINS,
    CONTRASTIVE,
    SOFTMAX,
    WARM_SOFTMAX,
    BINARY,
    rank_distil_case("binary", top_k=3, penalty_weight=0.25),
    rank_distil_case("binary", top_k=100),
    rank_distil_case("score", top_k=1, penalty_weight=3.0),
    SCORE,
    rank_distil_case("score", top_k=100),
    COUPLED,
    coupled_case(1),
    coupled_case(2),
    coupled_case(100),
    plackett_luce_case(None),
    plackett_luce_case(2),
    plackett_luce_case(100),
]
TEACHER_LOSSES = [loss for loss in LOSSES if loss.uses_teacher]


def each(losses: list[Loss]) -> pytest.MarkDecorator:
    """Run the test once for each loss."""
    return pytest.mark.parametrize("loss", losses, ids=[loss.name for loss in losses])


def value_and_grad(loss: Loss, batch: Batch, reduction: str = "sum") -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum with respect to the student's scores."""
    student = batch.student.detach().clone().requires_grad_()
    value = loss(replace(batch, student=student), reduction)
    value.sum().backward()
    assert student.grad is not None
    return value.detach(), student.grad


def assert_reduces_to(actual: Tensor, rows: list[float | None], reduction: str, rtol: float, atol: float) -> None:
    """The loss is the reference's rows, reduced, and is finite."""
    expected = torch.tensor(oracles.reduce(rows, reduction), dtype=torch.float64)
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def tensor(rows: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def flags(columns: set[int], width: int) -> list[bool]:
    return [column in columns for column in range(width)]


def random_batch(
    loss: Loss,
    *,
    dtype: torch.dtype,
    positives: bool,
    mask: bool,
    unscored: bool,
    scale: float = 1.0,
    junk: list[float] | None = None,
    shape: tuple[int, int] = (8, 7),
) -> Batch:
    """Distinct teacher scores in random order; some padding, positives and unscored documents where asked for."""
    generator = torch.Generator().manual_seed(1)
    student = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    order = torch.rand(shape, generator=generator).argsort(dim=1) - shape[1] // 2
    jitter = 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)
    teacher = max(loss.gap, scale) * (order + jitter)
    missing = torch.rand(shape, generator=generator) < 0.3
    if unscored and loss.uses_teacher:
        teacher[missing] = NAN
    real = torch.rand(shape, generator=generator) < 0.7
    real[0], real[1] = True, False
    if mask:
        padding = torch.tensor(list(itertools.islice(itertools.cycle(junk or JUNK), real.numel()))).view(shape)
        student = torch.where(real, student, padding)
        teacher = torch.where(real, teacher, padding.flip(1))
    marked = torch.rand(shape, generator=generator) < 0.35
    return Batch(student.to(dtype), teacher.to(dtype), marked if positives else None, real if mask else None)


# Values worked out by hand


def cross_check(loss: Loss, batch: Batch, expected: list[float], dtype: torch.dtype = torch.float64) -> None:
    """Function and reference both give the expected loss of each query."""
    assert loss.rows(batch) == pytest.approx(expected, abs=1e-9)
    inputs = replace(batch, student=batch.student.to(dtype), teacher=batch.teacher.to(dtype))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert loss(inputs, "none").tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


M3SE_TABLE: dict[str, tuple[list[float], list[float], set[int], float]] = {
    "one-positive": ([5, 3, 1], [4, 1, 2], {0}, ((5 - 3) - (4 - 1)) ** 2 + (2 - 1) ** 2),
    "shifted": ([12, 10, 8], [1, -2, -1], {0}, ((12 - 10) - (1 + 2)) ** 2 + (-1 + 2) ** 2),
    "two-over": ([10, 2, 5, 1], [7, 6, 3, 4], {0}, ((10 - 5) - (7 - 3)) ** 2 + (6 - 3) ** 2 + (4 - 3) ** 2),
    "two-positives": (
        [4, 2, 3, 1, 0],
        [3, 1, 2, 5, -1],
        {0, 1},
        ((4 - 3) - (3 - 2)) ** 2 + ((2 - 3) - (1 - 2)) ** 2 + (5 - 2) ** 2,
    ),
    "tie-first": ([5, 3, 3], [4, 1, 2], {0}, ((5 - 3) - (4 - 1)) ** 2 + (2 - 1) ** 2),
    "unscored-negative": ([5, 3, NAN], [4, 1, 2], {0}, ((5 - 3) - (4 - 1)) ** 2 + (2 - 1) ** 2),
    "unscored-positive": ([NAN, 3, 1], [4, 1, 2], {0}, (2 - 1) ** 2),
    "one-unscored-positive": ([5, NAN, 3, 1], [4, 9, 1, 2], {0, 1}, ((5 - 3) - (4 - 1)) ** 2 + (2 - 1) ** 2),
    "hinge-of-zero": ([NAN, 3, 1], [4, 2, 1], {0}, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", M3SE_TABLE)
def test_m3se_table(row: str, dtype: torch.dtype) -> None:
    """Prevents a hinge against t_j*, a detached or wrong j*, and averages where the paper has sums."""
    teacher, student, positives, expected = M3SE_TABLE[row]
    batch = Batch(tensor([student]), tensor([teacher]), torch.tensor([flags(positives, len(teacher))]))
    cross_check(M3SE, batch, [expected], dtype)
    if positives == {0}:
        cross_check(M3SE, replace(batch, positives=None), [expected], dtype)


def test_m3se_batch_mean_does_not_mix_queries() -> None:
    """Prevents `[B]` broadcast against `[B, 1]`, which mixes queries and gives 7 here."""
    batch = Batch(tensor([[4, 1, 2], [7, 6, 3]]), tensor([[5, 3, 1], [10, 2, 5]]))
    cross_check(M3SE, batch, [1 + 1, (5 - 4) ** 2 + (6 - 3) ** 2])
    assert M3SE(batch).item() == pytest.approx((2 + 10) / 2)


def test_m3se_gradient_flows_through_the_top_negative() -> None:
    """Prevents a detached s_j*: the loss would be right and the top negative would never move."""
    _, grad = value_and_grad(M3SE, Batch(tensor([[4, 1, 2]]), tensor([[5, 3, 1]])))
    margin, hinge = (5 - 3) - (4 - 1), 2 - 1
    assert grad.tolist() == [[-2 * margin, 2 * margin - 2 * hinge, 2 * hinge]]


HAND_VALUES: dict[str, tuple[Loss, list[list[float]], list[list[float]], set[int], float]] = {
    "margin_mse": (
        MARGIN_MSE,
        [[4, 2, 3, 1, 0]],
        [[3, 1, 2, 5, -1]],
        {0, 1},
        ((1 - 1) ** 2 + (3 + 2) ** 2 + (4 - 4) ** 2 + (-1 + 1) ** 2 + (1 + 4) ** 2 + (2 - 2) ** 2) / 6,
    ),
    "margin_mse-unscored": (
        MARGIN_MSE,
        [[4, NAN, 3, NAN, 0]],
        [[3, 1, 2, 5, 1]],
        {0, 1},
        (((4 - 3) - (3 - 2)) ** 2 + ((4 - 0) - (3 - 1)) ** 2) / 2,
    ),
    "score_mse": (SCORE_MSE, [[5, 3, 1]], [[4, 1, 2]], {0}, (1**2 + 2**2 + 1**2) / 3),
    "score_mse-unscored": (SCORE_MSE, [[5, NAN, 1]], [[4, 1, 2]], {0}, (1**2 + 1**2) / 2),
    "all_margins_mse": (
        ALL_MARGINS,
        [[5, 3, 1]],
        [[4, 1, 2]],
        {0},
        (((5 - 3) - (4 - 1)) ** 2 + ((5 - 1) - (4 - 2)) ** 2 + ((3 - 1) - (1 - 2)) ** 2) / 3**2,
    ),
    "all_margins_mse-unscored": (ALL_MARGINS, [[5, NAN, 1]], [[4, 1, 2]], {0}, ((5 - 1) - (4 - 2)) ** 2 / 2**2),
    "all_margins_mse-top": (
        TOP_MARGINS,
        [[3 * LN3, 0]],
        [[0, 1]],
        {0},
        (1 / 2 + 3 / 4) / 2 * (1 / 2 + 1 / 4) / 2 * (3 * LN3 + 1) ** 2,
    ),
    "contrastive": (CONTRASTIVE, [[0, 0, 0]], [[LN2, LN3, 0]], {0}, math.log((2 + 3 + 1) / 2)),
    "contrastive-positives": (
        CONTRASTIVE,
        [[0, 0, 0]],
        [[LN2, LN3, 0]],
        {0, 1},
        (math.log((2 + 1) / 2) + math.log((3 + 1) / 3)) / 2,
    ),
    "softmax": (SOFTMAX, [[LN3, 0]], [[0, LN2]], {0}, 3 / 4 * LN3 + 1 / 4 * math.log(3 / 2)),
    "softmax-temperatures": (
        WARM_SOFTMAX,
        [[2 * LN3, 0]],
        [[0, LN2 / 2]],
        {0},
        3 / 4 * LN3 + 1 / 4 * math.log(3 / 2),
    ),
    "softmax-unscored": (SOFTMAX, [[LN3, 0, NAN]], [[0, LN2, 0]], {0}, 3 / 4 * LN4 + 1 / 4 * LN2),
    "binary": (
        rank_distil_case("binary", top_k=1, penalty_weight=2.0),
        [[-LN3, LN3, NAN]],
        [[LN3, 0, 0]],
        {0},
        3 / 4 * LN2 + 1 / 4 * LN2 + 2 * (LN4 + LN2),
    ),
    "score": (
        rank_distil_case("score", top_k=2, penalty_weight=0.5),
        [[4, 2, 3, 1, NAN]],
        [[3, 1, 2, 5, 4]],
        {0},
        (4 - 3) ** 2 + (3 - 2) ** 2 + 0.5 * ((5 - 2) ** 2 + (4 - 2) ** 2),
    ),
    "score-tie": (SCORE, [[1, 1, 1]], [[5, 2, 3]], {0}, (1 - 5) ** 2 + (1 - 2) ** 2 + (3 - 2) ** 2),
    "coupled-negative-logits": (COUPLED, [[-1000, -2000]], [[0, LN3]], {0}, LN4),
    "coupled-unscored": (COUPLED, [[-2000, NAN, -1000]], [[0, LN2, LN3]], {0}, (math.log(6) - LN3) + LN3),
    "coupled-unscored-top": (coupled_case(1), [[-2000, NAN, -1000]], [[0, LN2, LN3]], {0}, math.log(6) - LN3),
}


@pytest.mark.parametrize("row", HAND_VALUES)
def test_values_by_hand(row: str) -> None:
    """Prevents a function and a reference that are wrong alike: sums for means, T squared, unscored documents lost."""
    loss, teacher, student, positives, expected = HAND_VALUES[row]
    batch = Batch(tensor(student), tensor(teacher), torch.tensor([flags(positives, len(student[0]))]))
    cross_check(loss, batch, [expected])


PLACKETT_LUCE = Batch(tensor([[0, LN3, LN2], [0, LN2, LN3]]), tensor([[0, 2, 1], [1, 0, 2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_plackett_luce_of_a_given_ranking(dtype: torch.dtype) -> None:
    """Prevents rankings read as ranks, or denominators over the documents already placed; TF-Ranking's value."""
    rankings = torch.tensor([[2, 0, 1], [2, 0, 1]])
    loss = plackett_luce_loss(PLACKETT_LUCE.student.to(dtype), rankings, top_k=2, reduction="none")
    # (6/2) * (4/1) and (6/3) * (3/1): what is left in the denominator over what is taken, place by place
    expected = [math.log(6 / 2 * 4 / 1), math.log(6 / 3 * 3 / 1)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    mean = plackett_luce_loss(PLACKETT_LUCE.student.to(dtype), rankings, top_k=2)
    assert mean.item() == pytest.approx(sum(expected) / 2, abs=1e-6) == pytest.approx(2.138333, abs=1e-6)


def weighted_over_all_rankings(batch: Batch, top_k: int | None) -> Tensor:
    """`plackett_luce_loss` of every ranking, weighted by its probability under the teacher's softmax."""
    width = batch.student.shape[1]
    total = torch.zeros(batch.student.shape[0], dtype=torch.float64)
    for ranking in itertools.permutations(range(width)):
        weights = [oracles.ranking_probability(teacher, ranking) for teacher in batch.teacher.tolist()]
        rankings = torch.tensor(ranking).expand(batch.student.shape)
        losses = plackett_luce_loss(batch.student, rankings, top_k=top_k, reduction="none")
        total = total + torch.tensor(weights, dtype=torch.float64) * losses
    return total


@pytest.mark.parametrize(
    ("top_k", "checked"), [(1, [0.891285, 0.998513]), (2, [1.443289, 1.794686]), (3, [1.443289, 1.794686])]
)
def test_coupled_expectation_by_enumeration(top_k: int, checked: list[float]) -> None:
    """Prevents a top-k sum that is off by one place: each checked value is an expectation over all rankings."""
    teachers = [[math.exp(score) for score in (0, 2, 1)], [math.exp(score) for score in (1, 0, 2)]]
    expected = []
    for weights, students in zip(teachers, ([1, 3, 2], [1, 2, 3]), strict=True):
        loss = 0.0
        for first, second in itertools.permutations(range(3), 2):
            one = math.log(sum(students) / students[first])
            two = math.log((sum(students) - students[first]) / students[second])
            probability = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
            loss += probability * (one + two * (top_k > 1))
        expected.append(loss)
    actual = weighted_over_all_rankings(PLACKETT_LUCE, top_k).tolist()
    assert actual == pytest.approx(expected, abs=1e-9)
    assert actual == pytest.approx(checked, abs=1e-6)
    for student, teacher, loss in zip(*(part.tolist() for part in PLACKETT_LUCE.parts[:2]), expected, strict=True):
        moments = oracles.coupled_moments(student, teacher, [True] * 3, top_k)
        assert moments is not None
        assert moments[0] == pytest.approx(loss, abs=1e-9)


# Random batches against the references


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("loss", "positives", "mask", "unscored"),
    [
        pytest.param(loss, positives, mask, unscored, id=f"{loss.name}{positives:d}{mask:d}{unscored:d}")
        for loss in LOSSES
        for positives in ([False, True] if loss.uses_positives else [True])
        for mask in (False, True)
        for unscored in ([False, True] if loss.uses_teacher else [False])
    ],
)
def test_against_reference(loss: Loss, positives: bool, mask: bool, unscored: bool) -> None:
    """Prevents padding or unscored documents that leak into value or gradient, and sums in half precision."""
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        batch = random_batch(loss, dtype=dtype, positives=positives, mask=mask, unscored=unscored)
        rows = loss.rows(batch)
        assert any(row is not None and row > 0 for row in rows)
        value, grad = value_and_grad(loss, batch, reduction)
        double = dtype == torch.float64
        assert value.dtype == (torch.float64 if double else torch.float32)
        assert_reduces_to(value, rows, reduction, *((1e-11, 1e-10) if double else (3e-5, 1e-5)))
        assert grad.dtype == dtype
        assert grad.isfinite().all()
        assert grad.any()
        if mask:
            assert not grad[~batch.flags[1]].any()


@each(LOSSES)
def test_large_half_precision_scores(loss: Loss) -> None:
    """Prevents float16 arithmetic: margins of 300 square to 90000, which is infinite there."""
    for dtype in (torch.bfloat16, torch.float16):
        batch = random_batch(loss, dtype=dtype, positives=True, mask=True, unscored=True, scale=300.0)
        assert_reduces_to(loss(batch, "none"), loss.rows(batch), "none", 3e-5, 1e-2)


@each(TEACHER_LOSSES)
def test_mixed_dtypes(loss: Loss) -> None:
    """Prevents a full-precision input rounded to the other one's half precision."""
    double = random_batch(loss, dtype=torch.float64, positives=True, mask=True, unscored=True)
    for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        batch = replace(double, student=double.student.to(student), teacher=double.teacher.to(teacher))
        value, grad = value_and_grad(loss, batch, "none")
        assert value.dtype == torch.float32
        assert grad.dtype == student
        assert_reduces_to(value, loss.rows(batch), "none", 3e-5, 1e-5)


@each(LOSSES)
def test_autocast_gives_the_float32_result(loss: Loss) -> None:
    """Prevents autocast from moving a part of the loss to half precision."""
    batch = random_batch(loss, dtype=torch.float32, positives=True, mask=True, unscored=True)
    value, grad = value_and_grad(loss, batch, "none")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            cast_value, cast_grad = value_and_grad(loss, batch, "none")
        assert cast_value.dtype == torch.float32
        torch.testing.assert_close(cast_value, value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(cast_grad, grad, rtol=1e-6, atol=1e-7)


@each(LOSSES)
def test_gradcheck(loss: Loss) -> None:
    """Prevents a gradient that is not the loss's own, as from a detached term or a value clamped too early."""
    batch = random_batch(
        loss, dtype=torch.float64, positives=True, mask=True, unscored=True, junk=[3e30, -7.0, 50.0], shape=(6, 5)
    )

    for reduction in REDUCTIONS:
        function = partial(lambda student, how: loss(replace(batch, student=student), how), how=reduction)
        assert torch.autograd.gradcheck(function, batch.student.requires_grad_())


@each(LOSSES)
def test_inputs_are_not_changed_and_the_teacher_gets_no_gradient(loss: Loss) -> None:
    """Prevents padding filled in place, and a teacher in the graph that learns to agree with the student."""
    batch = random_batch(loss, dtype=torch.float32, positives=True, mask=True, unscored=True)
    copies = [part.clone() for part in batch.parts if part is not None]
    student, teacher = batch.student.requires_grad_(), batch.teacher.requires_grad_()
    loss(replace(batch, student=student, teacher=teacher)).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert teacher.grad is None
    for part, copy in zip(batch.parts, copies, strict=True):
        assert part is not None
        torch.testing.assert_close(part.detach(), copy, rtol=0, atol=0, equal_nan=True)


@each(LOSSES)
def test_defaults_are_column_0_and_every_document(loss: Loss) -> None:
    """Prevents defaults that differ from the flags they stand for."""
    batch = random_batch(loss, dtype=torch.float64, positives=False, mask=False, unscored=True)
    positives, mask = batch.flags
    explicit = replace(batch, positives=positives, mask=mask)
    torch.testing.assert_close(loss(batch, "none"), loss(explicit, "none"), rtol=0, atol=0)


@each([M3SE, MARGIN_MSE])
def test_positives_in_the_padding_are_padding(loss: Loss) -> None:
    """Prevents a mark on a padded column from making its junk score a margin."""
    batch = random_batch(loss, dtype=torch.float64, positives=True, mask=True, unscored=True)
    positives, mask = batch.flags
    assert (positives & ~mask).any()
    clean = replace(batch, positives=positives & mask)
    torch.testing.assert_close(loss(batch, "none"), loss(clean, "none"), rtol=0, atol=0)


@pytest.mark.parametrize("equal", [64, 200])
@each([M3SE, rank_distil_case("binary", top_k=5), rank_distil_case("score", top_k=5)])
def test_wide_ties_go_to_the_first(loss: Loss, equal: int) -> None:
    """Prevents an unstable sort, which keeps the order of short rows and breaks that of long ones."""
    student = torch.randn(3, equal, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    teacher = torch.full_like(student, 0.5)
    batch = Batch(student, teacher, student > 1)
    assert_reduces_to(loss(batch, "none"), loss.rows(batch), "none", 1e-11, 1e-10)


# Scores of any size


HUGE_STUDENT = [[3e30, -3e30, 0, 1], [-3e30, 3e30, 3e30, 2], [1, 2, 3, 4], [-3e30, -3e30, -3e30, 3e30]]
HUGE_TEACHER = [[1, 2, 3, 4], [3e30, -3e30, 0, 1000], [3e30, 1000, 0, -3e30], [-3e30, 0, 1000, NAN]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each([loss for loss in LOSSES if not loss.squares])
def test_huge_scores_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    """Prevents inf - inf and 0 * inf: one wild score would turn every weight of the model to NaN."""
    teacher = tensor(HUGE_TEACHER, dtype)
    if not loss.uses_teacher:
        teacher = teacher.nan_to_num(0.5)
    teacher[0] *= loss.gap
    batch = Batch(tensor(HUGE_STUDENT, dtype), teacher)
    value, grad = value_and_grad(loss, batch, "none")
    assert_reduces_to(value, loss.rows(batch), "none", 1e-5, 1e-5)
    assert grad.isfinite().all()


@each([loss for loss in LOSSES if loss.squares])
def test_huge_scores_square_in_double(loss: Loss) -> None:
    """Prevents a fill value or a clamp that a large real score runs into."""
    batch = Batch(tensor(HUGE_STUDENT), tensor(HUGE_TEACHER))
    value, grad = value_and_grad(loss, batch, "none")
    assert_reduces_to(value, loss.rows(batch), "none", 1e-9, 1e-9)
    assert grad.isfinite().all()


# Queries with nothing left


NOTHING_LEFT: dict[str, tuple[list[float], set[int], set[int], set[str]]] = {
    # teacher scores, positives, real documents, and the losses that have something left
    "all-masked": ([3.0, 2.0, 1.0], {0}, set(), set()),
    "all-unscored": ([NAN, NAN, NAN], {0}, {0, 1, 2}, set()),
    "one-positive-only": ([3.0, 2.0, 1.0], {0}, {0}, {"score_mse", "rank_distil"}),
    "one-negative-only": ([3.0, 2.0, 1.0], {0}, {1}, {"score_mse", "rank_distil"}),
    "one-unscored-only": ([NAN, 2.0, 1.0], {0}, {0}, set()),
    "no-negative": (
        [3.0, 2.0, 1.0],
        {0, 1, 2},
        {0, 1, 2},
        {"score_mse", "all_margins_mse", "softmax", "rank_distil", "coupled"},
    ),
    "no-positive": (
        [3.0, 2.0, 1.0],
        set(),
        {0, 1, 2},
        {"m3se", "score_mse", "all_margins_mse", "softmax", "rank_distil", "coupled"},
    ),
    "masked-positive": (
        [3.0, 2.0, 1.0],
        {0},
        {1, 2},
        {"m3se", "score_mse", "all_margins_mse", "softmax", "rank_distil", "coupled"},
    ),
    "unscored-positive": (
        [NAN, 2.0, 1.0],
        {0},
        {0, 1, 2},
        {"m3se", "score_mse", "all_margins_mse", "softmax", "rank_distil", "coupled"},
    ),
    "unscored-positive-one-negative": (
        [NAN, 2.0, 1.0],
        {0},
        {0, 1},
        {"score_mse", "softmax", "rank_distil", "coupled"},
    ),
    "unscored-negatives": ([3.0, NAN, NAN], {0}, {0, 1, 2}, {"score_mse", "softmax", "rank_distil", "coupled"}),
}
OTHER_QUERY = ([1.0, 3.0, 2.0], [0.5, -1.0, 0.25])


@each(TEACHER_LOSSES)
def test_a_query_with_nothing_left(loss: Loss) -> None:
    """Prevents 0/0 and empty maxima, and a mean that counts queries which teach nothing."""
    for row, first in itertools.product(NOTHING_LEFT, (True, False)):
        check_a_query_with_nothing_left(loss, row, first)


def check_a_query_with_nothing_left(loss: Loss, row: str, first: bool) -> None:
    scores, positive, real, defined = NOTHING_LEFT[row]
    teachers = [scores, OTHER_QUERY[0]]
    positives, mask = [flags(positive, 3), flags({0}, 3)], [flags(real, 3), flags({0, 1, 2}, 3)]
    order = slice(None) if first else slice(None, None, -1)
    batch = Batch(
        tensor([[3.0, 1.0, 2.0], OTHER_QUERY[1]][order]),
        tensor(teachers[order]) * loss.gap,
        torch.tensor(positives[order]),
        torch.tensor(mask[order]),
    )
    query = 0 if first else 1
    rows = loss.rows(batch)
    is_defined = loss.name.split("-")[0] in defined
    assert (rows[query] is not None) == is_defined, row
    for reduction in REDUCTIONS:
        value, grad = value_and_grad(loss, batch, reduction)
        assert_reduces_to(value, rows, reduction, 1e-11, 1e-11)
        assert grad.isfinite().all()
        assert grad[1 - query].any()
        if not is_defined:
            assert not grad[query].any()
            alone = loss(batch.take(slice(1 - query, 2 - query)), reduction)
            assert value.max().item() == pytest.approx(alone.item())


@pytest.mark.parametrize("columns", [set(), {0}, {2}], ids=["all-masked", "first-only", "last-only"])
def test_plackett_luce_with_nothing_left(columns: set[int]) -> None:
    """Prevents the constant 0 of a ranking of one document from diluting the mean."""
    batch = Batch(PLACKETT_LUCE.student, PLACKETT_LUCE.teacher, None, torch.tensor([flags({0, 1, 2}, 3)] * 2))
    assert batch.mask is not None
    batch.mask[1] = torch.tensor(flags(columns, 3))
    loss = plackett_luce_case(None)
    alone = loss(batch.take(slice(0, 1)))
    assert alone.item() > 0
    for reduction, expected in (("mean", alone.item()), ("sum", alone.item()), ("none", [alone.item(), 0.0])):
        value, grad = value_and_grad(loss, batch, reduction)
        assert value.tolist() == pytest.approx(expected)
        assert grad[0].any()
        assert not grad[1].any()


@each(LOSSES)
def test_a_batch_with_nothing_left(loss: Loss) -> None:
    """Prevents NaN from the mean of no queries, and a loss without a graph, on which `backward` fails."""
    for reduction, dtype in itertools.product(REDUCTIONS, (torch.float32, torch.bfloat16)):
        junk = tensor([JUNK[:3], JUNK[2:]], dtype)
        value, grad = value_and_grad(loss, Batch(junk, junk, None, torch.zeros(2, 3, dtype=torch.bool)), reduction)
        assert value.tolist() == ([0.0, 0.0] if reduction == "none" else 0.0)
        assert value.dtype == torch.float32
        assert grad.isfinite().all()
        assert not grad.any()


# Properties


@st.composite
def batches(
    draw: st.DrawFn,
    loss: Loss,
    queries: st.SearchStrategy[int] | None = None,
    unscored: bool = True,
    masked: bool = True,
) -> Batch:
    """Float64 batches on a grid of 1/64, where sums and differences are exact; a row's teacher scores differ."""
    rows, width = draw(st.integers(1, 4) if queries is None else queries), draw(st.integers(1, 6))
    scores = st.integers(-640, 640)

    def matrix(elements: st.SearchStrategy[Any], unique: bool = False) -> Tensor:
        row = st.lists(elements, min_size=width, max_size=width, unique=unique)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))

    teacher = matrix(scores, unique=True) * (1 / 64 if loss.gap == 1.0 else loss.gap)
    teacher = teacher.double()
    if unscored and loss.uses_teacher:
        teacher[matrix(st.sampled_from([False, False, True]))] = NAN
    student = matrix(scores).double() / 64
    mask = matrix(st.sampled_from([True, True, False])) if masked else None
    return Batch(student, teacher, matrix(st.booleans()), mask)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Value and gradient agree to rounding."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("shifted", ["student", "teacher"])
@each([M3SE, MARGIN_MSE, ALL_MARGINS, TOP_MARGINS, SOFTMAX, WARM_SOFTMAX])
def test_shift_of_a_query_changes_nothing(loss: Loss, shifted: str, data: st.DataObject) -> None:
    """Prevents a hinge against t_j*: teacher and student scales differ, and the loss would only pull them together."""
    batch = data.draw(batches(loss))
    rows = batch.student.shape[0]
    shifts = data.draw(st.lists(st.integers(-6400, 6400), min_size=rows, max_size=rows))
    shift = torch.tensor(shifts, dtype=torch.float64)[:, None] / 64
    moved = replace(batch, **{shifted: getattr(batch, shifted) + shift})
    assert_same(value_and_grad(loss, moved, "none"), value_and_grad(loss, batch, "none"))


@PROPERTY
@given(data=st.data())
@each(LOSSES)
def test_order_of_documents_changes_nothing(loss: Loss, data: st.DataObject) -> None:
    """Prevents a meaning read into a column where `positives` says which documents are relevant."""
    batch = data.draw(batches(loss))
    rows, width = batch.student.shape
    orders = data.draw(st.lists(st.permutations(range(width)), min_size=rows, max_size=rows))
    order = torch.tensor(orders)
    permuted = Batch(*(None if part is None else part.gather(1, order) for part in batch.parts))  # type: ignore[arg-type]
    value, grad = value_and_grad(loss, batch, "none")
    assert_same(value_and_grad(loss, permuted, "none"), (value, grad.gather(1, order)))


@PROPERTY
@given(data=st.data())
@each(LOSSES)
def test_padding_changes_nothing(loss: Loss, data: st.DataObject) -> None:
    """Prevents padding from being ranked, averaged over, or multiplied by 0, which leaves NaN in place."""
    batch = data.draw(batches(loss, masked=False))
    (rows, width), extra = batch.student.shape, data.draw(st.integers(1, 3))
    junk = st.lists(st.sampled_from(JUNK), min_size=extra, max_size=extra)
    order = torch.tensor(data.draw(st.permutations(range(width + extra))))

    def padded(part: Tensor, filling: Tensor) -> Tensor:
        return torch.cat([part, filling], dim=1)[:, order]

    student, teacher = (tensor(data.draw(st.lists(junk, min_size=rows, max_size=rows))) for _ in range(2))
    marks = torch.tensor(data.draw(st.lists(st.booleans(), min_size=extra, max_size=extra))).expand(rows, extra)
    assert batch.positives is not None
    wide = Batch(
        padded(batch.student, student),
        padded(batch.teacher, teacher),
        padded(batch.positives, marks),
        padded(torch.ones_like(batch.positives), torch.zeros(rows, extra, dtype=torch.bool)),
    )
    value, grad = value_and_grad(loss, batch, "none")
    zeros = torch.zeros(rows, extra, dtype=torch.float64)
    assert_same(value_and_grad(loss, wide, "none"), (value, padded(grad, zeros)))


@settings(PROPERTY, max_examples=10)
@given(data=st.data())
@each(LOSSES)
def test_one_batch_of_8_is_8_batches_of_1(loss: Loss, data: st.DataObject) -> None:
    """Prevents queries that see each other, by broadcasting or by a reduction over the wrong dimension."""
    batch = data.draw(batches(loss, queries=st.just(8)))
    singles = [value_and_grad(loss, batch.take(slice(row, row + 1)), "none") for row in range(8)]
    values, grads = (torch.cat(parts) for parts in zip(*singles, strict=True))
    assert_same(value_and_grad(loss, batch, "none"), (values, grads))
    assert_same(value_and_grad(loss, batch, "sum"), (values.sum(), grads))
    count = max(1, sum(row is not None for row in loss.rows(batch)))
    assert_same(value_and_grad(loss, batch, "mean"), (values.sum() / count, grads / count))


@PROPERTY
@given(data=st.data())
def test_m3se_of_a_pair_is_margin_mse(data: st.DataObject) -> None:
    """Prevents a stray factor on the margins: with one positive and one negative the two losses are the same."""
    batch = data.draw(
        batches(M3SE, queries=st.just(3), unscored=False, masked=False).filter(lambda b: b.student.shape[1] > 1)
    )
    pairs = Batch(batch.student[:, :2], batch.teacher[:, :2])
    assert_same(value_and_grad(M3SE, pairs, "none"), value_and_grad(MARGIN_MSE, pairs, "none"))


@PROPERTY
@given(data=st.data())
def test_first_place_in_expectation_is_softmax_cross_entropy(data: st.DataObject) -> None:
    """Prevents rankings drawn from the wrong distribution or first places scored wrongly."""
    scores = st.lists(st.integers(-192, 192), min_size=4, max_size=4)
    student, teacher = (tensor([data.draw(scores)]) / 64 for _ in range(2))
    batch = Batch(student, teacher)
    torch.testing.assert_close(weighted_over_all_rankings(batch, 1), SOFTMAX(batch, "none"))


# Rankings, given or sampled


def test_several_rankings_are_averaged() -> None:
    """Prevents a sum over the samples, by which `num_samples` would scale the learning rate."""
    student = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rankings = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(4)).argsort(dim=-1)
    together = plackett_luce_loss(student, rankings, top_k=3, reduction="none")
    alone = torch.stack([plackett_luce_loss(student, ranking, top_k=3, reduction="none") for ranking in rankings])
    torch.testing.assert_close(together, alone.mean(dim=0))
    torch.testing.assert_close(plackett_luce_loss(student, rankings[:1]), plackett_luce_loss(student, rankings[0]))
    rows = [
        sum(oracles.plackett_luce(scores, ranking, [True] * 5, 3) or 0.0 for ranking in samples) / 6
        for scores, samples in zip(student.tolist(), rankings.transpose(0, 1).tolist(), strict=True)
    ]
    assert together.tolist() == pytest.approx(rows)


SAMPLED = Batch(
    tensor(
        [[0, LN3, LN2, -1, 1], [0.5, -0.5, 1, 0, 2], [0, LN3, LN2, NAN, INF], [2, -1, 0.5, 1, NAN], [1, 2, 3, 4, 5]]
    ),
    tensor([[0, 2, 1, -1, 0.5], [-3, -4, -5, -3.5, -4.5], [0, 2, 1, 9, NAN], [NAN, 1, 0, 0.5, INF], [NAN] * 5]),
    None,
    torch.tensor([[True] * 5, [True] * 5, flags({0, 1, 2}, 5), flags({0, 1, 2, 3}, 5), [True] * 5]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, None])
def test_sampler_draws_from_the_teacher(top_k: int | None, dtype: torch.dtype) -> None:
    """Prevents rankings from another distribution, as from noise scaled wrongly or unscored documents drawn early.

    The mean of 20000 samples lies within five standard errors of the exact expectation; the seed is fixed.
    """
    num_samples = 20_000
    student, teacher, _, mask = SAMPLED.parts
    sample = partial(coupled_rank_distil_loss, student.to(dtype), teacher.to(dtype), mask=mask, top_k=top_k)
    generator = torch.Generator().manual_seed(5)
    actual = sample(num_samples=num_samples, generator=generator, reduction="none").tolist()
    moments = [
        oracles.coupled_moments(*row, top_k)
        for row in zip(student.tolist(), teacher.tolist(), SAMPLED.flags[1].tolist(), strict=True)
    ]
    assert [row is None for row in moments] == [False] * 4 + [True]
    for loss, row in zip(actual, moments, strict=True):
        mean, variance = row or (0.0, 0.0)
        assert loss == pytest.approx(mean, abs=5 * math.sqrt(variance / num_samples) + 1e-5)
    if top_k == 1:
        exact = softmax_cross_entropy_loss(student, teacher, mask=mask, reduction="none").tolist()
        assert [row[0] if row else 0.0 for row in moments] == pytest.approx(exact)


def test_each_query_and_each_sample_draws_its_own_ranking() -> None:
    """Prevents noise shared over queries or samples: the expectation stays right and the gradient is far noisier."""
    student, teacher = (tensor([[0.0, 1.0, 2.0, 3.0]]).expand(64, 4) for _ in range(2))
    one = coupled_rank_distil_loss(
        student, teacher, num_samples=1, generator=torch.Generator().manual_seed(6), reduction="none"
    )
    many = coupled_rank_distil_loss(
        student, teacher, num_samples=64, generator=torch.Generator().manual_seed(6), reduction="none"
    )
    assert one.unique().numel() > 5
    assert many.std().item() < one.std().item() / 4


def test_generator_alone_decides_the_sample() -> None:
    """Prevents runs that cannot be repeated, and a generator that is taken and not used."""
    batch = random_batch(SOFTMAX, dtype=torch.float32, positives=False, mask=True, unscored=True)

    def sample(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return coupled_rank_distil_loss(batch.student, batch.teacher, generator=generator, mask=batch.mask).item()

    state = torch.get_rng_state()
    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(8)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_seed_decides() -> None:
    """Prevents a private default generator, which `set_seed` does not reach and every process shares."""
    batch = random_batch(SOFTMAX, dtype=torch.float32, positives=False, mask=True, unscored=True)
    values = []
    with torch.random.fork_rng():
        for seed in (8, 8, 9, 10, 11):
            torch.manual_seed(seed)
            values.append(coupled_rank_distil_loss(batch.student, batch.teacher, mask=batch.mask).item())
    assert values[0] == values[1]
    assert len(set(values)) > 2


# Input that is refused


S23, S24 = torch.zeros(2, 3), torch.zeros(2, 4)
I23 = torch.zeros(2, 3, dtype=torch.int64)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "m3se": m3se_loss,
    "margin_mse": margin_mse_loss,
    "all_margins_mse": all_margins_mse_loss,
    "score_mse": score_mse_loss,
    "softmax": softmax_cross_entropy_loss,
    "rank_distil": partial(rank_distil_loss, top_k=1, match="binary"),
    "coupled": coupled_rank_distil_loss,
}


def assert_refused(
    call: Callable[[], Tensor], error: type[Exception] | tuple[type[Exception], ...], *parts: str
) -> None:
    """The call raises, and the message holds every part: what was expected and what came."""
    message = "(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts)
    with pytest.raises(error, match=message):
        call()


BAD_SCORES: dict[str, tuple[tuple[Tensor, Tensor], dict[str, Any], Any, tuple[str, ...]]] = {
    "widths": ((S23, S24), {}, ValueError, ("2, 3", "2, 4")),
    "queries": ((S23, torch.zeros(1, 3)), {}, ValueError, ("2, 3", "1, 3")),
    "broadcast": ((S23, torch.zeros(2, 1)), {}, ValueError, ("2, 3", "2, 1")),
    "1-d": ((torch.zeros(3), torch.zeros(3)), {}, ValueError, ("3",)),
    "3-d": ((torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), {}, ValueError, ("2, 3, 4",)),
    "no-queries": ((torch.zeros(0, 3), torch.zeros(0, 3)), {}, ValueError, ("0, 3",)),
    "no-documents": ((torch.zeros(2, 0), torch.zeros(2, 0)), {}, ValueError, ("2, 0",)),
    "integer-student": ((I23, S23), {}, (TypeError, ValueError), ("student", "float", "int64")),
    "integer-teacher": ((S23, I23), {}, (TypeError, ValueError), ("teacher", "float", "int64")),
    "integer-mask": ((S23, S23), {"mask": I23}, (TypeError, ValueError), ("mask", "bool", "int64")),
    "float-mask": ((S23, S23), {"mask": S23}, (TypeError, ValueError), ("mask", "bool", "float32")),
    "mask-width": ((S23, S23), {"mask": S24.bool()}, ValueError, ("mask", "2, 3", "2, 4")),
    "mask-row": ((S23, S23), {"mask": torch.ones(3).bool()}, ValueError, ("mask", "2, 3", "3")),
    "reduction": ((S23, S23), {"reduction": "median"}, ValueError, ("mean", "sum", "none", "median")),
}


@pytest.mark.parametrize("bad", BAD_SCORES)
def test_bad_scores_are_refused(bad: str) -> None:
    """Prevents broadcasting, integer arithmetic and float masks from giving a number that looks like a loss."""
    scores, options, error, parts = BAD_SCORES[bad]
    for function in FUNCTIONS.values():
        assert_refused(partial(function, *scores, **options), error, *parts)


@pytest.mark.parametrize(
    ("positives", "error", "parts"),
    [
        (I23, (TypeError, ValueError), ("positives", "bool", "int64")),
        (S23, (TypeError, ValueError), ("positives", "bool", "float32")),
        (S24.bool(), ValueError, ("positives", "2, 3", "2, 4")),
        (torch.ones(2).bool(), ValueError, ("positives", "2, 3", "2")),
    ],
    ids=["integer", "float", "width", "row"],
)
@pytest.mark.parametrize("function", ["m3se", "margin_mse"])
def test_bad_positives_are_refused(function: str, positives: Tensor, error: Any, parts: tuple[str, ...]) -> None:
    """Prevents column numbers given as `positives` from being read as flags."""
    assert_refused(lambda: FUNCTIONS[function](S23, S23, positives=positives), error, *parts)


BAD_OPTIONS: dict[str, tuple[Callable[[], Tensor], tuple[str, ...]]] = {
    "rank_distil-top_k-0": (lambda: rank_distil_loss(S23, S23, top_k=0, match="binary"), ("top_k", "0")),
    "rank_distil-top_k-negative": (lambda: rank_distil_loss(S23, S23, top_k=-2, match="score"), ("top_k", "-2")),
    "rank_distil-match": (
        lambda: rank_distil_loss(S23, S23, top_k=1, match="logit"),  # type: ignore[arg-type]
        ("match", "binary", "score", "logit"),
    ),
    "coupled-top_k-0": (lambda: coupled_rank_distil_loss(S23, S23, top_k=0), ("top_k", "0")),
    "coupled-num_samples-0": (lambda: coupled_rank_distil_loss(S23, S23, num_samples=0), ("num_samples", "0")),
    "plackett_luce-top_k-0": (lambda: plackett_luce_loss(S23, I23, top_k=0), ("top_k", "0")),
    "top_temperature-0": (lambda: all_margins_mse_loss(S23, S23, top_temperature=0.0), ("top_temperature", "0")),
    "student_temperature-0": (
        lambda: softmax_cross_entropy_loss(S23, S23, student_temperature=0.0),
        ("student_temperature", "0"),
    ),
    "teacher_temperature-0": (
        lambda: softmax_cross_entropy_loss(S23, S23, teacher_temperature=0.0),
        ("teacher_temperature", "0"),
    ),
    "student_temperature-negative": (
        lambda: softmax_cross_entropy_loss(S23, S23, student_temperature=-1.5),
        ("student_temperature", "-1.5"),
    ),
    "teacher_temperature-negative": (
        lambda: softmax_cross_entropy_loss(S23, S23, teacher_temperature=-1.5),
        ("teacher_temperature", "-1.5"),
    ),
}


@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options_are_refused(bad: str) -> None:
    """Prevents an empty top k, which trains on the penalty alone, and a temperature that turns the ranking over."""
    call, parts = BAD_OPTIONS[bad]
    assert_refused(call, ValueError, *parts)


ORDER = torch.arange(3).expand(2, 3)


@pytest.mark.parametrize(
    ("student", "rankings", "options", "error", "parts"),
    [
        (S23, ORDER.float(), {}, (TypeError, ValueError), ("rankings", "int64", "float32")),
        (S23, torch.arange(4).expand(2, 4), {}, ValueError, ("rankings", "2, 3", "2, 4")),
        (S23, torch.arange(3), {}, ValueError, ("rankings", "3")),
        (S23, ORDER.expand(5, 4, 2, 3), {}, ValueError, ("rankings", "5, 4, 2, 3")),
        (S23, ORDER.expand(5, 2, 3)[:, :1], {}, ValueError, ("rankings", "5, 1, 3")),
        (S23, ORDER.expand(5, 2, 3)[:0], {}, ValueError, ("rankings", "0, 2, 3")),
        (I23, ORDER, {}, (TypeError, ValueError), ("student", "float", "int64")),
        (torch.zeros(3), ORDER, {}, ValueError, ("3",)),
        (S23, ORDER, {"mask": I23}, (TypeError, ValueError), ("mask", "bool", "int64")),
        (S23, ORDER, {"mask": S24.bool()}, ValueError, ("mask", "2, 3", "2, 4")),
        (S23, ORDER, {"reduction": "median"}, ValueError, ("mean", "sum", "none", "median")),
    ],
    ids=[
        "float",
        "width",
        "1-d",
        "4-d",
        "queries",
        "no-rankings",
        "integer-student",
        "1-d-student",
        "integer-mask",
        "mask-width",
        "reduction",
    ],
)
def test_bad_rankings_are_refused(
    student: Tensor, rankings: Tensor, options: dict[str, Any], error: Any, parts: tuple[str, ...]
) -> None:
    """Prevents scores given as rankings, and rankings of other queries, from being gathered without a word."""
    assert_refused(lambda: plackett_luce_loss(student, rankings, **options), error, *parts)


@each(TEACHER_LOSSES)
def test_options_are_keyword_only(loss: Loss) -> None:
    """Prevents a mask passed third from being read as `positives`."""
    function = FUNCTIONS[loss.name.split("-")[0]]
    with pytest.raises(TypeError, match="positional"):
        function(S23, S23, S23.bool())
