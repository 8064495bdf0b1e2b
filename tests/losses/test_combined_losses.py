"""The losses inside those of sentence-transformers that encode for them: SPLADE, CSR, GOR, and combinations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LOSSES,
    M3SE,
    MARGIN_LOSSES,
    LossSpec,
    assert_same_gradients,
    collate,
    collate_columns,
    gradients,
)
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import GlobalOrthogonalRegularizationLoss
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, CSRLoss, FlopsLoss, SpladeLoss
from students import autoencoder_student, multi_vector_student, sparse_student
from torch import Tensor, nn

import st_m3se
from st_m3se import DistillationCollator, M3SELoss, SoftmaxCrossEntropyLoss

SOFTMAX = next(spec for spec in LOSSES if "Softmax" in spec.name)


def embeddings_of(model: Any, features: Iterable[Any]) -> list[Tensor]:
    """What an outer loss hands on."""
    return [model(column)["sentence_embedding"] for column in features]


class Inside(nn.Module):
    """The least of a loss that holds another one."""

    def __init__(self, model: Any, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, features: Any, labels: Any) -> Tensor:
        return self.loss.compute_loss_from_embeddings(embeddings_of(self.model, features), labels)


@pytest.mark.parametrize("form", [collate, collate_columns])
def test_from_embeddings_the_loss_is_the_same(
    model: Any, even_rows: list[dict[str, Any]], spec: LossSpec, form: Any
) -> None:
    """Prevents a second reading of the labels, which would one day differ from the first."""
    loss, batch = spec.build(model, scale=3.0), form(model, even_rows[:6])
    value, expected = gradients(loss, model, batch)
    inside, found = gradients(Inside(model, loss), model, batch)
    torch.testing.assert_close(inside, value, rtol=1e-5, atol=1e-5)
    assert_same_gradients(expected, found)


def flops(embeddings: Tensor) -> Tensor:
    return embeddings.mean(0).square().sum()


@pytest.mark.parametrize("form", [collate, collate_columns])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("spec", [M3SE, SOFTMAX], ids=str)
def test_splade_loss_is_ours_and_its_regularizers(
    checkpoint: Path, even_rows: list[dict[str, Any]], spec: LossSpec, own: bool, cached: bool, form: Any
) -> None:
    """Theirs and ours: the value and gradient are those of the sum done by hand, cached or not."""
    model = sparse_student(checkpoint).double()
    batch = form(model, even_rows[:5])
    loss = spec.build(model, scale=0.1)
    weights = {"document_regularizer_weight": 0.03, "query_regularizer_weight": 0.05}

    class ByHand(nn.Module):
        def forward(self, features: Any, labels: Any) -> Tensor:
            queries, *documents = embeddings_of(model, features)
            base = loss.compute_loss_from_embeddings([queries, *documents], labels)
            return base + 0.03 * flops(torch.cat(documents)) + 0.05 * flops(queries)

    class Summed(nn.Module):  # what the trainer does
        def __init__(self) -> None:
            super().__init__()
            size = {"mini_batch_num_tokens": 60} if cached else {}
            self.splade = (st_m3se.SpladeLoss if own else CachedSpladeLoss if cached else SpladeLoss)(
                model, loss, **weights, **size
            )

        def forward(self, features: Any, labels: Any) -> Tensor:
            parts = self.splade(features, labels)
            assert set(parts) == {"base_loss", "document_regularizer_loss", "query_regularizer_loss"}
            return torch.stack(list(parts.values())).sum()

    value, expected = gradients(ByHand(), model, batch)
    actual, found = gradients(Summed(), model, batch)
    torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)  # theirs is of single precision
    assert_same_gradients(expected, found, 1e-10)


def test_our_splade_loss_refuses_what_it_cannot_encode(checkpoint: Path, model: Any) -> None:
    sparse = sparse_student(checkpoint)
    with pytest.raises(ValueError, match=r"expects a loss of st_m3se.*got FlopsLoss"):
        st_m3se.SpladeLoss(sparse, FlopsLoss(sparse), 1e-3)
    with pytest.raises(ValueError, match=r"give mini_batch_num_tokens=64 to SpladeLoss"):
        st_m3se.SpladeLoss(sparse, M3SELoss(sparse, mini_batch_num_tokens=64), 1e-3)
    with pytest.raises(ValueError, match="positive integer"):
        st_m3se.SpladeLoss(sparse, M3SELoss(sparse), 1e-3, mini_batch_num_tokens=0)
    config = st_m3se.SpladeLoss(sparse, M3SELoss(sparse), 1e-3, 2e-3).get_config_dict()
    assert config["document_regularizer_weight"] == 1e-3
    assert "mini_batch_size" not in config


def test_csr_and_orthogonal_regularization_take_ours(
    checkpoint: Path, model: Any, even_rows: list[dict[str, Any]]
) -> None:
    """CSRLoss adds its reconstruction, and sentence-transformers' recipe its regularizer, to the value of ours."""
    sparse = autoencoder_student(checkpoint)
    batch = collate(sparse, even_rows[:5])
    parts = CSRLoss(sparse, M3SELoss(sparse, scale=0.1), gamma=0.5)(batch.fresh(), batch.labels)
    with torch.no_grad():
        expected = M3SELoss(sparse, scale=0.1)(batch.fresh(), batch.labels)
    torch.testing.assert_close(parts["base_loss"], 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert set(parts) > {"base_loss"}

    ours, gor = M3SELoss(model, scale=3.0), GlobalOrthogonalRegularizationLoss(model)
    batch = collate(model, even_rows[:5])
    embeddings = embeddings_of(model, batch.fresh())
    combined = {"m3se": ours.compute_loss_from_embeddings(embeddings, batch.labels)}
    combined |= gor.compute_loss_from_embeddings(embeddings, batch.labels)
    torch.testing.assert_close(combined["m3se"], ours(batch.fresh(), batch.labels), rtol=1e-5, atol=1e-5)
    assert len(combined) == 3


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("how", ["texts", "ids"])
def test_what_is_known_to_be_relevant_is_known_from_embeddings_too(
    model: Any, even_rows: list[dict[str, Any]], how: str, gather: bool
) -> None:
    """Prevents a positive that another row holds from being pushed down because the loss sees no texts."""
    rows = [dict(even_rows[place]) for place in (0, 3)]
    if how == "ids":
        rows[0] |= {"document_ids": [1, 2, 3], "relevant_ids": [1, 77]}
        rows[1] |= {"document_ids": [77, 5, 6]}
    else:
        rows[1]["query"] = rows[0]["query"]
    batch = collate(model, rows)
    loss = SoftmaxCrossEntropyLoss(model, scale=3.0, in_batch_negatives=True, gather_across_devices=gather)
    inside = Inside(model, loss)
    torch.testing.assert_close(inside(batch.fresh(), batch.labels), loss(batch.fresh(), batch.labels))
    known = batch.labels["known"]
    known["relevant"] = torch.full_like(known["relevant"], -1)
    assert inside(batch.fresh(), batch.labels) > loss(collate(model, rows).fresh(), collate(model, rows).labels) + 1e-3


def test_what_cannot_be_known_from_embeddings_is_refused(model: Any, even_rows: list[dict[str, Any]]) -> None:
    batch = collate(model, even_rows[:3])
    embeddings = embeddings_of(model, batch.fresh())
    with pytest.raises(ValueError, match=r"CachedSpladeLoss.*leave it None in M3SELoss"):
        M3SELoss(model, mini_batch_num_tokens=64).compute_loss_from_embeddings(embeddings, batch.labels)
    loss = M3SELoss(model, in_batch_negatives=True)
    del batch.labels["known"]
    with pytest.raises(ValueError, match=r"no `known`.*DistillationCollator"):
        loss.compute_loss_from_embeddings(embeddings, batch.labels)
    columns = collate_columns(model, even_rows[:3])
    with pytest.raises(ValueError, match=r"another loss has made\)\. Pass data_collator=DistillationCollator"):
        loss.compute_loss_from_embeddings(embeddings_of(model, columns.fresh()), columns.labels)
    with pytest.raises(ValueError, match="expects two columns"):
        M3SELoss(model).compute_loss_from_embeddings(embeddings[:1], batch.labels)
    with pytest.raises(ValueError, match="point to document"):
        M3SELoss(model).compute_loss_from_embeddings([embeddings[0], embeddings[1][:2]], batch.labels)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_the_sparse_trainer_trains_it(
    checkpoint: Path, even_rows: list[dict[str, Any]], tmp_path: Path, cached: bool, own: bool
) -> None:
    """The way that a user goes: our collator, SpladeLoss around ours, the trainer of sparse models."""
    from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments

    model = sparse_student(checkpoint)
    arguments = SparseEncoderTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    inner = M3SELoss(model, scale=0.1, in_batch_negatives=True)
    weights = {"document_regularizer_weight": 1e-3, "query_regularizer_weight": 1e-3}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if own:
        loss = st_m3se.SpladeLoss(model, inner, **weights, mini_batch_num_tokens=100 if cached else None)
    elif cached:
        loss = CachedSpladeLoss(model, inner, **weights, mini_batch_size=4)
    else:
        loss = SpladeLoss(model, inner, **weights)
    trainer = SparseEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(even_rows),
        loss=loss,
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "base_loss" in entry]
    assert len(logged) == 2
    assert all(entry["base_loss"] > 0 for entry in logged)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("spec", MARGIN_LOSSES[:1], ids=str)
