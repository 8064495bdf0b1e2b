"""How good a student is: measured on the teacher's own lists, and in retrieval."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.evaluation.comparison import compare_files, merge_results
    from st_m3se.evaluation.data import EvaluationSet, Finding, open_set, qrels_set
    from st_m3se.evaluation.evaluation import evaluate
    from st_m3se.evaluation.evaluators import DistillationEvaluator, RetrievalEvaluator
    from st_m3se.evaluation.html import write_html
    from st_m3se.evaluation.measures import DEFAULT_MEASURES, parse_measures, per_query
    from st_m3se.evaluation.plots import plot_bars, plot_differences, plot_wins
    from st_m3se.evaluation.report import write_report
    from st_m3se.evaluation.results import EvaluatedSet, Results
    from st_m3se.evaluation.significance import Comparison, compare, confidence_interval
    from st_m3se.evaluation.systems import Encoder, GivenRun, ReRanker
    from st_m3se.evaluation.tables import render_latex, render_markdown, render_terminal

__all__ = [
    "DEFAULT_MEASURES",
    "Comparison",
    "DistillationEvaluator",
    "Encoder",
    "EvaluatedSet",
    "EvaluationSet",
    "Finding",
    "GivenRun",
    "ReRanker",
    "Results",
    "RetrievalEvaluator",
    "compare",
    "compare_files",
    "confidence_interval",
    "evaluate",
    "merge_results",
    "open_set",
    "parse_measures",
    "per_query",
    "plot_bars",
    "plot_differences",
    "plot_wins",
    "qrels_set",
    "render_latex",
    "render_markdown",
    "render_terminal",
    "write_html",
    "write_report",
]

MODULES = {
    "DEFAULT_MEASURES": "measures",
    "Comparison": "significance",
    "DistillationEvaluator": "evaluators",
    "EvaluationSet": "data",
    "Finding": "data",
    "RetrievalEvaluator": "evaluators",
    "compare": "significance",
    "confidence_interval": "significance",
    "open_set": "data",
    "parse_measures": "measures",
    "per_query": "measures",
    "qrels_set": "data",
    "EvaluatedSet": "results",
    "Results": "results",
    "compare_files": "comparison",
    "merge_results": "comparison",
    "write_report": "report",
    "write_html": "html",
    "render_terminal": "tables",
    "render_markdown": "tables",
    "render_latex": "tables",
    "plot_bars": "plots",
    "plot_differences": "plots",
    "plot_wins": "plots",
    "Encoder": "systems",
    "GivenRun": "systems",
    "ReRanker": "systems",
    "evaluate": "evaluation",
}
"""Where each public name is; imported when asked for, so that measures do not wait for sentence-transformers."""


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
