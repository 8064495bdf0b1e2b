"""Several losses over one encoding: the sum, its gradient, what the trainer logs, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_same_gradients, collate, collate_columns, gradients
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import nn

from st_m3se import (
    AllMarginsMSELoss,
    CombinedLoss,
    ContrastiveLoss,
    DistillationCollator,
    M3SELoss,
    SoftmaxCrossEntropyLoss,
)


def parts(model: Any) -> list[Any]:
    """A part with, one without in-batch negatives, and one with another scale."""
    return [
        SoftmaxCrossEntropyLoss(model, in_batch_negatives=True),
        M3SELoss(model, scale=3.0),
        ContrastiveLoss(model, scale=5.0, in_batch_negatives=True),
    ]


@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize("form", [collate, collate_columns])
def test_the_sum_and_its_gradient_are_those_of_the_parts(
    model: Any, even_rows: list[dict[str, Any]], form: Any, tokens: int | None
) -> None:
    """Prevents a part that is trained with another one's scale or negatives, or not at all."""
    model.eval()  # without dropout, which each forward pass draws anew
    batch, weights = form(model, even_rows[:6]), [1.0, 0.25, 2.0]
    combined = CombinedLoss(parts(model), weights, mini_batch_num_tokens=tokens)
    value, found = gradients(lambda *given: sum(combined(*given).values()), model, batch)
    expected, sums = 0.0, {}
    for weight, loss in zip(weights, parts(model), strict=True):
        alone, grads = gradients(loss, model, batch)
        expected += weight * alone
        sums = {name: sums.get(name, 0.0) + weight * grad for name, grad in grads.items()}
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found, sums)


def test_a_batch_is_encoded_once(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents three losses at three times the price."""
    batch, calls = collate(model, even_rows[:6]), []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    parts(model)[0](batch.fresh(), batch.labels)
    alone = len(calls)
    CombinedLoss(parts(model))(batch.fresh(), batch.labels)
    handle.remove()
    assert len(calls) == 2 * alone


def test_contrastive_columns_are_the_hosts_loss(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """With in-batch negatives over distinct texts: MultipleNegativesRankingLoss with hard negatives."""
    rows = [
        row | {"documents": [f"{text} {letter}" for text in row["documents"]]}
        for letter, row in zip("abcde", even_rows, strict=False)
    ]
    batch = collate_columns(model, rows)
    model.eval()
    value, found = gradients(ContrastiveLoss(model, in_batch_negatives=True), model, batch)
    host, expected = gradients(MultipleNegativesRankingLoss(model), model, batch)
    torch.testing.assert_close(value, host, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found, expected)


def test_matryoshka_takes_it(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Its weighted sum over dimensions is that of the parts' own Matryoshka losses."""
    model.eval()
    batch, dimensions = collate(model, even_rows[:6]), [model.get_embedding_dimension(), 8]
    value, found = gradients(MatryoshkaLoss(model, CombinedLoss(parts(model)[:2]), dimensions), model, batch)
    expected, sums = 0.0, {}
    for loss in parts(model)[:2]:
        alone, grads = gradients(MatryoshkaLoss(model, loss, dimensions), model, batch)
        expected += alone
        sums = {name: sums.get(name, 0.0) + grad for name, grad in grads.items()}
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found, sums)


@pytest.mark.parametrize("tokens", [None, 64])
def test_the_trainer_logs_each_part(
    model: Any, even_rows: list[dict[str, Any]], arguments: Any, tokens: int | None
) -> None:
    """The real trainer: weights move, and the log holds the parts beside their sum."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(max_steps=2),
        train_dataset=Dataset.from_list(even_rows[:8]),
        loss=CombinedLoss(
            [AllMarginsMSELoss(model), ContrastiveLoss(model), ContrastiveLoss(model, scale=3.0)],
            mini_batch_num_tokens=tokens,
        ),
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
    )
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ["AllMarginsMSELoss", "ContrastiveLoss_1", "ContrastiveLoss_2"]
    for entry in logged:
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in names), rel=1e-3)
        assert all(entry[name] > 0 for name in names)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model, other: CombinedLoss([]), "expects a list of losses"),
        (lambda model, other: CombinedLoss([MultipleNegativesRankingLoss(model)]), "got.*MultipleNegatives"),
        (lambda model, other: CombinedLoss([M3SELoss(model)], [1.0, 2.0]), "one positive finite number for each"),
        (lambda model, other: CombinedLoss([M3SELoss(model)], [0.0]), "weights"),
        (lambda model, other: CombinedLoss([M3SELoss(model), M3SELoss(other)]), "on one model"),
        (lambda model, other: CombinedLoss([M3SELoss(model, mini_batch_num_tokens=9)]), "mini_batch_num_tokens"),
        (
            lambda model, other: CombinedLoss(
                [
                    M3SELoss(model, in_batch_negatives=True, gather_across_devices=True),
                    ContrastiveLoss(model, in_batch_negatives=True),
                ]
            ),
            "gather_across_devices",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(model: Any, make_model: Any, build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model, make_model())


def test_a_list_without_a_positive_is_refused_if_a_part_needs_one(model: Any, even_rows: list[dict[str, Any]]) -> None:
    batch = collate(model, [row | {"positives": [False] * 3} for row in even_rows[:3]])
    CombinedLoss([SoftmaxCrossEntropyLoss(model), AllMarginsMSELoss(model)])(batch.fresh(), batch.labels)
    with pytest.raises(ValueError, match="no positive"):
        CombinedLoss([SoftmaxCrossEntropyLoss(model), ContrastiveLoss(model)])(batch.fresh(), batch.labels)


def test_the_card_holds_every_part(model: Any) -> None:
    """Prevents a model card from which the training cannot be repeated."""
    loss = CombinedLoss(parts(model), [1.0, 0.25, 2.0], mini_batch_num_tokens=64)
    config = loss.get_config_dict()
    assert config["M3SELoss"]["weight"] == 0.25
    assert config["M3SELoss"]["scale"] == 3.0
    assert config["mini_batch_num_tokens"] == 64
    assert all(
        f"{{{key}," in loss.citation for key in ("hinton2015distilling", "menon2022defense", "oord2019representation")
    )
    assert isinstance(loss.losses, nn.ModuleList)
