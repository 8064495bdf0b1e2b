"""The table of systems: what it is made of, and that every place where it is shown shows the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test

from st_m3se.core.markdown import text_table
from st_m3se.distillation.card import add_to_card
from st_m3se.distillation.lists import AFTER, BEFORE, JUDGES, Run
from st_m3se.distillation.results import compare_runs, p_text, render_text

QRELS = {f"q{number}": {"d0": 1} for number in range(24)}


def run(*ranks: int) -> Run:
    """Each query's relevant document at one of these ranks."""
    return {
        query: {f"d{(place + ranks[number % len(ranks)] - 1) % 10}": 1.0 / (1 + (place)) for place in range(10)}
        | {"d0": 1.0 / ranks[number % len(ranks)] + 1e-9}
        for number, query in enumerate(QRELS)
    }


RUNS = {"BM25": [run(9, 5, 7)], BEFORE: [run(2, 3, 4)], AFTER: [run(1, 2, 4), run(1, 3, 1)], "teacher": [run(1, 2, 1)]}


def test_p_is_a_randomisation_test_corrected_over_the_systems() -> None:
    found = compare_runs(RUNS, QRELS, "teacher")
    values = {name: np.array(found["per_query"][name]["RR@10"]) for name in RUNS}
    for name, each in found["against_student_after"].items():
        difference = values[AFTER] - values[name]
        exact = permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=9999, rng=np.random.default_rng(0)
        ).pvalue
        assert each["RR@10"]["difference"] == pytest.approx(difference.mean())
        assert each["RR@10"]["p"] == pytest.approx(exact, abs=0.02)
    ordered = sorted((each["RR@10"]["p"], each["RR@10"]["holm_p"]) for each in found["against_student_after"].values())
    highest = 0.0
    for place, (p, holm) in enumerate(ordered):
        highest = max(highest, min(1.0, p * (len(ordered) - place)))
        assert holm == pytest.approx(highest)
    start, end, goal = (found["systems"][name]["RR@10"] for name in (BEFORE, AFTER, "teacher"))
    assert found["lead_closed"]["RR@10"] == pytest.approx((end - start) / (goal - start))
    assert len(found["seeds"][AFTER]) == 2


def test_terminal_and_card_show_the_corrected_p(tmp_path: Path) -> None:
    results = {
        **compare_runs(RUNS, QRELS, "teacher"),
        **{"data": "toy", "documents": 10, "queries": {"train": 4, "test": 24}, "judged_by": next(iter(JUDGES))},
        **{"kept_start": False, "model": "m", "taught_by": "teacher", "command": "st-m3se distill", "model_from": "x"},
        **{"teachers": ["t"], "trainings": {AFTER: [{"folder": "x", "seed": 1}, {"folder": "y", "seed": 2}]}},
        "config": {"student": "s"},
    }
    card = tmp_path / "README.md"
    card.write_text("# Model\n")
    add_to_card(card, results)
    printed, written = render_text(results), card.read_text()
    for name, each in results["against_student_after"].items():
        p = p_text(each["nDCG@10"]["holm_p"])
        assert f"  {p}  " in next(line for line in printed.splitlines() if line.startswith(f"{name}  "))
        assert f"| {name} | " in written
        assert f"| {p} |" in next(line for line in written.splitlines() if line.startswith(f"| {name} |"))
    assert "Holm-corrected" in printed
    assert "Holm-corrected" in written


def test_a_table_for_a_terminal() -> None:
    table = text_table(["name", "figure"], [["a", "1.0"], ["longer name", "12.25"]], {1})
    assert table.splitlines() == ["name         figure", "-" * 19, "a               1.0", "longer name   12.25"]
