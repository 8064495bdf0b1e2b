"""Distil slow cross-encoders into fast bi-encoders with sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.collator import DistillationCollator
    from st_m3se.dataset import build_distillation_dataset
    from st_m3se.evaluation.distillation import DistillationEvaluator
    from st_m3se.evaluation.retrieval import RetrievalEvaluator
    from st_m3se.losses import (
        AllMarginsMSELoss,
        CombinedLoss,
        ContrastiveLoss,
        CoupledRankDistilLoss,
        DistillationLoss,
        M3SELoss,
        MarginMSELoss,
        RankDistilLoss,
        ScoreMSELoss,
        SoftmaxCrossEntropyLoss,
        SpladeLoss,
    )
    from st_m3se.resampling import ResampleCallback
    from st_m3se.scores.api import APITeacher

__version__ = "0.1.0"

__all__ = [
    "APITeacher",
    "AllMarginsMSELoss",
    "CombinedLoss",
    "ContrastiveLoss",
    "CoupledRankDistilLoss",
    "DistillationCollator",
    "DistillationEvaluator",
    "DistillationLoss",
    "M3SELoss",
    "MarginMSELoss",
    "RankDistilLoss",
    "ResampleCallback",
    "RetrievalEvaluator",
    "ScoreMSELoss",
    "SoftmaxCrossEntropyLoss",
    "SpladeLoss",
    "build_distillation_dataset",
]

MODULES = {
    "APITeacher": "scores.api",
    "DistillationCollator": "collator",
    "DistillationEvaluator": "evaluation.distillation",
    "ResampleCallback": "resampling",
    "RetrievalEvaluator": "evaluation.retrieval",
    "build_distillation_dataset": "dataset",
}
"""Where a public name is, if not in ``losses``."""


def __getattr__(name: str) -> Any:
    # Lazy, so that `import st_m3se` and the pure functions do not wait for transformers.
    if name in __all__:
        return getattr(import_module(f"st_m3se.{MODULES.get(name, 'losses')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
