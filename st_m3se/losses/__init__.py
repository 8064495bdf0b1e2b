"""Distillation losses for sentence-transformers, over one shared base."""

from __future__ import annotations

from st_m3se.losses.base import DistillationLoss
from st_m3se.losses.baselines import (
    AllMarginsMSELoss,
    ContrastiveLoss,
    MarginMSELoss,
    ScoreMSELoss,
    SoftmaxCrossEntropyLoss,
)
from st_m3se.losses.combined import CombinedLoss
from st_m3se.losses.m3se import M3SELoss
from st_m3se.losses.rank_distil import CoupledRankDistilLoss, RankDistilLoss
from st_m3se.losses.splade import SpladeLoss

__all__ = [
    "AllMarginsMSELoss",
    "CombinedLoss",
    "ContrastiveLoss",
    "CoupledRankDistilLoss",
    "DistillationLoss",
    "M3SELoss",
    "MarginMSELoss",
    "RankDistilLoss",
    "ScoreMSELoss",
    "SoftmaxCrossEntropyLoss",
    "SpladeLoss",
]
