"""How good a student is: measured on the teacher's own lists, and in retrieval."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.evaluation.data import EvaluationSet, Finding, open_set, qrels_set
    from st_m3se.evaluation.distillation import DistillationEvaluator
    from st_m3se.evaluation.measures import DEFAULT_MEASURES, parse_measures, per_query
    from st_m3se.evaluation.significance import Comparison, compare, confidence_interval

__all__ = [
    "DEFAULT_MEASURES",
    "Comparison",
    "DistillationEvaluator",
    "EvaluationSet",
    "Finding",
    "compare",
    "confidence_interval",
    "open_set",
    "parse_measures",
    "per_query",
    "qrels_set",
]

MODULES = {
    "DEFAULT_MEASURES": "measures",
    "Comparison": "significance",
    "DistillationEvaluator": "distillation",
    "EvaluationSet": "data",
    "Finding": "data",
    "compare": "significance",
    "confidence_interval": "significance",
    "open_set": "data",
    "parse_measures": "measures",
    "per_query": "measures",
    "qrels_set": "data",
}
"""Where each public name is; imported when asked for, so that measures do not wait for sentence-transformers."""


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
