"""What all readers share: the file and its lines, the policy for bad lines, ids and scores of one type."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, check_id, check_text, first_duplicate, short
from st_m3se.core.limits import LINE, RATIO, VALUES
from st_m3se.core.scored_list import ScoredList, check_score

__all__ = [
    "INTEGER",
    "WHOLE",
    "IdType",
    "OnError",
    "Reading",
    "check_keys",
    "open_binary",
    "parse_json",
    "parse_list",
    "parse_object",
    "parse_text",
    "text_id",
]

OnError = Literal["raise", "skip"]
IdType = Literal["str", "int"]

UNCOUNTED = 1 << 25  # bytes that any packed file may unpack to
KEPT_MESSAGES = 20
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
INTEGER = re.compile(r"-?[0-9]+", re.ASCII)
WHOLE = re.compile(r"-?[0-9]+(\.0*)?", re.ASCII)  # pandas writes a column of integers with a gap as 1.0

Parsed = TypeVar("Parsed")


class TextSink(Protocol):
    """Takes the texts that some formats carry beside, or instead of, ids."""

    def query(self, query_id: Id, text: str) -> None:
        """Take a query's text."""

    def document(self, document_id: Id, text: str, title: str = "") -> None:
        """Take a document's text."""


def text_id(text: str) -> str:
    """The id of a text that comes without one: 24 hexadecimal digits of its BLAKE2b hash, the same in every file."""
    return blake2b(check_text(text, "the text").encode(), digest_size=12).hexdigest()


