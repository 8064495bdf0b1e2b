"""The benchmark of the training step, small and in this process; figures are not judged, what they are of is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import load_benchmark

SIZES = ["--queries", "4", "--documents", "4", "--max-length", "64", "--repeats", "1", "--parts", "2"]
WAYS = ["host MarginMSE, merged", "st-m3se MarginMSE", "st-m3se M3SE", "floor, one piece", "floor, pieces"]
MODEL = ["--model", "random", "--device", "cpu", "--skip-memory", "--profile"]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("training_step", monkeypatch)
    monkeypatch.setattr(sys.modules["training_ways"], "LAYERS", 1)
    return module


@pytest.mark.slow
def test_all_ways_take_the_same_lists(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prevents a way that is fast because it leaves out texts or computes another gradient."""
    output = tmp_path / "step.json"
    data = ["--sets", "msmarco-like", "--data", str(tmp_path)]
    monkeypatch.setattr(
        sys, "argv", ["training_step.py", *SIZES, *MODEL, *data, "--ways", *WAYS, "--output", str(output)]
    )
    benchmark.main()
    steps, checks, profiles = json.loads(output.read_text())["tables"]
    by_way = {row[0]: dict(zip(steps["columns"], row, strict=True)) for row in steps["rows"]}
    assert list(by_way) == WAYS
    assert all(row["parts"] == 2 and row["median, s"] > 0 for row in by_way.values())
    padding = {way: row["padded / real tokens"] for way, row in by_way.items()}
    assert padding["floor, one piece"] == padding["floor, pieces"] == 1
    assert 1 <= padding["st-m3se MarginMSE"] < padding["host MarginMSE, merged"]
    assert padding["st-m3se MarginMSE"] == padding["st-m3se M3SE"]
    (difference,) = (row[1] for row in checks["rows"] if row[0].startswith("gradients"))
    assert float(difference) < 1e-4
    assert profiles["columns"] == ["operator", *benchmark.PROFILED]
    whole = profiles["rows"][-1]
    assert whole[1:] == pytest.approx([sum(row[place] for row in profiles["rows"][:-1]) for place in (1, 2, 3)])


@pytest.mark.slow
@pytest.mark.parametrize(("student", "trunk"), [("sparse", "bert"), ("multi-vector", "modernbert")])
def test_other_students_have_ways_of_their_own(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, student: str, trunk: str
) -> None:
    """Prevents a comparison of two students, or of two gradients."""
    output = tmp_path / "step.json"
    sizes = ["--queries", "2", "--documents", "3", "--max-length", "32", "--repeats", "1", "--sets", "msmarco-like"]
    kind = ["--student", student, "--trunk", trunk, "--model", "random", "--device", "cpu", "--skip-memory"]
    own = [way for way in benchmark.ways_of(student) if "Distil" not in way and "cached" not in way]
    where = ["--data", str(tmp_path), "--output", str(output), "--ways", *own]
    monkeypatch.setattr(sys, "argv", ["training_step.py", *sizes, *kind, *where])
    benchmark.main()
    steps, checks = json.loads(output.read_text())["tables"]
    assert [row[0] for row in steps["rows"]] == own
    assert sum(way.startswith("host") for way in own) == sum(way.startswith("st-m3se") for way in own) == 2
    (difference,) = (row[1] for row in checks["rows"] if row[0].startswith("gradients"))
    assert float(difference) < 1e-4
