"""What would train nothing, or something else than was asked for, found before the first step is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn

from st_m3se.encoding.host import base_model, in_matryoshka, own_prompt, routes_by_default, training_arguments
from st_m3se.encoding.rows import Features

__all__ = ["TrainingChecks", "check_collator", "check_routes"]

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
LISTS = 64
"""Lists after which the teacher's opinion of the positives is judged; under chance its mean has a deviation of 0.04."""
CHANCE = 0.6
"""A share of negatives below the positives that good lists pass by far, and shuffled ones, at 0.5, do not reach."""


def check_routes(model: nn.Module, columns: Sequence[Features]) -> None:
    """Refuse a column that a Router would send to its default route for want of a task.

    Raises:
        ValueError: With the column's place and the remedy.
    """
    for place, features in enumerate(columns):
        if features.get("task") is None and routes_by_default(model, features.get("modality")):
            raise ValueError(
                f"text column {place} of the batch has no task, and the model's Router would send it to its default "
                "route: one tower would be trained on the other's texts, or not at all. Name a route for every text "
                'column in the training arguments, e.g. router_mapping={"query": "query", "document_1": "document"}.'
            )


def check_collator(trainer: Any) -> None:
    """Refuse a trainer that would give lists of documents to the host's own collator, which knows texts only.

    Raises:
        ValueError: With the remedy.
    """
    if not type(trainer.data_collator).__module__.startswith("sentence_transformers."):
        return  # ours, or one that its author answers for
    for given in (trainer.train_dataset, trainer.eval_dataset):
        for dataset in given.values() if isinstance(given, Mapping) else [given]:
            row = dataset[0] if isinstance(dataset, Sized) and len(dataset) else {}  # type: ignore[index]
            if isinstance(row.get("documents"), list):
                raise ValueError(
                    "the dataset has lists of documents, and the trainer has its own collator, which knows texts only: "
                    "it would read two documents as one pair of texts, and stop at lists of different lengths. "
                    "Give the trainer data_collator=DistillationCollator(preprocess_fn=model.preprocess)."
                )


class TrainingChecks:
    """The checks of one loss, each done once, on the first training batch.

    Args:
        name: The loss, to open messages with.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen = self._learned = False
        self._shares: list[float] | None = []

    def student(self, loss: nn.Module, similarity_fct: Callable[..., Any]) -> None:
        """Look at the student, and at what the loss is in, when the first training batch comes."""
        if self._seen:
            return
        self._seen = True
        if in_matryoshka(loss) and not any(isinstance(part, Normalize) for part in loss.modules()):
            self._check_matryoshka(similarity_fct)
        half = {str(weight.dtype) for weight in loss.parameters() if weight.requires_grad and weight.dtype in HALF}
        if half:
            logger.warning(
                f"{self.name}: the student's weights are {', '.join(sorted(half))}, in which most small updates round to "
                "nothing. A model saved in 16 bits is loaded in 16 bits. Load it with model_kwargs={'dtype': "
                "torch.float32}, and train with bf16=True for speed."
            )

    def columns(self, model: nn.Module, columns: Sequence[Features]) -> None:
        """Look for prompts and lengths of the model's own that texts in columns did not get."""
        if self._seen or (plain := base_model(model)) is None or not (arguments := training_arguments(plain)):
            return
        own = {task: prompt for task in ("query", "document") if (prompt := own_prompt(plain, task))}
        if own and not arguments.get("prompts"):
            logger.warning(
                f"{self.name}: the model has prompts of its own, {own!r}, which encode_query and encode_document use, and "
                "the training arguments have none: it is trained on other texts than it is used on, unless they are in "
                'the texts already. Set prompts={"query": ..., "document_1": ...}, or use DistillationCollator.'
            )
        lengths = {
            f"{option}={value}"
            for part in plain.modules()
            if isinstance(part, Transformer)
            for option in ("query_length", "document_length")
            if (value := getattr(part, option, None)) is not None
        }
        if lengths and any(features.get("task") is None for features in columns):
            logger.warning(
                f"{self.name}: the model's {', '.join(sorted(lengths))}, which encode_query and encode_document use, have "
                "no effect in training without a task. Give the training arguments a router_mapping of each text "
                'column, e.g. {"query": "query", "document_1": "document"}, or use DistillationCollator.'
            )

    def _check_matryoshka(self, similarity_fct: Callable[..., Any]) -> None:
        one, other = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, -3.0]])
        if not torch.allclose(similarity_fct(one, other), similarity_fct(2.0 * one, 3.0 * other), atol=1e-5):
            raise ValueError(
                f"{self.name}: MatryoshkaLoss normalises every embedding, the full one too, and the similarity of this "
                "student depends on their lengths: it would be trained by another similarity than it is used with. "
                "End the model with a Normalize module, set similarity_fn_name='cosine' with a fitting scale, or "
                "train without MatryoshkaLoss."
            )

    def positives(self, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> None:
        """Look whether the teacher ranks the positives of the first lists above their negatives at all.

        Args:
            teacher_scores: ``[Q, D]``, NaN where unscored, as are the others.
            positives: bool.
            mask: bool.
        """
        if self._shares is None:
            return
        scored = mask & ~teacher_scores.isnan()
        positive, negative = scored & positives, scored & ~positives
        teacher = teacher_scores.detach().float()
        mean = teacher.masked_fill(~positive, 0.0).sum(1, keepdim=True) / positive.sum(1, keepdim=True).clamp(min=1)
        below = (teacher < mean).float() + 0.5 * (teacher == mean).float()
        share = (below * negative).sum(1) / negative.sum(1).clamp(min=1)
        self._shares += share[positive.any(1) & negative.any(1)].tolist()
        if len(self._shares) < LISTS:
            return
        share_of_all, self._shares = sum(self._shares) / len(self._shares), None
        if share_of_all < CHANCE:
            logger.warning(
                f"{self.name}: the teacher scores the positives above {share_of_all:.0%} of the negatives, about as chance "
                "would. Are they the relevant documents? Without a column `positives`, document 0 of a list is taken "
                "for the relevant one; and Dataset.from_list keeps the columns of its first row alone, so that "
                "`positives` of later rows vanish. Give every row the same columns."
            )

    def learned(
        self, loss: Tensor, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor
    ) -> None:
        """Stop where the first training batch has nothing to learn from: a gradient of exactly 0, whatever the loss.

        Args:
            loss: The loss, a scalar.
            student_scores: ``[Q, D]``, as are the others.
            teacher_scores: NaN where unscored.
            positives: bool.
            mask: bool.

        Raises:
            ValueError: With what the lists lack.
        """
        if self._learned or not (torch.is_grad_enabled() and student_scores.requires_grad and loss.requires_grad):
            return
        (gradient,) = torch.autograd.grad(loss, student_scores, retain_graph=True, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            scored = mask & ~teacher_scores.isnan()
            lacking = {
                "a second document": mask.sum(1) < 2,
                "a second teacher score": scored.sum(1) < 2,
                "a scored positive": ~(scored & positives).any(1),
                "a scored negative": ~(scored & ~positives).any(1),
            }
            found = [f"{int(lists.sum())} lack {what}" for what, lists in lacking.items() if lists.any()]
            raise ValueError(
                f"{self.name} has nothing to learn from the first training batch: its gradient is 0, and no weight would "
                f"change. Of its {len(mask)} lists {', '.join(found) or 'none lacks a document or a score'}. Score more "
                "candidates of each query, leave such lists out, or check the options of the loss."
            )
        self._learned = True
