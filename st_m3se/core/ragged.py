"""Lists of different lengths, as their values one after the other and their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

__all__ = ["list_array", "list_lengths", "list_values", "offsets", "owners"]


def offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each list begins, and at the end the number of values: int64 ``[lists + 1]``."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def owners(lengths: np.ndarray) -> np.ndarray:
    """The list of each value: int64 ``[values]``."""
    return np.repeat(np.arange(len(lengths)), lengths)


def list_array(values: pa.Array | np.ndarray, lengths: Sequence[int] | np.ndarray) -> pa.ListArray:
    """Arrow's array of these lists."""
    values = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets(lengths), pa.int32()), values)


def list_lengths(lists: pa.ListArray) -> np.ndarray:
    """How many values each list has, 0 where one is missing: int ``[lists]``."""
    return np.asarray(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))


def list_values(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of lists of numbers, and the lengths."""
    lists = table.column(name).combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False), list_lengths(lists)
