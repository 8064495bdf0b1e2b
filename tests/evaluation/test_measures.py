"""Measures against trec_eval itself (pytrec_eval), BEIR's own evaluation, and arithmetic."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.data.qrels import read_qrels
from st_m3se.evaluation import DEFAULT_MEASURES, parse_measures, per_query
from st_m3se.evaluation import measures as module
from st_m3se.scores import ScoredList, TeacherScores
from st_m3se.scores.formats.runs import read_run

pytrec_eval = pytest.importorskip("pytrec_eval", reason='the oracle comes with pip install -e ".[test]"')

TREC = Path(__file__).parents[2].parent / "shared" / "data" / "trec"

QRELS = {"q1": {"a": 2, "b": 1, "c": 0, "z": 1}, "q2": {"a": 1}}


def rows(run: dict[str, dict[str, float]]) -> list[ScoredList]:
    return [ScoredList(query, list(scores), list(scores.values())) for query, scores in run.items()]


def trec_eval(
    run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]], name: str, level: int = 1
) -> list[float]:
    """What trec_eval -c says: queries that the run does not have count 0."""
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {name}, relevance_level=level)
    found = evaluator.evaluate({query: scores for query, scores in run.items() if query in qrels})
    key = name.replace(".", "_")
    return [found.get(query, {}).get(key, 0.0) for query in qrels]


def cut(run: dict[str, dict[str, float]], depth: int) -> dict[str, dict[str, float]]:
    """What trec_eval -M leaves of a run, by its own order: float32 score, then id, both falling."""
    best = {
        query: sorted(scores, key=lambda document: (np.float32(scores[document]), document), reverse=True)[:depth]
        for query, scores in run.items()
    }
    return {query: {document: run[query][document] for document in documents} for query, documents in best.items()}


def check_against_trec_eval(run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> None:
    names = {
        "nDCG@10": "ndcg_cut.10",
        "R@100": "recall.100",
        "R@1000": "recall.1000",
        "AP": "map",
        "AP@10": "map_cut.10",
        "P@5": "P.5",
        "RR": "recip_rank",
        "nDCG": "ndcg",
        "Rprec": "Rprec",
        "Success@5": "success.5",
    }
    values = per_query(rows(run), qrels, [*names, "RR@10"], exclude_same_id=False)
    for ours, theirs in names.items():
        assert values[ours].tolist() == trec_eval(run, qrels, theirs), ours
    assert values["RR@10"].tolist() == pytest.approx(trec_eval(cut(run, 10), qrels, "recip_rank"), abs=1e-15)
    binary = {"RR(rel=2)@10": "recip_rank", "AP(rel=2)": "map", "R(rel=2)@100": "recall.100"}
    values = per_query(rows(run), qrels, [*binary, "nDCG@10"], exclude_same_id=False)
    for ours, theirs in binary.items():
        shown = cut(run, 10) if ours.startswith("RR") else run
        assert values[ours].tolist() == pytest.approx(trec_eval(shown, qrels, theirs, level=2), abs=1e-15), ours
    assert values["nDCG@10"].tolist() == trec_eval(run, qrels, "ndcg_cut.10")  # the level is not its business


def test_values_by_hand() -> None:
    """Prevents gains of 2^grade - 1, a discount from the wrong rank, and a recall over what was retrieved."""
    run = {"q1": {"c": 0.9, "b": 0.8, "x": 0.7, "a": 0.6}, "q2": {"b": 1.0}}
    values = per_query(rows(run), QRELS, ["nDCG@10", "RR@10", "R@3", "AP", "P@2", "nDCG@2"])
    dcg = 1 / math.log2(3) + 2 / math.log2(5)
    ideal = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert values["nDCG@10"].tolist() == pytest.approx([dcg / ideal, 0])
    assert values["nDCG@2"].tolist() == pytest.approx([1 / math.log2(3) / (2 + 1 / math.log2(3)), 0])
    assert values["RR@10"].tolist() == pytest.approx([1 / 2, 0])
    assert values["R@3"].tolist() == pytest.approx([1 / 3, 0])
    assert values["AP"].tolist() == pytest.approx([(1 / 2 + 2 / 4) / 3, 0])
    assert values["P@2"].tolist() == pytest.approx([1 / 2, 0])
    assert all(column.dtype == np.float64 and column.shape == (2,) for column in values.values())


def test_equal_scores_stand_in_the_order_of_trec_eval() -> None:
    """Prevents the order of the file, or rising ids as in other programs, from deciding between equal scores."""
    qrels = {"q": {"d1": 1}}
    for documents in (["d1", "d2", "d10"], ["d10", "d2", "d1"]):
        tied = {"q": dict.fromkeys(documents, 1.0)}
        values = per_query(rows(tied), qrels, ["RR@10", "RR", "AP", "P@1"])
        assert values["RR@10"].tolist() == values["RR"].tolist() == pytest.approx([1 / 3])  # d2, d10, d1
        assert values["RR"].tolist() == trec_eval(tied, qrels, "recip_rank")


def test_scores_are_compared_as_float32() -> None:
    """trec_eval holds scores in float32: what differs in float64 alone is a tie to it."""
    qrels = {"q": {"a": 1}}
    run = {"q": {"a": 1.0 + 1e-10, "b": 1.0}}
    values = per_query(rows(run), qrels, ["RR@10", "RR"])
    assert values["RR@10"].tolist() == values["RR"].tolist() == trec_eval(run, qrels, "recip_rank") == [0.5]
    far = {"q": {"a": 1.0 + 1e-6, "b": 1.0}}
    assert per_query(rows(far), qrels, ["RR@10"])["RR@10"].tolist() == [1.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_runs_agree_with_trec_eval(seed: int) -> None:
    """Graded and negative grades, ties, lists out of order and short, missing queries, ids that are not ASCII."""
    rng = random.Random(seed)
    documents = [f"d{number}" for number in range(30)] + ["é", "Ω7", "D-1", "0", "10", "9"]
    qrels = {
        f"q{number}": {document: rng.choice([-1, 0, 0, 1, 1, 2, 3]) for document in rng.sample(documents, 12)}
        for number in range(6)
    }
    run = {
        query: {document: rng.choice([rng.gauss(0, 5), 1.0, 0.0, -0.0, 2.5]) for document in shown}
        for query in [*list(qrels)[:5], "unjudged"]
        if (shown := rng.sample(documents, rng.randrange(1, 30)))
    }
    check_against_trec_eval(run, qrels)


def test_a_long_list_agrees_with_trec_eval() -> None:
    rng = random.Random(7)
    qrels = {f"q{number}": {f"d{rng.randrange(3000)}": rng.randrange(4) for _ in range(60)} for number in range(5)}
    run = {
        query: {f"d{document}": round(rng.random(), 2) for document in rng.sample(range(3000), 1500)} for query in qrels
    }
    check_against_trec_eval(run, qrels)


def test_queries_that_are_missing_or_have_no_relevant_document_count_0() -> None:
    """trec_eval leaves out what the run lacks unless -c is given: a system that finds nothing would look better."""
    qrels = {"gone": {"a": 1}, "empty": {"a": 1}, "none": {"a": 0}, "found": {"a": 1}}
    run = [ScoredList("found", ["a"], [1.0]), ScoredList("none", ["a"], [1.0]), ScoredList("empty", [], [])]
    for name, column in per_query(run, qrels).items():
        assert column.tolist() == [0, 0, 0, 1], name


def test_queries_whose_grades_are_all_negative_count_0() -> None:
    """Prevents a crash: trec_eval takes memory for grades up to the best one, which goes wrong if it is below 0."""
    qrels = {"q1": {"a": 3, "b": 1}, "q2": {"a": -1}, "q3": {"a": -2, "b": -100}}
    run = {query: {"a": 2.0, "b": 1.0, "c": 0.5} for query in qrels}
    values = per_query(rows(run), qrels, [*DEFAULT_MEASURES, "nDCG", "Judged@2", "Bpref"])
    assert {name: found.tolist()[1:] for name, found in values.items()} == {
        **{name: [0.0, 0.0] for name in (*DEFAULT_MEASURES, "nDCG", "Bpref")},
        "Judged@2": [1 / 2, 1.0],
    }
    assert values["nDCG@10"][0] == 1.0


def test_the_rule_of_the_same_id() -> None:
    """BEIR leaves a query's own document out of its results, trec_eval does not know the rule."""
    qrels = {"7": {"8": 1}, "9": {"8": 1}}
    run = {"7": {"7": 3.0, "8": 2.0}, "9": {"8": 1.0}}
    assert per_query(rows(run), qrels, ["RR@10"])["RR@10"].tolist() == [1, 1]
    assert per_query(rows(run), qrels, ["RR@10"], exclude_same_id=False)["RR@10"].tolist() == [1 / 2, 1]
    evaluation = pytest.importorskip("beir.retrieval.evaluation").EvaluateRetrieval
    for rule in (True, False):
        results = {query: dict(scores) for query, scores in run.items()}
        ndcg, average, recall, _ = evaluation.evaluate(qrels, results, [10], ignore_identical_ids=rule)
        values = per_query(rows(run), qrels, ["nDCG@10", "AP@10", "R@10"], exclude_same_id=rule)
        assert ndcg["NDCG@10"] == pytest.approx(values["nDCG@10"].mean(), abs=1e-5)
        assert average["MAP@10"] == pytest.approx(values["AP@10"].mean(), abs=1e-5)
        assert recall["Recall@10"] == pytest.approx(values["R@10"].mean(), abs=1e-5)


