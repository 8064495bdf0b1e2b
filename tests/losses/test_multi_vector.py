"""Multi-vector students: every way to their gradient is that of texts encoded alone and compared token by token."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, LOSSES, M3SE, Batch, LossSpec, collate, collate_columns, gradients, split
from datasets import Dataset
from packed import distance
from sentence_transformers import util
from sentence_transformers.multi_vector_encoder import losses, scoring
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from students import multi_vector_student
from torch import Tensor, nn

from st_m3se import DistillationCollator, M3SELoss, SoftmaxCrossEntropyLoss
from st_m3se.encoding.packing import Packed
from st_m3se.encoding.rows import in_order
from st_m3se.losses import late_interaction

EXPANSIONS: dict[str, Any] = {
    "none": None,
    "unattended": {"strategy": "fixed", "attend": False, "length": 14},
    "attended": {"strategy": "fixed", "attend": True, "length": 14},
    "least": {"strategy": "min", "attend": False, "length": 8},
}
SOFTMAX = next(spec for spec in LOSSES if "Softmax" in spec.name)


def student(checkpoint: Path, expansion: str = "none", double: bool = True, **options: Any) -> Any:
    model = multi_vector_student(checkpoint, EXPANSIONS[expansion], **options)
    return model.double() if double else model


def one_by_one(model: Any, texts: list[str], task: str) -> list[Tensor]:
    """The embeddings of the scored tokens of each text, from the model alone."""
    found = []
    for text in texts:
        out = model(model.preprocess([text], task=task), task=task)
        found.append(out["token_embeddings"][0][out["attention_mask"][0].bool()])
    return found


def best_matches(query: Tensor, document: Tensor) -> Tensor:
    return torch.stack([(document @ token).max() for token in query]).sum()


class ByHand(nn.Module):
    """The loss of lists done by hand; ``similarity`` sees all queries and all documents."""

    def __init__(self, model: Any, spec: LossSpec, rows: list[dict[str, Any]], scale: float, in_batch: bool) -> None:
        super().__init__()
        self.model, self.spec, self.rows, self.scale, self.in_batch = model, spec, rows, scale, in_batch

    def similarity(self, queries: list[Tensor], documents: list[Tensor]) -> Tensor:
        scores = [torch.stack([best_matches(query, document) for document in documents]) for query in queries]
        if self.model.similarity_fn_name == "meanmaxsim":
            scores = [score / len(query) for score, query in zip(scores, queries, strict=True)]
        return torch.stack(scores)

    def forward(self, *_: Any) -> Tensor:
        texts = list(dict.fromkeys(text for row in self.rows for text in row["documents"]))
        queries = one_by_one(self.model, [row["query"] for row in self.rows], "query")
        scores = self.scale * self.similarity(queries, one_by_one(self.model, texts, "document"))
        values = []
        for row, score in zip(self.rows, scores, strict=True):
            listed = [texts.index(text) for text in row["documents"]]
            others = [place for place in range(len(texts)) if place not in listed] if self.in_batch else []
            teacher = torch.tensor([[*row["scores"], *[torch.nan] * len(others)]])
            positives = torch.zeros(teacher.shape, dtype=torch.bool)
            positives[0, 0] = True
            values.append(self.spec.functional(score[None, listed + others], teacher, positives))
        return torch.stack(values).mean()


def assert_equal(one: tuple[Tensor, Any], other: tuple[Tensor, Any], tolerance: float) -> None:
    """Values and gradients: all of them together, relative to their length."""
    torch.testing.assert_close(other[0], one[0], rtol=10 * tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    assert (
        distance(*(torch.cat([grads[name].flatten() for name in one[1]]) for grads in (one[1], other[1]))) <= tolerance
    )


def assert_ours_is_by_hand(model: Any, batch: Batch, loss: Any, by_hand: nn.Module, tolerance: float = 1e-12) -> None:
    expected = gradients(by_hand, model, batch)
    assert_equal(expected, gradients(loss, model, batch), tolerance)


@pytest.mark.parametrize("expansion", EXPANSIONS)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
def test_gradients_are_those_of_texts_encoded_alone(
    checkpoint: Path,
    ragged_rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    expansion: str,
    cached: bool,
    in_batch: bool,
) -> None:
    """Prevents expansion tokens cut off as padding, punctuation that is scored, and rows of several widths mixed up."""
    monkeypatch.setattr("st_m3se.encoding.batch.CHUNK_TOKENS", 60)
    model = student(checkpoint, expansion)
    rows = ragged_rows[:5]
    options = {"scale": 0.5, "in_batch_negatives": in_batch, "mini_batch_num_tokens": 60 if cached else None}
    spec = SOFTMAX if in_batch else M3SE
    assert_ours_is_by_hand(
        model, collate(model, rows), spec.build(model, **options), ByHand(model, spec, rows, 0.5, in_batch)
    )


def stock_columns(model: Any, rows: list[dict[str, Any]]) -> Batch:
    """One column per document, through the collator of sentence-transformers' own trainer."""
    from conftest import as_columns

    return split(MultiVectorEncoderDataCollator(preprocess_fn=model.preprocess)(as_columns(rows)))


