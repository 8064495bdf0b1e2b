"""The benchmark of retrieval quality, small: its tables, its sample, and going on where it ended."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import BENCHMARKS, load_benchmark
from evaluation.beir_folder import QRELS, save_encoder, write_set
from evaluation.encoders import QUERIES
from retrieval.test_scoring import make_cross_encoder

from st_m3se.evaluation import open_set


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_benchmark("retrieval_quality", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets, a bi-encoder, a cross-encoder, and a run with judgements."""
    write_set(tmp_path / "scifact")
    corpus = tmp_path / "scifact" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace('"title": ""', '"title": "a file"', 3))
    write_set(tmp_path / "second")
    save_encoder("dense", checkpoint, tmp_path / "student")
    make_cross_encoder(checkpoint, tmp_path / "judge")
    judged = [f"{query} 0 {document} {grade}\n" for query, found in QRELS.items() for document, grade in found.items()]
    (tmp_path / "qrels.dl99.txt").write_text("".join(judged))
    (tmp_path / "a.run").write_text("".join(f"{query} Q0 {next(iter(QRELS[query]))} 1 1 x\n" for query in QUERIES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("st_m3se.evaluation.evaluation._free", lambda: None)  # slower than such models
    return tmp_path


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """The tables by title."""
    given = [*arguments, "--folder", "work", "--device", "cpu", "--no-plots", "--output", "beir.json"]
    monkeypatch.setattr(sys, "argv", ["retrieval_quality.py", *given])
    benchmark.main()
    result = json.loads(Path("beir.json").read_text())
    assert result["benchmark"] == "retrieval_quality"
    return {each["title"]: each for each in result["tables"]}


def cells(table: dict[str, Any], *keys: str) -> list[list[Any]]:
    return [[row[table["columns"].index(key)] for key in keys] for row in table["rows"]]


SYSTEMS = ["--system", "all-MiniLM-L6-v2=student", "--rerank", "judge", "--sample", "6", "--rerank-depth", "3"]


def test_every_table_is_made_of_real_runs(benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ["--qrels", "qrels.dl99.txt", "--run", "mine=a.run"]
    tables = run(benchmark, monkeypatch, "scifact", "second", *SYSTEMS, *runs, "--variants")
    assert cells(tables["Given runs: all measures, the headline's 95 % interval, seconds"], "RR(rel=2)@10") == [[1.0]]
    search = tables["Search of the whole corpus: nDCG@10"]
    assert search["columns"] == ["system", "scifact", "second", "average"]
    for system, first, second, average in search["rows"]:
        assert average == pytest.approx((first + second) / 2), system
    details = tables["Search of the whole corpus: all measures, the headline's 95 % interval, seconds"]
    assert [row[:2] for row in cells(details, "set", "system")] == [
        [name, system] for name in ("scifact", "second") for system in ("bm25", "all-MiniLM-L6-v2")
    ]
    for low, value, high in cells(details, "nDCG@10 from", "nDCG@10", "to"):
        assert low <= value <= high
    again = tables["Re-ranking the first 3, 6 queries a set at most: nDCG@10"]
    assert [row[0] for row in again["rows"]] == [
        "bm25",
        "all-MiniLM-L6-v2",
        "bm25+judge",
        "all-MiniLM-L6-v2+judge",
    ]
    published = tables["Published nDCG@10"]
    for ours, theirs, difference in cells(published, "ours", "published", "ours - published"):
        assert difference == pytest.approx(ours - theirs)
    others = tables["BM25 with other choices: nDCG@10"]
    assert cells(others, "set", "system") == [
        ["scifact", name] for name in [*benchmark.VARIANTS, "bm25-k0.9-b0.4-two-fields"]
    ]
    assert (folder / "work" / "all" / "report.html").is_file()
    committed = json.loads((BENCHMARKS / "results" / "retrieval_quality.json").read_text())["tables"]
    shapes = {shape(title): each["columns"] for title, each in tables.items()}
    shared = [each for each in committed if shape(each["title"]) in shapes]
    assert len(shared) == len(tables), "the committed results lack a table that the script makes"
    for each in shared:
        columns = shapes[shape(each["title"])]
        # Tables of means have a column for each set.
        assert each["columns"] == columns or each["columns"][-1] == columns[-1] == "average"


def shape(title: str) -> str:
    """A title, whatever the numbers in it."""
    return re.sub(r"\d+", "N", title)


def test_a_second_run_goes_on(benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first set alone, as if it had been killed behind it; then both."""
    run(benchmark, monkeypatch, "scifact", *SYSTEMS)
    stamps = {path: path.stat().st_mtime_ns for path in Path("work").rglob("run.trec")}
    assert len(stamps) == 2 + 4
    tables = run(benchmark, monkeypatch, "scifact", "second", *SYSTEMS)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "second" in tables["Search of the whole corpus: nDCG@10"]["columns"]


def test_quick_is_a_part_of_each_set(benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = run(benchmark, monkeypatch, "scifact", *SYSTEMS[:-4], "--quick")
    details = tables["Search of the whole corpus: all measures, the headline's 95 % interval, seconds"]
    assert cells(details, "queries") == [[benchmark.QUICK_QUERIES]] * 2
    title = f"Re-ranking the first {benchmark.QUICK_DEPTH}, {benchmark.QUICK_RERANKED} queries a set at most"
    assert any(name.startswith(title) for name in tables)
    assert not any(name.startswith("Published") for name in tables)  # it is another set by now


def test_a_sample_is_the_same_each_time(benchmark: Any, folder: Path) -> None:
    full = open_set(folder / "scifact")
    part = benchmark.sample(full, 5, 10)
    assert part.query_ids == benchmark.sample(full, 5, 10).query_ids
    assert len(part.query_ids) == 5
    assert list(part.query_ids) == [query for query in full.query_ids if query in part.query_ids]
    judged = {document for grades in part.qrels.values() for document in grades}
    assert judged <= set(part.corpus)
    assert len(part.corpus) == max(10, len(judged))
    assert set(benchmark.sample(full, 5, 1).corpus) == judged
    assert part.queries is not None
    assert dict(part.queries) == {query: QUERIES[query] for query in part.query_ids}
    assert part.findings[-1].effect.startswith("5 of 16 queries")
    assert benchmark.sample(full, 0).query_ids == full.query_ids
    assert part.fingerprint != full.fingerprint


def test_the_package_of_the_same_name_is_still_found(benchmark: Any) -> None:
    """Prevents downloads that fail because this file is called like the package that makes them."""
    beir = pytest.importorskip("beir")
    assert Path(beir.__file__).parent != BENCHMARKS
    assert Path(sys.path[0]).resolve() != BENCHMARKS


@pytest.mark.parametrize("arguments", [[], ["--run", "a=b"], ["scifact", "--qrels", "x"], ["scifact", "--system", "x"]])
def test_a_wrong_command_line_is_refused(
    arguments: list[str], benchmark: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval_quality.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark.options()
