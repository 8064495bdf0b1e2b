"""The containers of records with named values: jsonl, JSON arrays, Parquet and Arrow, a file or a folder of parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from st_m3se.core.arrow import ArrowFile
from st_m3se.core.errors import FormatError
from st_m3se.core.limits import ARRAY
from st_m3se.core.parquet import UNREADABLE, batches, open_parquet
from st_m3se.core.reading import Parsed, Reading, open_binary, parse_object

__all__ = ["Record", "column_names", "is_table", "parsed_records", "parts_of", "records"]

Record = dict[str, Any]

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


def column_names(path: Path) -> list[str]:
    """The columns of a Parquet or Arrow file, or the keys of the first record of a JSON file."""
    first = parts_of(path)[0]
    if _kind(first) == "json":
        reading = Reading(first, on_error="skip")
        return list(next(records(reading), (0, {}))[1])
    with _damage_named(first), _opened(first) as source:
        return list(source.schema_arrow.names)


def is_table(path: Path) -> bool:
    """Whether it is Parquet or Arrow, whose columns are known before a row is read."""
    return _kind(parts_of(path)[0]) != "json"


def records(reading: Reading, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Record]]:
    """The records, with the line, or else the row, counted from 1 in each file.

    While a part of a folder is read, ``reading.path`` is that part, so that messages name it.

    Args:
        reading: The file or folder.
        columns: Of Parquet and Arrow files read these only.

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


def parsed_records(
    reading: Reading, parse: Callable[[Record, int], Parsed], columns: Sequence[str] | None = None
) -> Iterator[Parsed]:
    """What ``parse`` makes of each record; it raises FormatError, without a place, on a bad one."""
    for number, record in records(reading, columns):
        try:
            value = parse(record, number)
        except FormatError as error:
            reading.reject(number, error)
            continue
        yield value


def _kind(path: Path) -> str:
    with open_binary(path) as file:
        head = file.read(8)
    return "parquet" if head.startswith(b"PAR1") else "arrow" if _is_arrow(path, head) else "json"


def _is_arrow(path: Path, head: bytes) -> bool:
    return head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) or path.suffix == ".arrow"


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What Arrow raises on a damaged file, or a limit without a place, as an error that names the file."""
    try:
        yield
    except FormatError as error:
        raise error if error.file else FormatError(error.message, file=str(path)) from None
    except UNREADABLE as error:
        raise FormatError(f"this file cannot be read: {error}", file=str(path)) from error


def _opened(path: Path) -> pq.ParquetFile | ArrowFile:
    if _kind(path) == "parquet":
        return open_parquet(path)
    return ArrowFile(path)


def _table(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Record]]:
    number = 0
    with _damage_named(path), _opened(path) as source:
        names = source.schema_arrow.names if columns is None else columns
        for batch in source.batches(names) if isinstance(source, ArrowFile) else batches(source, names):
            names = batch.schema.names
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                number += 1
                yield number, dict(zip(names, values, strict=True))


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
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"this is not JSON that can be read: {error}", file=str(reading.path)) from None
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            yield number, value
        else:
            reading.reject(number, f"expected an object, got {type(value).__name__}.")
