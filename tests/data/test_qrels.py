"""The one reader of judgements, in all the forms in which they are published, and by everything that uses it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from st_m3se import build_distillation_dataset
from st_m3se.cli import app
from st_m3se.core.errors import FormatError
from st_m3se.data.qrels import check_judgements, read_judgements, read_qrels
from st_m3se.data.texts import Texts
from st_m3se.diagnostics import track
from st_m3se.evaluation import qrels_set
from st_m3se.retrieval.exclusions import read_exclusions
from st_m3se.scores import TeacherScores, convert

JUDGED = {"1": {"22": 2, "23": 0}, "3": {"22": -1}}
ROWS = [(query, document, grade) for query, grades in JUDGED.items() for document, grade in grades.items()]


def fields(header: str, line: str) -> bytes:
    rows = [line.format(q=query, d=document, g=grade) for query, document, grade in ROWS]
    return "".join(f"{row}\n" for row in [header, *rows] if row).encode()


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def jsonl(query: str, document: str, grade: str, kind: Callable[[str], Any] = str) -> bytes:
    return "".join(json.dumps({query: kind(q), document: kind(d), grade: g}) + "\n" for q, d, g in ROWS).encode()


FORMS = {
    "beir": fields("query-id\tcorpus-id\tscore", "{q}\t{d}\t{g}"),
    "no header": fields("", "{q}\t{d}\t{g}"),
    "other header": fields("qid\tpid\trelevance", "{q}\t{d}\t{g}"),
    "another order": fields("corpus-id\tscore\tquery-id", "{d}\t{g}\t{q}"),
    "names that say nothing": fields("frage\tantwort\tnote", "{q}\t{d}\t{g}"),
    "quoted": fields('"query-id"\t"corpus-id"\t"score"', '"{q}"\t"{d}"\t"{g}"'),
    "commas": fields("query_id,doc_id,label", "{q},{d},{g}"),
    "trec": fields("", "{q} 0 {d} {g}"),
    "trec with tabs": fields("", "{q}\tQ0\t{d}\t{g}"),
    "four columns with a header": fields("query_id\titer\tdocid\trel", "{q}\t0\t{d}\t{g}"),
    "pandas": fields("query-id\tcorpus-id\tscore", "{q}\t{d}\t{g}.0"),
    "jsonl": jsonl("query-id", "corpus-id", "score"),
    "jsonl with numbers": jsonl("query_id", "doc_id", "relevance", int),
    "parquet": parquet(
        **dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*ROWS, strict=True)), strict=True))
    ),
    "parquet with numbers": parquet(qid=[1, 1, 3], pid=[22, 23, 22], label=[2.0, 0.0, -1.0]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pack", [None, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
def test_every_form_reads_alike(form: str, pack: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    """Whatever the file is called, and with ids of the type that the texts or scores have, each side by itself."""
    if form.startswith("parquet") and pack is not None:
        pytest.skip("Parquet is packed inside")
    path = tmp_path / "judgements"
    path.write_bytes(FORMS[form] if pack is None else pack(FORMS[form]))
    qrels, findings = read_judgements(path)
    assert qrels == JUDGED
    assert [list(grades) for grades in qrels.values()] == [["22", "23"], ["22"]]
    noted = {"no header": ["judgements without a header"], "names that say nothing": ["an unknown header"]}
    assert [finding.kind for finding in findings] == noted.get(form, [])
    assert read_qrels(path, id_type="int") == {
        int(query): {int(document): grade for document, grade in grades.items()} for query, grades in JUDGED.items()
    }
    assert read_qrels(path, id_type="int", document_id_type="str") == {int(q): grades for q, grades in JUDGED.items()}


def test_rows_without_grades_and_with_several_documents(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(**{"query-id": ["q"], "corpus-id": [["d1", "d2"]]}))
    (tmp_path / "b.parquet").write_bytes(parquet(**{"query-id": ["r"], "corpus-id": [["d1"]]}))
    assert read_qrels(tmp_path) == {"q": {"d1": 1, "d2": 1}, "r": {"d1": 1}}


def test_what_is_unusual_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "q").write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n1\ta\t1\n1\tb\t1\n1\tb\t0\n")
    assert read_qrels(tmp_path / "q") == {"1": {"a": 1, "b": 0}}
    assert f"{tmp_path / 'q'}: judgements that repeat: 1 (1 a); equal ones" in caplog.text
    assert "contradictory judgements: 1 (1 b); the last one in the file counts" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no judgement"),
        ("query-id\tcorpus-id\tscore\n", "has no judgement"),
        ("1 0 d1\n", r"q:1: the relevance must be an integer, got 'd1'|no judgement"),
        ("1 0 d1 x\n", "q:1: the relevance must be an integer"),
        ("1 0 d1 1 7\n", "q:1: expected `query-id"),
        ("1\td1\t.5\n", r"q:1: the relevance must be an integer, got '\.5'\. trec_eval would cut a fraction"),
        ("query-id\tcorpus-id\tscore\n1\t2\n", "q:2: expected `query-id.*as on the first line"),
        ("query-id\tcorpus-id\tscore\n1\t\t1\n", "q:2: document id is empty"),
        ('query-id\tcorpus-id\tscore\n"1\td\t1\n', "q:2: this is not quoted as CSV"),
        ('{"query-id": 1.5, "corpus-id": "d", "score": 1}\n', "q:1: query id must be a string or an integer"),
        ('{"text": "x"}\n', "q:1: expected query-id, corpus-id"),
    ],
)
def test_what_is_no_judgement_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q").write_text(content)
    with pytest.raises(FormatError, match=message):
        read_judgements(tmp_path / "q")


def test_an_id_that_would_match_none_is_refused(tmp_path: Path) -> None:
    """Prevents judgements that are there and count for nothing: 007 is not 7, and q1 is no integer."""
    for query in ("007", "q1", "1" * 30):
        (tmp_path / "q").write_text(f"{query}\t1\t1\n")
        with pytest.raises(FormatError, match=r"is not an integer in its plain form.*--ids str"):
            read_qrels(tmp_path / "q", id_type="int")


Pairs = dict[tuple[str, str], int]
IDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\n\r"), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(pairs=st.dictionaries(st.tuples(IDS, IDS), st.integers(-2, 3), min_size=1, max_size=5))
def test_what_csv_writes_comes_back(
    pairs: dict[tuple[str, str], int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Ids with quotes, tabs, commas and blanks, as convert and diagnose write them."""
    path = tmp_path_factory.getbasetemp() / "written.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["query-id", "corpus-id", "score"])
        writer.writerows([*pair, grade] for pair, grade in pairs.items())
    found = {
        (query, document): grade for query, grades in read_qrels(path).items() for document, grade in grades.items()
    }
    assert found == pairs