@pytest.mark.parametrize("form", [collate, stock_columns])
@pytest.mark.parametrize("name", ["maxsim", "meanmaxsim"])
def test_every_loss_in_both_forms(
    checkpoint: Path, even_rows: list[dict[str, Any]], spec: LossSpec, form: Any, name: str
) -> None:
    """The model's own similarity is the one that is trained."""
    model, rows = student(checkpoint, "unattended", similarity_fn_name=name), even_rows[:4]
    if "Coupled" in spec.name:
        rows = [{**row, "scores": [100 * score for score in row["scores"]]} for row in rows]  # a sure teacher
    batch = form(model, rows)
    value, grads = gradients(spec.build(model, scale=0.5), model, batch)
    if "Coupled" in spec.name:
        assert value > 0
        assert any(grad.abs().max() > 1e-3 for grad in grads.values())
        return
    assert_equal(gradients(ByHand(model, spec, rows, 0.5, False), model, batch), (value, grads), 1e-12)


@pytest.mark.parametrize(
    ("similarity", "hosts"),
    [
        (None, None),
        (scoring.colbert_kd_scores, scoring.colbert_kd_scores),
        (scoring.mean_colbert_scores, scoring.mean_colbert_kd_scores),
        (scoring.XTRScores(top_k=12), scoring.XTRKDScores(top_k=12)),
        (scoring.XTRKDScores(top_k=12), scoring.XTRKDScores(top_k=12)),
        (scoring.xtr_kd_scores, scoring.xtr_kd_scores),
    ],
    ids=["own", "maxsim", "mean", "XTR", "XTR of lists", "XTR function"],
)
def test_the_softmax_loss_has_the_gradient_of_the_hosts_kl_divergence(
    checkpoint: Path, even_rows: list[dict[str, Any]], similarity: Any, hosts: Any
) -> None:
    """For each way of scoring; no document stands in two lists, as XTR's top tokens are those of all documents."""
    model = student(checkpoint, "unattended", double=False)
    rows = even_rows[1:16:3]
    batch = stock_columns(model, rows)
    ours = SoftmaxCrossEntropyLoss(model, scale=1.0, similarity_fct=similarity)
    host = losses.MultiVectorDistillKLDivLoss(model, similarity_fct=hosts)
    expected = gradients(host, model, batch)
    # In single precision either is 1.4e-6 from the gradient in double precision; theirs knows no double precision.
    assert_equal((torch.zeros(()), expected[1]), (torch.zeros(()), gradients(ours, model, batch)[1]), 3e-6)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("name", ["maxsim", "meanmaxsim"])
def test_scores_are_those_of_the_library(name: str, lists: bool) -> None:
    """On random tokens and masks, in pieces of several widths; a document without a scored token has score 0 here."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(*shape, 8, generator=generator) for shape in ((4, 5), (7, 9)))
    counted, scored = (torch.rand(shape, generator=generator) < 0.7 for shape in ((4, 5), (7, 9)))
    scored[2] = False
    expected = getattr(util, "mean_maxsim" if name == "meanmaxsim" else "maxsim")(
        queries, documents, a_mask=counted, b_mask=scored
    )
    expected[:, 2] = 0.0
    both = torch.cat([documents, scored[:, :, None].float()], 2)
    pieces = [both[:3, :7], both[3:]]
    expected_narrow = getattr(util, "mean_maxsim" if name == "meanmaxsim" else "maxsim")(
        queries, documents[:3, :7], a_mask=counted, b_mask=scored[:3, :7]
    )
    expected[:, :2] = expected_narrow[:, :2]
    asked = torch.cat([queries, counted[:, :, None].float()], 2)
    similarity = late_interaction.token_similarity("M3SELoss", getattr(util, "mean_maxsim" if "mean" in name else name))
    if lists:
        index = torch.tensor([[0, 6, 3], [2, 2, 1], [5, 4, 0], [6, 1, 2]])
        mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]]).bool()
        found = late_interaction.listed_scores(asked, pieces, index, mask, similarity)
        expected = expected.gather(1, index).masked_fill(~mask, 0.0)
    else:
        found = late_interaction.score_matrix(asked, pieces, similarity)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_document_of_punctuation_alone_is_left_out(
    checkpoint: Path, even_rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents a score of minus a thousand million, which sentence-transformers gives it, from being trained."""
    model = student(checkpoint)
    model[2].skiplist_words = [".", ";", "[CLS]", "[SEP]"]
    model[2].resolve_with_tokenizer(model.tokenizer)
    late_interaction._say_once.cache_clear()
    rows = [{**row, "documents": [*row["documents"], ". ;"], "scores": [*row["scores"], 9.0]} for row in even_rows[:3]]
    for in_batch in (False, True):
        loss = SoftmaxCrossEntropyLoss(model, in_batch_negatives=in_batch)
        with caplog.at_level(logging.WARNING, logger="st_m3se.losses.late_interaction"):
            actual = gradients(loss, model, collate(model, rows))
        assert_equal(gradients(loss, model, collate(model, even_rows[:3])), actual, 1e-12)
    assert len([record for record in caplog.records if "skiplist" in record.getMessage()]) == 1


