"""What came of a distillation, in numbers: the systems beside each other, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from st_m3se.core.markdown import text_table
from st_m3se.diagnostics.gap import percent
from st_m3se.distillation.data import Qrels
from st_m3se.distillation.lists import AFTER, BEFORE, ENSEMBLE, JUDGES, MEASURES, TEACHER, Run, measure
from st_m3se.evaluation.significance import compare

__all__ = ["P_EXPLAINED", "about_seeds", "compare_runs", "p_text", "ranked_by", "render_text", "table"]

LEAST_LEAD = 0.01  # below, a share of it says nothing
P_EXPLAINED = (
    "p: two-sided paired randomisation test against the student after training, Holm-corrected over the systems of a "
    "measure."
)


def compare_runs(
    runs: Mapping[str, Sequence[Run]], qrels: Qrels, taught_by: str, *, exclude_same_id: bool = False
) -> dict[str, Any]:
    """Measure systems on the same queries, and test each against the student after training.

    Args:
        runs: System to its runs, one for each seed; their values are averaged query by query.
        qrels: What is relevant.
        taught_by: The system that taught, of whose lead over the start a share was closed.
        exclude_same_id: Whether documents with the query's own id count for nothing.

    Returns:
        "systems", "seeds", "against_student_after", "lead_closed" and "per_query" of ``results.json``, see
        :mod:`st_m3se.distillation`.
    """
    by_seed = {
        name: [measure(run, qrels, exclude_same_id=exclude_same_id) for run in each] for name, each in runs.items()
    }
    values = {
        name: {m: np.mean([each[m] for each in found], axis=0) for m in MEASURES} for name, found in by_seed.items()
    }
    systems = {name: {m: float(each[m].mean()) for m in MEASURES} for name, each in values.items()}
    against: dict[str, Any] = {name: {} for name in values if name != AFTER}
    closed = {}
    for m in MEASURES:
        for other in compare({name: each[m] for name, each in values.items()}, m, baseline=AFTER):
            # Of the student minus the other one: above 0 the student is better.
            low, high = other.interval
            against[other.second][m] = {
                "difference": -other.difference,
                "interval": [-high, -low],
                "p": other.randomisation_p,
                "holm_p": other.holm_p,
            }
        start, end, goal = (systems[name][m] for name in (BEFORE, AFTER, taught_by))
        closed[m] = (end - start) / (goal - start) if goal - start >= LEAST_LEAD else None
    return {
        "systems": systems,
        "seeds": {
            name: [{m: float(each[m].mean()) for m in MEASURES} for each in found]
            for name, found in by_seed.items()
            if len(found) > 1
        },
        "against_student_after": against,
        "lead_closed": closed,
        "per_query": {name: {m: each[m].tolist() for m in MEASURES} for name, each in values.items()},
    }


def p_text(p: float) -> str:
    """A p-value as text; a permutation test of 9,999 resamples says no more than this."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def ranked_by(name: str) -> str:
    """What a system ranks."""
    return "candidates" if name in (TEACHER, ENSEMBLE) else "whole corpus"


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads and the rows of the table of systems: means over the test queries, and p."""
    measures = list(results["systems"][AFTER])
    rows = []
    for name, means in results["systems"].items():
        against = results["against_student_after"].get(name)
        cells = [(f"{means[m]:.3f}", p_text(against[m]["holm_p"]) if against else "-") for m in measures]
        rows.append([name, ranked_by(name), *(part for cell in cells for part in cell)])
    return ["system", "ranks", *(head for m in measures for head in (m, "p"))], rows


def about_seeds(results: Mapping[str, Any]) -> str:
    """Of several trainings: that the table has their means, and what the one that became the model reaches."""
    folders = [training["folder"] for training in results["trainings"][AFTER]]
    if len(folders) < 2:
        return ""
    place = folders.index(results["model_from"])
    reached = ", ".join(f"{m} {value:.3f}" for m, value in results["seeds"][AFTER][place].items())
    seed = results["trainings"][AFTER][place]["seed"]
    return f"Means over {len(folders)} seeds. The model is that of seed {seed}, the best on dev: {reached}."


def _lead(results: Mapping[str, Any]) -> str:
    """How much of the teacher's lead was closed, in a sentence."""
    share, teacher = results["lead_closed"]["nDCG@10"], results["taught_by"]
    if share is None:
        return f"'{teacher}' has no lead over the student on these queries that could be closed."
    return f"{percent(share)} of the lead of '{teacher}' over the student was closed (nDCG@10)."


def render_text(results: Mapping[str, Any]) -> str:
    """The results as a table of plain text, and what it says."""
    head, rows = table(results)
    lines = [
        f"\n{results['data']}: {results['queries']['test']:,} test queries, {results['documents']:,} documents",
        text_table(head, rows, range(2, len(head))),
        *filter(None, [JUDGES[results["judged_by"]]]),
        P_EXPLAINED,
        _lead(results),
        *filter(None, [about_seeds(results)]),
    ]
    if results["kept_start"]:
        lines.append("Training made the student worse on dev: the model is the student as it comes.")
    lines.append(f"Model: {results['model']}" + (f"; report: {results['report']}" if "report" in results else ""))
    return "\n".join(lines)
