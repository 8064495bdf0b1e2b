"""What a format of teacher scores is, what tells one from another, and how a file of one is written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file
from st_m3se.core.ids import Id
from st_m3se.core.reading import open_binary, parse_json
from st_m3se.core.records import column_names, is_table
from st_m3se.core.scored_list import ScoredList

__all__ = ["HEAD", "Format", "Head", "decimals", "head_lines", "one_field", "write_lines"]

HEAD = 1 << 20
LINES = 50
PACKED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Head:
    """What tells the format of a file.

    Attributes:
        start: Its first bytes, unpacked; none of a folder.
        lines: The first lines of a text that is not JSON.
        names: The columns of a table, or the keys of the first JSON object; None of other files.
        first: The first JSON value, of a file with one value per line.
        table: Whether it is Parquet or Arrow.
        columns: Names that the user chose for the columns of ids and scores.
    """

    start: bytes = b""
    lines: list[str] = field(default_factory=list)
    names: list[str] | None = None
    first: Any = None
    table: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, columns: Mapping[str, str] | None = None) -> Head:
        """The head of a file or a folder of parts.

        Raises:
            FormatError: If it cannot be read, is empty, or is JSON over several lines that is no array of objects.
        """
        chosen = columns or {}
        start = b""
        if not path.is_dir():
            with open_binary(path) as file:
                start = file.read(HEAD)
        if is_table(path):
            return cls(start, names=column_names(path), table=True, columns=chosen)
        try:
            lines = head_lines(start)
        except UnicodeDecodeError:
            return cls(start)
        opening = lines[0].lstrip()[:1]
        if opening not in ("{", "["):
            return cls(start, lines, columns=chosen)
        try:
            first = parse_json(lines[0])
        except FormatError as error:
            if opening == "{":
                raise FormatError(
                    f"the first line is not JSON by itself ({error.message}) Formats of this package have one value "
                    "per line, or one array of objects."
                ) from None
            first = [{}]  # an array over several lines
        if opening == "[" and first and isinstance(first[0], dict):
            return cls(start, names=column_names(path), columns=chosen)
        return cls(start, names=list(first) if opening == "{" else None, first=first, columns=chosen)

    def has(self, *names: str) -> bool:
        """Whether it has columns or keys of all these names."""
        return self.names is not None and set(names) <= set(self.names)


@dataclass(frozen=True)
class Format:
    """One format: all that the package knows of it.

    Attributes:
        name: What users call it.
        read: The rows of a file: ``read(reading)``, with what ``option`` names as a second argument.
        matches: How well the head of a file fits: how many of its lines do; of named columns 1 if they do, and 2 if
            they can be nothing else that is known.
        meaning: What it holds, where a file could be something else.
        option: What ``read`` also takes: "columns", or "scores", the store with the scores of documents without.
        suffixes: What the name of a file to write may end in.
        write: ``write(rows, path, overwrite=False)``; None where the package only reads it.
        note: What users should know of scores of this format.
    """

    name: str
    read: Callable[..., Iterator[ScoredList]]
    matches: Callable[[Head], int]
    meaning: str = ""
    option: str = ""
    suffixes: tuple[str, ...] = ()
    write: Callable[..., None] | None = None
    note: str = ""


def head_lines(head: bytes) -> list[str]:
    """The first lines of a text that are not blank, without their ends, from its first :data:`HEAD` bytes.

    Raises:
        FormatError: If there is none.
        UnicodeDecodeError: If the first line is no text.
    """
    lines = [line for line in head.split(b"\n") if line.strip()]
    if len(lines) > 1 and len(head) == HEAD:
        lines.pop()  # cut in the middle
    texts = [line.decode(errors="replace" if place else "strict") for place, line in enumerate(lines[:LINES])]
    if not texts:
        raise FormatError("the file is empty.")
    return [text.rstrip("\r") for text in (texts[0].removeprefix("\ufeff"), *texts[1:])]


def write_lines(lines: Iterable[str], path: str | Path, overwrite: bool) -> None:
    """Write a file of these lines, whole or not at all, packed if its name ends in .gz or .zst."""
    path = Path(path)
    packed = PACKED.get(path.suffix)
    with atomic_file(path, overwrite=overwrite) as temporary, temporary.open("wb") as raw:
        stream: Any = raw if packed is None else pa.CompressedOutputStream(pa.PythonFile(raw, "w"), packed)
        text = io.TextIOWrapper(io.BufferedWriter(stream), encoding="utf-8", newline="")
        try:
            text.writelines(lines)
        finally:
            # One layer after the other: closing the outermost would close the file before Arrow writes its end.
            buffer = text.detach()
            buffer.flush()
            buffer.detach()
            if packed is not None:
                stream.close()


def decimals(scores: Iterable[float]) -> list[str]:
    """The shortest decimals that give the same float32 again."""
    return [str(score) for score in np.asarray(scores, dtype=np.float32)]


def one_field(value: Id, split: Callable[[str], list[str]]) -> str:
    """An id as a text.

    Raises:
        FormatError: If a reader, who splits lines so, would not take it for one field.
    """
    text = str(value)
    if split(text.replace("\r", "\n")) != [text]:
        raise FormatError(f"the id {text!r:.80} cannot be written in this format: it would be read as two fields.")
    return text
