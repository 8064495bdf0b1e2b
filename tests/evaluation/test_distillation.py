"""The held-out evaluator: its measures against plain loops, and in the real trainer."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from students import multi_vector_student, sparse_student

from st_m3se import DistillationCollator, DistillationEvaluator, M3SELoss, build_distillation_dataset
from st_m3se.evaluation.evaluators import list_metrics
from st_m3se.scores import TeacherScores

Rows = list[dict[str, Any]]


def tau_b(one: list[float], other: list[float]) -> float:
    """Concordant minus discordant pairs, over the geometric mean of the pairs that each side does not tie."""
    agreement, untied_one, untied_other = 0, 0, 0
    for i in range(len(one)):
        for j in range(i):
            a, b = np.sign(one[i] - one[j]), np.sign(other[i] - other[j])
            agreement += int(a * b)
            untied_one += int(a != 0)
            untied_other += int(b != 0)
    return agreement / math.sqrt(untied_one * untied_other) if untied_one and untied_other else 0.0


def ndcg(teacher: list[float], student: list[float], k: int) -> float:
    """Each document takes the mean discount of the ranks that its tie covers."""
    low, high = min(teacher), max(teacher)
    gains = [(score - low) / (high - low) for score in teacher]

    def discount(rank: int) -> float:
        return 1 / math.log2(1 + rank) if rank <= k else 0.0

    def dcg(scores: list[float]) -> float:
        total = 0.0
        for gain, score in zip(gains, scores, strict=True):
            above, tied = sum(other > score for other in scores), sum(other == score for other in scores)
            total += gain * sum(discount(above + 1 + place) for place in range(tied)) / tied
        return total

    return dcg(student) / dcg(teacher)


def margin_errors(teacher: list[float], student: list[float], scale: float) -> list[float]:
    top = teacher.index(max(teacher))
    return [
        scale * (student[top] - student[place]) - (teacher[top] - teacher[place])
        for place in range(len(teacher))
        if place != top
    ]


def expected_metrics(teacher: list[float], student: list[float], scale: float, k: int) -> tuple[float, ...]:
    errors = margin_errors(teacher, student, scale)
    return (
        tau_b(teacher, student),
        ndcg(teacher, student, k),
        sum(map(abs, errors)) / len(errors),
        sum(error**2 for error in errors) / len(errors),
    )


SCORES = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=9).filter(
    lambda pairs: len({teacher for teacher, _ in pairs}) > 1
)


@given(SCORES, st.sampled_from([1.0, 0.25, 20.0]), st.integers(1, 12))
def test_the_measures_are_what_the_loops_give(pairs: Any, scale: float, k: int) -> None:
    """With ties on either side, negative scores, and a cut-off beyond the list."""
    teacher, student = ([float(pair[side]) for pair in pairs] for side in range(2))
    found = list_metrics(np.array(teacher), np.array(student), scale, k)
    assert found == pytest.approx(expected_metrics(teacher, student, scale, k), abs=1e-9)


def test_the_ends_of_the_scales() -> None:
    teacher = np.array([4.0, 1.0, -2.0, -3.5])
    assert list_metrics(teacher, teacher / 20 + 1, 20.0, 10) == pytest.approx((1.0, 1.0, 0.0, 0.0), abs=1e-12)
    reverse = list_metrics(teacher, -teacher, 1.0, 10)
    assert reverse[0] == pytest.approx(-1.0)
    assert 0.0 < reverse[1] < 1.0
    # 20 * cosine apart: 10 where the teacher has 3, and so on
    errors = [10 - 3.0, 10 - 6.0, 10 - 7.5]
    found = list_metrics(teacher, np.array([0.5, 0.0, 0.0, 0.0]), 20.0, 10)
    assert found[2:] == pytest.approx((sum(errors) / 3, sum(error**2 for error in errors) / 3))


def test_a_collapsed_student_gains_nothing_from_the_order_of_a_list() -> None:
    """Lists come with the positive first and by falling score; ties broken by place would call this student perfect."""
    teacher = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    tau, found, *_ = list_metrics(teacher, np.full(5, 0.9), 20.0, 10)
    assert tau == 0.0
    assert found == list_metrics(teacher[::-1].copy(), np.full(5, 0.9), 20.0, 10)[1] < 0.9


def evaluate_by_hand(model: SentenceTransformer, rows: Rows, scale: float, k: int) -> dict[str, float]:
    """Each list on its own, every text encoded again."""
    each = []
    for row in rows:
        query = model.encode_query(row["query"], convert_to_tensor=True)
        documents = model.encode_document(row["documents"], convert_to_tensor=True)
        student = model.similarity(query, documents)[0].tolist()
        each.append(expected_metrics(row["scores"], student, scale, k))
    tau, found, mae, mse = (sum(values) / len(rows) for values in zip(*each, strict=True))
    return {"kendall_tau": tau, f"ndcg@{k}": found, "margin_mae": mae, "margin_rmse": math.sqrt(mse)}


def test_a_model_is_measured_list_by_list(make_model: Callable[..., Any], ragged_rows: Rows) -> None:
    model = make_model(prompts={"query": "find: ", "document": "text: "}).eval()
    found = DistillationEvaluator(ragged_rows, scale=5.0, at_k=3)(model)
    assert found == pytest.approx(evaluate_by_hand(model, ragged_rows, 5.0, 3), rel=1e-4)


def test_a_perfect_student(make_model: Callable[..., Any], ragged_rows: Rows) -> None:
    """Teacher scores made from the student's own: tau 1, nDCG 1, and no error at the scale they were made with."""
    model = make_model().eval()
    rows = []
    for row in ragged_rows:
        cosines = model.similarity(model.encode_query(row["query"]), model.encode_document(row["documents"]))
        rows.append({**row, "scores": (20 * cosines[0].double() - 7).tolist()})
    found = DistillationEvaluator(rows, scale=20.0)(model)
    assert found["kendall_tau"] == pytest.approx(1.0)
    assert found["ndcg@10"] == pytest.approx(1.0)
    assert found["margin_mae"] == pytest.approx(0.0, abs=1e-4)
    assert found["margin_rmse"] == pytest.approx(0.0, abs=1e-4)
    assert DistillationEvaluator(rows, scale=10.0)(model)["margin_mae"] > 0.1


