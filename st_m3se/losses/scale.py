"""How far a student's scores and its teacher's are apart: the default scale, and a warning where they cannot meet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

__all__ = ["COSINE_SCALE", "ScaleCheck", "default_scale", "fitting_scale", "spread"]

logger = logging.getLogger(__name__)

COSINE_SCALE = 20.0
"""What multiplies a cosine unless told otherwise: the scale of sentence-transformers' MultipleNegativesRankingLoss, with
which most bi-encoders were trained, so that a student starts where it is."""
BATCHES = 4
"""Training batches that are looked at: reading the result off an accelerator waits for it."""
TOO_SMALL = 0.1
"""Teacher margins below this share of the scale would ask a cosine for differences of a few hundredths."""
FLAT = 1.1
"""A teacher whose best document has less than this many times its equal share of the probability prefers none."""
BOUND = 1.001
"""The largest similarity that rounding makes of a cosine."""

Matches = Literal["margins", "odds", "distribution", "rankings"]


def default_scale(model: nn.Module, similarity_fct: Callable[[Tensor, Tensor], Tensor]) -> float:
    """20 for a cosine, or for another similarity of embeddings that the model normalises; 1 for all else."""
    modules = list(model.children())
    normalises = bool(modules) and type(modules[-1]).__name__ == "Normalize"
    return COSINE_SCALE if similarity_fct is cos_sim or normalises else 1.0


def spread(scores: Tensor, real: Tensor) -> float | None:
    """The median over queries of (highest - lowest) score; None where no query has two scores.

    Args:
        scores: ``[Q, D]`` scores; what stands outside ``real`` does not count.
        real: ``[Q, D]`` bool.
    """
    ranges = scores.masked_fill(~real, -torch.inf).amax(1) - scores.masked_fill(~real, torch.inf).amin(1)
    ranges = ranges[real.sum(1) > 1]
    return float(ranges.float().median()) if len(ranges) else None


def fitting_scale(teacher_spread: float) -> float:
    """The scale at which a cosine difference of 1 is the teacher's spread, to two digits.

    Trained students use cosines of about 0 to 1 for a query's worst and best candidates, rarely the whole [-1, 1].
    """
    return float(f"{teacher_spread:.2g}")


class ScaleCheck:
    """Warns once when the student cannot learn what the teacher's scores say.

    Whether the student's similarity is a cosine is seen from its values, not from the name of its function: a dot
    product of normalised embeddings, or a function of one's own, is bounded just as much.

    Args:
        name: The loss, to open the message with.
        scale: What multiplies the similarity.
        matches: "margins" for a loss that compares scores in absolute units, "odds" for one that takes the teacher's
            for log-odds, "distribution" for one that takes a softmax of them, "rankings" for one that draws from it.
        temperature: What divides the teacher's scores before that softmax.
    """

    def __init__(self, name: str, scale: float, matches: Matches, temperature: float = 1.0) -> None:
        self.name = name
        self.scale = scale
        self.matches = matches
        self.temperature = temperature
        self.batches_left = BATCHES

    def __call__(self, similarity: Tensor, teacher_scores: Tensor, mask: Tensor) -> None:
        """Look at one training batch, each tensor ``[Q, D]``; ``similarity`` is the student's, without the scale."""
        if self.batches_left == 0:
            return
        scored = mask & ~teacher_scores.isnan()
        teacher = teacher_scores.detach().masked_fill(~scored, 0.0)
        teacher_spread = spread(teacher, scored)
        if not teacher_spread:  # nothing to see: unscored, or a teacher that gives all documents one score
            return
        self.batches_left -= 1
        bounded = bool((similarity.detach().masked_fill(~scored, 0.0).abs() <= BOUND).all())
        squeezed = bool(((teacher >= 0) & (teacher <= 1)).all())
        if self.matches == "margins":
            reason = self._margins(teacher_spread, bounded, squeezed)
        elif self.matches == "odds":
            reason = _sigmoid(None) if squeezed else None
        else:
            reason = self._distribution(teacher, scored, teacher_spread, squeezed)
        if reason:
            self.batches_left = 0
            logger.warning(
                f"{self.name}: the teacher's scores of one query's documents span {teacher_spread:.3g} (median), and {reason}"
            )

    def _margins(self, teacher_spread: float, bounded: bool, squeezed: bool) -> str | None:
        if not bounded or TOO_SMALL * self.scale <= teacher_spread <= 2 * self.scale:
            return _sigmoid(None) if squeezed else None
        remedy = f"Set scale={fitting_scale(teacher_spread):g}, or divide the teacher scores by a constant."
        if teacher_spread > self.scale:
            return (
                f"a cosine times {self.scale:g} can differ by {2 * self.scale:g} at most, so the student cannot reach "
                f"them. {remedy}"
            )
        if squeezed:
            return f"{_sigmoid(self.scale)} Otherwise: {remedy}"
        return (
            f"a cosine times {self.scale:g} must differ by {teacher_spread / self.scale:.2g} only, so the student is "
            f"trained to tell nothing apart. {remedy}"
        )

    def _distribution(self, teacher: Tensor, scored: Tensor, teacher_spread: float, squeezed: bool) -> str | None:
        target = (teacher / self.temperature).float().masked_fill(~scored, -torch.inf)
        several = scored.sum(1) > 1
        target, counts = target[several].softmax(1), scored[several].sum(1)
        if float((target.amax(1) * counts).median()) < FLAT or (squeezed and self.temperature > 0.5):
            if squeezed:
                return _sigmoid(None)
            remedy = f"Set teacher_temperature={teacher_spread / 10:.2g}."
            if self.matches == "rankings":
                remedy = f"Multiply the teacher scores by {10 / teacher_spread:.2g}."
            return (
                f"at a teacher temperature of {self.temperature:g} all documents are about equally likely, so the student "
                f"is trained to tell nothing apart. {remedy}"
            )
        lost = (target == 0) & scored[several]
        if self.matches == "distribution" and int(lost.sum()) * 2 > int(scored[several].sum()):
            return (
                f"at a teacher temperature of {self.temperature:g} the probability of most documents is exactly 0: only "
                f"each query's best one is taught. Set teacher_temperature={teacher_spread / 10:.2g}."
            )
        return None


def _sigmoid(scale: float | None) -> str:
    told = "" if scale is None else f", where a cosine times {scale:g} can differ by {2 * scale:g}"
    return (
        f"all of them lie in [0, 1]{told}. They look like sigmoid outputs, which squeeze the teacher's margins away. "
        "Score with raw logits: CrossEncoder(..., activation_fn=torch.nn.Identity()), or turn the probabilities p back "
        "into log(p / (1 - p)). If they are a bi-encoder's cosines, all is well."
    )
