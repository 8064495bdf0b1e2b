"""Several losses over one encoding of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from st_m3se.losses.base import DistillationLoss, InBatchLoss, Lists


class _Parts(dict[str, Tensor]):
    """A loss by its parts, as the trainer logs them; in a weighted sum, as MatryoshkaLoss makes, it is their sum."""

    def __mul__(self, weight: float) -> Tensor:
        return weight * torch.stack(list(self.values())).sum()

    __rmul__ = __mul__


class CombinedLoss(InBatchLoss):
    """The weighted sum of several losses of this package, at the price of one encoding.

    Distillation and the labels' contrastive loss together often train a better student than either: the teacher says
    how near each candidate is, the labels correct the teacher. Each part keeps its own scale, temperature and in-batch
    negatives. The trainer logs the parts one by one, weighted, under the names of their classes.

    Args:
        losses: The parts, on one model. Gradient caching is this loss's business: parts have
            ``mini_batch_num_tokens=None``.
        weights: One for each part. None: 1 each. The parts differ in size: a squared error of margins may be a hundred
            times a cross-entropy, so look at what is logged.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.

    Raises:
        ValueError: If a part is no loss of this package, is on another model or caches gradients itself, if parts differ
            in ``gather_across_devices``, or if weights do not fit.

    Inputs:
        As the parts.

    Example:
        ::

            loss = CombinedLoss(
                [
                    SoftmaxCrossEntropyLoss(model, in_batch_negatives=True),
                    ContrastiveLoss(model, in_batch_negatives=True),
                ],
                weights=[1.0, 0.5],
            )
    """

    def __init__(
        self,
        losses: Sequence[DistillationLoss],
        weights: Sequence[float] | None = None,
        *,
        mini_batch_num_tokens: int | None = None,
    ) -> None:
        losses = list(losses)
        if not losses or not all(isinstance(loss, DistillationLoss) for loss in losses):
            raise ValueError(
                f"CombinedLoss expects a list of losses of st_m3se, got {[type(loss).__name__ for loss in losses]}: only "
                "they can share one encoding. Put losses of sentence-transformers on a data set of their own."
            )
        weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(weights) != len(losses) or not all(
            isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < math.inf
            for weight in weights
        ):
            raise ValueError(
                f"weights must hold one positive finite number for each of the {len(losses)} losses, got {weights!r}. "
                "Leave out a loss that should not count."
            )
        if any(loss.model is not losses[0].model for loss in losses):
            raise ValueError("CombinedLoss encodes a batch once, so all its losses must be on one model.")
        if any(loss.uses_gradient_cache for loss in losses):
            raise ValueError(
                "a part of CombinedLoss has mini_batch_num_tokens, which would cache gradients of a part alone. Give it "
                "to CombinedLoss instead."
            )
        joining = [loss for loss in losses if loss.in_batch_negatives]
        if len({loss.gather_across_devices for loss in joining}) > 1:
            raise ValueError(
                "the losses with in_batch_negatives differ in gather_across_devices. Documents are gathered once for "
                "all: set it in all of them or in none."
            )
        super().__init__(
            losses[0].model,
            losses[0].scale,
            losses[0].similarity_fct,
            in_batch_negatives=bool(joining),
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=bool(joining) and joining[0].gather_across_devices,
        )
        self.losses = nn.ModuleList(losses)
        self.weights = [float(weight) for weight in weights]
        self.needs_positives = any(loss.needs_positives for loss in losses)  # type: ignore[misc]
        names = [type(loss).__name__ for loss in losses]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        ]
        self._values: dict[str, Tensor] = {}

    def forward(self, sentence_features: Any, labels: Any) -> Any:
        """The parts' weighted losses by name; their sum is the loss."""
        total = super().forward(sentence_features, labels)
        first, *others = self.names
        # The first part carries the gradient of all, as with the host's CachedSpladeLoss; the rest are for the log.
        parts = {name: self._values[name] for name in others}
        return _Parts({first: total - sum(parts.values()), **parts})

    def calculate_loss(  # type: ignore[override]  # the host types labels as a tensor
        self, reps: list[list[Tensor]], labels: Lists, *, with_backward: bool = False
    ) -> Tensor:
        """The weighted sum of the parts' losses of the same embeddings."""
        for loss in self.losses:
            loss._batches = self._batches  # type: ignore[assignment]  # which counts where a batch comes in
        values = [
            weight * loss.calculate_loss(reps, labels)  # type: ignore[operator]
            for weight, loss in zip(self.weights, self.losses, strict=True)
        ]
        self._values = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        total = torch.stack(values).sum()
        if with_backward:
            torch.autograd.backward(total)
            return total.detach()
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """The parts' options and weights, as the model card shows them."""
        parts = {
            name: {"weight": weight} | loss.get_config_dict()  # type: ignore[operator]
            for name, weight, loss in zip(self.names, self.weights, self.losses, strict=True)
        }
        return {**parts, "mini_batch_num_tokens": self.mini_batch_num_tokens}

    @property
    def citation(self) -> str:
        """The parts' BibTeX for the model card."""
        found = [getattr(loss, "citation", "") for loss in self.losses]
        return "".join(dict.fromkeys(filter(None, found)))
