"""The losses as pure functions of score tensors. Only torch is imported here.

Every function takes ``student_scores`` and ``teacher_scores`` of shape ``[Q, D]``: one row per query, one column per
candidate document, padded. ``mask`` is True where a column holds a real document; whatever stands elsewhere, NaN and
infinity included, neither changes the loss nor receives a gradient. A real document whose teacher score is NaN is
*unscored*: an in-batch negative, or a late addition that the teacher never saw. What each loss does with it is in
that loss's docstring.

Each loss is first one number per query. A query for which nothing is left to compare contributes 0 with a zero
gradient, and ``reduction="mean"`` averages over the other queries. Arithmetic is in float32, or in float64 when the
student scores are float64, whatever the input dtype or autocast; teacher scores never receive a gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
Match = Literal["binary", "score"]

__all__ = [
    "all_margins_mse_loss",
    "contrastive_loss",
    "coupled_rank_distil_loss",
    "m3se_loss",
    "margin_mse_loss",
    "plackett_luce_loss",
    "rank_distil_loss",
    "sample_rankings",
    "score_mse_loss",
    "softmax_cross_entropy_loss",
]


class _Scores(NamedTuple):
    """Checked inputs, with a number in every entry that does not count.

    They are filled *before* any arithmetic: a ``where`` behind it would send ``0 * inf = NaN`` through backward.
    """

    student: Tensor  # [Q, D], 0 where no document is
    teacher: Tensor  # [Q, D], 0 where no teacher score is
    real: Tensor  # [Q, D] bool
    scored: Tensor  # [Q, D] bool, a subset of real


def _check_scores(name: str, scores: Tensor) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape [Q, D], got {type(scores).__name__}.")
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(
            f"{name} must have shape [Q, D] (queries x candidate documents, both at least 1), got "
            f"{list(scores.shape)}. For a single query pass scores[None]."
        )
    if not scores.is_floating_point():
        raise ValueError(
            f"{name} must be a floating point tensor, got {scores.dtype}. Integers are usually class labels or ids, "
            "not scores; if they are scores, pass scores.float()."
        )


def _check_flags(name: str, flags: Tensor, shape: torch.Size) -> None:
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
        came = str(flags.dtype) if isinstance(flags, Tensor) else type(flags).__name__
        raise ValueError(f"{name} must be a bool tensor of shape {list(shape)}, got {came}. Convert it with .bool().")
    if flags.shape != shape:
        raise ValueError(
            f"{name} must have the shape of student_scores, {list(shape)}, got {list(flags.shape)}. "
            "Broadcasting it would apply one query's documents to another."
        )


def _prepare(student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None) -> _Scores:
    _check_scores("student_scores", student_scores)
    _check_scores("teacher_scores", teacher_scores)
    if student_scores.shape != teacher_scores.shape:
        raise ValueError(
            f"student_scores and teacher_scores must have one shape [Q, D], got {list(student_scores.shape)} and "
            f"{list(teacher_scores.shape)}. Broadcasting would mix the scores of different queries."
        )
    if mask is None:
        mask = torch.ones_like(student_scores, dtype=torch.bool)
    _check_flags("mask", mask, student_scores.shape)
    dtype = torch.promote_types(student_scores.dtype, torch.float32)
    teacher = teacher_scores.detach().to(dtype)
    scored = mask & ~teacher.isnan()
    student = student_scores.to(dtype).masked_fill(~mask, 0.0)
    return _Scores(student, teacher.masked_fill(~scored, 0.0), mask, scored)


def _split(scores: _Scores, positives: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the bool masks ``[Q, D]`` of the positives and of the negatives among the real documents."""
    if positives is None:
        positives = torch.zeros_like(scores.real)
        positives[:, 0] = True
    _check_flags("positives", positives, scores.real.shape)
    return positives & scores.real, ~positives & scores.real


