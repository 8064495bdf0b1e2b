from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from scores.score_samples import AMBIGUOUS, SAMPLES, write_sample
from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.data.qrels import read_qrels
from st_m3se.data.texts import Texts
from st_m3se.scores import TeacherScores, convert, sniff, text_id
from st_m3se.scores.formats import FORMATS

T = text_id


def read(name: str, path: Path, **options: object) -> dict[object, dict[object, float]]:
    rows = FORMATS[name].read(Reading(path, **options))  # type: ignore[arg-type]
    return {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in rows}


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


EXPECTED: dict[str, dict[object, dict[object, float]]] = {
    "marginmse": {"7": {"d1": 9.5, "d2": -1.25, "d3": 3.0}, "5": {"d4": 8.0, "d2": 0.5}},
    "marginmse-text": {
        T("what is it"): {T("this is it"): 9.5, T("that is not"): -1.25},
        T("who was"): {T("she was"): 8.0, T("that is not"): 0.5},
    },
    "gpl": {"q7": {"d1": 0.0, "d2": -10.75, "d3": -6.5}, "q5": {"d4": 0.0, "d2": -7.5}},
    "hard-negatives": {7: {1: 9.5, 2: -1.25}, 5: {4: 8.0, 2: 0.5}},
    "score-pickle": {7: {1: 9.5, 2: -1.25}, 5: {4: 8.0}},
    "flagembedding": {
        T("what"): {T("this"): 9.5, T("that"): -1.25, T("them"): 3.0},
        T("who"): {T("she"): 8.0, T("that"): 0.5},
    },
    "pylate": {7: {1: 9.5, 2: -1.25}, 5: {4: 8.0, 2: 0.5}},
    "tevatron": {"7": {"d1": 9.5, "d2": -1.25}},
    "margins": {"q7": {"d1": 0.0, "d2": -10.75, "d3": -6.5}, "q5": {"d4": 0.0, "d2": -7.5}},
    "tuples": {
        T("what"): {T("this"): 9.5, T("that"): -1.25, T("them"): 3.0},
        T("who"): {T("she"): 8.0, T("that"): 0.5, T("this"): 0.25},
    },
    "rank-llm": {"7": {"d1": 9.5, "d2": -1.25}},
    "rankify": {T("what?"): {1: 9.5, 2: -1.25}},
    "colbert": {7: {1: 9.5, 2: -1.25}, 5: {4: 8.0, 2: 0.5}},
    "trec": {"7": {"d1": 9.5, "d2": -1.25}, "5": {"d4": 8.0}},
    "ranking": {"7": {"d1": 9.5, "d2": -1.25}, "5": {"d4": 8.0}},
    "csv": {"7": {"d1": 9.5, "d,2": -1.25}, "5": {"d4": 8.0}},
    "parquet": {7: {1: 9.5, 2: -1.25}, 5: {4: 8.0}},
}


HUGE = "0x" + "f" * 5_000  # as Python writes no decimal number


@pytest.mark.parametrize("id_type", [None, "str", "int"])
@pytest.mark.parametrize("lists", [(f"[{HUGE}]", "[1.0]"), ("['d']", f"[{HUGE}]"), (f"[[{HUGE}]]", "[1.0]")])
def test_a_number_of_thousands_of_digits_is_named(tmp_path: Path, lists: tuple[str, str], id_type: str | None) -> None:
    line = json.dumps({"query_id": "q", "document_ids": lists[0], "scores": lists[1]})
    with pytest.raises(FormatError, match=r"x\.jsonl:1: .*(bits|integer)"):
        read("pylate", written(tmp_path / "x.jsonl", line), id_type=id_type)


DATE, TIME = pa.array([2**31 - 1], pa.int32()).cast(pa.date32()), pa.array([2**53], pa.timestamp("s"))


@pytest.mark.parametrize("ids", [DATE, TIME, pa.array([1], pa.timestamp("us", tz="No/Where")), pa.nulls(1)])
def test_values_that_python_has_no_object_for_are_refused(tmp_path: Path, ids: pa.Array) -> None:
    lists = {"document_ids": pa.array([["d"]]), "scores": pa.array([[1.0]])}
    pq.write_table(pa.table({"query_id": ids, **lists}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"_id": ids, "text": ["t"]}), tmp_path / "t.parquet")
    with pytest.raises(FormatError, match=r"x\.parquet"):
        read("parquet", tmp_path / "x.parquet")
    with pytest.raises(FormatError, match=r"t\.parquet"):
        Texts.open(tmp_path / "t.parquet", cache_dir=tmp_path / "cache")


