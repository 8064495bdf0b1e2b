"""A training stops at the batch whose numbers are not finite: the host's trainer would log a finite loss and go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DIMENSION, as_columns
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.util import cos_sim
from transformers import TrainerCallback

from st_m3se import CombinedLoss, DistillationCollator, M3SELoss
from st_m3se.losses.finite import LARGEST_SCORE, require_finite


def train(model: Any, args: Any, rows: list[dict[str, Any]], loss: Any, **options: Any) -> SentenceTransformerTrainer:
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), loss=loss, **options
    )
    trainer.train()
    return trainer


class Spoil(TrainerCallback):
    """Does to the weights what a step that is too large does."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)


@pytest.mark.parametrize("kind", ["alone", "combined", "matryoshka"])
@pytest.mark.parametrize("tokens", [None, 60])
def test_weights_that_are_not_finite_stop_the_training(
    make_model: Any,
    arguments: Callable[..., Any],
    ragged_rows: list[dict[str, Any]],
    tokens: int | None,
    kind: str,
) -> None:
    """The number is that of the batch, which MatryoshkaLoss hands in once for each of its dimensions."""
    model = make_model()
    loss: Any = M3SELoss(model, scale=3.0, mini_batch_num_tokens=None if kind == "combined" else tokens)
    if kind == "combined":
        loss = CombinedLoss([loss], mini_batch_num_tokens=tokens)
    elif kind == "matryoshka":
        loss = MatryoshkaLoss(model, loss, [DIMENSION, 16, 8])
    with pytest.raises(ValueError, match=r"M3SELoss: the embeddings of the queries are not finite in batch 3 of this"):
        train(
            model,
            arguments(max_steps=5),
            ragged_rows,
            loss,
            data_collator=DistillationCollator(preprocess_fn=model.preprocess),
            callbacks=[Spoil()],
        )


@pytest.mark.parametrize("tokens", [None, 60])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    make_model: Any, arguments: Callable[..., Any], ragged_rows: list[dict[str, Any]], tokens: int | None
) -> None:
    """The loss is finite: the square root of 0 is, and its slope is not."""
    model = make_model()
    loss = M3SELoss(
        model,
        scale=1.0,
        similarity_fct=lambda queries, documents: (cos_sim(queries, documents) * 0).sqrt(),
        mini_batch_num_tokens=tokens,
    )
    with pytest.raises(ValueError, match=r"the gradient of the \w+' embeddings is not finite in batch 1 of this"):
        train(
            model,
            arguments(),
            ragged_rows,
            loss,
            data_collator=DistillationCollator(preprocess_fn=model.preprocess),
        )
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_rows_are_those_of_all_pieces() -> None:
    pieces = [torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])]
    with pytest.raises(ValueError, match=r"the embeddings of the documents are not finite in batch 7 .*row\(s\) \[3\]"):
        require_finite(torch.tensor(math.nan), torch.zeros(1, 3), pieces, torch.zeros(1, 4), "M3SELoss", 7)


@pytest.mark.parametrize("score", [2 * LARGEST_SCORE, -1e20])
@pytest.mark.parametrize("columns", [True, False])
def test_scores_whose_squares_overflow_are_refused(
    make_model: Any, arguments: Callable[..., Any], even_rows: list[dict[str, Any]], columns: bool, score: float
) -> None:
    model = make_model()
    rows = as_columns(even_rows) if columns else [dict(row) for row in even_rows]
    name = "label" if columns else "scores"
    for row in rows:
        row[name] = [*row[name][:-1], score]
    options = {} if columns else {"data_collator": DistillationCollator(preprocess_fn=model.preprocess)}
    with pytest.raises(ValueError, match=r"1e\+16"):
        train(model, arguments(), rows, M3SELoss(model, scale=3.0), **options)


def test_scores_up_to_the_limit_train(
    make_model: Any, arguments: Callable[..., Any], even_rows: list[dict[str, Any]]
) -> None:
    model = make_model()
    rows = [{**row, "scores": [*row["scores"][:-1], -LARGEST_SCORE]} for row in even_rows]
    collator = DistillationCollator(preprocess_fn=model.preprocess)
    with torch.autograd.set_detect_anomaly(False):
        train(model, arguments(), rows, M3SELoss(model, scale=3.0), data_collator=collator)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