def test_an_id_with_a_quote_that_convert_wrote(tmp_path: Path) -> None:
    line = {
        "query_id": '5" disk',
        "query": "x",
        "positive_passages": [{"docid": '"a"', "text": "x", "title": "", "score": 2.0}],
        "negative_passages": [{"docid": "b", "text": "y", "title": "", "score": 1.0}],
    }
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    convert(tmp_path / "t.jsonl", tmp_path / "store")
    qrels = tmp_path / "store" / "qrels" / "train.tsv"
    assert read_qrels(qrels) == {'5" disk': {'"a"': 1}}
    assert TeacherScores.open(tmp_path / "store").describe(read_qrels(qrels)).covered == 1


@pytest.mark.parametrize("form", ["trec", "other header", "commas", "jsonl with numbers", "parquet with numbers"])
@pytest.mark.parametrize("query_kind", [str, int])
@pytest.mark.parametrize("document_kind", [str, int])
def test_every_user_reads_every_form(
    form: str, query_kind: type, document_kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, diagnosis, candidates, describe, convert and evaluation: each with ids of its own types."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "judgements"
    path.write_bytes(FORMS[form])
    queries = {query_kind(query): f"find {query}" for query in JUDGED}
    corpus = {document_kind(document): f"page {document}" for document in ("22", "23", "24")}
    rows = [(query, list(corpus), [3.0, 2.0, 1.0]) for query in queries]
    store = TeacherScores.from_rows(rows, tmp_path / "store")
    options: dict[str, Any] = {"list_size": 2, "cache_dir": tmp_path / "lists"}
    first, second = queries
    relevant, other, _ = corpus
    dataset = build_distillation_dataset(store, queries, corpus, path, **options)
    assert dataset[0]["document_ids"][0] == relevant
    assert track(store, queries, corpus, path)[0].document_ids[0] == relevant
    asked, documents = Texts.open(queries, "queries"), Texts.open(corpus)
    assert read_exclusions([path], asked, documents) == ({first: {relevant, other}, second: {relevant}}, [])
    described = CliRunner().invoke(app, ["describe", str(tmp_path / "store"), "--qrels", str(path)])
    assert "positives with a score: 1 of 1" in described.output
    convert(tmp_path / "store", tmp_path / "pairs.tsv", qrels=path)
    assert (tmp_path / "pairs.tsv").read_text().splitlines() == ["3.0\t2.0\t1\t22\t23", "3.0\t1.0\t1\t22\t24"]
    assert qrels_set(path, name="set").qrels == JUDGED == check_judgements(JUDGED)
