"""Distil slow cross-encoders into fast bi-encoders with sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.core.errors import FormatError
    from st_m3se.data.collection import Collection
    from st_m3se.distillation.pipeline import distill
    from st_m3se.evaluation.evaluation import evaluate
    from st_m3se.evaluation.evaluators import DistillationEvaluator, RetrievalEvaluator
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
    from st_m3se.retrieval.api import APITeacher
    from st_m3se.retrieval.bm25 import BM25
    from st_m3se.retrieval.candidates import find_candidates
    from st_m3se.retrieval.queries import generate_queries
    from st_m3se.retrieval.scoring import score_candidates
    from st_m3se.scores.teacher_scores import TeacherScores
    from st_m3se.training.collator import DistillationCollator
    from st_m3se.training.dataset import build_distillation_dataset
    from st_m3se.training.reader import ResampleCallback

__version__ = "0.1.0"

__all__ = [
    "BM25",
    "APITeacher",
    "AllMarginsMSELoss",
    "Collection",
    "CombinedLoss",
    "ContrastiveLoss",
    "CoupledRankDistilLoss",
    "DistillationCollator",
    "DistillationEvaluator",
    "DistillationLoss",
    "FormatError",
    "M3SELoss",
    "MarginMSELoss",
    "RankDistilLoss",
    "ResampleCallback",
    "RetrievalEvaluator",
    "ScoreMSELoss",
    "SoftmaxCrossEntropyLoss",
    "SpladeLoss",
    "TeacherScores",
    "build_distillation_dataset",
    "distill",
    "evaluate",
    "find_candidates",
    "generate_queries",
    "score_candidates",
]

MODULES = {
    "APITeacher": "retrieval.api",
    "BM25": "retrieval.bm25",
    "Collection": "data.collection",
    "DistillationCollator": "training.collator",
    "DistillationEvaluator": "evaluation.evaluators",
    "FormatError": "core.errors",
    "ResampleCallback": "training.reader",
    "RetrievalEvaluator": "evaluation.evaluators",
    "TeacherScores": "scores.teacher_scores",
    "build_distillation_dataset": "training.dataset",
    "distill": "distillation.pipeline",
    "evaluate": "evaluation.evaluation",
    "find_candidates": "retrieval.candidates",
    "generate_queries": "retrieval.queries",
    "score_candidates": "retrieval.scoring",
}
"""Where a public name is, if not in ``losses``."""


def __getattr__(name: str) -> Any:
    # Lazy, so that `import st_m3se` and the pure functions do not wait for transformers.
    if name in __all__:
        return getattr(import_module(f"st_m3se.{MODULES.get(name, 'losses')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
