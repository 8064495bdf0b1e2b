"""One query's list of documents and scores, and the check that every score passes on its way in."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short

__all__ = ["ScoredList", "check_score", "is_score"]

FLOAT32 = struct.Struct("f")


class ScoredList(NamedTuple):
    """One row of a store: a query, its candidate documents and the teacher's score of each.

    ``positives`` are those documents that the source names as relevant; ``line`` is where the row came from.
    """

    query_id: Id
    document_ids: Sequence[Id]
    scores: Sequence[float]
    positives: Sequence[Id] = ()
    line: int | None = None


def check_score(value: Any, name: str = "score") -> float:
    """Return ``value`` rounded to float32, as it will be stored.

    Raises:
        FormatError: On a bool, a text that is not a decimal number, NaN, infinity, or a number beyond float32.
    """
    if isinstance(value, str):
        try:
            if "_" in value:  # Python's digit grouping; in a file it is damage
                raise ValueError
            number = float(value)
        except ValueError:
            raise FormatError(f"{name} must be a number, got {value!r:.80}.") from None
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond any float
            number = math.inf
    else:
        raise FormatError(f"{name} must be a number, got {short(value)} ({type(value).__name__}).")
    try:
        single: float = FLOAT32.unpack(FLOAT32.pack(number))[0]
    except OverflowError:
        single = math.inf
    if not math.isfinite(single):
        raise FormatError(f"{name} must be finite and fit into float32, got {short(value)}.")
    return single


def is_score(text: str) -> bool:
    """Whether a text is a score that :func:`check_score` lets pass."""
    try:
        check_score(text)
    except FormatError:
        return False
    return True
