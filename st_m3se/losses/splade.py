"""SPLADE's regularizers beside a loss of this package, over texts that are encoded without padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder import losses
from torch import Tensor

from st_m3se.encoding.batch import CachedEncoding, check_caching, check_student, encode
from st_m3se.encoding.rows import Features, in_order, is_sliceable, merge_columns
from st_m3se.losses.base import DistillationLoss

__all__ = ["SpladeLoss"]


@dataclass(frozen=True)
class Ordered:
    """Labels, and where each text of the batch is among those that were encoded."""

    labels: Any
    queries: Tensor  # int64 [Q]
    documents: Tensor  # int64 [columns, rows]


class SpladeLoss(CachedEncoding, losses.CachedSpladeLoss):
    """A loss of this package and SPLADE's regularizers: the options and values of sentence-transformers' ``SpladeLoss``.

    Equal texts are encoded once, and without padding, which takes a fraction of the time and memory. With
    ``mini_batch_num_tokens`` gradients are cached, as in ``CachedSpladeLoss``. As there, a regularizer sees the documents
    of all columns; with :class:`~st_m3se.DistillationCollator` these are the batch's distinct documents.

    Args:
        model: The student, a SparseEncoder.
        loss: The loss of the teacher's scores; its own ``mini_batch_num_tokens`` must be None.
        document_regularizer_weight: Weight of the documents' regularizer, 3e-5 or so: the greater, the sparser.
        query_regularizer_weight: Weight of the queries' regularizer, 5e-5 or so. None: no such regularizer.
        mini_batch_num_tokens: Cache gradients over mini-batches of so many tokens. None: no caching.
        options: Others of ``SpladeLoss``: regularizers, thresholds, ``use_document_regularizer_only``.

    Returns:
        From :meth:`forward`, the parts of the loss by name, whose sum has the gradient: the trainer logs each.

    Raises:
        ValueError: If ``loss`` is not of this package, or encodes in mini-batches of its own.
    """

    def __init__(
        self,
        model: SparseEncoder,
        loss: DistillationLoss,
        document_regularizer_weight: float,
        query_regularizer_weight: float | None = None,
        *,
        mini_batch_num_tokens: int | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        check_student(name, model)
        check_caching(model, mini_batch_num_tokens)
        if not isinstance(loss, DistillationLoss):
            raise ValueError(
                f"{name} expects a loss of st_m3se, such as M3SELoss, got {type(loss).__name__}. Others go into the "
                "SpladeLoss of sentence-transformers."
            )
        if loss.uses_gradient_cache:
            raise ValueError(
                f"{name} encodes, not the {type(loss).__name__} inside it: give mini_batch_num_tokens="
                f"{loss.mini_batch_num_tokens} to {name} and leave it None in {type(loss).__name__}."
            )
        super().__init__(model, loss, document_regularizer_weight, query_regularizer_weight, **options)
        self.mini_batch_size = 1
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.uses_gradient_cache = mini_batch_num_tokens is not None

    def forward(self, sentence_features: Iterable[Features], labels: Any = None) -> dict[str, Tensor]:
        """Return the parts of the batch's loss; features and labels are those of :meth:`DistillationLoss.forward`."""
        first, *others = list(sentence_features)
        documents = merge_columns(others) if others else None
        if documents is None or not is_sliceable(first):
            if self.uses_gradient_cache:
                raise ValueError(
                    "mini_batch_num_tokens needs features with one padded row per text, and these cannot be split "
                    "(flattened, static or unlike between columns). Leave mini_batch_num_tokens=None."
                )
            return losses.SpladeLoss.forward(self, [first, *others], labels)
        queries, of_queries = in_order(self.model, first)
        documents, of_documents = in_order(self.model, documents)
        ordered: Any = Ordered(labels, of_queries, of_documents.view(len(others), -1))
        if self.uses_gradient_cache:
            total = self.forward_cached([queries, documents], ordered)
        else:
            total = self.calculate_loss([encode(self.model, queries), encode(self.model, documents)], ordered)
        parts = {name: total.new_tensor(value) for name, value in self._component_values.items()}
        # The first one carries the gradient of all, so that their sum is the loss.
        name, *rest = parts
        return parts | {name: total - sum(parts[other] for other in rest)}

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """The loss of the encoded texts' embeddings: ``reps`` holds the queries' chunks and the documents' chunks."""
        queries, documents = torch.cat(reps[0])[labels.queries], torch.cat(reps[1])
        columns = [queries, *(documents[column] for column in labels.documents)]
        total: Tensor = super().calculate_loss(
            [[column] for column in columns], labels.labels, with_backward=with_backward
        )
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        config: dict[str, Any] = super().get_config_dict()
        return {key: value for key, value in config.items() if key != "mini_batch_size"}
