"""The comparison of losses: what is on disk is found again, and nothing else is taken for it."""

from __future__ import annotations

from argparse import Namespace

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
        "m3se", 1, Namespace(**vars(older), guide=None, unlabelled=False)
    )
    names = {
        comparison.ranking_name("m3se", 1, Namespace(**vars(older), guide=guide, unlabelled=unlabelled))
        for guide in (None, "larger")
        for unlabelled in (False, True)
    }
    assert len(names) == 4
