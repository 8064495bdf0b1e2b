"""Arrow files that others wrote: what their messages ask for is added up before the first of them is decoded."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from st_m3se.core.limits import LINE, VALUES
from st_m3se.core.parquet import EXPANSION, UNCOUNTED, check_values, slice_rows

__all__ = ["ArrowFile"]

MAGIC = b"ARROW1"  # at both ends of a file, which holds a stream from byte 8 on; its index is not needed
VERSION_5 = 4  # the number of the metadata version from which on packing is a field of the batch


class ArrowFile:
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
        self._longest = _check(path, start)
        self._source = pa.OSFile(str(path), "rb")
        self._source.seek(start)
        self._reader = pa.ipc.open_stream(self._source)
        self.schema_arrow = self._reader.schema

    def __enter__(self) -> ArrowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of some columns, so few at a time that they fit into memory as Python's objects.

        Raises:
            FormatError: If a list, or the texts of a batch, are beyond their limit.
        """
        for batch, longest in zip(self._reader, self._longest, strict=True):
            batch.validate(full=True)  # Arrow reads what is there: a damaged offset would point anywhere
            chosen, rows = batch.select(list(columns)), slice_rows(batch.num_rows, longest)
            for start in range(0, chosen.num_rows, rows):
                part = chosen.slice(start, rows)
                for name, column in zip(part.schema.names, part.columns, strict=True):
                    check_values(column, name)
                yield part


def _check(path: Path, start: int) -> list[int]:
    """Add up the values, and the bytes of packed buffers, each of which begins with its length when it is unpacked.

    Returns:
        The values of the longest column, or part of one, in each batch of rows.
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
            if values > max(UNCOUNTED * VALUES.value, EXPANSION * size):
                raise VALUES.error(f"{values:,} values in {size:,} bytes")
            if unpacked > max(UNCOUNTED * LINE.value, EXPANSION * size):
                raise LINE.error(f"{unpacked:,} bytes packed into {size:,}")
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
