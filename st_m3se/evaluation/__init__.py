"""How good a student is: measured on the teacher's own lists, and in retrieval."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.evaluation.comparison import compare_files as compare_files
    from st_m3se.evaluation.comparison import merge_results as merge_results
    from st_m3se.evaluation.data import EvaluationSet as EvaluationSet
    from st_m3se.evaluation.data import Finding as Finding
    from st_m3se.evaluation.data import open_set as open_set
    from st_m3se.evaluation.data import qrels_set as qrels_set
    from st_m3se.evaluation.evaluation import evaluate as evaluate
    from st_m3se.evaluation.evaluators import DistillationEvaluator as DistillationEvaluator
    from st_m3se.evaluation.evaluators import RetrievalEvaluator as RetrievalEvaluator
    from st_m3se.evaluation.measures import DEFAULT_MEASURES as DEFAULT_MEASURES
    from st_m3se.evaluation.measures import parse_measures as parse_measures
    from st_m3se.evaluation.measures import per_query as per_query
    from st_m3se.evaluation.plots import plot_bars as plot_bars
    from st_m3se.evaluation.plots import plot_differences as plot_differences
    from st_m3se.evaluation.plots import plot_wins as plot_wins
    from st_m3se.evaluation.report import write_html as write_html
    from st_m3se.evaluation.report import write_report as write_report
    from st_m3se.evaluation.results import EvaluatedSet as EvaluatedSet
    from st_m3se.evaluation.results import Results as Results
    from st_m3se.evaluation.significance import Comparison as Comparison
    from st_m3se.evaluation.significance import compare as compare
    from st_m3se.evaluation.significance import confidence_intervals as confidence_intervals
    from st_m3se.evaluation.systems import Encoder as Encoder
    from st_m3se.evaluation.systems import GivenRun as GivenRun
    from st_m3se.evaluation.systems import ReRanker as ReRanker
    from st_m3se.evaluation.tables import render_latex as render_latex
    from st_m3se.evaluation.tables import render_markdown as render_markdown
    from st_m3se.evaluation.tables import render_terminal as render_terminal

MODULES = {
    "comparison": ("compare_files", "merge_results"),
    "data": ("EvaluationSet", "Finding", "open_set", "qrels_set"),
    "evaluation": ("evaluate",),
    "evaluators": ("DistillationEvaluator", "RetrievalEvaluator"),
    "measures": ("DEFAULT_MEASURES", "parse_measures", "per_query"),
    "plots": ("plot_bars", "plot_differences", "plot_wins"),
    "report": ("write_html", "write_report"),
    "results": ("EvaluatedSet", "Results"),
    "significance": ("Comparison", "compare", "confidence_intervals"),
    "systems": ("Encoder", "GivenRun", "ReRanker"),
    "tables": ("render_latex", "render_markdown", "render_terminal"),
}
"""Where each public name is; imported when asked for, so that a measure does not wait for a model library."""

__all__ = [name for names in MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