def _reduce(per_query: Tensor, defined: Tensor, reduction: Reduction) -> Tensor:
    """The one place where queries with nothing left are zeroed and left out of the mean."""
    per_query = per_query.masked_fill(~defined, 0.0)
    if reduction == "none":
        return per_query
    if reduction == "sum":
        return per_query.sum()
    if reduction == "mean":
        return per_query.sum() / defined.sum().clamp(min=1)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}.')


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Row means ``[Q, 1]`` of the entries in ``where``; 0 for a row without one. ``values`` must be finite."""
    return values.masked_fill(~where, 0.0).sum(-1, keepdim=True) / where.sum(-1, keepdim=True).clamp(min=1)


def _top_k(scores: _Scores, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the mask ``[Q, D]`` of the teacher's top k scored documents, and the column ``[Q, 1]`` of the last."""
    order = scores.teacher.masked_fill(~scores.scored, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    in_order = scores.scored.gather(-1, order)  # a real score of -inf may stand behind an unscored document
    order = order.gather(-1, (~in_order).to(torch.int8).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    last = (scores.scored.sum(-1, keepdim=True).clamp(max=top_k) - 1).clamp(min=0)
    return scores.scored & (rank < top_k), order.gather(-1, last)


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")


def _check_temperature(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")


def _check_penalty_weight(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < float("inf"):
        raise ValueError(f"penalty_weight must be finite and at least 0, got {value!r}.")


def m3se_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    positives: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Multi-margin mean squared error (M3SE).

    .. math::
        \ell(t, s) = \sum_{i \in P} \big((t_i - t_{j^*}) - (s_i - s_{j^*})\big)^2
                   + \sum_{j \in N} \max(0, s_j - s_{j^*})^2,
        \qquad j^* = \arg\max_{j \in N} t_j

    The positives keep the teacher's margin to the negative that the teacher ranks highest, and no negative may pass
    that one in the student's ranking. Both terms are plain sums, and the cost is :math:`O(|P| + |N|)`. The loss does
    not change when all of a query's teacher scores, or all of its student scores, shift by a constant. With one
    positive and one negative it is Margin MSE.

    An unscored negative joins the second term and is never :math:`j^*`; an unscored positive is left out. A query
    without a scored negative has nothing left.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores (raw logits, not probabilities); NaN where unscored.
        positives: ``[Q, D]`` bool, the relevant documents. None: column 0.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean" over the queries for which the loss is defined, "sum", or "none" for ``[Q]``.

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape or dtype.

    Example:
        >>> student, teacher = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[5.0, 3.0, 1.0]])
        >>> m3se_loss(student, teacher)  # the margin to the teacher's best negative: 2 and 3; and 2 passes 1 by 1
        tensor(2.)

    References:
        Menon, Jayasumana, Rawat, Kim, Reddi, Kumar: In Defense of Dual-Encoders for Neural Ranking, ICML 2022,
        equation (4).
    """
    scores = _prepare(student_scores, teacher_scores, mask)
    positive, negative = _split(scores, positives)
    scored_positive, scored_negative = positive & scores.scored, negative & scores.scored
    top = scores.teacher.masked_fill(~scored_negative, -torch.inf).argmax(-1, keepdim=True)  # the first one on a tie
    student_margin = scores.student - scores.student.gather(-1, top)
    teacher_margin = scores.teacher - scores.teacher.gather(-1, top)
    error = (teacher_margin - student_margin).masked_fill(~scored_positive, 0.0)
    excess = student_margin.masked_fill(~negative, 0.0).relu()
    defined = scored_negative.any(-1) & (scored_positive.any(-1) | (negative.sum(-1) > 1))
    return _reduce(error.square().sum(-1) + excess.square().sum(-1), defined, reduction)


def margin_mse_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    positives: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Margin MSE: the mean over :math:`P \times N` of :math:`((t_i - t_j) - (s_i - s_j))^2`.

    Unscored documents are left out. A query without a scored positive and a scored negative has nothing left.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores; NaN where unscored.
        positives: ``[Q, D]`` bool, the relevant documents. None: column 0.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean", "sum" or "none" (``[Q]``).

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape or dtype.

    Example:
        >>> student, teacher = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[5.0, 3.0, 1.0]])
        >>> margin_mse_loss(student, teacher)  # margins 2, 4 of the teacher and 3, 2 of the student
        tensor(2.5000)

    References:
        Hofstätter, Althammer, Schröder, Sertkan, Hanbury: Improving Efficient Neural Ranking Models with
        Cross-Architecture Knowledge Distillation, 2020, https://arxiv.org/abs/2010.02666.
    """
    scores = _prepare(student_scores, teacher_scores, mask)
    positive, negative = _split(scores, positives)
    positive, negative = positive & scores.scored, negative & scores.scored
    error = scores.teacher - scores.student
    # With e = t - s, the mean over all pairs of (e_i - e_j)^2 is Var_P(e) + Var_N(e) + (mean_P(e) - mean_N(e))^2:
    # O(|P| + |N|) instead of O(|P| |N|), and centred, so nothing cancels.
    positive_mean, negative_mean = _mean(error, positive), _mean(error, negative)
    spread = _mean((error - positive_mean).masked_fill(~positive, 0.0).square(), positive)
    spread = spread + _mean((error - negative_mean).masked_fill(~negative, 0.0).square(), negative)
    per_query = (spread + (positive_mean - negative_mean).square()).squeeze(-1)
    return _reduce(per_query, positive.any(-1) & negative.any(-1), reduction)


def score_mse_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Score MSE (logit matching): the mean over the scored documents of :math:`(t_i - s_i)^2`.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores; NaN where unscored, and left out.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean", "sum" or "none" (``[Q]``).

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape or dtype.

    Example:
        >>> student, teacher = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[5.0, 3.0, 1.0]])
        >>> score_mse_loss(student, teacher)  # differences 1, 2, -1
        tensor(2.)
    """
    scores = _prepare(student_scores, teacher_scores, mask)
    error = (scores.teacher - scores.student).masked_fill(~scores.scored, 0.0)
    return _reduce(_mean(error.square(), scores.scored).squeeze(-1), scores.scored.any(-1), reduction)


def all_margins_mse_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    top_temperature: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""All margins: the mean over *all* pairs of documents of the squared difference of teacher and student margin.

    .. math::
        \ell(t, s) = \sum_{i < j} w_i w_j \big((t_i - t_j) - (s_i - s_j)\big)^2
                   = \sum_i w_i (e_i - \bar e)^2, \qquad e = t - s, \quad \bar e = \sum_i w_i e_i

    The weights sum to 1, so the double sum over pairs is a weighted variance and costs :math:`O(D)`, not
    :math:`O(D^2)`. Margin MSE uses the margins between positives and negatives only, and M3SE one margin for each
    positive; this loss uses those among negatives too and needs no positives. It does not change when all of a query's
    teacher scores, or all of its student scores, shift by a constant.

    Unscored documents are left out. A query with fewer than two scored documents has nothing left.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores (raw logits, not probabilities); NaN where unscored.
        top_temperature: None weighs all documents alike, ``w = 1 / D``. A number T gives ``w`` the average of that
            and ``softmax(t / T)``, so that the documents that the teacher likes best count for about half of the loss.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean" over the queries for which the loss is defined, "sum", or "none" for ``[Q]``.

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape, dtype or temperature.

    Example:
        >>> student, teacher = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[5.0, 3.0, 1.0]])
        >>> all_margins_mse_loss(student, teacher)  # t - s is 1, 2, -1: its variance
        tensor(1.5556)
    """
    if top_temperature is not None:
        _check_temperature("top_temperature", top_temperature)
    scores = _prepare(student_scores, teacher_scores, mask)
    weights = scores.scored.to(scores.teacher.dtype) / scores.scored.sum(-1, keepdim=True).clamp(min=1)
    if top_temperature is not None:
        least = torch.finfo(scores.teacher.dtype).min
        top = (scores.teacher / top_temperature).masked_fill(~scores.scored, least).softmax(-1)
        weights = (weights + top.masked_fill(~scores.scored, 0.0)) / 2
    error = (scores.teacher - scores.student).masked_fill(~scores.scored, 0.0)
    centred = error - (weights * error).sum(-1, keepdim=True)
    return _reduce((weights * centred.square()).sum(-1), scores.scored.sum(-1) > 1, reduction)


