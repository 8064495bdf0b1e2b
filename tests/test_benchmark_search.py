"""The search benchmark, small and in this process; figures are not judged, that results agree is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_fixtures import load_benchmark

pytest.importorskip("beir")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load_benchmark("search", monkeypatch)
    monkeypatch.setattr(module, "in_own_process", module.measure)
    return module


def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    sizes = ["--queries", "7", "--documents", "60000", "--dimension", "8", "--depth", "20"]
    options = ["--folder", str(folder), "--output", str(folder / "search.json")]
    monkeypatch.setattr(sys, "argv", ["search.py", *sizes, *options])
    benchmark.main()
    result: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return result


def test_it_measures_every_way_and_compares_the_lists(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over more than one of beir's chunks, so that its running heaps are compared with ours as well."""
    (table,) = run(benchmark, monkeypatch, tmp_path)["tables"]
    assert table["title"].startswith("7 queries x 60,000 documents x 8, top 20")
    ways = [row[0] for row in table["rows"]]
    assert ways[:3] == ["matrix product alone", "st-m3se", "beir"]
    assert all(row[1] > 0 for row in table["rows"])
    assert table["rows"][1][2] == table["rows"][0][3] == 1
    found = dict(np.load(tmp_path / "beir.npz"))
    assert found["rows"].shape == (7, 20)
    assert len(np.unique(found["rows"])) > 20


@pytest.mark.parametrize("wrong", ["score", "document"])
def test_lists_that_differ_are_an_error(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: str
) -> None:
    """Prevents a fast search that is fast because it is wrong."""
    search = benchmark.WAYS["st-m3se"]

    def spoilt(folder: Path, sizes: Any) -> Any:
        def call() -> Any:
            rows, scores = search(folder, sizes)()
            if wrong == "score":
                scores[3, 0] += 0.01
            else:
                rows[3, 0] = next(row for row in range(60_000) if row not in rows[3])
            return rows, scores

        return call

    monkeypatch.setitem(benchmark.WAYS, "st-m3se", spoilt)
    with pytest.raises(ValueError, match="query 3: beir and st-m3se differ"):
        run(benchmark, monkeypatch, tmp_path)
