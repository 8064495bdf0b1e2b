"""Which documents are followed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from st_m3se.core.errors import FormatError
from st_m3se.diagnostics import Evolution, track
from st_m3se.scores import TeacherScores

CORPUS = {f"d{place}": f"text {place}" for place in range(30)}


def follow(candidates: dict, qrels: dict, **options: object) -> list:
    queries = {query: f"question {query}" for query in candidates}
    return track(candidates, queries, CORPUS, qrels, **options)  # type: ignore[arg-type]


def test_five_and_five_of_one_query_with_their_texts() -> None:
    candidates = {"few": list(CORPUS)[:8], "many": list(CORPUS)[:20]}
    qrels = {"few": {"d0": 1}, "many": {**{f"d{place}": 1 for place in range(7)}, "d8": 0, "lost": 1}}
    (found,) = follow(candidates, qrels)
    assert found.query_id == "many"
    assert found.query == "question many"
    assert found.positives == (True,) * 5 + (False,) * 5
    assert {int(document[1:]) < 7 for document in found.document_ids[:5]} == {True}
    assert {7 <= int(document[1:]) < 20 for document in found.document_ids[5:]} == {True}
    assert found.documents == tuple(CORPUS[document] for document in found.document_ids)
    assert len(set(found.document_ids)) == 10


def test_with_one_relevant_document_each_there_is_one_positive() -> None:
    candidates = {f"q{place}": list(CORPUS)[place : place + 6] for place in range(20)}
    qrels = {f"q{place}": {"d29": 1} for place in range(20)}
    found = follow(candidates, qrels, num_queries=3, seed=4)
    assert len({each.query_id for each in found}) == 3
    for each in found:
        assert each.positives == (True,) + (False,) * 5
        assert each.document_ids[0] == "d29"  # among the candidates or not


def test_every_query_and_document_is_as_likely_as_another() -> None:
    """A reservoir that favours the first or the last would show here: 1,000 draws, 5 standard deviations."""
    candidates = {f"q{place}": list(CORPUS)[:11] for place in range(8)}
    qrels = {query: {"d0": 1} for query in candidates}
    drawn: Counter[str] = Counter()
    for seed in range(1000):
        (found,) = follow(candidates, qrels, seed=seed)
        drawn[str(found.query_id)] += 1
        drawn.update(map(str, found.document_ids[1:]))
    for query in candidates:
        assert abs(drawn[query] - 125) < 5 * (1000 * 1 / 8 * 7 / 8) ** 0.5
    for place in range(1, 11):
        assert abs(drawn[f"d{place}"] - 500) < 5 * (1000 / 4) ** 0.5


def test_the_seed_decides_and_a_store_is_a_mapping(tmp_path: Path) -> None:
    candidates = {f"q{place}": list(CORPUS)[place : place + 9] for place in range(20)}
    qrels = {query: {listed[0]: 1} for query, listed in candidates.items()}
    store = TeacherScores.from_rows([(q, d, [0.0] * len(d)) for q, d in candidates.items()], tmp_path / "run")
    queries = {query: f"question {query}" for query in candidates}
    one = follow(candidates, qrels, seed=1)
    assert one == follow(candidates, qrels, seed=1) == track(store, queries, CORPUS, qrels, seed=1)
    assert any(one != follow(candidates, qrels, seed=seed) for seed in (2, 3))


def test_nothing_to_follow_is_an_error() -> None:
    with pytest.raises(FormatError, match="no query has both"):
        follow({"q": ["d1"]}, {"q": {"d1": 1}})
    with pytest.raises(ValueError, match="at least 1"):
        follow({"q": ["d1"]}, {}, num_positives=0)


HEADER = "step,epoch,query_id,document_id,positive,score\n"


def test_a_record_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "student.csv"
    whole = HEADER + '0,0.0,q,"a,b",1,0.5\n0,0.0,q,c,0,0.25\n10,0.1,q,"a,b",1,0.75\n10,0.1,q,c,0,-1e-05\n'
    for torn in ("", '20,0.2,q,"a,b",1,0.5\n', '20,0.2,q,"a,', "2"):
        file.write_text(whole + torn)
        found = Evolution.read(file)
        assert found.name == "student"
        assert found.steps.tolist() == [0, 10]
        assert found.document_ids == ("a,b", "c")
        assert found.positives.tolist() == [True, False]
        assert found.scores.tolist() == [[0.5, 0.25], [0.75, -1e-05]]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    for content, message in (
        ("a,b\n1,2\n", "expected the columns"),
        (HEADER, "no whole record"),
        (HEADER + "0,0,q,a,1,x\n", "not a record"),
        (HEADER + "0,0,q,a,1,1\n1,0,q,b,1,1\n", "not those of the first step"),
    ):
        file.write_text(content)
        with pytest.raises(FormatError, match=message):
            Evolution.read(file)
