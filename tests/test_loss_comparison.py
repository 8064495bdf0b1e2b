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


def test_a_ranking_without_a_set_that_is_asked_for_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prevents a table out of domain from being made of rankings that have none, or a training for nothing."""
    comparison = load_benchmark("loss_comparison", monkeypatch)
    each = comparison.Comparison.__new__(comparison.Comparison)
    each.name, each.folder, each.args = "here", tmp_path, Namespace(tables_only=False, depth=2, list_size=4)
    trained: list[str] = []

    def train(row: str, seed: int) -> tuple[str, float]:
        trained.append(row)
        return "student", 1.0

    monkeypatch.setattr(each, "trained", train)
    monkeypatch.setattr(each, "found_by", lambda student, data: {"q1": {data: 1.0}})
    each.data, each.foreign = "own", {}
    assert each.rankings("m3se", 1)["run"] == each.rankings("m3se", 1)["run"] == {"q1": {"own": 1.0}}
    assert trained == ["m3se"]
    each.foreign = {"there": "other"}
    assert each.rankings("m3se", 1)["out_of_domain"] == {"there": {"q1": {"other": 1.0}}}
    each.rankings("m3se", 1)
    assert trained == ["m3se"] * 2
    each.foreign, each.args.tables_only = {"elsewhere": "third"}, True
    with pytest.raises(SystemExit, match="or some sets in it"):
        each.rankings("m3se", 1)