def softmax_cross_entropy_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax cross-entropy (probability matching): :math:`-\sum_i \sigma(t / T_t)_i \log \sigma(s / T_s)_i`.

    An unscored document has teacher probability 0 and stays in the student's denominator. A query without a scored
    document, or with a single document, whose probability is 1 whatever its score, has nothing left.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores (logits); NaN where unscored.
        student_temperature: Divides the student scores. 1.0: as they are.
        teacher_temperature: Divides the teacher scores; raise it where the teacher puts all its mass on one document.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean", "sum" or "none" (``[Q]``).

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``. It is a cross-entropy, not a divergence: its least value is
        the teacher's entropy. The gradient is that of the KL divergence.

    Raises:
        ValueError: On a wrong shape, dtype or temperature.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 3.0]])
        >>> softmax_cross_entropy_loss(student, teacher)  # two alike for both: log 2
        tensor(0.6931)

    References:
        Menon et al., ICML 2022, equation (1); temperatures as in Hinton et al., https://arxiv.org/abs/1503.02531.
    """
    _check_temperature("student_temperature", student_temperature)
    _check_temperature("teacher_temperature", teacher_temperature)
    scores = _prepare(student_scores, teacher_scores, mask)
    # The least finite number and not -inf: a row without any document must not become NaN.
    least = torch.finfo(scores.student.dtype).min
    teacher = (scores.teacher / teacher_temperature).masked_fill(~scores.scored, least).softmax(-1)
    student = (scores.student / student_temperature).masked_fill(~scores.real, least).log_softmax(-1)
    teacher, student = teacher.masked_fill(~scores.scored, 0.0), student.masked_fill(~scores.scored, 0.0)
    defined = scores.scored.any(-1) & (scores.real.sum(-1) > 1)
    return _reduce(-(teacher * student).sum(-1), defined, reduction)


def contrastive_loss(
    student_scores: Tensor,
    *,
    positives: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrastive loss (InfoNCE): each positive against the query's negatives, without a teacher.

    .. math:: \ell(s) = -\frac{1}{|P|} \sum_{i \in P} \log \frac{e^{s_i}}{e^{s_i} + \sum_{j \in N} e^{s_j}}

    With one positive a query and the other queries' documents as negatives it is sentence-transformers'
    ``MultipleNegativesRankingLoss``. One positive never stands in the denominator of another. A query without a
    positive or without a negative has nothing left.

    Args:
        student_scores: ``[Q, D]`` student scores.
        positives: ``[Q, D]`` bool, the relevant documents. None: column 0.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean" over the queries for which the loss is defined, "sum", or "none" for ``[Q]``.

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape or dtype.

    References:
        van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding,
        https://arxiv.org/abs/1807.03748.

    Example:
        >>> contrastive_loss(torch.tensor([[0.0, 0.0, 0.0, 0.0]]))  # one of four, all alike: log 4
        tensor(1.3863)
    """
    _check_scores("student_scores", student_scores)
    scores = _prepare(student_scores, torch.zeros_like(student_scores), mask)
    positive, negative = _split(scores, positives)
    least = torch.finfo(scores.student.dtype).min
    others = scores.student.masked_fill(~negative, least).logsumexp(-1, keepdim=True)
    excess = F.softplus((others - scores.student).masked_fill(~positive | ~negative.any(-1, keepdim=True), 0.0))
    return _reduce(_mean(excess, positive).squeeze(-1), positive.any(-1) & negative.any(-1), reduction)


