"""Scales on which the scores of different teachers can be compared, as functions of arrays."""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["Calibration", "calibrate", "deviation"]

Calibration = Literal["none", "z-norm", "min-max", "rank"]


def calibrate(scores: np.ndarray, lengths: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Bring each query's scores to a scale that teachers share.

    * "none": as they are.
    * "z-norm": minus their mean, divided by their standard deviation (the population's).
    * "min-max": the lowest becomes 0, the highest 1.
    * "rank": the ranks, evenly spaced from 0 for the lowest to 1 for the highest; equal scores share the mean of their
      ranks.

    A list whose scores are all equal, as in a list of one, says nothing about its documents; they get the middle of
    the scale: 0 for "z-norm", 0.5 for "min-max" and "rank".

    Args:
        scores: All queries' scores, one list after the other, shape [N].
        lengths: The lists' lengths, shape [Q]; they sum to N.
        calibration: The scale.

    Returns:
        Shape [N], float64.
    """
    values = np.asarray(scores, dtype=np.float64)
    lengths = np.asarray(lengths)
    lengths = lengths[lengths > 0]
    if calibration == "none" or not len(lengths):
        return values
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    constant = (low == high)[owner]
    if calibration == "z-norm":
        mean, spread = _moments(values, lengths, owner)
        return np.where(constant, 0.0, (values - mean[owner]) / np.where(constant, 1.0, spread[owner]))
    if calibration == "min-max":
        return np.where(constant, 0.5, (values - low[owner]) / np.where(constant, 1.0, (high - low)[owner]))
    order = np.lexsort((values, owner))
    ordered = values[order]  # by owner first, so the owner of each is still `owner`
    new = np.append(True, (ordered[1:] != ordered[:-1]) | (owner[1:] != owner[:-1]))
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(values)) - 1
    places = ((first + last) / 2)[np.cumsum(new) - 1] - starts[owner]
    ranks = np.empty(len(values))
    ranks[order] = places / np.maximum(lengths - 1, 1)[owner]
    return np.where(constant, 0.5, ranks)


def deviation(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The standard deviation (the population's) of each list that is not empty, in order."""
    lengths = lengths[lengths > 0]
    return _moments(scores, lengths, np.repeat(np.arange(len(lengths)), lengths))[1]


def _moments(values: np.ndarray, lengths: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each list; none is empty."""
    mean = np.bincount(owner, values, len(lengths)) / lengths
    return mean, np.sqrt(np.bincount(owner, (values - mean[owner]) ** 2, len(lengths)) / lengths)
