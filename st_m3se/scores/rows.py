"""One query's list, and the checks that every row passes on its way in."""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from st_m3se.scores.errors import FormatError

__all__ = ["Id", "ScoredList", "check_id", "check_score", "first_duplicate", "short"]

Id = str | int

LONG_INTEGER = 256  # bits; Python refuses to write numbers of more than 4,300 digits
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


class _Short(reprlib.Repr):
    """The start of a value, without ever writing the whole of it down."""

    def repr_int(self, x: int, level: int) -> str:
        return f"<integer of {x.bit_length()} bits>" if x.bit_length() > LONG_INTEGER else super().repr_int(x, level)


def short(value: Any) -> str:
    """The start of a value, for messages; a list nested a thousand deep or a number of 5,000 digits does no harm."""
    return f"{_Short().repr(value):.80}"


def check_id(value: Any, name: str) -> Id:
    """Return ``value`` if it is a str or an int64.

    Raises:
        FormatError: On anything else: a float or bool would be read back as another id.
    """
    kind = type(value)
    if kind is str:
        if not value:
            raise FormatError(f"{name} is empty.")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise FormatError(f"{name} {value!r:.80} holds half of a surrogate pair and is not text.") from None
        return str(value)
    if kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise FormatError(f"{name} {short(value)} does not fit into 64 bits. Make it a string.")
        return int(value)
    raise FormatError(f"{name} must be a string or an integer, got {short(value)} ({kind.__name__}).")


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


def first_duplicate(ids: Sequence[Id]) -> Id | None:
    """The first id that occurs a second time, or None."""
    if len(set(ids)) == len(ids):
        return None
    seen: set[Id] = set()
    for value in ids:
        if value in seen:
            return value
        seen.add(value)
    return None
