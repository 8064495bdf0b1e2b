"""Rows with named columns, as others wrote them: Parquet, Arrow, jsonl or a JSON array; a file or a folder of parts.

A few bytes of Parquet or Arrow can stand for gigabytes: what they ask for is added up before anything is decoded, and
rows are decoded in small batches.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.limits import ARRAY, HELD, LINE, VALUES
from st_m3se.core.reading import Reading, open_binary, parse_object

__all__ = [
    "UNREADABLE",
    "Record",
    "check_footer",
    "check_groups",
    "check_values",
    "column_names",
    "dictionaries",
    "is_table",
    "parts_of",
    "records",
]

Record = dict[str, Any]

# What Arrow raises over damaged files, and over values that Python has no object for: dates before year 1, time zones.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError, ImportError, MemoryError)

BATCH_ROWS = 1_024
SCANNED = 1 << 16  # bytes; files of the size of a hand-made bomb, which a scan survives
UNCOUNTED = 4  # lists of the limit's length that a group may hold however few bytes they take
EXPANSION = 1_024  # values, or bytes, that a stored byte may stand for; ids cost about a byte each in any encoding
MAGIC = b"ARROW1"  # at both ends of a file, which holds a stream from byte 8 on; its index is not needed
STREAM = b"\xff\xff\xff\xff"  # an Arrow stream begins so
VERSION_5 = 4  # the number of the metadata version from which on packing is a field of the batch
HEAD = 1 << 16  # bytes in which an array of objects shows, whatever blanks it begins with


def parts_of(path: Path) -> list[Path]:
    """The file; or of a folder its Parquet files (Spark's part-*), or its Arrow files (``Dataset.save_to_disk``).

    Raises:
        FormatError: If the folder has neither.
    """
    if not path.is_dir():
        return [path]
    for ending in ("parquet", "arrow"):
        if parts := sorted(part for part in path.rglob(f"*.{ending}") if not part.name.startswith((".", "_"))):
            return parts
    raise FormatError("the folder has no Parquet and no Arrow files.", file=str(path))


def _kind(path: Path) -> str:
    """Whether a file is "parquet", "arrow" or "json", by its content."""
    with open_binary(path) as file:
        head = file.read(8)
    arrow = head.startswith((MAGIC, STREAM)) or path.suffix == ".arrow"
    return "parquet" if head.startswith(b"PAR1") else "arrow" if arrow else "json"


def is_table(path: Path) -> bool:
    """Whether it is Parquet or Arrow, whose columns are known before a row is read."""
    return _kind(parts_of(path)[0]) != "json"


def column_names(path: Path) -> list[str]:
    """The columns of a Parquet or Arrow file, or the keys of the first record of a JSON file."""
    first = parts_of(path)[0]
    if _kind(first) == "json":
        return list(next(records(Reading(first, on_error="skip")), (0, {}))[1])
    with _opened(first) as source:
        return list(source.schema_arrow.names)


def records(reading: Reading, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Record]]:
    """The records, with the line, or else the row, counted from 1 in each file; of tables these ``columns`` only.

    While a part of a folder is read, ``reading.path`` is that part, so that messages name it.

    Raises:
        FormatError: If a file is damaged, or is none of these.
    """
    whole = reading.path
    try:
        for part in parts_of(whole):
            reading.path = part
            yield from _json(reading) if _kind(part) == "json" else _table(part, columns)
    finally:
        reading.path = whole


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile | _ArrowFile]:
    """The open file; what goes wrong while it is, is an error that names it."""
    kind = _kind(path)
    with errors_in(path, UNREADABLE, f"this is not a readable {kind.capitalize()} file"):
        if kind == "parquet":
            # Packed texts stay dictionaries: unpacked, one of them could be repeated a million times.
            check_footer(path)
            packed = dictionaries(pq.read_metadata(path))
            file = pq.ParquetFile(path, read_dictionary=packed, page_checksum_verification=True)
        else:
            file = _ArrowFile(path)
        with file:
            yield file


def _table(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Record]]:
    number = 0
    with _opened(path) as source:
        names = list(source.schema_arrow.names if columns is None else columns)
        for batch in source.batches(names) if isinstance(source, _ArrowFile) else _batches(source, names):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                check_values(column, name)
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, dict(zip(batch.schema.names, values, strict=True))


def _json(reading: Reading) -> Iterator[tuple[int, Record]]:
    """Lines of objects, or one array of them."""
    with open_binary(reading.path) as file:
        start = file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    objects = start.startswith(b"[") and start[1:].lstrip().startswith(b"{")
    if not objects and start.partition(b"\n")[0].strip() != b"[":
        yield from reading.parsed(lambda line, number: (number, parse_object(line, ())))
        return
    with open_binary(reading.path) as file:
        content = file.read(ARRAY.value + 1)
    if len(content) > ARRAY.value:
        error = ARRAY.error("a JSON array is read as a whole, and this one is longer")
        raise FormatError(f"{error.message} Or write one object a line (jq -c '.[]').", file=str(reading.path))
    with errors_in(reading.path, (ValueError, RecursionError), "this is not JSON that can be read"):
        values = json.loads(content.decode("utf-8-sig"))
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            yield number, value
        else:
            reading.reject(number, f"expected an object, got {type(value).__name__}.")


# Parquet.


def check_footer(path: Path) -> None:
    """Have Arrow read what the footer says of every column where damage to it is an error.

    Asked for a damaged column from Python (``row_group(i).column(j)``), pyarrow ends the process. A small file is
    scanned, a thousand values at a time; of a large one the first row of each group is read.

    Raises:
        pa.ArrowException, OSError: If the footer is damaged.
    """
    with pq.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        for number in groups:
            if (columns := file.metadata.row_group(number).num_columns) != file.metadata.num_columns:
                raise pa.ArrowInvalid(
                    f"row group {number} has {columns} columns, and the file {file.metadata.num_columns}"
                )
        if path.stat().st_size < SCANNED:
            file.scan_contents(batch_size=BATCH_ROWS)
            return
        for number in groups:
            next(file.iter_batches(1, row_groups=[number], use_threads=False), None)


def dictionaries(metadata: pq.FileMetaData) -> list[str]:
    """The columns of texts that are stored as dictionaries."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [metadata.schema.column(place) for place in range(metadata.num_columns)]
    return [
        column.path
        for place, column in enumerate(columns)
        if column.physical_type == "BYTE_ARRAY" and any(group.column(place).has_dictionary_page for group in groups)
    ]


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
            values, size = chunk.num_values, chunk.total_uncompressed_size
            _check_expansion(values, size, stored, f" of {chunk.path_in_schema}")


def _check_expansion(values: int, size: int, stored: int, of: str = "") -> None:
    if values > max(UNCOUNTED * VALUES.value, EXPANSION * stored):
        raise VALUES.error(f"{values:,} values{of} in {stored:,} bytes")
    if size > max(UNCOUNTED * LINE.value, EXPANSION * stored):
        raise LINE.error(f"{size:,} bytes{of} packed into {stored:,}")


def _batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of some columns, so few at a time that they fit into memory as Python's objects."""
    check_groups(file.metadata, columns)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        values = max((group.column(place).num_values for place in range(group.num_columns)), default=0)
        rows = _slice_rows(group.num_rows, values)
        yield from file.iter_batches(rows, row_groups=[number], columns=list(columns), use_threads=False)


def _slice_rows(rows: int, values: int) -> int:
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


# Arrow.


class _ArrowFile:
    """An Arrow file or stream, read in order.

    Raises:
        FormatError: If it unpacks to more, or holds more values, than its size allows; it names the limit.
        pa.ArrowException, OSError, ValueError, LookupError, TypeError: If it is damaged.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            start = 8 if file.read(len(MAGIC)) == MAGIC else 0
            if start:
                file.seek(max(path.stat().st_size - len(MAGIC), start))
                if file.read() != MAGIC:
                    raise pa.ArrowInvalid("it is cut off")
        self._longest = _longest_columns(path, start)
        self._source = pa.OSFile(str(path), "rb")
        self._source.seek(start)
        self._reader = pa.ipc.open_stream(self._source)
        self.schema_arrow = self._reader.schema

    def __enter__(self) -> _ArrowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of some columns, so few at a time that they fit into memory as Python's objects."""
        for batch, longest in zip(self._reader, self._longest, strict=True):
            batch.validate(full=True)  # Arrow reads what is there: a damaged offset would point anywhere
            chosen, rows = batch.select(list(columns)), _slice_rows(batch.num_rows, longest)
            for start in range(0, chosen.num_rows, rows):
                yield chosen.slice(start, rows)


def _longest_columns(path: Path, start: int) -> list[int]:
    """The values of the longest column, or part of one, in each batch of rows.

    All values are added up, and the bytes of packed buffers, each of which begins with its length when unpacked.
    """
    size, values, unpacked, longest = path.stat().st_size, 0, 0, []
    with pa.memory_map(str(path)) as source:
        source.seek(start)
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type not in ("record batch", "dictionary"):
                continue
            try:
                lengths, sizes = _asked_for(message)
            except struct.error as error:
                raise pa.ArrowInvalid(f"a message is damaged: {error}") from None
            values, unpacked = values + sum(lengths), unpacked + sum(sizes)
            _check_expansion(values, unpacked, size)
            if message.type == "record batch":
                longest.append(max(lengths, default=0))
    return longest


def _asked_for(message: Any) -> tuple[list[int], list[int]]:
    """The lengths of a batch and its columns, and the sizes of its packed buffers; the flatbuffer is a Message.fbs."""
    data, body = memoryview(message.metadata), memoryview(message.body)

    def number(form: str, place: int, source: memoryview = data) -> int:
        return int(struct.unpack_from(form, source, place)[0])

    def field(table: int, place: int) -> int:  # 0 where it has none
        fields = table - number("<i", table)
        inside = 4 + 2 * place
        offset = number("<H", fields + inside) if inside < number("<H", fields) else 0
        return table + offset if offset else 0

    def target(place: int) -> int:
        return place + number("<I", place)

    def pairs(place: int) -> Iterator[tuple[int, int]]:
        begin = target(place) if place else 0
        for step in range(number("<I", begin) if place else 0):
            yield struct.unpack_from("<qq", data, begin + 4 + 16 * step)

    root = target(0)
    batch = target(field(root, 2))
    if message.type == "dictionary":
        batch = target(field(batch, 1))
    version = number("<h", place) if (place := field(root, 0)) else 0
    packed = field(batch, 3) or (version < VERSION_5 and field(root, 4))
    rows = number("<q", place) if (place := field(batch, 0)) else 0
    lengths = [rows, *(length for length, _ in pairs(field(batch, 1)))]
    sizes = [number("<q", begin, body) for begin, length in pairs(field(batch, 2)) if packed and length >= 8]
    if min([*lengths, *sizes, 0]) < -1:  # -1: a buffer that is left as it is
        raise pa.ArrowInvalid("a length is negative")
    return lengths, sizes
