from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.scores import TeacherScores

ROWS = [(7, ["d1", "d2", "d3"], [3.5, -1.25, 0.5]), (10, ["d9"], [2.0])]


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["describe", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    parents = [{"name": "a", "queries": 2}, {"name": "b", "queries": 2}]
    manifest = {"teacher": "my/teacher", "max_length": 256, "parents": parents, "source": {"file": "x.tsv"}}
    TeacherScores.from_rows(ROWS, tmp_path / "store", manifest=manifest)
    return tmp_path / "store"


def test_the_manifest_and_the_figures_are_printed(store: Path) -> None:
    out, _ = run(store, "--bins", 5)
    lines = out.splitlines()
    assert lines[0] == f"{store}: 2 queries in 1 Parquet files"
    for line in (
        "teacher: my/teacher",
        "max length: 256",
        'source: {"file": "x.tsv"}',
        "parents:",
        '  {"name": "a", "queries": 2}',
        "query id type: int",
        "document id type: str",
        "2 queries, 4 scores",
        "documents per query: 1 to 3, mean 2.0",
    ):
        assert line in lines
    assert not any(line.startswith(("revision", "shards", "version")) for line in lines)
    summary = TeacherScores.open(store).describe(bins=5)
    assert str(summary.score_histogram) in out
    assert str(summary.margin_histogram) in out


def test_the_coverage_of_positives_takes_ids_of_the_stores_types(store: Path, tmp_path: Path) -> None:
    """The queries are integers and the documents strings, and the file of judgements says neither."""
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n7\td1\t1\n7\tlost\t1\n10\td9\t0\n")
    out, _ = run(store, "--qrels", tmp_path / "qrels.tsv")
    assert "positives with a score: 1 of 2 (50.0%)" in out
    (tmp_path / "words.tsv").write_text("query-id\tcorpus-id\tscore\nseven\td1\t1\n")
    _, err = run(store, "--qrels", tmp_path / "words.tsv", code=1)
    assert f"error: {tmp_path / 'words.tsv'}: the id 'seven' is not an integer" in err


def test_validate_stops_at_what_is_wrong(store: Path, tmp_path: Path) -> None:
    assert run(store, "--validate")[0].endswith("valid\n")
    table = pa.table(
        {"query_id": ["a"], "document_ids": [["d", "d"]], "scores": pa.array([[1, 2]], pa.list_(pa.float32()))}
    )
    pq.write_table(table, tmp_path / "bad.parquet")
    assert "2 scores" in run(tmp_path / "bad.parquet")[0]
    out, err = run(tmp_path / "bad.parquet", "--validate", code=1)
    assert out == ""
    assert "error: the store is not valid: document 'd' stands twice in the list of query 'a'" in err


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    assert "no such file or folder" in run(tmp_path / "lost", code=1)[1]
    assert "--qrels" in run("--help")[0]