def test_every_format_has_a_sample() -> None:
    assert set(SAMPLES) == set(EXPECTED) == set(FORMATS)


PACKED = [(name, pack) for name in ("trec", "csv", "pylate", "rank-llm", "score-pickle") for pack in ("gz", "zst")]


@pytest.mark.parametrize(("name", "packing"), [*((name, "plain") for name in SAMPLES), *PACKED])
def test_each_format_is_recognised_and_read(tmp_path: Path, name: str, packing: str) -> None:
    path = write_sample(tmp_path, name)
    if packing != "plain":
        pack = gzip.compress if packing == "gz" else zstandard.compress
        path.write_bytes(pack(SAMPLES[name]))
    if name in AMBIGUOUS:
        with pytest.raises(FormatError, match=r"gpl \(.*margin\) or ranking \(.*rank, score\).*format="):
            sniff(path)
    else:
        assert sniff(path) == name
    assert read(name, path) == EXPECTED[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_each_format_becomes_a_store(tmp_path: Path, name: str) -> None:
    chosen = name if name in AMBIGUOUS else None
    result = convert(write_sample(tmp_path, name), tmp_path / "store", source_format=chosen)
    store = TeacherScores.open(tmp_path / "store")
    store.validate()
    assert {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in store} == EXPECTED[name]
    assert (result.source_format, result.queries) == (name, len(EXPECTED[name]))
    assert store.manifest["scale"] == ("margin" if name in ("gpl", "margins") else None)
    pairs = ("marginmse", "marginmse-text", "gpl", "margins", "tuples")
    named = name in (*pairs, "hard-negatives", "flagembedding", "tevatron")
    assert (tmp_path / "store" / "qrels" / "train.tsv").is_file() == named
    if named:  # the positive of each query stands first, as the losses assume by default
        kind = "int" if store.manifest["query_id_type"] == "int" else "str"
        qrels = read_qrels(tmp_path / "store" / "qrels" / "train.tsv", id_type=kind)
        assert {row.query_id: {row.document_ids[0]: 1} for row in store} == qrels


def test_texts_are_kept_beside_the_scores(tmp_path: Path) -> None:
    """A format without ids gets ids from its texts, and the texts in the BEIR layout, each once."""
    convert(write_sample(tmp_path, "flagembedding"), tmp_path / "store")
    corpus = [json.loads(line) for line in (tmp_path / "store" / "corpus.jsonl").open()]
    queries = [json.loads(line) for line in (tmp_path / "store" / "queries.jsonl").open()]
    assert {entry["_id"]: entry["text"] for entry in corpus} == {T(x): x for x in ("this", "that", "them", "she")}
    assert len(corpus) == 4
    assert queries == [{"_id": T("what"), "text": "what"}, {"_id": T("who"), "text": "who"}]
    convert(write_sample(tmp_path, "tevatron"), tmp_path / "tevatron")
    assert json.loads((tmp_path / "tevatron" / "corpus.jsonl").open().readline()) == {
        "_id": "d1",
        "title": "It",
        "text": "this",
    }


def test_scattered_pairs_of_a_query_become_one_row(tmp_path: Path) -> None:
    path = written(tmp_path / "x", "2.5\t1\ta\tp\tn1\n1.5\t0.5\tb\tp\tn1\n2.5\t0.25\ta\tp\tn2\n2\t.5\ta\tp2\tn2\n")
    with pytest.raises(FormatError, match=r"x:4: query 'a' and document 'n2' have the score 0.5 here and 0.25"):
        read("marginmse", path)
    reading = Reading(path, on_error="skip")
    rows = list(FORMATS["marginmse"].read(reading))
    assert [(row.query_id, row.document_ids, row.scores, row.positives) for row in rows] == [
        ("a", ["p", "p2", "n1", "n2"], [2.5, 2.0, 1.0, 0.25], ("p", "p2")),
        ("b", ["p", "n1"], [1.5, 0.5], ("p",)),
    ]
    assert reading.skipped == 1


def test_margins_keep_every_difference(tmp_path: Path) -> None:
    """GPL has no scores: p1 is 0, and p2 finds its place through the negative that both have."""
    path = written(tmp_path / "x", "q\tp1\tn1\t3.0\nq\tp2\tn2\t0.5\nq\tp2\tn1\t4.5\nq\tp1\tn1\t3.0\n")
    scores = read("gpl", path)["q"]
    assert scores == {"p1": 0.0, "n1": -3.0, "p2": -3.0 + 4.5, "n2": -3.0 + 4.5 - 0.5}
    with pytest.raises(FormatError, match=r"x:2: .* shares no negative"):
        read("gpl", written(tmp_path / "x", "q\tp1\tn1\t3.0\nq\tp2\tn2\t0.5\n"))
    with pytest.raises(FormatError, match=r"x:2: .* contradicts other lines, from which 3.0 follows"):
        read("gpl", written(tmp_path / "x", "q\tp1\tn1\t3.0\nq\tp1\tn1\t5.0\n"))
    with pytest.raises(FormatError, match="is the positive and the negative"):
        read("gpl", written(tmp_path / "x", "q\tp1\tp1\t3.0\n"))


@pytest.mark.parametrize(
    "line",
    [
        "7 Q0 d1 1 9.5 tag",
        "7\tQ0\td1\t1\t9.5\ttag",
        "7 0 d1 1 9.5 a tag of words",
        "7 Q0 d1 1 9.5",
        "7 d1 1 9.5 tag",
        "7   d1\t1 9.5   tag",
    ],
)
def test_runs_come_in_many_shapes(tmp_path: Path, line: str) -> None:
    path = written(tmp_path / "x", "\ufeff" + line + "\r\n\r\n" + line.replace("d1", "d2").replace("9.5", "8e-1"))
    assert sniff(path) == "trec"
    assert read("trec", path) == {"7": {"d1": 9.5, "d2": np.float32(0.8)}}


BAD = [
    ("marginmse", "1\t2\tq\tp\n", 1, "expected 5 fields with tabs"),
    ("marginmse", "1\t2\tq\tp\tn\nx\t2\tq\tp\tn\n", 2, "the positive's score must be a number, got 'x'"),
    ("marginmse", "1\tnan\tq\tp\tn\n", 1, "must be finite"),
    ("marginmse", "1_0\t2\tq\tp\tn\n", 1, "must be a number"),
    ("marginmse", "1\t2\t\tp\tn\n", 1, "query id is empty"),
    ("gpl", "q\tp\tn\t1e99\n", 1, "fit into float32"),
    ("trec", "7 Q0 d1 1 9.5 tag\n7 Q0 d2 2\n", 2, "expected 6 fields"),
    ("trec", "7 Q0 d1 1 9.5 tag\n7 Q0 d2 x 3 tag\n", 2, "the rank must be an integer"),
    ("trec", "hello\n", 1, "expected `query Q0 document rank score tag`"),
    ("pylate", "{}\n", 1, r"lacks \['query_id'"),
    ("pylate", "[]\n", 1, "expected a JSON object"),
    ("pylate", '{"query_id": 1\n', 1, "not JSON"),
    ("pylate", "[" * 100_000 + "\n", 1, "not JSON"),
    ("pylate", '{"query_id": 1, "document_ids": [1], "scores": [1, 2]}\n', 1, "1 documents and 2 scores"),
    ("pylate", '{"query_id": 1, "document_ids": [1, 1], "scores": [1, 2]}\n', 1, "document 1 stands twice"),
    ("pylate", '{"query_id": 1, "document_ids": [1], "scores": [null]}\n', 1, "must be a number, got None"),
    ("pylate", '{"query_id": 1, "document_ids": [1], "scores": [NaN]}\n', 1, "must be finite"),
    ("pylate", '{"query_id": 1.5, "document_ids": [1], "scores": [1]}\n', 1, "string or an integer, got 1.5"),
    ("pylate", '{"query_id": 1, "document_ids": [true], "scores": [1]}\n', 1, "got True"),
    ("pylate", '{"query_id": 1, "document_ids": [1, "2"], "scores": [1, 2]}\n', 1, "one type of ids"),
    ("pylate", '{"query_id": 99999999999999999999, "document_ids": [1], "scores": [1]}\n', 1, "64 bits"),
    ("pylate", '{"query_id": 1, "document_ids": "open(1)", "scores": [1]}\n', 1, "holds no list"),
    ("pylate", '{"query_id": "\\ud800", "document_ids": [1], "scores": [1]}\n', 1, "surrogate"),
    (
        "pylate",
        '{"query_id": 1, "document_ids": ' + "[" * 900 + "]" * 900 + ', "scores": [1]}',
        1,
        "string or an integer",
    ),
    ("pylate", "{" + '"query_id": ' + "9" * 5000 + "}\n", 1, "not JSON that can be read"),
    ("flagembedding", '{"query": "q", "pos": ["p"], "neg": []}\n', 1, "has not scored this file"),
    (
        "flagembedding",
        '{"query": "q", "pos": ["p"], "neg": [], "pos_scores": [], "neg_scores": []}\n',
        1,
        "1 documents",
    ),
    ("flagembedding", '{"query": 1, "pos": [], "neg": [], "pos_scores": [], "neg_scores": []}\n', 1, "must be a text"),
    ("tevatron", '{"query_id": 1, "positive_passages": [{"docid": 1}], "negative_passages": []}\n', 1, "has no score"),
    ("tevatron", '{"query_id": 1, "positive_passages": [1], "negative_passages": []}\n', 1, "object with a docid"),
    ("colbert", "[7, [1, 9.5, 3]]\n", 1, r"expected \[query_id"),
    ("colbert", "[7, [1, 9.5]]\n[7, [[1], 9.5]]\n", 2, "string or an integer"),
    ("hard-negatives", '{"qid": 1, "pos": [2], "neg": {}}\n', 1, "has no score: this format keeps them"),
    ("hard-negatives", '{"qid": 1, "pos": [{}], "neg": {}}\n', 1, "object with a pid"),
    ("csv", "query_id,document_id,score\nq,d\n", 2, "expected 3 fields"),
    ("csv", 'query_id,document_id,score\nq,"d,1\n', 2, "unexpected end of data"),
    ("csv", "query_id,document_id,points\nq,d,1\n", 1, "expected one column for score"),
    ("csv", "query_id,qid,document_id,score\nq,q,d,1\n", 1, "expected one column for query_id"),
]


@pytest.mark.parametrize(("name", "content", "line", "message"), BAD)
def test_a_bad_line_is_named_and_nothing_is_written(
    tmp_path: Path, name: str, content: str, line: int, message: str
) -> None:
    path = written(tmp_path / "bad", content)
    with pytest.raises(FormatError, match=message) as caught:
        convert(path, tmp_path / "out", source_format=name)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad"]


def test_skipping_counts_and_reports(tmp_path: Path) -> None:
    good = '{"query_id": %d, "document_ids": [1], "scores": [1]}\n'
    content = (good % 1).encode() + b"\xff\n" + b"{\n" * 30 + (good % 1).encode() + (good % 2).encode()
    path = written(tmp_path / "mixed.jsonl", content)
    result = convert(path, tmp_path / "store", on_error="skip")
    assert (result.queries, result.skipped, len(result.messages)) == (2, 31, 20)
    assert result.messages[0].startswith(f"{path}:2: this is not UTF-8")
    assert [row.query_id for row in TeacherScores.open(tmp_path / "store")] == [1, 2]
    with pytest.raises(FormatError, match="no row of scores"):
        convert(written(tmp_path / "none.jsonl", "{\n"), tmp_path / "x", source_format="pylate", on_error="skip")
    other = (good % 1).replace('"scores": [1]', '"scores": [2]')
    with pytest.raises(FormatError, match=r"3: query 1 and document 1 have the score 2\.0 here and 1\.0 on an earlier"):
        convert(written(tmp_path / "twice", (good % 1) + (good % 2) + other), tmp_path / "x")
    line = "[1, [1, 9.5]]\n"
    with pytest.raises(FormatError, match="2: query 1 has a row already"):
        convert(written(tmp_path / "twice", line * 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_a_truncated_file_is_an_error_even_when_skipping(tmp_path: Path, pack: object) -> None:
    """zstandard's own reader ends a truncated stream in silence: half of the scores would be missing."""
    lines = "".join(f"{q} Q0 d{d} {d} {q / (d + 1)} tag\n" for q in range(99) for d in range(99))
    packed = pack(lines.encode())  # type: ignore[operator]
    path = written(tmp_path / "run", packed[: len(packed) // 2])
    with pytest.raises(FormatError, match=r"run:[0-9]+: reading stops here"):
        convert(path, tmp_path / "out", source_format="trec", on_error="skip")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert len(read("trec", written(tmp_path / "run", packed + pack(b"100 Q0 d 1 1 t\n")))) == 100  # type: ignore[operator]


def test_ids_become_another_type_only_when_asked(tmp_path: Path) -> None:
    path = written(tmp_path / "run", "7 Q0 12 1 9.5 tag\n")
    assert read("trec", path) == {"7": {"12": 9.5}}
    assert read("trec", path, id_type="int") == {7: {12: 9.5}}
    assert read("pylate", write_sample(tmp_path, "pylate"), id_type="str")["7"] == {"1": 9.5, "2": -1.25}
    for damaged in ("007", "+7", "7.0", "\u0667", "9" * 30, "1_0", "-0"):
        with pytest.raises(FormatError, match=":1: query id"):
            read("trec", written(tmp_path / "run", f"{damaged} Q0 12 1 9.5 tag\n"), id_type="int")
    with pytest.raises(FormatError, match="whose ids are strings"):
        read("flagembedding", write_sample(tmp_path, "flagembedding"), id_type="int")


def test_hard_negatives_find_their_scores(tmp_path: Path) -> None:
    """The ids and the scores are published as two files; a missing score is an error that names the pair."""
    line = '{"qid": %s, "pos": [1], "neg": {"bm25": [2, 3], "tas-b": [3, 1]}}\n'
    path = written(tmp_path / "hard.jsonl", line % 7)
    scores = written(tmp_path / "scores.pkl.gz", gzip.compress(pickle.dumps({7: {3: 0.5, 2: 1.5, 1: 9.0, 8: 0.0}})))
    convert(path, tmp_path / "store", scores=scores)
    assert [tuple(row[:3]) for row in TeacherScores.open(tmp_path / "store")] == [(7, [1, 2, 3], [9.0, 1.5, 0.5])]
    convert(scores, tmp_path / "all")
    convert(path, tmp_path / "again", scores=tmp_path / "all")
    assert len(TeacherScores.open(tmp_path / "again")[7].scores) == 3
    with pytest.raises(FormatError, match=r"hard.jsonl:1: query 8 and document 1 have no score"):
        convert(written(path, line % 8), tmp_path / "no", scores=tmp_path / "all")
    with pytest.raises(ValueError, match="belongs to hard-negatives"):
        convert(write_sample(tmp_path, "trec"), tmp_path / "no", scores=scores)
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".", "no"))]


def test_judgements_are_not_taken_for_scores(tmp_path: Path) -> None:
    for content in ("1 0 d1 1\n", "query-id\tcorpus-id\tscore\n1\td\t1\n"):
        with pytest.raises(FormatError, match="relevance judgements, not"):
            sniff(written(tmp_path / "q", content))


@pytest.mark.parametrize("blank", ["\t", " "])
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (["9.5", "-3.25"], "csv"),
        (["-3", "2.5"], "csv"),
        (["2", "0"], "judgements"),
        (["4.0", "1.0"], "judgements"),  # as pandas writes a column with a gap
        (["-1", "1"], "either"),  # TREC's web tracks judge spam below 0
        (["7", "12"], "either"),
    ],
)
def test_the_scores_tell_a_teacher_s_table_from_judgements_of_the_same_header(
    tmp_path: Path, scores: list[str], expected: str, blank: str
) -> None:
    """A fraction is no grade; whole numbers beyond the usual grades may be either, and nothing is guessed."""
    rows = [["query-id", "corpus-id", "score"], ["q1", "d1", scores[0]], ["q1", "d2", scores[1]]]
    path = written(tmp_path / "x.tsv", "".join(blank.join(row) + "\n" for row in rows))
    if expected == "csv" and blank == "\t":
        assert sniff(path) == "csv"
        convert(path, tmp_path / "store")
        assert TeacherScores.open(tmp_path / "store")["q1"].scores == [float(score) for score in scores]
        return
    message = {"judgements": "relevance judgements, not", "either": r"csv .* or judgements", "csv": "no format that"}
    with pytest.raises(FormatError, match=message[expected]):
        sniff(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("a b c\n", "no format that is known"),
        ("1\t2\t3\t4\t5\n1\t2\t3\t4\tx\n", None),
        ("[\n{}\n]\n", "no format"),
        ('{"query": "x"}\n', "no format"),
        ('{"query_id": 1, "document_ids": [], "scores": [], "qid": 1, "pos": [], "neg": []}\n', "pylate .* or hard"),
        ("1\t2\t3\t4.5\tx\n", "trec or marginmse"),
        ("[1, 2]\n", "no format"),
        (b"\xff\xfe\x00", "neither text"),
        ("7\t1\t1\t-20.5\n7\t2\t2\t-22.5\n", "gpl .* or ranking"),
        ("7\t1\t1\n7\t2\t2\n", "ranking .* or judgements"),
        ("7\t1\t2\t-20.5\n7\t2\t1\t-22.5\n", "gpl"),  # ranks that fall are none
    ],
)
def test_an_uncertain_format_is_refused(tmp_path: Path, content: str | bytes, message: str | None) -> None:
    path = written(tmp_path / "x", content)
    if message is None or message == "gpl":
        assert sniff(path) == (message or "marginmse")
        return
    with pytest.raises(FormatError, match=message):
        sniff(path)