def rank_distil_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    top_k: int = 8,
    match: Match = "binary",
    penalty_weight: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""RankDistil: match the teacher on its top k documents, push the rest down.

    .. math::
        \ell(t, s) = \sum_{i \in \mathrm{top}_k(t)} \mathrm{match}(t_i, s_i)
                   + w \sum_{j \notin \mathrm{top}_k(t)} \mathrm{penalty}(s_j)

    The framework is the paper's. The constants of its variants are not public, so the functions and their defaults
    are ours: ``match="binary"`` is the binary cross-entropy of :math:`\sigma(s_i)` against :math:`\sigma(t_i)` with
    the penalty :math:`\log(1 + e^{s_j})`; ``match="score"`` is :math:`(t_i - s_i)^2` with the penalty
    :math:`\max(0, s_j - s_k)^2` over the student's score of the teacher's k-th document.

    An unscored document is below the top k. A query without a scored document has nothing left.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores (logits); NaN where unscored.
        top_k: How many of the teacher's scored documents to match; a shorter list is matched whole. 8 is half of a
            usual list of 16.
        match: "binary" (scores as log-odds) or "score".
        penalty_weight: The weight w of the second term. 1.0: both terms count alike.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean", "sum" or "none" (``[Q]``).

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape, dtype or option.

    Example:
        >>> student, teacher = torch.tensor([[4.0, 1.0, 2.0]]), torch.tensor([[5.0, 3.0, 1.0]])
        >>> rank_distil_loss(student, teacher, top_k=1, match="score")  # (5 - 4)^2: nothing outside passes the top
        tensor(1.)

    References:
        Reddi, Pasumarthi, Menon, Rawat, Yu, Kim, Veit, Kumar: RankDistil: Knowledge Distillation for Ranking,
        AISTATS 2021.
    """
    _check_positive_int("top_k", top_k)
    _check_penalty_weight(penalty_weight)
    scores = _prepare(student_scores, teacher_scores, mask)
    top, last = _top_k(scores, top_k)
    rest = scores.real & ~top
    if match == "binary":
        matched = F.binary_cross_entropy_with_logits(scores.student, scores.teacher.sigmoid(), reduction="none")
        penalty = F.softplus(scores.student)
    elif match == "score":
        matched = (scores.teacher - scores.student).masked_fill(~top, 0.0).square()
        penalty = (scores.student - scores.student.gather(-1, last)).masked_fill(~rest, 0.0).relu().square()
    else:
        raise ValueError(f'match must be "binary" or "score", got {match!r}.')
    per_query = matched.masked_fill(~top, 0.0).sum(-1) + penalty_weight * penalty.masked_fill(~rest, 0.0).sum(-1)
    return _reduce(per_query, scores.scored.any(-1), reduction)


def sample_rankings(
    teacher_scores: Tensor,
    *,
    num_samples: int = 8,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample rankings from the teacher's Plackett-Luce distribution, softmax(t) without replacement.

    Args:
        teacher_scores: ``[Q, D]`` teacher scores; NaN where unscored.
        num_samples: M, the number of rankings per query.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        generator: Source of randomness, on the scores' device. None: torch's global one.

    Returns:
        int64 ``[M, Q, D]``: column indices, best first; unscored documents behind the scored ones, padding last.

    Raises:
        ValueError: On a wrong shape, dtype or option.
    """
    _check_positive_int("num_samples", num_samples)
    scores = _prepare(teacher_scores, teacher_scores, mask)
    # -log of an exponential variate is a Gumbel variate: the perturbed argsort is an exact Plackett-Luce sample.
    noise = torch.empty((num_samples, *scores.teacher.shape), dtype=scores.teacher.dtype, device=scores.teacher.device)
    perturbed = scores.teacher - noise.exponential_(generator=generator).log()
    order = perturbed.argsort(dim=-1, descending=True, stable=True)
    group = (~scores.scored).to(torch.int8) + (~scores.real).to(torch.int8)  # 0 scored, 1 unscored, 2 padding
    return order.gather(-1, group.expand_as(order).gather(-1, order).argsort(dim=-1, stable=True))


