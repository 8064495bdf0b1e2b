from __future__ import annotations

import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_help import help_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.cli.combine import combine as combine_command
from st_m3se.core.errors import FormatError
from st_m3se.scores import TeacherScores, combine
from st_m3se.scores import writer as writer_module
from st_m3se.scores.combine import calibrate

Lists = dict[object, dict[object, float]]

CALIBRATIONS = ["none", "z-norm", "min-max", "rank", "log-rank"]


def make(path: Path, lists: Lists, **manifest: object) -> TeacherScores:
    rows = [(query, list(scores), list(scores.values())) for query, scores in lists.items()]
    return TeacherScores.from_rows(rows, path, manifest=manifest)


def read(store: TeacherScores) -> Lists:
    return {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in store}


def oracle_calibrate(scores: dict[object, float], calibration: str) -> dict[object, float]:
    """One query's list, by the definition."""
    values = list(scores.values())
    if calibration == "none":
        return scores
    if calibration == "log-rank":
        ranks = rankdata([-value for value in values], method="average")
        return {document: -math.log(rank) for document, rank in zip(scores, ranks, strict=True)}
    if len(set(values)) == 1:
        return dict.fromkeys(scores, 0.0 if calibration == "z-norm" else 0.5)
    if calibration == "z-norm":
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        return {document: (score - mean) / deviation for document, score in scores.items()}
    if calibration == "min-max":
        return {document: (score - min(values)) / (max(values) - min(values)) for document, score in scores.items()}
    ranks = rankdata(values, method="average")
    return {document: (rank - 1) / (len(values) - 1) for document, rank in zip(scores, ranks, strict=True)}


def oracle(
    stores: list[Lists], calibration: str, aggregation: str, spread: float | None, limit: float | None
) -> tuple[Lists, list[float]]:
    """The ensemble by plain loops, with missing="drop", and the disagreement of every shared document."""
    if spread is None:
        shared_lists = [
            [score for document, score in scores.items() if all(document in store[query] for store in stores)]
            for query, scores in stores[0].items()
            if all(query in store for store in stores)
        ]
        deviations = [statistics.pstdev(scores) for scores in shared_lists if len(set(scores)) > 1]
        spread = statistics.fmean(deviations) if deviations else math.nan
    combined: Lists = {}
    disagreements = []
    for query in stores[0]:
        if not all(query in store for store in stores):
            continue
        shared = [document for document in stores[0][query] if all(document in store[query] for store in stores)]
        lists = [oracle_calibrate({d: store[query][d] for d in shared}, calibration) for store in stores if shared]
        for document in shared:
            values = [scores[document] for scores in lists]
            disagreements.append(statistics.pstdev(values))
            if limit is None or disagreements[-1] <= limit:
                value = {"mean": statistics.fmean, "median": statistics.median, "min": min}[aggregation](values)
                combined.setdefault(query, {})[document] = value * spread
    return combined, disagreements


quarters = st.integers(-40, 40).map(lambda number: number / 4)  # equal scores, and exact in float32


@st.composite
def ensembles(draw: st.DrawFn) -> list[Lists]:
    queries = draw(st.sampled_from([["q1", "q2", "é", "10"], [3, -1, 2**62, 0]]))
    documents = draw(st.sampled_from([["a", "b", "c", "d", "e"], [1, 2, 3, 4, 2**40]]))
    stores = []
    for _ in range(draw(st.integers(2, 4))):
        chosen = draw(st.lists(st.sampled_from(queries), unique=True, min_size=1))
        store: Lists = {}
        for query in chosen:
            listed = draw(st.lists(st.sampled_from(documents), unique=True))
            store[query] = {document: draw(quarters) for document in listed}
        assume(any(store.values()))  # else the type of the document ids is not known
        stores.append(store)
    return stores


