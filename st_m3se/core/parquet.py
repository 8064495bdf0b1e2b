"""Parquet files that others wrote: decoded in small batches, and not at all where a few bytes stand for gigabytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st_m3se.core.errors import FormatError
from st_m3se.core.limits import HELD, LINE, VALUES

__all__ = [
    "UNREADABLE",
    "batches",
    "check_footer",
    "check_groups",
    "check_values",
    "dictionaries",
    "open_parquet",
    "slice_rows",
]

# What Arrow raises over damaged files, and over values that Python has no object for: dates before year 1, time zones.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError, ImportError, MemoryError)

BATCH_ROWS = 1_024
SCANNED = 1 << 16  # bytes; files of the size of a hand-made bomb, which a scan survives
UNCOUNTED = 4  # lists of the limit's length that a group may hold however few bytes they take
EXPANSION = 1_024  # values, or bytes, that a stored byte may stand for; ids cost about a byte each in any encoding


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file, its packed texts left as dictionaries: unpacked, one of them could be repeated a million times."""
    check_footer(path)
    metadata = pq.read_metadata(path)
    return pq.ParquetFile(path, read_dictionary=dictionaries(metadata), page_checksum_verification=True)


def check_footer(path: Path) -> None:
    """Have Arrow read what the footer says of every column where damage to it is an error.

    Asked for a damaged column from Python (``row_group(i).column(j)``), pyarrow ends the process. A small file is
    scanned, a thousand values at a time; of a large one the first row of each group is read.

    Raises:
        pa.ArrowException, OSError: If the footer is damaged.
    """
    with pq.ParquetFile(path) as file:
        for number in range(file.metadata.num_row_groups):
            if (columns := file.metadata.row_group(number).num_columns) != file.metadata.num_columns:
                raise pa.ArrowInvalid(
                    f"row group {number} has {columns} columns, and the file {file.metadata.num_columns}"
                )
        if path.stat().st_size < SCANNED:
            file.scan_contents(batch_size=BATCH_ROWS)
        else:
            for number in range(file.metadata.num_row_groups):
                next(file.iter_batches(1, row_groups=[number], use_threads=False), None)


def dictionaries(metadata: pq.FileMetaData) -> list[str]:
    """The columns of texts that are stored as dictionaries."""
    found = []
    for place in range(metadata.num_columns):
        column = metadata.schema.column(place)
        groups = range(metadata.num_row_groups)
        if column.physical_type == "BYTE_ARRAY" and any(
            metadata.row_group(group).column(place).has_dictionary_page for group in groups
        ):
            found.append(column.path)
    return found


def check_groups(metadata: pq.FileMetaData, columns: Sequence[str]) -> None:
    """Refuse groups of rows that a few bytes stand for.

    Raises:
        FormatError: Naming the limit.
    """
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        stored = sum(chunk.total_compressed_size for chunk in chunks)
        for chunk in chunks:
            if chunk.num_values > max(UNCOUNTED * VALUES.value, EXPANSION * stored):
                raise VALUES.error(f"{chunk.num_values:,} values of {chunk.path_in_schema} in {stored:,} bytes")
            if chunk.total_uncompressed_size > max(UNCOUNTED * LINE.value, EXPANSION * stored):
                raise LINE.error(
                    f"{chunk.total_uncompressed_size:,} bytes of {chunk.path_in_schema} packed into {stored:,}"
                )


def batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of some columns, so few at a time that they fit into memory as Python's objects.

    Raises:
        FormatError: If a list, or the texts of a batch, are beyond their limit.
    """
    check_groups(file.metadata, columns)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        values = max((group.column(place).num_values for place in range(group.num_columns)), default=0)
        rows = slice_rows(group.num_rows, values)
        for batch in file.iter_batches(rows, row_groups=[number], columns=list(columns), use_threads=False):
            for name in columns:
                check_values(batch.column(name), name)
            yield batch


def slice_rows(rows: int, values: int) -> int:
    """How many of ``rows`` to turn into Python's objects at a time, where a column of them has so many values."""
    return max(1, min(BATCH_ROWS, VALUES.value * max(rows, 1) // max(values, 1)))


def check_values(array: pa.Array, name: str) -> None:
    """Refuse an array with a list, or texts in all, beyond the limits.

    Raises:
        FormatError: Naming the limit; or the type, if its values can share what they hold without end.
    """
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        longest = pc.max(pc.list_value_length(array)).as_py() or 0
        if longest > VALUES.value:
            raise VALUES.error(f"{name} has a list of {longest:,} values")
        array = array.flatten()
    if pa.types.is_struct(array.type):
        for field, values in zip(array.type, array.flatten(), strict=True):
            check_values(values, f"{name}.{field.name}")
    kind, size = array.type, 0
    shared = _shares(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        shared = _shares(kind) or pa.types.is_nested(kind) or pa.types.is_string_view(kind)
        if not (shared or pa.types.is_primitive(kind)):
            size = pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    elif pa.types.is_string_view(kind) and len(array):  # of 16 bytes, the first 4 their length
        lengths = np.frombuffer(array.buffers()[1], np.int32)[::4]
        size = int(lengths[array.offset : array.offset + len(array)].sum(dtype=np.int64))
    if shared:
        raise FormatError(f"{name} has the type {array.type}, which is not read. Write it as plain texts and lists.")
    if size > HELD.value:
        raise HELD.error(f"the texts of {name} take {size:,} bytes")


def _shares(kind: pa.DataType) -> bool:
    """Whether values of a type can be one and the same bytes, over and over."""
    types = pa.types
    tests = types.is_run_end_encoded, types.is_binary_view, types.is_list_view, types.is_large_list_view
    return any(test(kind) for test in tests)