def test_each_text_is_encoded_once(make_model: Callable[..., Any], ragged_rows: Rows) -> None:
    evaluator = DistillationEvaluator([*ragged_rows, *ragged_rows])
    assert len(evaluator.queries) == len({row["query"] for row in ragged_rows}) == 16
    assert len(evaluator.documents) == len({text for row in ragged_rows for text in row["documents"]}) == 16
    assert evaluator(make_model()) == pytest.approx(DistillationEvaluator(ragged_rows)(make_model()))


def test_unscored_documents_and_lists_without_an_order_are_left_out(
    make_model: Callable[..., Any], ragged_rows: Rows, caplog: Any
) -> None:
    model = make_model()
    unscored = {**ragged_rows[0], "documents": [*ragged_rows[0]["documents"], "cut here", "and here"]}
    unscored["scores"] = [*ragged_rows[0]["scores"], None, math.nan]
    flat = {**ragged_rows[1], "scores": [1.0] * len(ragged_rows[1]["scores"])}
    found = DistillationEvaluator([unscored, flat, *ragged_rows[2:]])(model)
    assert found == pytest.approx(DistillationEvaluator([ragged_rows[0], *ragged_rows[2:]])(model))
    assert "1 of 16 lists are left out" in caplog.text
    with pytest.raises(ValueError, match="no order"):
        DistillationEvaluator([flat])


def test_a_similarity_of_ones_own(make_model: Callable[..., Any], ragged_rows: Rows) -> None:
    model = make_model()
    negated = DistillationEvaluator(ragged_rows, similarity_fct=lambda one, two: -model.similarity(one, two))
    found = DistillationEvaluator(ragged_rows)(model)
    assert negated(model)["kendall_tau"] == pytest.approx(-found["kendall_tau"])


