"""Tables with named columns: CSV (or TSV with a header) and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence

import pyarrow.parquet as pq

from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.grouping import Pair, group_pairs
from st_m3se.scores.formats.jsonl import decode_list
from st_m3se.scores.formats.reading import Reading
from st_m3se.scores.parquet import UNREADABLE, batches, open_parquet
from st_m3se.scores.rows import ScoredList, check_score

__all__ = ["find_columns", "read_csv", "read_parquet"]

ALIASES = {
    "query_id": ("query_id", "query-id", "qid", "queryid"),
    "document_id": ("document_id", "document-id", "doc_id", "docid", "docno", "corpus-id", "corpus_id", "pid"),
    "score": ("score", "teacher_score", "ce_score"),
    "document_ids": ("document_ids",),
    "scores": ("scores",),
}
LONG = ("query_id", "document_id", "score")
LISTS = ("query_id", "document_ids", "scores")


def find_columns(names: Sequence[str], wanted: Sequence[str], chosen: Mapping[str, str] | None = None) -> list[str]:
    """The table's names for the ``wanted`` columns: those chosen, or the usual ones.

    Raises:
        FormatError: Where one is missing, or where two columns could be it.
    """
    found = []
    for column in wanted:
        options = [chosen[column]] if chosen and column in chosen else ALIASES[column]
        matches = [name for name in names if name in options]
        if len(matches) != 1:
            raise FormatError(
                f"expected one column for {column} ({' or '.join(options)}), got {matches or list(names)!r:.200}. "
                f"Name it: columns={{{column!r}: ...}} or --column {column}=NAME."
            )
        found.append(matches[0])
    return found


def read_csv(reading: Reading, columns: Mapping[str, str] | None = None) -> Iterator[ScoredList]:
    """Read a table of one scored pair per line, with a header; commas, semicolons or tabs.

    Each query's lines, wherever they stand, become one row in the order of the file. Queries come in the order of
    their ids.
    """

    def pairs() -> Iterator[Pair]:
        lines = reading.lines()
        number, header = next(lines, (1, ""))
        delimiter = max("\t,;", key=header.count)
        try:
            names = next(csv.reader([header], delimiter=delimiter, strict=True), [])
            places = [names.index(name) for name in find_columns(names, LONG, columns)]
        except (csv.Error, FormatError) as error:
            raise FormatError(getattr(error, "message", str(error)), file=str(reading.path), line=number) from None
        for number, line in lines:
            try:
                # Line by line: ids have no line breaks, and an open quote must not swallow the rest of the file.
                fields = next(csv.reader([line], delimiter=delimiter, strict=True))
                if len(fields) != len(names):
                    raise FormatError(f"expected {len(names)} fields as in the header, got {len(fields)}.")
                query_id, document_id = reading.query_id(fields[places[0]]), reading.document_id(fields[places[1]])
                pair = Pair(query_id, document_id, None, check_score(fields[places[2]]), False, number)
            except (csv.Error, FormatError) as error:
                reading.reject(number, getattr(error, "message", str(error)))
                continue
            yield pair

    return group_pairs(pairs(), reading)


def read_parquet(reading: Reading, columns: Mapping[str, str] | None = None) -> Iterator[ScoredList]:
    """Read a Parquet file of lists (``query_id document_ids scores``) or of pairs (``query_id document_id score``).

    Messages count rows instead of lines.
    """
    file_name = str(reading.path)
    try:
        with open_parquet(reading.path) as file:
            names = file.schema_arrow.names
            chosen = columns or {}
            if "document_id" in chosen or "score" in chosen or not set(names) & {"document_ids", "scores"}:
                found = find_columns(names, LONG, columns)
                yield from group_pairs(_long(file, found, reading), reading)
            else:
                found = find_columns(names, LISTS, columns)
                yield from _lists(file, found, reading)
    except FormatError as error:
        raise error if error.file else FormatError(error.message, file=file_name) from None
    except UNREADABLE as error:
        raise FormatError(f"this Parquet file cannot be read: {error}", file=file_name) from error


def _rows(file: pq.ParquetFile, columns: list[str]) -> Iterator[tuple[int, tuple[object, ...]]]:
    number = 0
    for batch in batches(file, columns):
        for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            number += 1
            yield number, values


def _lists(file: pq.ParquetFile, columns: list[str], reading: Reading) -> Iterator[ScoredList]:
    for number, (query_id, documents, scores) in _rows(file, columns):
        try:
            row = reading.row(
                query_id, decode_list(documents, "document_ids"), decode_list(scores, "scores"), (), number
            )
        except FormatError as error:
            reading.reject(number, error)
            continue
        yield row


def _long(file: pq.ParquetFile, columns: list[str], reading: Reading) -> Iterator[Pair]:
    for number, (query, document, score) in _rows(file, columns):
        try:
            pair = Pair(reading.query_id(query), reading.document_id(document), None, check_score(score), False, number)
        except FormatError as error:
            reading.reject(number, error)
            continue
        yield pair