def test_a_judged_document_is_never_left_out() -> None:
    """Prevents a perfect run of questions and answers that are numbered alike from measuring 0.0, as in BEIR."""
    qrels = {"7": {"7": 1}, "9": {"9": 0, "8": 1}}
    run = {"7": {"7": 3.0, "8": 2.0}, "9": {"9": 2.0, "8": 1.0}}
    for rule in (True, False):
        assert per_query(rows(run), qrels, ["RR@10"], exclude_same_id=rule)["RR@10"].tolist() == [1, 1 / 2]


def test_ids_may_be_numbers_and_a_fraction_is_no_grade() -> None:
    """Prevents judgements that match nothing, and a grade of 0.5 that is cut to 0: every measure would be 0."""
    run = [ScoredList(7, [1, 2], [1.0, 2.0])]
    for qrels in ({7: {1: 1}}, {"7": {"1": 1}}, {7: {1: np.int64(1)}}, {7: {1: 1.0}}):
        for chosen in (None, [7], ["7"]):
            assert per_query(run, qrels, ["RR@10"], query_ids=chosen)["RR@10"].tolist() == [1 / 2]
    with pytest.raises(FormatError, match=r"relevance must be an integer, got 0\.5\. .*scale the grades"):
        per_query(run, {7: {1: 0.5}}, ["nDCG@10"])
    with pytest.raises(FormatError, match="stand twice, as text and as number"):
        per_query(run, {7: {1: 1, "1": 0}})


