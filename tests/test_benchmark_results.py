"""The committed results of the benchmarks, and the tables that are made of them."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest
from benchmark_fixtures import BENCHMARKS, load_benchmark

RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))

sys.path.append(str(BENCHMARKS))
from benchmark_results import fill, render, table  # noqa: E402


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_says_where_it_comes_from(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["command"].startswith("python benchmarks/")
    facts = result["provenance"]
    assert datetime.fromisoformat(facts["date"]).tzinfo is not None
    for name in ("commit", "python", "system", "cpu", "cores", "memory_gib", "packages"):
        assert facts[name], name
    assert result["tables"]
    for each in result["tables"]:
        assert each["title"]
        assert each["rows"]
        assert {len(row) for row in each["rows"]} == {len(each["columns"])}
    shown = f"<!-- {path.name} -->" in (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert shown, f"give {path.name} a heading and its markers in benchmarks/README.md"


def test_the_tables_are_those_of_the_results() -> None:
    """Prevents a README that tells of other figures than the files."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert fill(text) == text, "run python benchmarks/benchmark_results.py"
    assert RESULTS


def test_a_table_is_rendered_and_checked() -> None:
    facts = {"date": "2020-01-02T03:04:05+00:00", "commit": "abc", "cpu": "C", "cores": 2, "memory_gib": 8, "load": 0.5}
    facts |= {"system": "Linux", "python": "3.11"}
    made = table("Speed", ["what", "value"], [["ours", 1234567], ["theirs", 0.12345], ["none", None]])
    text = render({"command": "python benchmarks/x.py", "provenance": facts, "tables": [made]})
    assert "`python benchmarks/x.py`, 2020-01-02, commit abc: C, 2 cores" in text
    assert text.endswith("| what | value |\n| --- | --- |\n| ours | 1,234,567 |\n| theirs | 0.1235 |\n| none |  |")
    with pytest.raises(ValueError, match="2 cells"):
        table("Speed", ["what", "value"], [["ours"]])


def test_the_store_benchmark_measures_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement and every format, small and in this process; figures are not judged."""
    benchmark = load_benchmark("store", monkeypatch)
    assert benchmark.measure("idle")["peak"] > 2**20  # one in a process of its own, as all are otherwise
    monkeypatch.setattr(benchmark, "measure", lambda name, **arguments: benchmark.MEASUREMENTS[name](**arguments))
    sizes = ["--queries", "30", "--small", "20", "--list-size", "20", "--pairs", "400"]
    monkeypatch.setattr(
        sys, "argv", ["store.py", *sizes, "--folder", str(tmp_path), "--output", str(tmp_path / "store.json")]
    )
    benchmark.main()
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]
    result = json.loads((tmp_path / "store.json").read_text())
    committed = json.loads((BENCHMARKS / "results" / "store.json").read_text())
    assert [each["columns"] for each in result["tables"]] == [each["columns"] for each in committed["tables"]]
    assert [row[:3] for row in result["tables"][0]["rows"]] == [["int", 30, 600], ["str", 20, 400]]
    assert result["tables"][2]["title"].startswith("The same 400 scores")
    conversions = result["tables"][3]["rows"]
    assert [row[0] for row in conversions] == [row[0] for row in committed["tables"][3]["rows"]]
    assert {row[2] for row in conversions} == {400}
