"""How good a student is: measured on the teacher's own lists, and in retrieval."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.evaluation.distillation import DistillationEvaluator

__all__ = ["DistillationEvaluator"]

MODULES = {"DistillationEvaluator": "distillation"}
"""Where each public name is; imported when asked for, so that measures do not wait for sentence-transformers."""


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