@contextmanager
def open_binary(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading, unpacked if it is gz or zst by its first bytes; a damaged one raises FormatError."""
    if not path.is_file():
        raise FormatError("there is no such file." if not path.exists() else "it is not a file.", file=str(path))
    with path.open("rb") as raw:
        head = raw.peek(4)
        packed = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        # Arrow notices a truncated gz or zst, which zstandard's own stream reader passes over in silence.
        try:
            if packed is None:
                yield raw
            else:
                stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, "r"), packed)
                most = max(UNCOUNTED, RATIO.value * path.stat().st_size)
                yield io.BufferedReader(_Unpacked(stream, most, path), 1 << 16)
        except (OSError, EOFError, pa.ArrowException) as error:
            if packed is None:
                raise
            raise FormatError(f"the {packed} data is damaged: {error}", file=str(path)) from error


class _Unpacked(io.RawIOBase):
    """A packed stream that ends with an error where it gives more than it may."""

    def __init__(self, stream: Any, most: int, path: Path) -> None:
        self._stream, self._left, self._path = stream, most, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            error = RATIO.error(f"the {self._path.stat().st_size:,} bytes of the file unpack to ever more")
            raise FormatError(error.message, file=str(self._path))
        buffer[: len(block)] = block
        return len(block)


@dataclass
class Reading:
    """One pass over one file: the options given to a reader, and what it counts.

    Attributes:
        path: The file.
        on_error: "raise" on the first bad line, or "skip" it and count.
        id_type: "str" or "int" converts the ids of the file, and refuses those that would not survive the way back.
            None leaves JSON and Parquet ids as they are, and takes those of text formats as strings.
        texts: Takes the texts of formats that carry them.
        scale: "margin" or "rank" where the scores are no scores on a scale of their own, as soon as a row is read.
        skipped: How many lines, or documents, were left out.
        messages: The first of their messages.
    """

    path: Path
    on_error: OnError = "raise"
    id_type: IdType | None = None
    texts: TextSink | None = None
    scale: str | None = None
    skipped: int = 0
    messages: list[str] = field(default_factory=list)
    _types: dict[str, type] = field(default_factory=dict)

    def reject(self, line: int | None, error: FormatError | str) -> None:
        """Raise with the place, or count."""
        message = error.message if isinstance(error, FormatError) else error
        placed = FormatError(message, file=str(self.path), line=line)
        if self.on_error == "raise":
            raise placed
        self.skipped += 1
        if len(self.messages) < KEPT_MESSAGES:
            self.messages.append(str(placed))

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, without their ends, counted from 1."""
        with open_binary(self.path) as file:
            number = blank = 0
            while raw := self._readline(file, number + 1):
                number += 1
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                try:
                    line = raw.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    self.reject(number, f"this is not UTF-8 ({error.reason} at byte {error.start + 1} of the line).")
                    continue
                if line and not line.isspace():
                    blank = 0
                    yield number, line
                    continue
                blank += 1
                if blank > VALUES.value:
                    raise FormatError(VALUES.error("blank lines follow each other").message, file=str(self.path))

    def _readline(self, file: io.BufferedReader, number: int) -> bytes:
        try:
            raw = file.readline(LINE.value + 1)
        except (OSError, EOFError, pa.ArrowException) as error:
            raise FormatError(f"reading stops here: {error}", file=str(self.path), line=number) from error
        if len(raw) > LINE.value:
            raise FormatError(LINE.error("the line is too long").message, file=str(self.path), line=number)
        return raw

    def parsed(
        self, parse: Callable[[Any, int], Parsed], items: Iterable[tuple[int, Any]] | None = None
    ) -> Iterator[Parsed]:
        """What ``parse`` makes of each line, or of each of other numbered items.

        It raises FormatError, without a place, on a bad one.
        """
        for number, item in self.lines() if items is None else items:
            try:
                row = parse(item, number)
            except FormatError as error:
                self.reject(number, error)
                continue
            yield row

    def query_id(self, value: Any) -> Id:
        """Check and, as ``id_type`` says, convert a query id."""
        return self._id(value, "query id")

    def document_id(self, value: Any) -> Id:
        """Check and, as ``id_type`` says, convert a document id."""
        return self._id(value, "document id")

    def _id(self, value: Any, name: str) -> Id:
        if self.id_type == "int" and isinstance(value, str):
            if not INTEGER.fullmatch(value) or len(value) > 20 or str(int(value)) != value:
                raise FormatError(f"{name} {value!r:.80} is not an integer in its plain form. Read it as a string.")
            value = int(value)
        elif self.id_type == "str" and type(value) is int:
            value = str(check_id(value, name))
        checked = check_id(value, name)
        known = self._types.setdefault(name, type(checked))
        if type(checked) is not known:
            raise FormatError(
                f"{name} {value!r:.80} is {type(checked).__name__}, but those before were {known.__name__}. A file has "
                'one type of ids: choose it with id_type="str" or "int".'
            )
        return checked

    def row(
        self, query_id: Any, document_ids: Sequence[Any], scores: Sequence[Any], positives: Sequence[Id], line: int
    ) -> ScoredList:
        """Check a whole row."""
        query_id = self.query_id(query_id)
        document_ids, scores = parse_list(document_ids, "document_ids"), parse_list(scores, "scores")
        if len(document_ids) != len(scores):
            raise FormatError(
                f"query {query_id!r:.80} has {len(document_ids)} documents and {len(scores)} scores. From the first "
                "gap on each score would belong to another document."
            )
        documents = [self.document_id(value) for value in document_ids]
        if (twice := first_duplicate(documents)) is not None:
            raise FormatError(f"document {twice!r:.80} stands twice in the list of query {query_id!r:.80}.")
        return ScoredList(query_id, documents, [check_score(value) for value in scores], positives, line)


def parse_json(line: str) -> Any:
    """The value of one line of JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise FormatError(f"this is not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 5,000 brackets
        raise FormatError(f"this is not JSON that can be read: {error}") from None


def parse_object(line: str, required: Sequence[str]) -> dict[str, Any]:
    """The JSON object of one line, which has the ``required`` keys."""
    value = parse_json(line)
    if not isinstance(value, dict):
        raise FormatError(f"expected a JSON object on each line, got {type(value).__name__}.")
    check_keys(value, required)
    return value


def check_keys(record: Mapping[str, Any], required: Sequence[str]) -> None:
    """Refuse an object without one of these keys."""
    if missing := [key for key in required if key not in record]:
        raise FormatError(f"the object lacks {missing}; it has {list(record)!r:.200}.")


def parse_list(value: Any, name: str) -> list[Any]:
    """``value`` if it is a list."""
    if not isinstance(value, list):
        raise FormatError(f"{name} must be a list, got {short(value)}.")
    if len(value) > VALUES.value:
        raise VALUES.error(f"{name} has {len(value):,} values")
    return value


def parse_text(value: Any, name: str) -> str:
    """``value`` if it is a text."""
    if not isinstance(value, str):
        raise FormatError(f"{name} must be a text, got {short(value)}.")
    return check_text(value, name)
