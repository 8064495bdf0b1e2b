"""Ids of queries and documents: which may be one, and their rows, among millions, without a Python object for each."""

from __future__ import annotations

import reprlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_m3se.core.errors import FormatError

__all__ = ["Id", "SortedIds", "check_id", "check_text", "first_duplicate", "short"]

Id = str | int

LONG_INTEGER = 256  # bits; Python refuses to write numbers of more than 4,300 digits


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
        return check_text(value, name)
    if kind is int:
        if not _storable(value):
            raise FormatError(f"{name} {short(value)} does not fit into 64 bits. Make it a string.")
        return int(value)
    raise FormatError(f"{name} must be a string or an integer, got {short(value)} ({kind.__name__}).")


def check_text(value: str, name: str) -> str:
    """Return ``value``.

    Raises:
        FormatError: If it holds half of a surrogate pair, which no file can.
    """
    if not _storable(value):
        raise FormatError(f"{name} {value!r:.80} holds half of a surrogate pair and is not text.")
    return value


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


class SortedIds:
    """The ids of a column in sorted order, and the row of each: 8 bytes and the id apiece.

    Args:
        ids: Strings or integers. "7" and 7 are two: an id of the other type is never found.
    """

    def __init__(self, ids: pa.ChunkedArray) -> None:
        self.is_int: bool = pa.types.is_integer(ids.type)
        if self.is_int:
            values = ids.to_numpy().astype(np.int64)
            self._order = np.argsort(values, kind="stable")
            self._integers = values[self._order]
        else:
            self._order = pc.sort_indices(ids).to_numpy()
            # One array, so large_string: the ids of 100 million texts pass the 2 GiB that string can address.
            self._strings = ids.cast(pa.large_string()).combine_chunks().take(pa.array(self._order))

    def __len__(self) -> int:
        return len(self._order)

    def find(self, wanted: object) -> int | None:
        """The row of one id, or None."""
        if self.is_int or not isinstance(wanted, str):
            rows = self.find_all([int(wanted) if isinstance(wanted, np.integer) else wanted])  # type: ignore[list-item]
            return None if rows[0] < 0 else int(rows[0])
        # Arrow sorts by the bytes of UTF-8, Python compares code points: the same order.
        place = bisect_left(range(len(self)), wanted, key=lambda row: self._strings[row].as_py())
        return int(self._order[place]) if place < len(self) and self._strings[place].as_py() == wanted else None

    def find_all(self, wanted: Sequence[Id] | np.ndarray) -> np.ndarray:
        """The row of each id, -1 where there is none: int64, as many. 512 among a million take less than 1 ms."""
        rows = np.full(len(wanted), -1, dtype=np.int64)
        if isinstance(wanted, np.ndarray):
            wanted = wanted.tolist()
        right = int if self.is_int else str
        # Almost always all; ids of the other type and those that no file can hold are simply not there.
        places = [place for place, value in enumerate(wanted) if type(value) is right and _storable(value)]
        if not places or not len(self):
            return rows
        found, exact = self._search([wanted[place] for place in places])
        rows[np.array(places)[exact]] = self._order[found[exact]]
        return rows

    def _search(self, wanted: list[Id]) -> tuple[np.ndarray, np.ndarray]:
        """For each id its place in the sorted order, and whether it stands there."""
        last = len(self) - 1
        if self.is_int:
            numbers = np.array(wanted, dtype=np.int64)
            low = np.minimum(np.searchsorted(self._integers, numbers), last)
            return low, self._integers[low] == numbers
        texts = pa.array(wanted, pa.large_string())
        low, high = np.zeros(len(wanted), dtype=np.int64), np.full(len(wanted), len(self), dtype=np.int64)
        for _ in range(len(self).bit_length()):  # a binary search for all at once
            middle = (low + high) // 2
            less = pc.less(self._strings.take(pa.array(np.minimum(middle, last))), texts).to_numpy(zero_copy_only=False)
            less &= low < high
            low, high = np.where(less, middle + 1, low), np.where(less, high, middle)
        low = np.minimum(low, last)
        return low, pc.equal(self._strings.take(pa.array(low)), texts).to_numpy(zero_copy_only=False)

    def first_duplicate(self) -> tuple[Id, int] | None:
        """An id that occurs twice, the smallest, and the row in which it does for the second time; or None."""
        if len(self) < 2:
            return None
        same = self._as_before()
        place = int(np.argmax(same))
        if not same[place]:
            return None
        value = int(self._integers[place]) if self.is_int else str(self._strings[place].as_py())
        return value, int(self._order[place + 1])

    def first_and_last(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows in which each distinct id, in sorted order, occurs for the first and for the last time: int64."""
        order = self._order.astype(np.int64, copy=False)  # Arrow's are unsigned
        if not len(self):
            return order, order
        ends = np.append(np.flatnonzero(~self._as_before()), len(self) - 1)
        starts = np.append(0, ends[:-1] + 1)
        return order[starts], order[ends]

    def _as_before(self) -> np.ndarray:
        """Whether each sorted id, from the second on, is the one before it. Both sorts are stable: rows rise."""
        same: np.ndarray
        if self.is_int:
            same = self._integers[1:] == self._integers[:-1]
        else:
            same = pc.equal(self._strings[1:], self._strings[:-1]).to_numpy(zero_copy_only=False)
        return same


def _storable(value: Id) -> bool:
    """Whether a file can hold it: integers of 64 bits, and text without halves of surrogate pairs."""
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False
