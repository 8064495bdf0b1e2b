"""The comparison of losses: what is on disk is found again, and nothing else is taken for it."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from benchmark_fixtures import load_benchmark


def test_a_ranking_is_found_by_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents --tables-only from looking for files of a name that no run has written."""
    comparison = load_benchmark("loss_comparison", monkeypatch)
    made = {"list_size": 4, "student": "minilm", "output": "a.json", "tables_only": False, "work": "w", "seeds": [1]}
    name = comparison.ranking_name("m3se", 1, Namespace(**made))
    later = made | {"output": "b.json", "tables_only": True, "work": "v", "seeds": [1, 2]}
    assert comparison.ranking_name("m3se", 1, Namespace(**later)) == name
    assert comparison.ranking_name("m3se", 1, Namespace(**made | {"list_size": 8})) != name
    assert comparison.ranking_name("m3se", 2, Namespace(**made)) != name


def test_options_that_came_later_leave_older_rankings_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = load_benchmark("loss_comparison", monkeypatch)
    older = Namespace(list_size=4, student="minilm")
    assert comparison.ranking_name("m3se", 1, older) == comparison.ranking_name(
        "m3se", 1, Namespace(**vars(older), guide=None, unlabelled=False, labelled=None)
    )
    names = {
        comparison.ranking_name("m3se", 1, Namespace(**vars(older), guide=guide, **labels))
        for guide in (None, "larger")
        for labels in ({"unlabelled": False, "labelled": None}, {"unlabelled": True, "labelled": None}, {"labelled": 9})
    }
    assert len(names) == 6


def test_both_benchmarks_give_every_option_that_a_comparison_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prevents an option of one from ending the other, which builds upon it."""
    given: dict[str, set[str]] = {}
    for name, made in (("loss_comparison", "Comparison"), ("msmarco", "MSMarco")):
        benchmark = load_benchmark(name, monkeypatch)

        def keep(*parts: Any, name: str = name) -> None:
            given[name] = set(vars(parts[-1]))

        monkeypatch.setattr(benchmark, made, keep)
        monkeypatch.setattr(benchmark, "tables_of", lambda *parts: [])
        monkeypatch.setattr(benchmark, "save", lambda *parts: None)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(tmp_path / "result.json")])
        benchmark.main()
    assert given["loss_comparison"] - given["msmarco"] == {"data", "depth"}  # of the loop over sets, of a search
