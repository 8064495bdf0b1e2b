"""Candidates and training lists: no judgement leaks where there are none, and no relevant document is a negative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from example_fixtures import shared_words
from sentence_transformers import SentenceTransformer

from st_m3se import score_candidates
from st_m3se.distillation.data import DistillationData, open_data
from st_m3se.distillation.lists import Candidates, interleave, measure, training_lists, training_qrels
from st_m3se.evaluation import compare
from st_m3se.scores import TeacherScores


@pytest.fixture
def data(beir: Path) -> DistillationData:
    return open_data(beir)


@pytest.fixture
def candidates(data: DistillationData, models: dict[str, str], tmp_path: Path) -> Candidates:
    student = SentenceTransformer(models["student"], device="cpu")
    Candidates.find(data, student, tmp_path / "found", show=False)
    return Candidates.open(data, tmp_path / "found", judged=True)


def test_candidates_of_training_queries_begin_with_the_relevant_ones(candidates: Candidates) -> None:
    for query, pool in candidates.pools("train", 3).items():
        assert pool[0] in candidates.data.qrels["train"][query]
        assert len(set(pool)) == 3
    lexical, dense = {"q": {"a": 3.0, "b": 2.0}}, {"q": {"b": 0.9, "c": 0.8, "d": 0.7}}
    assert interleave(lexical, dense, {"q": {"x": 1}}, 3, with_relevant=False) == {"q": ["a", "b", "c"]}
    assert interleave(lexical, dense, {"q": {"d": 1}}, 2, with_relevant=True) == {"q": ["d", "a"]}
    many = {"a": 1, "d": 2, "x": 1, "y": 1}
    pool = interleave(lexical, dense, {"q": many}, 3, with_relevant=True)["q"]
    assert pool[0] == "d", "of many relevant documents the best one, and negatives, none of which is relevant"
    assert len(pool) == 3
    assert not many.keys() & pool[1:]


def test_without_judgements_the_teacher_is_the_only_label(candidates: Candidates, tmp_path: Path) -> None:
    """Prevents judgements from leaking into a run that says it has none: not in the pools, and not as positives."""
    data, candidates.judged = candidates.data, False
    first = candidates.pools("train", 1)
    scores = score_candidates(
        shared_words, candidates.pools("train", 4), data.queries, data.corpus, tmp_path / "scores", name="words"
    )
    data.qrels["train"] = {query: {"d00": 1} for query in data.qrels["train"]}  # wrong ones: nobody may look at them
    assert candidates.pools("train", 1) == first
    for row in training_lists(scores, candidates, list_size=4, false_negatives="leave-out", seed=0):
        assert row["positives"] == [True, False, False, False]
        assert row["scores"][0] == max(row["scores"])
    texts_of = {query: data.corpus[pool[0]] for query, pool in first.items()}
    names = {text: query for query, text in data.queries.items()}
    for row in training_lists(scores, candidates, list_size=4, false_negatives="leave-out", seed=0, teacher=False):
        assert row["documents"][0] == texts_of[names[row["query"]]]


def test_where_some_queries_have_judgements_the_teacher_stands_in_for_the_others(
    candidates: Candidates, tmp_path: Path
) -> None:
    data = candidates.data
    judged, unjudged = list(data.qrels["train"])[:5], list(data.qrels["train"])[5:]
    data.qrels["train"] |= {query: {} for query in unjudged}
    pools = candidates.pools("train", 4)
    scores = score_candidates(shared_words, pools, data.queries, data.corpus, tmp_path / "scores", name="words")
    found = training_qrels(scores, candidates)
    assert {query: found[query] for query in judged} == {query: data.qrels["train"][query] for query in judged}
    for query in unjudged:
        listed = dict(zip(scores[query].document_ids, scores[query].scores, strict=True))
        assert found[query] == {max(listed, key=listed.__getitem__): 1}
    assert set(training_qrels(scores, candidates, teacher=False)) == set(judged), "the control has the labels alone"
    counts = [
        len(training_lists(scores, candidates, list_size=3, false_negatives="leave-out", seed=0, teacher=teacher))
        for teacher in (True, False)
    ]
    assert counts == [len(pools), len(judged)]


def test_lists_are_filtered_by_the_known_positive(candidates: Candidates, tmp_path: Path) -> None:
    relevant = {query: [*given, "d00", "d11"] for query, given in candidates.data.qrels["train"].items()}
    lists = {query: ids for query, ids in relevant.items() if len(set(ids)) == 3}
    chosen = list(lists.items())[:2]
    scores = TeacherScores.from_rows([(query, ids, [3.0, 5.0, 1.0]) for query, ids in chosen], tmp_path / "made")
    kept = training_lists(scores, candidates, list_size=3, false_negatives="keep", seed=0)
    assert len(kept) == 2
    assert kept[0]["scores"] == [3.0, 5.0, 1.0]
    filtered = training_lists(scores, candidates, list_size=3, false_negatives="leave-out", seed=0)
    assert filtered[0]["scores"] == [3.0, 1.0]
    assert filtered[0]["positives"] == [True, False]
    with pytest.raises(ValueError, match="nothing to train on"):
        training_lists(scores, candidates, list_size=3, false_negatives="leave-out", margin=2.5, seed=0)
    both = training_lists(scores, candidates, list_size=4, false_negatives="relabel", seed=0)
    assert dict(zip(both[0]["scores"], both[0]["positives"], strict=True)) == {3.0: True, 5.0: True, 1.0: False}
    control = training_lists(scores, candidates, list_size=4, false_negatives="relabel", seed=0, teacher=False)
    assert control[0]["positives"] == [True, False], "the control knows nothing of the teacher"


def test_measures_by_hand() -> None:
    values = measure({"q": {"a": 1.0, "b": 3.0, "c": 2.0}}, {"q": {"c": 1}, "none": {"a": 1}})
    assert values["RR@10"].tolist() == [1 / 2, 0.0]
    assert values["nDCG@10"].tolist() == [pytest.approx(1 / np.log2(3)), 0.0]
    better = compare({"low": np.array([0.1, 0.2] * 10), "high": np.array([0.9, 0.8] * 10)}, "nDCG@10")[0]
    assert better.difference > 0