def test_the_scale_is_looked_at_inside_another_loss_too(
    model: Any, even_rows: list[dict[str, Any]], spec: LossSpec, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents a scale that cannot fit the teacher from passing unseen because another loss encodes."""
    rows = [{**row, "scores": [10 * score for score in row["scores"]]} for row in even_rows]
    batch = collate(model, rows)
    Inside(model, spec.build(model, scale=1.0))(batch.fresh(), batch.labels)
    assert any("scale" in record.getMessage() for record in caplog.records)


def test_a_combined_loss_goes_wherever_its_parts_go(checkpoint: Path, even_rows: list[dict[str, Any]]) -> None:
    """Inside SPLADE's regularizers, from embeddings, and for a student of several vectors."""
    for model in (sparse_student(checkpoint), multi_vector_student(checkpoint)):
        batch = collate(model, even_rows[:5])
        parts = [M3SELoss(model, scale=0.1), SoftmaxCrossEntropyLoss(model, scale=0.1, in_batch_negatives=True)]
        combined = st_m3se.CombinedLoss(parts, weights=[1.0, 2.0])
        expected = parts[0](batch.fresh(), batch.labels) + 2.0 * parts[1](batch.fresh(), batch.labels)
        torch.testing.assert_close(sum(combined(batch.fresh(), batch.labels).values()), expected, rtol=1e-4, atol=1e-5)
        if not parts[0].multi_vector:
            inside = Inside(model, combined)(batch.fresh(), batch.labels)
            torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-5)
            splade = st_m3se.SpladeLoss(model, combined, 0.0)(batch.fresh(), batch.labels)
            torch.testing.assert_close(splade["base_loss"], expected, rtol=1e-4, atol=1e-5)
