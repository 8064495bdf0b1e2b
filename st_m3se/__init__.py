"""Distil slow cross-encoders into fast bi-encoders with sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.collator import DistillationCollator
    from st_m3se.losses import (
        CoupledRankDistilLoss,
        DistillationLoss,
        M3SELoss,
        MarginMSELoss,
        RankDistilLoss,
        ScoreMSELoss,
        SoftmaxCrossEntropyLoss,
    )

__version__ = "0.1.0"

__all__ = [
    "CoupledRankDistilLoss",
    "DistillationCollator",
    "DistillationLoss",
    "M3SELoss",
    "MarginMSELoss",
    "RankDistilLoss",
    "ScoreMSELoss",
    "SoftmaxCrossEntropyLoss",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import st_m3se` and the pure functions do not wait for transformers.
    if name == "DistillationCollator":
        return import_module("st_m3se.collator").DistillationCollator
    if name in __all__:
        return getattr(import_module("st_m3se.losses"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
