"""What the check of the teacher says of runs whose measures are known."""

from __future__ import annotations

from typing import Any

import pytest

from st_m3se.distillation.lists import ENSEMBLE, TEACHER, Run
from st_m3se.distillation.teacher_check import LEAST_CHECKED, PoorTeacherError, check_teacher

QRELS = {f"q{number}": {"relevant": 1} for number in range(20)}


def ranked(rank: int, queries: Any = QRELS) -> Run:
    """The relevant document at this rank, of every query."""
    documents = [f"d{number}" for number in range(9)]
    documents.insert(rank - 1, "relevant")
    return {query: {document: -float(place) for place, document in enumerate(documents)} for query in queries}


def check(bm25: int, student: int, teacher: int, both: int, **options: Any) -> tuple[dict[str, Any], str]:
    said: list[str] = []
    ranks = {"BM25": bm25, "student": student, TEACHER: teacher, ENSEMBLE: both}
    runs = {name: ranked(rank) for name, rank in ranks.items()}
    settings = {"qrels": QRELS, "ensemble": None, "anyway": False, **options}
    return check_teacher(runs, say=said.append, **settings), "\n".join(said)


def test_the_better_of_teacher_and_mean_is_taught() -> None:
    found, said = check(5, 4, 2, 1)
    assert (found["taught_by"], found["ensemble"], found["nDCG@10"][ENSEMBLE]) == (ENSEMBLE, True, 1.0)
    assert found["p"] < 0.001
    assert "The teacher + student is better than the student" in said
    assert "BM25 alone" not in said
    found, _ = check(5, 4, 1, 2)
    assert found["taught_by"] == TEACHER
    found, _ = check(5, 4, 1, 2, ensemble=True)
    assert found["taught_by"] == ENSEMBLE


def test_a_poor_teacher_is_refused_unless_asked_for() -> None:
    with pytest.raises(PoorTeacherError, match=r"The teacher is no better .* What may help: another --teacher"):
        check(5, 1, 2, 3)
    with pytest.raises(PoorTeacherError, match="--ensemble, which averages it"):
        check(5, 1, 2, 3, ensemble=False)
    found, said = check(5, 1, 2, 3, anyway=True)
    assert found["difference"] < 0
    assert "Going on, as asked" in said


def test_a_search_that_is_better_than_the_teacher_is_named() -> None:
    _, said = check(1, 4, 2, 3)
    assert "BM25 alone is better than that here" in said


def test_few_queries_refuse_nothing() -> None:
    few = dict(list(QRELS.items())[: LEAST_CHECKED - 1])
    found, said = check(5, 1, 2, 3, qrels=few)
    assert found == {"measured": False, "ensemble": True}
    assert "too few to tell" in said