@settings(max_examples=80, deadline=None)
@given(
    stores=ensembles(),
    calibration=st.sampled_from(CALIBRATIONS),
    aggregation=st.sampled_from(["mean", "median", "min"]),
    spread=st.sampled_from([1.0, 7.5, None]),
    limit=st.one_of(st.none(), st.floats(0, 2)),
)
def test_an_ensemble_is_what_plain_loops_make_of_it(
    tmp_path_factory: pytest.TempPathFactory,
    stores: list[Lists],
    calibration: str,
    aggregation: str,
    spread: float | None,
    limit: float | None,
) -> None:
    """Whatever the orders, gaps and equal scores, and however rows fall into groups and stretches."""
    spread = spread if calibration == "z-norm" else 1.0
    expected, disagreements = oracle(stores, calibration, aggregation, spread, limit)
    assume(limit is None or all(abs(value - limit) > 1e-9 for value in disagreements))
    folder = tmp_path_factory.mktemp("ensembles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "GROUP_SCORES", 4)
        patch.setattr(sys.modules[combine.__module__], "CHUNK_QUERIES", 2)
        opened = [make(folder / str(number), store) for number, store in enumerate(stores)]
        arguments = {
            "calibration": calibration,
            "aggregation": aggregation,
            "spread": spread if calibration == "z-norm" else None,
            "missing": "drop",
            "max_disagreement": limit,
        }
        constant = any(math.isnan(value) for scores in expected.values() for value in scores.values())
        if not expected or constant:
            messages = r"every list .* is constant|no query is in all|no document is left"
            with pytest.raises(FormatError, match="every list" if constant else messages):
                combine(opened, folder / "both", **arguments)  # type: ignore[arg-type]
            assert not (folder / "both").exists()
            return
        both = combine(opened, folder / "both", **arguments)  # type: ignore[arg-type]
    found = read(both)
    assert list(found) == list(expected)
    for query, scores in expected.items():
        assert list(found[query]) == list(scores)
        assert list(found[query].values()) == pytest.approx(list(scores.values()), rel=1e-6, abs=1e-6)
    both.validate()

    source = both.manifest["source"]
    assert source["mean_disagreement"] == pytest.approx(statistics.fmean(disagreements), abs=1e-9)
    kept = sum(map(len, expected.values()))
    assert source["dropped"]["scores"] == len(disagreements) - kept
    shared_queries = [query for query in stores[0] if all(query in store for store in stores)]
    assert source["dropped"]["queries"] == len(shared_queries) - len(expected)
    for parent, store in zip(both.manifest["parents"], stores, strict=True):
        assert parent["unused"]["queries"] == len(store) - len(shared_queries)
        assert parent["unused"]["scores"] == sum(len(store[query]) for query in shared_queries) - len(disagreements)


@settings(max_examples=100, deadline=None)
@given(lists=st.lists(st.lists(quarters, max_size=6), max_size=6))
def test_calibration_has_its_properties(lists: list[list[float]]) -> None:
    """Order is kept, the scale is the promised one, and neither a teacher's zero nor its unit matters."""
    flat = np.array([score for scores in lists for score in scores])
    lengths = np.array([len(scores) for scores in lists], dtype=np.int64)
    for name in CALIBRATIONS:
        values = calibrate(flat, lengths, name)  # type: ignore[arg-type]
        for scores, found in zip(lists, np.split(values, np.cumsum(lengths)[:-1]) if lists else [], strict=True):
            for (one, one_value), (other, other_value) in itertools.combinations(zip(scores, found, strict=True), 2):
                assert (one < other, one == other) == (one_value < other_value, one_value == other_value)
            if len(set(scores)) < 2:
                assert name in ("none", "log-rank") or set(found) <= {0.0 if name == "z-norm" else 0.5}
            elif name == "z-norm":
                assert (found.mean(), found.std()) == pytest.approx((0, 1))
            elif name == "min-max" or (name == "rank" and len(set(scores)) == len(scores)):
                assert (found.min(), found.max()) == (0, 1)
            elif name == "log-rank" and len(set(scores)) == len(scores):
                assert sorted(np.exp(-found)) == pytest.approx(range(1, len(scores) + 1))
            elif name == "rank":
                assert found.mean() == pytest.approx(0.5)
        if name != "none":
            np.testing.assert_allclose(calibrate(flat * 8 + 4, lengths, name), values, atol=1e-12)  # type: ignore[arg-type]


def test_an_order_alone_becomes_scores(tmp_path: Path) -> None:
    """A language model that sorts gives ranks: softmax must make a distribution of what becomes of them."""
    store = make(tmp_path / "ranks", {"q1": {"a": -1.0, "b": -2.0, "c": -3.0}}, scale="rank")
    (scores,) = read(combine([store], tmp_path / "scores", calibration="log-rank")).values()
    assert scores == pytest.approx({"a": 0.0, "b": -math.log(2), "c": -math.log(3)})
    with pytest.raises(ValueError, match="two stores"):
        combine([store], tmp_path / "same", calibration="rank")


def test_probabilities_become_the_logits_that_they_were(tmp_path: Path) -> None:
    logits = {"a": 9.0, "b": 0.0, "c": -11.5}
    store = make(tmp_path / "sigmoid", {"q1": {name: 1 / (1 + math.exp(-x)) for name, x in logits.items()}})
    (scores,) = read(combine([store], tmp_path / "logits", calibration="logit")).values()
    assert scores == pytest.approx(logits, abs=2e-3)  # float32 has few steps near 1
    rounded = make(tmp_path / "rounded", {"q1": {"a": 1.0, "b": 0.0}})
    (scores,) = read(combine([rounded], tmp_path / "finite", calibration="logit")).values()
    assert scores == pytest.approx({"a": math.log(1e7), "b": -math.log(1e7)}, rel=1e-4)
    with pytest.raises(ValueError, match="logit is for probabilities"):
        combine([make(tmp_path / "raw", {"q1": logits})], tmp_path / "no", calibration="logit")
    assert not (tmp_path / "no").exists()


LEFT: Lists = {"q1": {"a": 4.0, "b": 0.0, "c": -4.0}, "q2": {"a": 2.0, "b": 1.0}}
RIGHT: Lists = {"q1": {"a": 10.0, "b": 30.0, "c": 20.0}, "q2": {"a": 10.0, "b": -10.0}}


@pytest.fixture
def pair(tmp_path: Path) -> list[TeacherScores]:
    return [
        make(tmp_path / "left", LEFT, teacher="small", inputs="abc", max_length=512),
        make(tmp_path / "right", RIGHT, teacher="large", inputs="abc", revision="v2"),
    ]


def test_the_mean_of_z_scores_keeps_the_first_teachers_units(pair: list[TeacherScores], tmp_path: Path) -> None:
    """Prevents margins of z-scores, some five times smaller than logits', from reaching a student unnoticed."""
    both = combine(pair, tmp_path / "both")
    spread = (np.std([4, 0, -4]) + np.std([2, 1])) / 2
    one = np.sqrt(1.5)  # the z-score of the outer two of three evenly spaced scores
    assert both.manifest["source"]["spread"] == pytest.approx(spread)
    assert read(both)["q1"] == pytest.approx({"a": 0.0, "b": spread * one / 2, "c": -spread * one / 2}, abs=1e-6)
    assert read(both)["q2"] == pytest.approx({"a": spread, "b": -spread})
    plain = combine(pair, tmp_path / "plain", spread=1.0)
    assert read(plain)["q2"] == pytest.approx({"a": 1.0, "b": -1.0})


def test_search_scores_among_the_teachers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run beside a teacher's scores has the same layout, and would be averaged with them without a word."""
    lists: Lists = {"q": {"a": 12.5, "b": 3.0}}
    make(tmp_path / "run", lists, source={"candidates": [{"name": "bm25"}], "depth": 50})
    make(tmp_path / "teacher", lists, teacher="my/teacher", source={"candidates": "run"})
    make(tmp_path / "other", lists)
    combine([tmp_path / "teacher", tmp_path / "other"], tmp_path / "quiet")
    assert not caplog.records
    combine([tmp_path / "teacher", tmp_path / "run"], tmp_path / "both")
    assert "run has the scores of a search for candidates" in caplog.text


def test_a_sigmoid_among_the_teachers_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """z-scores bring it to the others' units, but not its margins back."""
    squeezed = make(tmp_path / "squeezed", {"q": {"a": 0.999, "b": 0.998, "c": 0.001}})
    raw = make(tmp_path / "raw", {"q": {"a": 9.0, "b": 6.0, "c": -7.0}})
    combine([raw, squeezed], tmp_path / "both")
    (record,) = caplog.records
    assert record.getMessage().startswith("squeezed: all scores lie in [0, 1], as a sigmoid's outputs do")


def test_the_spread_leaves_constant_lists_out(tmp_path: Path) -> None:
    stores = [
        make(tmp_path / "left", {"q1": {"a": 3.0, "b": 5.0}, "q2": {"a": 1.0}, "q3": {"a": 2.0, "b": 2.0}}),
        make(tmp_path / "right", {"q1": {"a": 0.0, "b": 9.0}, "q2": {"a": 7.0}, "q3": {"a": 5.0, "b": 1.0}}),
    ]
    assert combine(stores, tmp_path / "both").manifest["source"]["spread"] == 1.0
    constant = make(tmp_path / "constant", {query: dict.fromkeys(scores, 2.0) for query, scores in LEFT.items()})
    right = make(tmp_path / "other", RIGHT)
    with pytest.raises(FormatError, match=r"every list of constant is constant.*spread=1\.0"):
        combine([constant, right], tmp_path / "never")
    halves = combine([constant, right], tmp_path / "halves", spread=1.0)
    assert read(halves)["q2"] == pytest.approx({"a": 0.5, "b": -0.5})


def test_the_manifest_names_the_parents_and_the_method(pair: list[TeacherScores], tmp_path: Path) -> None:
    both = combine([tmp_path / "left", pair[1]], tmp_path / "both", calibration="rank", aggregation="min")
    manifest = TeacherScores.open(tmp_path / "both").manifest
    assert manifest["teacher"] == "small + large"
    assert (manifest["inputs"], manifest["max_length"], manifest["scale"]) == ("abc", None, "margin")
    unused = {"queries": 0, "scores": 0}
    assert manifest["parents"] == [
        {"name": "left", "queries": 2, "teacher": "small", "max_length": 512, "inputs": "abc", "unused": unused},
        {"name": "right", "queries": 2, "teacher": "large", "revision": "v2", "inputs": "abc", "unused": unused},
    ]
    assert manifest["source"]["calibration"] == "rank"
    assert manifest["source"]["aggregation"] == "min"
    assert read(both)["q1"] == {"a": 0.0, "b": 0.5, "c": 0.0}
    raw = combine(pair, tmp_path / "raw", calibration="none")
    assert raw.manifest["scale"] is None
    assert read(raw)["q1"] == {"a": 7.0, "b": 15.0, "c": 8.0}


@pytest.mark.parametrize("which", ["a query of the first", "a query of the second", "a document", "another document"])
def test_what_is_missing_is_named(pair: list[TeacherScores], tmp_path: Path, which: str) -> None:
    """Prevents an ensemble that is one teacher's alone for some documents, on another scale than the rest."""
    changed = {query: dict(scores) for query, scores in RIGHT.items()}
    if which == "a query of the first":
        del changed["q2"]
        message = r"other lacks 1 queries of left, the first of them \['q2'\]"
    elif which == "a query of the second":
        changed["q9"] = {"a": 1.0}
        message = r"left lacks 1 queries of other, the first of them \['q9'\]"
    elif which == "a document":
        del changed["q1"]["b"]
        message = "other has no score for document 'b' of query 'q1', which left has"
    else:
        changed["q1"]["z"] = 1.0
        message = "left has no score for document 'z' of query 'q1', which other has"
    other = make(tmp_path / "other", changed)
    with pytest.raises(FormatError, match=message):
        combine([pair[0], other], tmp_path / "both")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["left", "other", "right"]
    assert len(combine([pair[0], other], tmp_path / "both", missing="drop"))


def test_a_filter_that_leaves_nothing_says_so(pair: list[TeacherScores], tmp_path: Path) -> None:
    both = combine(pair, tmp_path / "both", max_disagreement=0.9)
    assert read(both).keys() == {"q1", "q2"}
    assert list(read(both)["q1"]) == ["b", "c"]
    assert both.manifest["source"]["dropped"] == {"queries": 0, "scores": 1}
    opposite = make(tmp_path / "opposite", {q: {d: -s for d, s in scores.items()} for q, scores in LEFT.items()})
    lost = combine([pair[0], opposite], tmp_path / "lost", max_disagreement=0.5)
    assert read(lost) == {"q1": {"b": 0.0}}
    assert lost.manifest["source"]["dropped"] == {"queries": 1, "scores": 4}
    with pytest.raises(FormatError, match="no document is left: 2 are in all of"):
        combine([pair[0].select(["q2"]), opposite.select(["q2"])], tmp_path / "none", max_disagreement=0.5)


def test_selections_combine_like_stores(pair: list[TeacherScores], tmp_path: Path) -> None:
    chosen = [store.select(["q2"]) for store in pair]
    assert read(combine(chosen, tmp_path / "both", calibration="none")) == {"q2": {"a": 6.0, "b": -4.5}}


def test_what_cannot_be_combined_is_refused(pair: list[TeacherScores], tmp_path: Path) -> None:
    left, _ = pair
    for arguments, message in [
        ({"calibration": "sigmoid"}, "calibration must be one of none, z-norm"),
        ({"aggregation": "max"}, "aggregation must be one of"),
        ({"missing": "ignore"}, "missing must be one of"),
        ({"spread": 0.0}, "positive number"),
        ({"spread": 2.0, "calibration": "rank"}, "belongs to z-norm"),
        ({"max_disagreement": -1.0}, "at least 0"),
        ({"max_disagreement": float("nan")}, "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            combine(pair, tmp_path / "both", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two"):
        combine([left], tmp_path / "both")
    with pytest.raises(ValueError, match="one of the stores to combine"):
        combine(pair, tmp_path / "left", overwrite=True)
    (tmp_path / "both").mkdir()
    with pytest.raises(FileExistsError):
        combine(pair, tmp_path / "both")
    with pytest.raises(FormatError, match="store 2 of 2 is empty"):
        combine([left, make(tmp_path / "empty", {})], tmp_path / "new")
    numbers = make(tmp_path / "numbers", {1: {"a": 1.0}})
    with pytest.raises(FormatError, match="query ids of left are str and those of numbers are int"):
        combine([left, numbers], tmp_path / "new")
    margins = make(tmp_path / "margins", RIGHT, scale="margin")
    with pytest.raises(FormatError, match="margins has margins"):
        combine([left, margins], tmp_path / "new", calibration="none", aggregation="min")
    assert combine([left, margins], tmp_path / "new", calibration="none").manifest["scale"] == "margin"


def test_a_store_that_is_not_valid_is_named(pair: list[TeacherScores], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    table = pa.table(
        {
            "query_id": ["q1", "q2"],
            "document_ids": [["a", "b", "c"], ["a", "b"]],
            "scores": pa.array([[1, 2, float("nan")], [1, 2]], pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, tmp_path / "bad" / "x.parquet")
    with pytest.raises(FormatError, match="bad is not valid: query 'q1' has the score nan"):
        combine([pair[0], tmp_path / "bad"], tmp_path / "new")
    twice = pa.concat_tables([table.slice(1), table.slice(1)])
    pq.write_table(twice, tmp_path / "bad" / "x.parquet")
    with pytest.raises(FormatError, match="bad has a query without an id, or one with two rows"):
        combine([pair[0], tmp_path / "bad"], tmp_path / "new")


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["combine", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_command_combines_and_says_what_it_left_out(pair: list[TeacherScores], tmp_path: Path) -> None:
    changed = {**RIGHT, "q9": {"a": 1.0}, "q2": {"a": 1.0, "b": 0.0, "z": 2.0}}
    make(tmp_path / "other", changed)
    stores = [tmp_path / "left", tmp_path / "other"]
    out, err = run(*stores, tmp_path / "both", code=1)
    assert out == ""
    assert "error: left lacks 1 queries of other, the first of them ['q9']" in err
    out, _ = run(*stores, tmp_path / "both", "--missing", "drop", "--max-disagreement", 0.9)
    assert "combined left, other: mean after z-norm" in out
    assert "left out of other, as not in every store: 1 queries, and 1 scores of the others" in out
    assert "dropped 1 scores with a disagreement above 0.9\n" in out
    assert "queries, which" not in out
    assert out.endswith(f"wrote {tmp_path / 'both'}: 2 queries, 4 scores\n")
    assert len(TeacherScores.open(tmp_path / "both")) == 2
    assert "exists" in run(*stores, tmp_path / "both", "--missing", "drop", code=1)[1]
    run(*stores, tmp_path / "right", tmp_path / "both", "--missing", "drop", "--overwrite", "--calibration", "rank")
    assert len(TeacherScores.open(tmp_path / "both").manifest["parents"]) == 3
    assert "at least two" in run(tmp_path / "left", tmp_path / "one", code=1)[1]
    make(tmp_path / "opposite", {q: {d: -s for d, s in scores.items()} for q, scores in LEFT.items()})
    out, _ = run(tmp_path / "left", tmp_path / "opposite", tmp_path / "lost", "--max-disagreement", 0.5)
    assert "dropped 1 queries, which have no document left" in out


def test_the_commands_help_names_every_choice() -> None:
    text = help_of(combine_command)
    for word in (*CALIBRATIONS, "mean", "median", "min", "--spread", "--missing", "--max-disagreement", "--overwrite"):
        assert word in text