def _plackett_luce(student: Tensor, real: Tensor, rankings: Tensor, depth: Tensor) -> Tensor:
    """Per query ``[Q]``: minus the log probability of the first ``depth`` ([Q]) places, averaged over rankings."""
    ranked = (
        student.masked_fill(~real, torch.finfo(student.dtype).min).expand(len(rankings), -1, -1).gather(-1, rankings)
    )
    places = int(depth.max())
    per_query = (student * 0.0).sum(-1)  # and not new zeros: without any place to count it still has a gradient, 0
    # From the last place up, log(exp(s_i) + exp(rest)) by logaddexp. torch.logcumsumexp would do the same in one
    # call, but its gradient is exp(a difference of large numbers) and overflows on large scores.
    rest = ranked[..., places:].logsumexp(-1) if places < ranked.shape[-1] else None
    for place in reversed(range(places)):
        score = ranked[..., place]
        rest = score if rest is None else torch.logaddexp(score, rest)
        per_query = per_query + (rest - score).masked_fill(place >= depth, 0.0).mean(0)
    return per_query


def plackett_luce_loss(
    student_scores: Tensor,
    rankings: Tensor,
    *,
    top_k: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Minus the log of the top-k Plackett-Luce probability of given rankings.

    .. math::
        \ell(s, \pi) = -\sum_{i \le k} \Big[ s_{\pi(i)} - \log \sum_{j \ge i} e^{s_{\pi(j)}} \Big]

    Args:
        student_scores: ``[Q, D]`` student scores.
        rankings: int64 ``[Q, D]``, or ``[M, Q, D]`` to average over M rankings: column indices, best first, real
            documents before padding.
        top_k: The number of places k that count. None: all.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean", "sum" or "none" (``[Q]``).

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``. A query with fewer than two documents has nothing left.

    Raises:
        ValueError: On a wrong shape, dtype or option, or when a row of ``rankings`` is not a permutation.

    Example:
        >>> plackett_luce_loss(torch.zeros(1, 3), torch.tensor([[2, 0, 1]]))  # one of three, then of two: log 6
        tensor(1.7918)

    References:
        Plackett, 1975; Reddi et al., AISTATS 2021 (the loss that TF-Ranking calls coupled RankDistil).
    """
    if top_k is not None:
        _check_positive_int("top_k", top_k)
    scores = _prepare(student_scores, student_scores, mask)
    columns = scores.real.shape[1]
    if not isinstance(rankings, Tensor) or rankings.dtype != torch.int64:
        came = str(rankings.dtype) if isinstance(rankings, Tensor) else type(rankings).__name__
        raise ValueError(f"rankings must be an int64 tensor of column indices, got {came}.")
    if rankings.ndim not in (2, 3) or rankings.shape[-2:] != scores.real.shape or 0 in rankings.shape:
        raise ValueError(
            f"rankings must have shape {list(scores.real.shape)}, or [M, ...] of it for M rankings, got "
            f"{list(rankings.shape)}."
        )
    rankings = rankings.reshape(-1, *scores.real.shape)
    identity = torch.arange(columns, device=rankings.device)
    if not torch.equal(rankings.sort(-1).values, identity.expand_as(rankings)):
        raise ValueError(f"every row of rankings must be a permutation of 0 ... {columns - 1}; one is not.")
    count = scores.real.sum(-1)
    places = scores.real.expand_as(rankings).gather(-1, rankings)
    if not torch.equal(places, (identity < count[:, None]).expand_as(places)):
        raise ValueError("rankings must list a query's real documents before its padding; one row does not.")
    depth = count if top_k is None else count.clamp(max=top_k)
    return _reduce(_plackett_luce(scores.student, scores.real, rankings, depth), count > 1, reduction)


def coupled_rank_distil_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    top_k: int | None = None,
    num_samples: int = 8,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Coupled RankDistil: cross-entropy of the top-k Plackett-Luce probability under rankings sampled from softmax(t).

    :func:`sample_rankings` draws the rankings and :func:`plackett_luce_loss` defines the loss of one. With ``top_k=1``
    its expectation is softmax cross-entropy. An unscored document ranks behind the scored ones, never takes one of
    the k places, and stays in every denominator. A query without a scored document, or with a single document, has
    nothing left. Lists whose teacher scores are negative count like any other: cross-encoder logits often are.

    Args:
        student_scores: ``[Q, D]`` student scores.
        teacher_scores: ``[Q, D]`` teacher scores (logits); NaN where unscored.
        top_k: The number of places that count, at most the scored documents. None: all of them.
        num_samples: Rankings per query; more give less noise. 8 as in TF-Ranking.
        generator: Source of randomness, on the scores' device. None: torch's global one.
        mask: ``[Q, D]`` bool, True for real documents. None: all.
        reduction: "mean", "sum" or "none" (``[Q]``).

    Returns:
        A scalar, or ``[Q]`` with ``reduction="none"``.

    Raises:
        ValueError: On a wrong shape, dtype or option.

    Example:
        >>> teacher = torch.tensor([[9e3, 5e3, 0.0]])  # so sure that every sample is the same ranking
        >>> coupled_rank_distil_loss(torch.zeros(1, 3), teacher)
        tensor(1.7918)

    References:
        Reddi et al.: RankDistil, AISTATS 2021, in the form of TF-Ranking.
    """
    if top_k is not None:
        _check_positive_int("top_k", top_k)
    scores = _prepare(student_scores, teacher_scores, mask)
    rankings = sample_rankings(teacher_scores, num_samples=num_samples, mask=mask, generator=generator)
    depth = scores.scored.sum(-1)
    if top_k is not None:
        depth = depth.clamp(max=top_k)
    defined = (depth > 0) & (scores.real.sum(-1) > 1)
    return _reduce(_plackett_luce(scores.student, scores.real, rankings, depth), defined, reduction)