def test_documents_are_packed_and_expanded_queries_are_not(checkpoint: Path, even_rows: list[dict[str, Any]]) -> None:
    """Expanded queries have one width, so that there is nothing to gain; others are packed."""
    for expansion, packed in (("unattended", False), ("attended", False), ("none", True)):
        model = student(checkpoint, expansion)
        queries, documents = collate(model, even_rows[:4]).fresh()
        assert isinstance(in_order(model, documents)[0], Packed)
        assert isinstance(in_order(model, queries)[0], Packed) == packed


def test_the_scale_is_1_unless_the_similarity_is_a_mean_of_cosines(checkpoint: Path) -> None:
    """Prevents a sum of thirty cosines from being multiplied by 20."""
    assert M3SELoss(student(checkpoint)).scale == 1.0
    assert M3SELoss(student(checkpoint, similarity_fn_name="meanmaxsim")).scale == 20.0


def test_tasks_reach_the_model_without_being_told(checkpoint: Path, even_rows: list[dict[str, Any]]) -> None:
    """Prevents queries that are not expanded, cut at a document's length, or stripped of their punctuation."""
    model = student(checkpoint, "unattended")
    batch = DistillationCollator(preprocess_fn=model.preprocess)(even_rows[:3])
    assert (batch["query_task"], batch["document_task"]) == ("query", "document")
    assert batch["query_input_ids"].shape == (3, 14)
    assert "document_query_expansion_positions" not in batch
    plain = split(DistillationCollator(preprocess_fn=lambda texts, **_: model.preprocess(texts))(even_rows[:3]))
    with pytest.raises(ValueError, match=r"expands each query to 14 tokens.*preprocess_fn=model\.preprocess"):
        M3SELoss(model)(plain.fresh(), plain.labels)
    unexpanded = student(checkpoint)  # as in the losses of sentence-transformers, the first column is the queries
    with_task, without = (
        collate(unexpanded, even_rows[:3]),
        split(DistillationCollator(preprocess_fn=lambda texts, **_: unexpanded.preprocess(texts))(even_rows[:3])),
    )
    loss = M3SELoss(unexpanded)
    torch.testing.assert_close(loss(with_task.fresh(), with_task.labels), loss(without.fresh(), without.labels))


def test_what_does_not_compare_tokens_is_refused(checkpoint: Path, model: Any, even_rows: list[dict[str, Any]]) -> None:
    tokens = student(checkpoint)
    with pytest.raises(ValueError, match=r"cos_sim compares one vector with another.*colbert_scores"):
        M3SELoss(tokens, similarity_fct=util.cos_sim)
    with pytest.raises(ValueError, match="compares pairs only"):
        M3SELoss(tokens, similarity_fct=scoring.colbert_scores_pairwise)
    with pytest.raises(ValueError, match=r"Let it encode"):
        M3SELoss(tokens).compute_loss_from_embeddings([torch.zeros(1, 2, 3)] * 3, torch.zeros(1, 2))
    batch = collate(tokens, even_rows[:3])
    with pytest.raises(ValueError, match=r"matrix \[Q, U\]"):
        M3SELoss(tokens, similarity_fct=lambda *_, **__: torch.zeros(3))(batch.fresh(), batch.labels)


@pytest.mark.parametrize("gather", [False, True])
def test_the_multi_vector_trainer_trains_it(
    checkpoint: Path, even_rows: list[dict[str, Any]], tmp_path: Path, gather: bool
) -> None:
    """The way that a user goes; the loss falls on what it has seen."""
    from sentence_transformers import MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments

    model = student(checkpoint, "unattended", double=False)
    rows = [{**row, "documents": [f"{text} {row['query']}" for text in row["documents"]]} for row in even_rows]
    arguments = MultiVectorEncoderTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    loss = M3SELoss(model, in_batch_negatives=True, gather_across_devices=gather, mini_batch_num_tokens=500)
    trainer = MultiVectorEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        loss=loss,
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1] < 0.9 * logged[0]


def test_a_row_of_one_token_is_as_good_as_any(checkpoint: Path) -> None:
    """The narrowest piece there is: a document of no words, beside long ones."""
    model = student(checkpoint)
    rows = [{"query": "a key", "documents": ["", *ANSWERS[:3]], "scores": [1.0, 0.5, 0.2, 0.1]}]
    batch = collate(model, rows)
    assert_ours_is_by_hand(model, batch, M3SELoss(model, scale=0.5), ByHand(model, M3SE, rows, 0.5, False))


def test_both_forms_of_columns_agree(checkpoint: Path, even_rows: list[dict[str, Any]]) -> None:
    """The dense collator's columns have no tasks; the first column is the queries all the same."""
    model = student(checkpoint)
    one, other = collate_columns(model, even_rows[:4]), stock_columns(model, even_rows[:4])
    loss = M3SELoss(model, scale=0.5)
    assert_equal(gradients(loss, model, one), gradients(loss, model, other), 1e-12)
