"""Which documents of which queries are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from st_m3se.core.errors import FormatError
from st_m3se.diagnostics import JudgedLists
from st_m3se.scores import TeacherScores

CANDIDATES = {
    "q1": ["a", "b", "c"],
    "q2": ["a", "b"],  # no relevant one in the list
    "q3": ["c"],  # nothing else in it
    "q4": ["a", "b"],  # judged, and nothing is relevant
    "q5": ["q5", "b", "c"],  # itself
    "q6": ["q6", "b", "c"],  # itself, and relevant
}
QRELS = {"q1": {"b": 2, "a": 0}, "q2": {"c": 1}, "q3": {"c": 1}, "q4": {"a": 0}, "q5": {"c": 1}, "q6": {"q6": 1}}


def test_lists_have_positives_and_negatives_and_the_rest_is_counted() -> None:
    lists = JudgedLists.of(CANDIDATES, QRELS)
    assert lists.by_query() == {"q1": ["a", "b", "c"], "q5": ["b", "c"], "q6": ["q6", "b", "c"]}
    assert lists.qrels() == {"q1": {"b": 1}, "q5": {"c": 1}, "q6": {"q6": 1}}
    assert lists.positives.tolist() == [False, True, False, False, True, True, False, False]
    assert lists.owner.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert lists.left_out == {
        "queries without a relevant document in the judgements": 1,
        "queries without a relevant document in their list": 1,
        "queries without another document in their list": 1,
        "documents with the id of their query": 1,
    }
    assert JudgedLists.of(CANDIDATES, QRELS, min_relevance=2).by_query() == {"q1": ["a", "b", "c"]}
    assert JudgedLists.of(CANDIDATES, QRELS, exclude_same_id=False).by_query()["q5"] == ["q5", "b", "c"]


def test_what_one_store_lacks_is_left_out_for_all(tmp_path: Path) -> None:
    """Prevents numbers of two scorers from being over different documents."""
    rows: list[Any] = [("q1", ["c", "b"], [1.0, 2.0]), ("q6", ["b"], [0.5])]
    store = TeacherScores.from_rows(rows, tmp_path / "store")
    lists = JudgedLists.of(CANDIDATES, QRELS, scored_by={"teacher": store})
    assert lists.by_query() == {"q1": ["b", "c"]}
    assert lists.left_out["documents that teacher has not scored"] == 3
    assert lists.left_out["queries that teacher has not scored"] == 3
    assert lists.scores(store).tolist() == [2.0, 1.0]  # by id, not by place


def test_a_missing_score_is_named(tmp_path: Path) -> None:
    store = TeacherScores.from_rows([("q1", ["a", "b"], [1.0, 2.0])], tmp_path / "store")
    with pytest.raises(FormatError, match=r"lacks 1 of the 3 documents of query 'q1', first 'c'"):
        JudgedLists.of(CANDIDATES, QRELS).scores(store)


def test_ids_that_never_match_are_refused(tmp_path: Path) -> None:
    store = TeacherScores.from_rows([(1, ["a"], [1.0])], tmp_path / "store")
    with pytest.raises(FormatError, match=r"the scores teacher: these have int query ids and str document ids"):
        JudgedLists.of(CANDIDATES, QRELS, scored_by={"teacher": store})
    with pytest.raises(FormatError, match=r"the candidates: these have int query ids"):
        JudgedLists.of({1: ["a"]}, QRELS)
    with pytest.raises(FormatError, match=r"no list has both .*6 queries without a relevant document in the judgem"):
        JudgedLists.of(CANDIDATES, {"other": {"a": 1}})
    with pytest.raises(FormatError, match="no judgements"):
        JudgedLists.of(CANDIDATES, {})


def test_queries_are_drawn_by_seed_and_keep_their_order() -> None:
    candidates = {f"q{query:02}": ["a", "b"] for query in range(50)}
    qrels = {query: {"a": 1} for query in candidates}
    drawn = [JudgedLists.of(candidates, qrels, max_queries=20, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].query_ids == drawn[1].query_ids != drawn[2].query_ids
    assert list(drawn[0].query_ids) == sorted(drawn[0].query_ids)
    assert len(drawn[0]) == 20
    assert drawn[0].left_out == {"queries not drawn": 30}
    assert np.array_equal(drawn[0].lengths, np.full(20, 2))
    with pytest.raises(ValueError, match="max_queries"):
        JudgedLists.of(candidates, qrels, max_queries=0)