def gdeval(run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]], cutoff: int) -> dict[str, list[float]]:
    """What TREC's gdeval.pl says, where it can: ids of digits, grades up to 4."""
    import ir_measures
    from ir_measures.providers.gdeval_provider import GdevalProvider

    measures = [ir_measures.ERR @ cutoff, ir_measures.nDCG(dcg="exp-log2") @ cutoff]
    values = GdevalProvider().iter_calc(measures, qrels, run)
    found = {(each.query_id, str(each.measure)): each.value for each in values}
    return {str(measure): [found.get((query, str(measure)), 0.0) for query in qrels] for measure in measures}


@pytest.mark.parametrize("cutoff", [1, 3, 20])
def test_measures_of_our_own_are_those_of_the_original(cutoff: int) -> None:
    """ERR and exponential nDCG against gdeval.pl, the others against ir_measures' code; where these can compute."""
    import ir_measures
    from ir_measures.providers.accuracy_provider import AccuracyProvider
    from ir_measures.providers.judged_provider import JudgedProvider

    rng = random.Random(5)
    qrels = {str(q): {f"d{rng.randrange(20)}": rng.choice([-1, 0, 1, 2, 4]) for _ in range(8)} for q in range(12)}
    run = {query: {f"d{d}": rng.random() for d in rng.sample(range(40), 15)} for query in qrels}
    expected = gdeval(run, qrels, cutoff) if shutil.which("perl") else {}
    judged, accuracy = ir_measures.Judged @ cutoff, ir_measures.Accuracy(rel=2) @ 15
    for provider, measure in ((JudgedProvider(), judged), (AccuracyProvider(), accuracy)):
        found = {each.query_id: each.value for each in provider.iter_calc([measure], qrels, run)}
        expected[str(measure)] = [found.get(query, 0.0) for query in qrels]
    values = per_query(rows(run), qrels, list(expected), exclude_same_id=False)
    for name, column in expected.items():
        assert values[name].tolist() == pytest.approx(column, abs=1e-5), name
        assert any(column), name