@pytest.mark.parametrize("kind", ["sparse", "multi-vector"])
def test_a_student_of_any_kind(checkpoint: Path, ragged_rows: Rows, kind: str) -> None:
    """Scores are those of the model itself, text by text; a query is expanded and a document is not."""
    if kind == "sparse":
        model = sparse_student(checkpoint).eval()
    else:
        model = multi_vector_student(checkpoint, {"strategy": "fixed", "attend": False, "length": 14}).eval()
    scores = []
    for row in ragged_rows:
        query = model.encode_query([row["query"]])
        scores.append([float(model.similarity(query, model.encode_document([text]))) for text in row["documents"]])
    found = DistillationEvaluator(ragged_rows, scale=2.0)(model)
    taus = [tau_b(row["scores"], student) for row, student in zip(ragged_rows, scores, strict=True)]
    assert found["kendall_tau"] == pytest.approx(np.mean(taus), abs=1e-6)
    errors = [margin_errors(row["scores"], student, 2.0) for row, student in zip(ragged_rows, scores, strict=True)]
    assert found["margin_mae"] == pytest.approx(np.mean([np.abs(row).mean() for row in errors]), rel=1e-4)
    with pytest.raises(ValueError, match=r"truncate_dim=8 is for dense"):
        DistillationEvaluator(ragged_rows, truncate_dim=8)(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0]}, "sample 1: got 1 scores"),
        ({"query": 7}, "sample 1: `query` must be a str"),
        ({"documents": "one text"}, "sample 1: `documents` must be a list"),
        ({"scores": [math.inf, 1.0, 0.0]}, "sample 1: an infinite"),
    ],
)
def test_samples_of_another_form(ragged_rows: Rows, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationEvaluator([ragged_rows[0], {**ragged_rows[1], **change}])
    with pytest.raises(ValueError, match=r"sample 0 lacks \['documents'\]"):
        DistillationEvaluator([{"query": "a", "document": "b", "scores": [1.0]}])


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": True}, {"at_k": 0}, {"at_k": 2.5}])
def test_options_out_of_range(ragged_rows: Rows, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DistillationEvaluator(ragged_rows, **options)


def test_in_the_trainer(make_model: Any, arguments: Any, ragged_rows: Rows, tmp_path: Path) -> None:
    """Names, the best checkpoint, the CSV file, the model card; and distillation makes the student follow."""
    model = make_model()
    evaluator = DistillationEvaluator(Dataset.from_list(ragged_rows), scale=3.0, name="dev")
    before = evaluator(model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(
            max_steps=24,
            eval_strategy="steps",
            eval_steps=12,
            save_strategy="steps",
            save_steps=12,
            load_best_model_at_end=True,
            metric_for_best_model="eval_dev_kendall_tau",
        ),
        train_dataset=Dataset.from_list(ragged_rows),
        loss=M3SELoss(model, scale=3.0),
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
        evaluator=evaluator,
    )
    trainer.train()
    assert evaluator.primary_metric == "dev_kendall_tau"
    logged = [entry for entry in trainer.state.log_history if "eval_dev_kendall_tau" in entry]
    assert trainer.state.best_metric == max(entry["eval_dev_kendall_tau"] for entry in logged)
    assert trainer.state.best_metric > before["dev_kendall_tau"] + 0.1
    with (tmp_path / "run" / "eval" / "DistillationEvaluator_dev_results.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["steps"] for line in lines] == ["12", "24"]
    assert [float(line["kendall_tau"]) for line in lines] == [entry["eval_dev_kendall_tau"] for entry in logged]
    model.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "### Metrics" in card
    assert "#### Distillation" in card
    assert "margin_rmse" in card


def test_held_out_lists_from_a_store(make_model: Any, ragged_rows: Rows, tmp_path: Path) -> None:
    """As the documentation shows it: every candidate of the held-out queries."""
    texts = sorted({text for row in ragged_rows for text in row["documents"]})
    ids = {text: f"d{place}" for place, text in enumerate(texts)}
    rows = [
        (f"q{place}", [ids[text] for text in row["documents"]], row["scores"]) for place, row in enumerate(ragged_rows)
    ]
    store = TeacherScores.from_rows(rows, tmp_path / "scores")
    queries = {f"q{place}": row["query"] for place, row in enumerate(ragged_rows)}
    corpus = {text_id: text for text, text_id in ids.items()}
    held_out = build_distillation_dataset(store, queries, corpus, list_size=None, cache_dir=tmp_path / "cache")
    model = make_model()
    found = DistillationEvaluator(held_out)(model)
    assert found == pytest.approx(DistillationEvaluator(ragged_rows)(model), rel=1e-5)
    assert torch.is_grad_enabled()
