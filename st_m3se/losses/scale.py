"""Whether a cosine student can express the teacher's margins at all."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BATCHES = 4
"""Training batches that are looked at: reading the result off an accelerator waits for it."""
TOO_SMALL = 0.05
"""Teacher margins below this share of the scale would ask a cosine for differences of a few hundredths."""


def teacher_spread(scores: Tensor, mask: Tensor) -> float | None:
    """The median over queries of (highest - lowest) teacher score; None where no query has two scores.

    Args:
        scores: ``[Q, D]`` teacher scores, NaN where unscored.
        mask: ``[Q, D]`` bool, True for real documents.
    """
    scored = mask & ~scores.isnan()
    spread = scores.masked_fill(~scored, -torch.inf).amax(1) - scores.masked_fill(~scored, torch.inf).amin(1)
    spread = spread[scored.sum(1) > 1]
    return float(spread.float().median()) if len(spread) else None


def fitting_scale(spread: float) -> float:
    """The scale at which a cosine difference of 1 is the teacher's spread, to two digits.

    Trained students use cosines of about 0 to 1 for a query's worst and best candidates, rarely the whole [-1, 1].
    """
    return float(f"{spread:.2g}")


class ScaleCheck:
    """Warns once when the teacher's margins and ``scale`` times a cosine cannot meet.

    Args:
        name: The loss, to open the message with.
        scale: What multiplies the cosine.
    """

    def __init__(self, name: str, scale: float) -> None:
        self.name = name
        self.scale = scale
        self.batches_left = BATCHES

    def __call__(self, scores: Tensor, mask: Tensor) -> None:
        """Look at one training batch, each tensor ``[Q, D]``."""
        if self.batches_left == 0:
            return
        spread = teacher_spread(scores.detach(), mask)
        if not spread:  # nothing to see: unscored, or a teacher that gives all documents one score
            return
        self.batches_left -= 1
        if TOO_SMALL * self.scale <= spread <= 2 * self.scale:
            return
        self.batches_left = 0
        reason = (
            f"a cosine times {self.scale:g} can differ by {2 * self.scale:g} at most, so the student cannot reach them"
            if spread > self.scale
            else f"a cosine times {self.scale:g} must differ by {spread / self.scale:.2g} only, so the student is trained "
            "to tell nothing apart. Scores within [0, 1] are usually sigmoid outputs: raw logits distil better"
        )
        logger.warning(
            f"{self.name}: the teacher's scores of one query's documents span {spread:.3g} (median), and {reason}. "
            f"Set scale={fitting_scale(spread):g}, or divide the teacher scores by a constant."
        )