def test_measures_whose_providers_fail_on_ordinary_input() -> None:
    """Prevents a traceback after hours: ids with a hyphen, empty lists, lists of relevant documents alone."""
    qrels = {"q-1": {"a": 3, "b": 1, "c": -2}, "q-2": {"x": 1}, "empty": {"a": 1}, "none": {"a": 0}}
    run = {"q-1": {"b": 3.0, "z": 2.0, "a": 1.0}, "q-2": {"x": 1.0}, "empty": {}, "none": {"a": 1.0}}
    names = ["ERR@2", "ERR", "nDCG(dcg='exp-log2')@2", "nDCG(dcg='exp-log2')", "Judged@3", "Accuracy"]
    values = per_query(rows(run), qrels, names)
    first = (2**1 - 1) / 2**4
    assert values["ERR@2"].tolist() == pytest.approx([first, first, 0, 0])
    assert values["ERR"][0] == pytest.approx(first + (1 - first) * (2**3 - 1) / 2**4 / 3)
    ideal = 7 + 1 / math.log2(3)
    assert values["nDCG(dcg='exp-log2')@2"].tolist() == pytest.approx([1 / ideal, 1, 0, 0])
    assert values["nDCG(dcg='exp-log2')"][0] == pytest.approx((1 + 7 / math.log2(4)) / ideal)
    assert values["Judged@3"].tolist() == pytest.approx([2 / 3, 1, 0, 1])
    assert values["Accuracy"].tolist() == pytest.approx([1 / 2, 1, 0, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("P@0", "cut-off of P@0 must be an integer of at least 1, got 0"),
        ("nDCG(gains={1:0.5})@10", r"gains .* must be integers.*scale"),
        ("RBP(p=0.8)", "nothing that is installed computes"),
    ],
)
def test_what_a_measure_cannot_do_is_said_at_once(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_measures([name])


def test_grades_beyond_a_measure_are_refused_before_the_work() -> None:
    qrels = {"q": {"a": 5}}
    with pytest.raises(ValueError, match="ERR@10 takes grades up to 4, and these judgements go up to 5"):
        per_query([], qrels, ["nDCG@10", "ERR@10"])
    assert per_query(rows({"q": {"a": 1.0}}), qrels, ["nDCG(dcg='exp-log2')@10"])["nDCG(dcg='exp-log2')@10"][0] == 1


def test_the_run_streams_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a run of millions of lines from being held at once, and a block's border from changing values."""
    rng = random.Random(3)
    qrels = {f"q{number}": {f"d{rng.randrange(20)}": 1 for _ in range(4)} for number in range(25)}
    run = {query: {f"d{document}": rng.random() for document in range(20)} for query in reversed(list(qrels))}
    whole = per_query(rows(run), qrels)
    monkeypatch.setattr(module, "BLOCK_QUERIES", 4)
    alive: list[Any] = []

    class Watched(list[str]):
        def __del__(self) -> None:
            alive.remove(1)

    def stream() -> Iterator[ScoredList]:
        for query, scores in run.items():
            alive.append(1)
            assert len(alive) <= 4 + 2
            yield ScoredList(query, Watched(scores), list(scores.values()))

    for name, column in per_query(stream(), qrels).items():
        assert column.tolist() == whole[name].tolist()


def test_the_order_of_the_queries_is_the_callers(tmp_path: Path) -> None:
    store = TeacherScores.from_rows([(2, [10, 5], [0.5, 1.5]), (1, [10], [1.0]), (3, [9], [0.0])], tmp_path / "run")
    qrels = {query: {"10": 1} for query in "1234"}
    assert per_query(store, qrels, ["RR@10"])["RR@10"].tolist() == [1, 1 / 2, 0, 0]
    chosen = per_query(store, qrels, ["RR@10", "MRR@10"], query_ids=["4", "2"])
    assert chosen["RR@10"].tolist() == chosen["MRR@10"].tolist() == [0, 1 / 2]
    with pytest.raises(ValueError, match="1 queries have no judgement, first '5'"):
        per_query(store, qrels, query_ids=["5"])
    with pytest.raises(ValueError, match="twice"):
        per_query(store, qrels, query_ids=["1", "1"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ScoredList("q1", ["a", "a"], [1.0, 2.0]), "a document stands twice in the list of query 'q1'"),
        (ScoredList("q1", ["a", "b"], [1.0, math.nan]), "not a finite float32"),
        (ScoredList("q1", ["a", "b"], [1.0, 1e39]), "not a finite float32"),
        (ScoredList("q1", ["a"], [1.0, 2.0]), "1 documents and 2 scores"),
    ],
)
def test_a_run_that_is_none_is_refused(row: ScoredList, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        per_query([row], QRELS)


def test_a_query_with_two_rows_is_refused() -> None:
    with pytest.raises(FormatError, match="query 'q2' has two rows"):
        per_query([ScoredList("q2", ["a"], [1.0]), ScoredList("q2", ["b"], [1.0])], QRELS)


def test_measures_by_name() -> None:
    assert [str(measure) for measure in parse_measures(DEFAULT_MEASURES)] == list(DEFAULT_MEASURES)
    assert parse_measures(["MRR@10", "MAP", "Recall@5"]) == parse_measures(["RR@10", "AP", "R@5"])
    assert str(parse_measures(["RR(rel=2)@10"])[0]) == "RR(rel=2)@10"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ndcg_cut_10"], r"'ndcg_cut_10' is not a measure.*Write NAME@CUTOFF.*nDCG"),
        (["nDCG@"], "not a measure"),
        (["nDCG@ten"], "not a measure"),
        (["nDCG(relevance=2)@10"], "not a measure"),
        (["R"], "not a measure"),
        (["import os"], "not a measure"),
        (["RBP(p=0.8)"], r"nothing that is installed computes RBP\(p=0.8\)"),
        ("nDCG@10", "must be a list"),
        ([], "must be a list"),
    ],
)
def test_an_unknown_measure_says_what_there_is(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_measures(names)


@pytest.mark.parametrize("system", ["bm25", "colbert"])
def test_real_runs_agree_with_trec_eval(system: str) -> None:
    """TREC DL19: graded, with ties, and run files written by other programs."""
    if not TREC.is_dir():
        pytest.skip("the TREC DL19 runs are not on this machine")
    qrels = read_qrels(TREC / "qrels.dl19-passage.txt")
    with (TREC / f"{system}.dl19.run").open() as file:
        run = pytrec_eval.parse_run(file)
    assert len(qrels) == 43
    values = per_query(read_run(Reading(TREC / f"{system}.dl19.run")), qrels, exclude_same_id=False)
    for ours, theirs in (("nDCG@10", "ndcg_cut.10"), ("R@1000", "recall.1000"), ("AP", "map")):
        assert values[ours].tolist() == trec_eval(run, qrels, theirs)
    check_against_trec_eval(run, qrels)