def test_tables_with_other_names(tmp_path: Path) -> None:
    path = written(tmp_path / "x", "q;text;d;points\n7;hello;d1;9.5\n")
    columns = {"query_id": "q", "document_id": "d", "score": "points"}
    convert(path, tmp_path / "store", source_format="csv", columns=columns)
    assert TeacherScores.open(tmp_path / "store")["7"].scores == [9.5]
    pq.write_table(pa.table({"q": [2, 1, 2], "d": ["a", "b", "c"], "points": [1.0, 2.0, 3.0]}), tmp_path / "long")
    convert(tmp_path / "long", tmp_path / "other", columns=columns)
    assert TeacherScores.open(tmp_path / "other")[2].document_ids == ["a", "c"]
    pq.write_table(
        pa.table({"query_id": [2, 1], "document_ids": ["['a']", "b"], "scores": ["[1]", "[2]"]}), tmp_path / "t"
    )
    with pytest.raises(FormatError, match="t:2: document_ids is a text that holds no list"):
        convert(tmp_path / "t", tmp_path / "no")


def test_real_runs_and_margins(shared_data: Path, tmp_path: Path) -> None:
    for name, first in [("bm25.dl19.run", 32.25045041042719), ("colbert.dl19.run", None)]:
        result = convert(shared_data / "trec" / name, tmp_path / name, destination_format="store")
        lines = (shared_data / "trec" / name).read_text().splitlines()
        assert (result.scores, result.queries) == (len(lines), len({line.split()[0] for line in lines}))
        store = TeacherScores.open(tmp_path / name)
        store.validate()
        if first is not None:
            assert store["19335"].scores[0] == np.float32(first)
    qrels = read_qrels(shared_data / "trec" / "qrels.dl19-passage.txt")
    summary = TeacherScores.open(tmp_path / "bm25.dl19.run").describe(qrels)
    assert summary.positives is not None
    assert summary.covered is not None
    assert 0 < summary.covered < summary.positives
    for path in sorted(shared_data.glob("*/qrels/*.tsv")):
        assert sum(len(judged) for judged in read_qrels(path).values()) == len(path.read_text().splitlines()) - 1

    folder = shared_data / "gpl-fiqa-sample"
    convert(folder / "gpl-training-data.tsv", tmp_path / "gpl")
    gpl = TeacherScores.open(tmp_path / "gpl")
    for line in (folder / "gpl-training-data.tsv").read_text().splitlines():
        query, positive, negative, margin = line.split("\t")
        scores = dict(zip(gpl[query].document_ids, gpl[query].scores, strict=True))
        assert scores[positive] - scores[negative] == pytest.approx(float(margin), abs=1e-5)
    assert sniff(folder / "hard-negatives.jsonl") == "hard-negatives"
    with pytest.raises(FormatError, match=r"jsonl:1: .* has no score"):
        convert(folder / "hard-negatives.jsonl", tmp_path / "no")
