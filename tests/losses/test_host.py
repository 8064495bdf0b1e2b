"""The losses inside sentence-transformers: its trainer, ``fit``, wrapper losses, adapters, routers and model cards.

Nothing here is mocked: small real models are trained for a few steps, and must have learned something.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    DIMENSION,
    LOSSES,
    M3SE,
    UNSCORED_LOSSES,
    LossSpec,
    as_columns,
    assert_same_gradients,
    collate,
    collate_columns,
    gradients,
)
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    InputExample,
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    util,
)
from sentence_transformers.base.model_card import BaseModelCardCallback
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.multi_vector_encoder import MultiVectorEncoderTrainingArguments
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardCallback
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from st_m3se import CoupledRankDistilLoss, DistillationCollator, M3SELoss, ScoreMSELoss, SoftmaxCrossEntropyLoss
from st_m3se.functional import m3se_loss

Rows = list[dict[str, Any]]
Arguments = Callable[..., Any]
CACHING = pytest.mark.parametrize("tokens", [None, 60], ids=["plain", "cached"])


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_changed(before: dict[str, torch.Tensor], model: Any, part: str = "") -> None:
    """Guards against a pass in which nothing was trained, and against weights that ran away."""
    after = weights(model)
    changed = [name for name in before if part in name and not torch.equal(before[name], after[name])]
    assert changed, f"no parameter of {part or 'the model'} changed"
    assert all(value.isfinite().all() for value in after.values())


def train(model: Any, args: Any, loss: Any, rows: Rows | Any, **options: Any) -> SentenceTransformerTrainer:
    """Train with this package's collator, or with ``data_collator=None`` for the stock one; weights must change."""
    options.setdefault("data_collator", DistillationCollator(preprocess_fn=model.preprocess))
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    before = weights(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset, loss=loss, **options)
    trainer.train()
    assert_changed(before, trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(value == value and value > 0.0 for value in losses), losses
    return trainer


def value_of(loss: Any, model: Any, rows: Rows) -> float:
    """The loss over all rows, without dropout."""
    was_training = model.training
    model.eval()
    batch = collate(model, rows)
    torch.manual_seed(0)
    with torch.no_grad():
        value = loss(batch.fresh(), batch.labels).item()
    model.train(was_training)
    return value


# The trainer


@CACHING
def test_each_loss_falls_in_the_trainer_with_ragged_lists(
    model: Any, arguments: Arguments, ragged_rows: Rows, spec: LossSpec, tokens: int | None
) -> None:
    """Prevents a loss that runs and does not learn: it must be clearly lower after a few epochs on sixteen lists."""
    loss = spec.build(model, scale=3.0, mini_batch_num_tokens=tokens, in_batch_negatives=spec in UNSCORED_LOSSES)
    before = value_of(loss, model, ragged_rows)
    floor = 0.0
    if spec.name in ("SoftmaxCrossEntropyLoss", "CoupledRankDistilLoss", "RankDistilLoss"):
        floor = 0.5 * before  # cross-entropies end at the teacher's entropy and not at 0
    args = arguments(max_steps=25, eval_strategy="steps", eval_steps=25, per_device_train_batch_size=8)
    trainer = train(model, args, loss, ragged_rows, eval_dataset=Dataset.from_list(ragged_rows))
    after = value_of(loss, model, ragged_rows)
    assert after - floor < 0.8 * (before - floor), (before, after)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 1
    assert 0.0 < evaluated[0] < before


def test_each_loss_trains_on_columns(model: Any, arguments: Arguments, even_rows: Rows, spec: LossSpec) -> None:
    """The stock collator, train and eval."""
    dataset = Dataset.from_list(as_columns(even_rows))
    loss = spec.build(model, scale=3.0)
    trainer = train(model, arguments(), loss, dataset, data_collator=None, eval_dataset=dataset)
    assert trainer.evaluate()["eval_loss"] > 0.0


def test_the_trainer_computes_the_loss_of_its_batch(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """Prevents something between dataset and loss (column order, dtype, device moves) from changing the numbers."""
    loss = M3SELoss(model, scale=3.0)
    expected = value_of(loss, model, ragged_rows[:4])
    args = arguments(max_steps=1, learning_rate=1e-9)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ragged_rows[:4]),
        eval_dataset=Dataset.from_list(ragged_rows[:4]),
        loss=loss,
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_loss_class_is_built_by_the_trainer(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """The trainer takes a function of the model as well as a loss."""
    train(model, arguments(max_steps=1), M3SELoss, ragged_rows)


def test_a_dict_of_losses_over_lists(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """One collator, two datasets, a loss for each."""
    datasets = DatasetDict({"docs": Dataset.from_list(ragged_rows[:8]), "code": Dataset.from_list(ragged_rows[8:])})
    losses = {"docs": M3SELoss(model, scale=3.0), "code": SoftmaxCrossEntropyLoss(model, scale=3.0)}
    trainer = train(model, arguments(max_steps=4), losses, datasets, eval_dataset=copy.deepcopy(datasets))
    metrics = {key for entry in trainer.evaluate().items() for key in entry[:1]}
    assert {"eval_docs_loss", "eval_code_loss"} <= metrics


def test_a_dict_of_losses_over_columns(model: Any, arguments: Arguments, even_rows: Rows) -> None:
    """Lists of two lengths in one run need one column dataset each."""
    columns = as_columns(even_rows)
    pairs = [{**row, "label": row["label"][:2]} for row in columns]
    datasets = DatasetDict(
        {"three": Dataset.from_list(columns), "two": Dataset.from_list(pairs).remove_columns("document_3")}
    )
    losses = {"three": ScoreMSELoss(model, scale=3.0), "two": M3SELoss(model, scale=3.0)}
    train(model, arguments(max_steps=4), losses, datasets, data_collator=None)


def test_workers_that_persist(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    args = arguments(
        max_steps=6, per_device_train_batch_size=8, dataloader_num_workers=2, dataloader_persistent_workers=True
    )
    train(model, args, M3SELoss(model, scale=3.0), ragged_rows)


@pytest.mark.parametrize("sampler", ["no_duplicates", "no_duplicates_hashed"])
def test_no_duplicates_counts_texts_alone(model: Any, arguments: Arguments, ragged_rows: Rows, sampler: str) -> None:
    """Prevents equal flags, ids or scores of two rows from putting each row into a batch of its own.

    The host's sampler compares every column that the collator does not declare to be a label. Equal texts still count.
    """
    rows = [
        row
        | {
            "scores": [2.0, 1.0, 0.0][: len(row["documents"])] + [-1.0] * (len(row["documents"]) - 3),
            "positives": [place == 0 for place in range(len(row["documents"]))],
            "document_ids": list(range(len(row["documents"]))),
            "relevant_ids": [0],
            "query_id": 7,
        }
        for row in ragged_rows
    ]
    loss, collator = M3SELoss(model, scale=3.0), DistillationCollator(preprocess_fn=model.preprocess)
    trainer = train(model, arguments(max_steps=1, batch_sampler=sampler), loss, rows, data_collator=collator)
    assert [len(batch["label"]["scores"]) for batch in trainer.get_train_dataloader()] == [4] * 4
    twice = train(model, arguments(max_steps=1, batch_sampler=sampler), loss, rows[:2] * 2, data_collator=collator)
    assert [len(batch["label"]["scores"]) for batch in twice.get_train_dataloader()] == [2] * 2


def test_a_streamed_dataset(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """accelerate cuts the batches of a stream, all their tensors, to the number of queries, unless told not to."""
    stream = Dataset.from_list(ragged_rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"(?s)only 4 documents.*accelerator_config=\{'dispatch_batches': False\}"):
        train(model, arguments(), M3SELoss(model, scale=3.0), stream)
    args = arguments(accelerator_config={"dispatch_batches": False})
    train(model, args, M3SELoss(model, scale=3.0, in_batch_negatives=True), stream)


@CACHING
def test_gradient_accumulation_gives_the_large_batchs_gradient(
    make_model: Any, arguments: Arguments, even_rows: Rows, tokens: int | None
) -> None:
    """Prevents gradients of cached mini-batches from missing the division by the number of accumulated steps."""
    ends = []
    for size, steps in ((8, 1), (4, 2)):
        model = make_model()
        args = arguments(
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.0,
        )
        train(model, args, M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens), even_rows[:8])
        ends.append(weights(model))
    start = weights(make_model())
    moved = [{name: end[name] - start[name] for name in end} for end in ends]
    assert_same_gradients(*moved, tolerance=1e-4 * max(float(m.abs().max()) for m in moved[0].values()))


@CACHING
def test_bf16(model: Any, arguments: Arguments, ragged_rows: Rows, tokens: int | None) -> None:
    """Mixed precision as the training arguments switch it on."""
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
    before = value_of(loss, model, ragged_rows)
    train(model, arguments(bf16=True, max_steps=8), loss, ragged_rows)
    assert value_of(loss, model, ragged_rows) < before


@CACHING
def test_gradient_checkpointing(model: Any, arguments: Arguments, ragged_rows: Rows, tokens: int | None) -> None:
    """Prevents checkpointed layers from dropping the gradient where the loss cuts the batch."""
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
    before = weights(model)
    train(model, arguments(gradient_checkpointing=True), loss, ragged_rows)
    assert model[0].auto_model.is_gradient_checkpointing
    assert_changed(before, model, "layer.0")


@CACHING
def test_lora(make_model: Any, arguments: Arguments, ragged_rows: Rows, tokens: int | None) -> None:
    """Only the adapter learns, and it does."""
    peft = pytest.importorskip("peft")
    model = make_model()
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"]))
    before = weights(model)
    train(model, arguments(), M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens), ragged_rows)
    assert_changed(before, model, "lora_")
    frozen = [name for name in before if "lora_" not in name]
    assert frozen
    assert all(torch.equal(before[name], weights(model)[name]) for name in frozen)


def test_a_compiled_or_wrapped_model_needs_no_similarity(model: Any, ragged_rows: Rows) -> None:
    """The trainer swaps in a wrapper that has only ``forward``: DDP knows no ``similarity``."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, features: Any) -> Any:
            return self.module(features)

    for tokens in (None, 60):
        loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
        expected = value_of(loss, model, ragged_rows)
        loss.model = Wrapper(model)
        assert value_of(loss, model, ragged_rows) == pytest.approx(expected, rel=1e-6)


# model.fit


@CACHING
def test_fit(model: Any, even_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int | None) -> None:
    """The older way in: a DataLoader of InputExamples whose label is the list of scores."""
    monkeypatch.chdir(tmp_path)
    examples = [InputExample(texts=[row["query"], *row["documents"]], label=row["scores"]) for row in even_rows]
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
    before, start = weights(model), value_of(loss, model, even_rows)
    model.fit(
        train_objectives=[(DataLoader(examples, shuffle=True, batch_size=4), loss)],
        epochs=2,
        warmup_steps=0,
        optimizer_params={"lr": 5e-3},
        show_progress_bar=False,
        output_path=str(tmp_path / "model"),
    )
    assert_changed(before, model)
    assert value_of(loss, model, even_rows) < start
    assert "M3SELoss" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("short", "message"),
    [
        (lambda e: InputExample(texts=e.texts[:-1], label=e.label), r"got \[4, 3\]"),
        (lambda e: InputExample(texts=e.texts, label=e.label[:-1]), r"length|size|shape"),
    ],
    ids=["a text", "a score"],
)
def test_fit_refuses_one_short_row(
    model: Any, even_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: Any, message: str
) -> None:
    """Prevents one row with a document too few from taking that column away from all rows, without a word."""
    monkeypatch.chdir(tmp_path)
    examples = [InputExample(texts=[row["query"], *row["documents"]], label=row["scores"]) for row in even_rows[:8]]
    examples[5] = short(examples[5])
    with pytest.raises(ValueError, match=message):
        model.fit([(DataLoader(examples, batch_size=4), M3SELoss(model))], show_progress_bar=False)


def test_fit_refuses_whole_number_scores(
    model: Any, even_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grades typed as integers look like scores."""
    monkeypatch.chdir(tmp_path)
    examples = [InputExample(texts=[row["query"], *row["documents"]], label=[2, 1, 0]) for row in even_rows[:8]]
    with pytest.raises(ValueError, match=r"floating point teacher scores, got torch.int64"):
        model.fit([(DataLoader(examples, batch_size=4), M3SELoss(model))], show_progress_bar=False)


def test_fit_refuses_examples_without_scores(
    model: Any, even_rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fit`` drops labels that are all 0, the default: no label reaches the loss."""
    monkeypatch.chdir(tmp_path)
    examples = [InputExample(texts=[row["query"], *row["documents"]]) for row in even_rows[:8]]
    with pytest.raises(ValueError, match=r"expects teacher scores as labels.*NoneType"):
        model.fit([(DataLoader(examples, batch_size=4), M3SELoss(model))], show_progress_bar=False)


# Wrapper losses


@pytest.mark.parametrize("form", [collate, collate_columns])
@CACHING
def test_matryoshka_is_the_sum_over_its_dimensions(
    model: Any, even_rows: Rows, form: Any, tokens: int | None, spec: LossSpec
) -> None:
    """Prevents the wrapper's cache of forward passes from handing one chunk's embeddings to another."""
    batch = form(model, even_rows[:6])
    in_batch = spec in UNSCORED_LOSSES and "Coupled" not in spec.name
    build = {"scale": 3.0, "in_batch_negatives": in_batch, "mini_batch_num_tokens": tokens}
    expected = 0.0
    whole = [model(features)["sentence_embedding"] for features in batch.fresh()]
    plain = spec.build(model, **build | {"mini_batch_num_tokens": None})

    class Cut(torch.nn.Module):
        """The model with its embeddings cut, and nothing of the wrapper."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def forward(self, features: Any) -> Any:
            embedding = model(features)["sentence_embedding"][:, : self.size]
            return {"sentence_embedding": torch.nn.functional.normalize(embedding, dim=-1)}

    assert len(whole) == len(batch.features)
    torch.manual_seed(0)
    for size, weight in ((DIMENSION, 1.0), (8, 0.5)):
        plain.model = Cut(size)
        expected = expected + weight * plain(batch.fresh(), batch.labels)
    wrapped = MatryoshkaLoss(model, spec.build(model, **build), [8, DIMENSION], matryoshka_weights=[0.5, 1.0])
    value, grads = gradients(wrapped, model, batch)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
    model.zero_grad()
    expected.backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, grads)


@CACHING
def test_matryoshka_in_the_trainer(model: Any, arguments: Arguments, ragged_rows: Rows, tokens: int | None) -> None:
    loss = MatryoshkaLoss(model, M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens), [DIMENSION, 16, 8])
    before = value_of(loss, model, ragged_rows)
    train(model, arguments(max_steps=8), loss, ragged_rows, eval_dataset=Dataset.from_list(ragged_rows)).evaluate()
    assert value_of(loss, model, ragged_rows) < before


def test_matryoshka_with_as_many_documents_as_dimensions(model: Any) -> None:
    """The wrapper takes a label as wide as the embedding for an embedding, and cuts it.

    In the column form that must be an error which says so; the collator's labels are no tensor and pass.
    """
    texts = [f"copy {count} files" + " again" * count for count in range(DIMENSION)]
    scores = [float(score) for score in torch.linspace(1.0, -1.0, DIMENSION)]
    rows = [{"query": "copy a file", "documents": texts, "scores": scores}]
    columns, lists = collate_columns(model, rows), collate(model, rows)
    assert columns.labels.shape == (1, DIMENSION)
    wrapped = MatryoshkaLoss(model, M3SELoss(model, scale=3.0), [DIMENSION, 8])
    with pytest.raises(ValueError, match=r"(?s)D = 32.*got \[1, 8\].*MatryoshkaLoss.*DistillationCollator"):
        wrapped(columns.fresh(), columns.labels)
    expected = M3SELoss(model, scale=3.0)(lists.fresh(), lists.labels)
    assert wrapped(lists.fresh(), lists.labels) > expected
    cached = MatryoshkaLoss(model, M3SELoss(model, scale=3.0, mini_batch_num_tokens=64), [DIMENSION, 8])
    torch.testing.assert_close(
        cached(columns.fresh(), columns.labels), wrapped(lists.fresh(), lists.labels), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("form", [collate, collate_columns])
def test_adaptive_layers(model: Any, even_rows: Rows, form: Any) -> None:
    """Prevents one layer's embeddings, handed on through the features, from being read for another text's.

    The reference runs a model whose top layers are really gone.
    """
    batch = form(model, even_rows[:6])
    loss = M3SELoss(model, scale=3.0)
    options = {"n_layers_per_step": -1, "kl_temperature": 0.0, "kl_div_weight": 0.0}
    wrapped = AdaptiveLayerLoss(model, loss, last_layer_weight=2.0, prior_layers_weight=0.5, **options)
    value, grads = gradients(wrapped, model, batch)

    layers = model[0].auto_model.encoder.layer
    values = []
    for count in range(len(layers) + 1):
        model[0].auto_model.encoder.layer = layers[:count]
        values.append(loss(batch.fresh(), batch.labels).detach())
    model[0].auto_model.encoder.layer = layers
    expected = 2.0 * values[-1] + 0.5 * torch.stack(values[:-1]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert any(float(grad.abs().max()) > 0.0 for grad in grads.values())
    again, _ = gradients(loss, model, batch)
    torch.testing.assert_close(again, values[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", [AdaptiveLayerLoss, Matryoshka2dLoss])
def test_adaptive_layers_in_the_trainer(model: Any, arguments: Arguments, ragged_rows: Rows, wrapper: Any) -> None:
    """With the self-distillation between layers, which concatenates all embeddings of a call in order."""
    options = {"matryoshka_dims": [DIMENSION, 8]} if wrapper is Matryoshka2dLoss else {}
    loss = wrapper(model, M3SELoss(model, scale=3.0), **options)
    train(model, arguments(), loss, ragged_rows)


def test_adaptive_layers_refuse_a_cached_loss(model: Any, even_rows: Rows) -> None:
    """Prevents mini-batches that are embedded again after the wrapper has gone, with the last layer's output."""
    batch = collate(model, even_rows[:4])
    with pytest.warns(UserWarning, match="AdaptiveLayerLoss is not compatible with M3SELoss"):
        wrapped = AdaptiveLayerLoss(model, M3SELoss(model, mini_batch_num_tokens=64))
    with pytest.raises(ValueError, match=r"AdaptiveLayerLoss.*mini_batch_num_tokens=None"):
        wrapped(batch.fresh(), batch.labels)
    assert model(batch.fresh()[0])["sentence_embedding"].shape == (4, DIMENSION)


# Prompts and routes


def test_prompts_by_column_in_the_training_arguments(make_model: Any, arguments: Arguments, even_rows: Rows) -> None:
    """The stock collator and a prompt per column: the run differs from one without prompts."""
    ends = []
    for prompts in (None, {"query": "find: "}, {"query": "find: ", "document_1": "text: ", "document_2": "text: "}):
        model = make_model(include_prompt=False)
        dataset = Dataset.from_list(as_columns(even_rows))
        trainer = train(
            model, arguments(max_steps=1, prompts=prompts), M3SELoss(model, scale=3.0), dataset, data_collator=None
        )
        ends.append(trainer.state.log_history[0]["loss"])
    assert len(set(ends)) == 3


def test_prompts_of_the_collator_in_the_trainer(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """What was trained is what is searched with: the eval loss is that of the prompted texts."""
    prompts = {"query": "find: ", "documents": "text: "}
    collator = DistillationCollator(preprocess_fn=model.preprocess, prompts=prompts)
    loss = M3SELoss(model, scale=3.0)
    trainer = train(
        model, arguments(), loss, ragged_rows, data_collator=collator, eval_dataset=Dataset.from_list(ragged_rows[:4])
    )
    prompted = [
        row | {"query": "find: " + row["query"], "documents": [f"text: {text}" for text in row["documents"]]}
        for row in ragged_rows[:4]
    ]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(value_of(loss, model, prompted), rel=1e-3)
    assert value_of(loss, model, prompted) != pytest.approx(value_of(loss, model, ragged_rows[:4]), rel=1e-3)


@pytest.fixture
def routed(checkpoint: Path) -> SentenceTransformer:
    """Two towers: one BERT for queries, another one with a dense layer on top for documents."""

    def tower() -> list[Any]:
        config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return [Transformer(str(checkpoint), config_kwargs=config), Pooling(DIMENSION, "mean")]

    torch.manual_seed(0)
    router = Router.for_query_document(tower(), [*tower(), Dense(DIMENSION, DIMENSION)])
    return SentenceTransformer(modules=[router], device="cpu").train()


MAPPING = {"query": "query", "documents": "document"}


@CACHING
def test_a_router_over_lists(routed: Any, arguments: Arguments, ragged_rows: Rows, tokens: int | None) -> None:
    """Prevents queries from being encoded by the document tower, the router's default."""
    collator = DistillationCollator(preprocess_fn=routed.preprocess, router_mapping=MAPPING)
    loss = M3SELoss(routed, scale=3.0, mini_batch_num_tokens=tokens)
    rows = ragged_rows[:5]
    batch = collate(routed, rows, router_mapping=MAPPING)
    texts = list(dict.fromkeys(text for row in rows for text in row["documents"]))
    student = 3.0 * routed.similarity(
        routed.encode_query([row["query"] for row in rows], convert_to_tensor=True),
        routed.encode_document(texts, convert_to_tensor=True),
    )
    labels = batch.labels
    expected = m3se_loss(
        student.gather(1, labels["index"]), labels["scores"], positives=labels["positives"], mask=labels["mask"]
    )
    routed.train()
    torch.testing.assert_close(loss(batch.fresh(), labels).detach(), expected, rtol=1e-4, atol=1e-5)
    before = weights(routed)
    train(routed, arguments(router_mapping=MAPPING), loss, ragged_rows, data_collator=collator)
    for tower in ("query.0", "document.0", "document.2"):
        assert_changed(before, routed, tower)


def test_a_router_over_columns(routed: Any, arguments: Arguments, even_rows: Rows) -> None:
    """The stock collator takes the mapping from the training arguments."""
    mapping = {"query": "query"} | {f"document_{place}": "document" for place in (1, 2, 3)}
    dataset = Dataset.from_list(as_columns(even_rows))
    before = weights(routed)
    loss = M3SELoss(routed, scale=3.0, in_batch_negatives=True)
    train(routed, arguments(router_mapping=mapping), loss, dataset, data_collator=None)
    for tower in ("query.0", "document.2"):
        assert_changed(before, routed, tower)


def test_a_router_needs_no_mapping_over_lists_and_heeds_the_arguments(
    routed: Any, arguments: Arguments, ragged_rows: Rows
) -> None:
    """Prevents both columns from taking the default route, which leaves the query tower as it was."""
    before = weights(routed)
    train(routed, arguments(), M3SELoss(routed, scale=3.0), ragged_rows)
    assert_changed(before, routed, "query.0")
    assert_changed(before, routed, "document.2")
    before = weights(routed)
    both = arguments(router_mapping={"query": "document", "documents": "document"})
    train(routed, both, M3SELoss(routed, scale=3.0), ragged_rows)
    assert all(torch.equal(value, weights(routed)[name]) for name, value in before.items() if "query.0" in name)


def test_a_partial_mapping_of_columns_is_refused(routed: Any, arguments: Arguments, even_rows: Rows) -> None:
    """The host trains the unmapped query through the document tower without a word."""
    mapping = {f"document_{place}": "document" for place in (1, 2, 3)}
    dataset = Dataset.from_list(as_columns(even_rows))
    with pytest.raises(ValueError, match=r"text column 0 of the batch has no task.*router_mapping"):
        train(routed, arguments(router_mapping=mapping), M3SELoss(routed), dataset, data_collator=None)


def test_a_route_that_the_model_lacks_is_named(checkpoint: Path, ragged_rows: Rows) -> None:
    tower = [Transformer(str(checkpoint)), Pooling(DIMENSION, "mean")]
    model = SentenceTransformer(modules=[Router({"code": tower, "prose": tower})], device="cpu")
    with pytest.raises(ValueError, match=r"no route for the column 'query'.*router_mapping=\{'query': ROUTE"):
        DistillationCollator(preprocess_fn=model.preprocess)(ragged_rows[:2])
    mapping = {"query": "code", "documents": "prose"}
    collate(model, ragged_rows[:2], router_mapping=mapping)


@pytest.mark.parametrize("workers", [0, 1])
def test_prompts_of_the_training_arguments_reach_the_lists(
    make_model: Any, arguments: Arguments, ragged_rows: Rows, workers: int
) -> None:
    """Prevents prompts that a trainer takes, and hands only to a collator of its own making."""
    prompts = {"query": "find: ", "documents": "text: "}
    prompted = [
        row | {"query": "find: " + row["query"], "documents": [f"text: {text}" for text in row["documents"]]}
        for row in ragged_rows[:4]
    ]
    model = make_model()
    loss = M3SELoss(model, scale=3.0)
    expected = value_of(loss, model, prompted)
    args = arguments(max_steps=1, learning_rate=1e-9, prompts=prompts, dataloader_num_workers=workers)
    trainer = train(model, args, loss, ragged_rows[:4], eval_dataset=Dataset.from_list(ragged_rows[:4]))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)

    collator = DistillationCollator(preprocess_fn=model.preprocess, prompts={"query": "other: "})
    with pytest.raises(ValueError, match=r"arguments have prompts=\{'query': 'find: '.*collator has prompts=\{'query'"):
        train(model, args, M3SELoss(model), ragged_rows, data_collator=collator)
    with pytest.raises(ValueError, match=r"prompts names the column\(s\) \['document_1'\]"):
        train(model, arguments(prompts={"document_1": "text: "}), M3SELoss(model), ragged_rows)


@pytest.mark.parametrize(
    ("how", "workers"), [("model_init", 1), ("no card", 0), ("before training", 0), ("second trainer", 0)]
)
def test_the_arguments_reach_the_lists_however_the_trainer_is_used(
    make_model: Any, arguments: Arguments, ragged_rows: Rows, how: str, workers: int
) -> None:
    """Prevents arguments from being lost where they do not come by way of the model's card."""
    rows, model = ragged_rows[:4], make_model()
    prompted = [row | {"query": "find: " + row["query"]} for row in rows]
    expected, other = (value_of(M3SELoss(model, scale=3.0), model, each) for each in (prompted, rows))
    assert expected != pytest.approx(other, rel=1e-2)
    width = collate(model, prompted).features[0]["input_ids"].shape[1]
    dataset, kept = Dataset.from_list(rows), []

    class Keep(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            kept.append(pickle.dumps(collator))  # as for a worker that is spawned and not forked

    if how == "second trainer":
        train(model, arguments(max_steps=1, learning_rate=1e-9, prompts={"query": "other: "}), M3SELoss(model), rows)
    collator = DistillationCollator(preprocess_fn=model.preprocess)
    trainer = SentenceTransformerTrainer(
        args=arguments(max_steps=1, learning_rate=1e-9, prompts={"query": "find: "}, dataloader_num_workers=workers),
        **{"model_init": lambda: make_model()} if how == "model_init" else {"model": model},
        train_dataset=dataset,
        eval_dataset=dataset,
        loss=M3SELoss(model, scale=3.0),
        data_collator=collator,
        callbacks=[Keep()],
    )
    if how == "no card":
        trainer.remove_callback(BaseModelCardCallback)
        trainer.remove_callback(SentenceTransformerModelCardCallback)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    if how != "before training":
        trainer.train()
        assert trainer.state.log_history[-2]["loss"] == pytest.approx(expected, rel=1e-3)
        assert pickle.loads(kept[0])(rows)["query_input_ids"].shape[1] == width


def test_a_batch_read_before_training_says_that_it_knows_no_arguments(
    model: Any, arguments: Arguments, ragged_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A trainer hands its arguments to nobody who is not called by it."""
    for given, count in (({}, 1), ({"prompts": {}}, 0)):
        caplog.clear()
        collator = DistillationCollator(preprocess_fn=model.preprocess, **given)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(),
            train_dataset=Dataset.from_list(ragged_rows),
            loss=M3SELoss(model),
            data_collator=collator,
        )
        next(iter(trainer.get_train_dataloader()))
        texts = [record.getMessage() for record in caplog.records if record.name == "st_m3se.training.collator"]
        assert len(texts) == count
        assert all("have no effect on the lists" in text for text in texts)


def test_prompts_and_lengths_of_the_model_that_columns_do_not_get_are_named(
    make_model: Any, arguments: Arguments, even_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """The host's own collator knows neither; a task brings the lengths, and the arguments bring prompts."""
    model = make_model(prompts={"query": "find: "})
    model[0].query_length = 16
    dataset = Dataset.from_list(as_columns(even_rows))
    train(model, arguments(), M3SELoss(model, scale=3.0), dataset, data_collator=None)
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("st_m3se")]
    assert [("prompts of its own, {'query': 'find: '}" in t, "query_length=16" in t) for t in texts] == [
        (True, False),
        (False, True),
    ]
    caplog.clear()
    mapping = {"query": "query"} | {f"document_{place}": "document" for place in (1, 2, 3)}
    args = arguments(prompts={"query": "find: "}, router_mapping=mapping)
    train(model, args, M3SELoss(model, scale=3.0), dataset, data_collator=None)
    train(model, arguments(), M3SELoss(model, scale=3.0), even_rows)
    assert [record for record in caplog.records if record.name.startswith("st_m3se")] == []


def test_a_multi_vector_model_gets_its_tasks_markers_and_lengths(checkpoint: Path, ragged_rows: Rows) -> None:
    """Prevents queries from being cut and masked as documents: what differs between the two hangs on the task."""
    transformer = Transformer(str(checkpoint), query_length=5, document_length=7)
    model = MultiVectorEncoder(modules=[transformer, MultiVectorMask()], device="cpu", prompts={"query": "find: "})
    batch = collate(model, ragged_rows[:3])
    assert [features["task"] for features in batch.features] == ["query", "document"]
    assert [features["input_ids"].shape[1] for features in batch.features] == [5, 7]
    args = MultiVectorEncoderTrainingArguments(
        output_dir="unused", max_length={"query": 4, "document": 6}, use_cpu=True
    )
    model.model_card_data.all_hyperparameters = args.to_dict()  # as the trainer does when training starts
    assert [features["input_ids"].shape[1] for features in collate(model, ragged_rows[:3]).features] == [4, 6]


def test_lists_beside_an_ordinary_dataset(model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """A trainer has one collator for all its datasets."""
    pairs = [{"anchor": row["query"], "positive": row["documents"][0]} for row in ragged_rows]
    datasets = DatasetDict({"lists": Dataset.from_list(ragged_rows), "pairs": Dataset.from_list(pairs)})
    losses = {"lists": M3SELoss(model, scale=3.0), "pairs": MultipleNegativesRankingLoss(model)}
    args = arguments(max_steps=4, prompts={"lists": {"query": "find: "}, "pairs": {"anchor": "same: "}})
    train(model, args, losses, datasets, eval_dataset=copy.deepcopy(datasets)).evaluate()


# What would train nothing, or something else


@CACHING
def test_lists_of_one_document_stop_the_run(
    model: Any, arguments: Arguments, ragged_rows: Rows, tokens: int | None
) -> None:
    """Prevents a run that ends well with every weight as it was."""
    rows = [row | {"documents": row["documents"][:1], "scores": row["scores"][:1]} for row in ragged_rows]
    with pytest.raises(ValueError, match=r"nothing to learn.*Of its 4 lists 4 lack a second document"):
        train(model, arguments(), M3SELoss(model, mini_batch_num_tokens=tokens), rows)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "vanished"])
def test_positives_that_vanished_are_noticed(
    model: Any, arguments: Arguments, ragged_rows: Rows, caplog: pytest.LogCaptureFixture, kept: bool
) -> None:
    """``Dataset.from_list`` keeps the columns of its first row: flags of later rows are lost, and document 0 is it."""
    rows = []
    for place, row in enumerate(row for row in ragged_rows * 8 if len(row["documents"]) > 2):
        turn = [*row["documents"][1:], row["documents"][0]], [*row["scores"][1:], row["scores"][0]]
        flags = [False] * (len(row["scores"]) - 1) + [True]
        rows.append({"query": row["query"], "documents": turn[0], "scores": turn[1], "positives": flags})
        if place == 0 and not kept:
            del rows[0]["positives"]
    train(model, arguments(max_steps=24), M3SELoss(model, scale=3.0), rows)
    texts = [record.getMessage() for record in caplog.records if record.name == "st_m3se.losses.checks"]
    assert len(texts) == (not kept)
    assert all(re.search(r"above \d\d% of the negatives.*`positives`.*Dataset.from_list", text) for text in texts)


def test_a_student_in_16_bits_is_named(
    model: Any, arguments: Arguments, ragged_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder saved in bfloat16 is loaded in bfloat16, in which AdamW changes a few of the weights."""
    args = arguments(max_steps=1, learning_rate=0.1)
    train(model.bfloat16(), args, SoftmaxCrossEntropyLoss(model, scale=3.0), ragged_rows)
    (text,) = [record.getMessage() for record in caplog.records if record.name == "st_m3se.losses.checks"]
    assert "weights are torch.bfloat16" in text
    assert "'dtype': torch.float32" in text


@CACHING
def test_a_dot_product_student_is_no_matryoshka(make_model: Any, ragged_rows: Rows, tokens: int | None) -> None:
    """The wrapper normalises the full embedding too: it would be taught as a cosine, and searched by dot product."""
    model = make_model(similarity_fn_name="dot")
    batch = collate(model, ragged_rows[:4])
    wrapped = MatryoshkaLoss(model, M3SELoss(model, mini_batch_num_tokens=tokens), [DIMENSION, 8])
    with pytest.raises(ValueError, match=r"MatryoshkaLoss normalises every embedding.*Normalize module"):
        wrapped(batch.fresh(), batch.labels)
    normalised = SentenceTransformer(modules=[*model, Normalize()], device="cpu", similarity_fn_name="dot")
    for student, similarity in ((normalised, None), (model, lambda one, other: util.cos_sim(one, other))):
        loss = M3SELoss(student, similarity_fct=similarity, mini_batch_num_tokens=tokens)
        MatryoshkaLoss(student, loss, [DIMENSION, 8])(batch.fresh(), batch.labels)


# Save, reload, and the card


def test_a_saved_model_gives_the_same_embeddings(
    model: Any, arguments: Arguments, ragged_rows: Rows, tmp_path: Path
) -> None:
    """Prevents a part of the student from living in the loss, and being lost."""
    train(model, arguments(), M3SELoss(model, scale=3.0), ragged_rows)
    model.save_pretrained(str(tmp_path / "model"))
    again = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = [row["query"] for row in ragged_rows]
    torch.testing.assert_close(
        again.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("ragged", [True, False], ids=["lists", "columns"])
def test_the_model_card_tells_what_was_trained(
    model: Any, arguments: Arguments, even_rows: Rows, tmp_path: Path, spec: LossSpec, ragged: bool
) -> None:
    """The loss, each of its options and the paper to cite."""
    loss = spec.build(model, scale=7.25, mini_batch_num_tokens=96)
    options = {} if ragged else {"data_collator": None}
    rows = even_rows if ragged else as_columns(even_rows)
    train(model, arguments(max_steps=1), loss, Dataset.from_list(rows), **options)
    model.save_pretrained(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"loss:{spec.name}" in card
    assert f"#### {spec.name}" in card
    assert loss.citation.strip() in card
    for name, value in loss.get_config_dict().items():
        assert f'"{name}": ' in card, name
        if value is not None and not isinstance(value, bool):
            assert str(value) in card, name


def test_a_run_resumes_from_its_checkpoint(make_model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """Four steps are four steps, with or without a break after the second."""
    options = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    straight = make_model()
    train(straight, arguments(max_steps=4, **options), M3SELoss(straight, scale=3.0), ragged_rows)
    resumed = make_model()
    args = arguments(max_steps=4, **options)
    trainer = SentenceTransformerTrainer(
        model=resumed,
        args=args,
        train_dataset=Dataset.from_list(ragged_rows),
        loss=M3SELoss(resumed, scale=3.0),
        data_collator=DistillationCollator(preprocess_fn=resumed.preprocess),
    )
    trainer.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-2"))
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(trainer.model)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_sampled_rankings_follow_the_trainers_seed(make_model: Any, arguments: Arguments, ragged_rows: Rows) -> None:
    """Prevents two runs of one seed from ending at two models."""
    ends = []
    for seed in (5, 5, 6):
        model = make_model()
        train(model, arguments(seed=seed), CoupledRankDistilLoss(model, scale=3.0, num_samples=2), ragged_rows)
        ends.append(torch.cat([value.flatten() for value in weights(model).values()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_every_loss_is_covered() -> None:
    """Prevents a new loss from coming in without these tests."""
    import st_m3se

    wrappers = {"DistillationLoss", "SpladeLoss", "CombinedLoss"}
    names = {name for name in st_m3se.__all__ if name.endswith("Loss")} - wrappers
    assert {spec.name for spec in LOSSES} == names
    assert M3SE.name == "M3SELoss"
