"""Whether scores are a sigmoid's outputs: the commonest mistake with teacher scores, since the host gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["ScoreRange"]


class ScoreRange:
    """The lowest and highest of scores as they pass.

    Args:
        low: Where it begins, as of a range that was kept.
        high: Likewise.
    """

    def __init__(self, low: float = np.inf, high: float = -np.inf) -> None:
        self.low, self.high = low, high

    def add(self, scores: np.ndarray) -> None:
        """Take in scores; what is not finite is left out."""
        finite = scores[np.isfinite(scores)]
        if len(finite):
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))

    def warning(self, manifest: Mapping[str, Any]) -> str | None:
        """What to say where all scores lie in [0, 1] and the manifest does not say why; None where all is well.

        Fused ranks, calibrated ensembles and cosines lie there by nature.
        """
        source = manifest.get("source")
        by_nature = (
            manifest.get("scale") == "margin"
            or (isinstance(source, Mapping) and "merged_by" in source)
            or "similarity" in str(manifest.get("activation"))
        )
        if by_nature or not 0.0 <= self.low < self.high <= 1.0:
            return None
        return (
            "all scores lie in [0, 1], as a sigmoid's outputs do, which CrossEncoder.predict and mine_hard_negatives "
            "give: it squeezes the margins between good documents away. Score with activation_fn=torch.nn.Identity(), "
            "as st-m3se score does. (If they are cosines, give the manifest the activation 'cosine similarity'.)"
        )
