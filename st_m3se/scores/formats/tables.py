"""Tables of ids and scores with named columns: lists or pairs in any container, and CSV (or TSV with a header)."""

from __future__ import annotations

import ast
import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id
from st_m3se.core.reading import Reading, check_keys, parse_json, parse_list
from st_m3se.core.records import Record, column_names, is_table, records
from st_m3se.core.scored_list import ScoredList, check_score
from st_m3se.scores.formats.format import Format, Head, decimals, one_field, write_lines
from st_m3se.scores.formats.grouping import Pair, group_pairs

__all__ = ["CSV", "NEGATIVE", "PARQUET", "PYLATE", "mined", "unnamed"]

ALIASES = {
    "query_id": ("query_id", "query-id", "qid", "queryid"),
    "document_id": (
        *("document_id", "document-id", "doc_id", "docid", "docno", "corpus-id", "corpus_id", "pid", "passage_id"),
    ),
    "score": ("score", "teacher_score", "ce_score"),
    "document_ids": ("document_ids", "doc_ids"),
    "scores": ("scores",),
}
IDS = frozenset(name for kind in ("query_id", "document_id", "document_ids") for name in ALIASES[kind])
TEXTS = frozenset({"anchor", "query", "question"})
"""What the column of a query's text is called, by which texts are told from ids."""
NEGATIVE = re.compile(r"negative(_[0-9]+)?")
LONG = ("query_id", "document_id", "score")
LISTS = ("query_id", "document_ids", "scores")
LITERAL = 1 << 20  # characters; Python's syntax trees take some hundred times their memory


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
                f"Name it: columns={{{column!r}: ...}}."
            )
        found.append(matches[0])
    return found


def _table_columns(names: Sequence[str], chosen: Mapping[str, str] | None = None) -> tuple[str, str, str | None]:
    """The columns of query, document or documents, and score or scores, if there is one."""
    chosen = chosen or {}
    if not chosen and set(names) & {"label", "labels"} and not set(names) & {*ALIASES["score"], *ALIASES["scores"]}:
        raise FormatError("it has labels and no scores: these are judgements, not a teacher's.")
    plural = not {"document_id", "score"} & chosen.keys() and bool(
        {"document_ids", "scores"} & chosen.keys() or {"document_ids", "doc_ids", "scores"} & set(names)
    )
    query, documents = find_columns(names, ("query_id", "document_ids" if plural else "document_id"), chosen)
    kind = "scores" if plural and "score" not in names else "score"
    if not plural or kind in chosen or kind in names or set(names) - {query, documents, "positive_ids"}:
        return query, documents, find_columns(names, (kind,), chosen)[0]
    return query, documents, None


def _read_table(reading: Reading, columns: Mapping[str, str] | None = None) -> Iterator[ScoredList]:
    """Read a table of lists (``query_id document_ids scores``) or of pairs (``query_id document_id score``).

    Lists may be encoded as texts. Without a column of scores the order of the lists is all there is: each score is
    minus the rank. A column ``positive_ids`` names the relevant documents. Where several rows have one query, they
    become one list, and queries come in the order of their ids.
    """
    names, path = column_names(reading.path), reading.path
    try:
        query, documents, score = _table_columns(names, columns)
    except FormatError as error:
        if columns or is_table(path):
            raise FormatError(error.message, file=str(path)) from None
        query, documents, score = LISTS  # what the first object lacks is told as the others' lacks
    used = [query, documents, *([] if score is None else [score])]
    positives = "positive_ids" if "positive_ids" in names else None

    def pair(record: Record, number: int) -> Pair:
        check_keys(record, used)
        ids = reading.query_id(record[query]), reading.document_id(record[documents])
        return Pair(*ids, None, check_score(record[used[-1]]), False, number)

    def row(record: Record, number: int) -> ScoredList:
        check_keys(record, used)
        ids = _decode_list(record[documents], documents)
        scores = [-rank for rank in range(1, len(ids) + 1)] if score is None else _decode_list(record[score], score)
        relevant: list[Id] = []
        if positives is not None and record.get(positives) is not None:
            relevant = [reading.document_id(value) for value in _decode_list(record[positives], positives)]
        return reading.row(record[query], ids, scores, relevant, number)

    named = documents in (*ALIASES["document_ids"], (columns or {}).get("document_ids"))
    # A look ahead: what is wrong in the file is told when the rows are read.
    example = next(records(Reading(path, on_error="skip"), used), (0, {}))[1].get(documents)
    if not named and not (isinstance(example, list) or (isinstance(example, str) and example.lstrip().startswith("["))):
        if score is None:
            raise FormatError(f"pairs need a score, and the columns are {names!r:.200}.", file=str(path))
        return group_pairs(reading.parsed(pair, records(reading, used)), reading)
    if score is None:
        reading.scale = "rank"
    rows = reading.parsed(row, records(reading, used if positives is None else [*used, positives]))
    return group_pairs(_pairs(rows), reading) if _repeats(path, query) else rows


def _repeats(path: Path, query: str) -> bool:
    """Whether a query has several rows."""
    seen: set[Any] = set()
    for _, record in records(Reading(path, on_error="skip"), [query]):
        value = record.get(query)
        if not isinstance(value, (str, int)):
            continue  # which is an error when the rows are read
        if value in seen:
            return True
        seen.add(value)
    return False


def _pairs(rows: Iterable[ScoredList]) -> Iterator[Pair]:
    for row in rows:
        relevant = set(row.positives)
        for document, score in zip(row.document_ids, row.scores, strict=True):
            yield Pair(row.query_id, document, None, score, document in relevant, row.line or 0)


def _decode_list(value: Any, name: str) -> list[Any]:
    """A list, or the text of one as JSON or as Python writes it."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except FormatError:
            if len(value) > LITERAL:
                raise FormatError(
                    f"{name} is a text of {len(value):,} characters that is no JSON. Lists as Python writes them are "
                    f"read up to {LITERAL:,} characters: write them as JSON, or as lists."
                ) from None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)
                    value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                raise FormatError(f"{name} is a text that holds no list: {value!r:.80}.") from None
    return parse_list(value, name)


def mined(names: Sequence[str]) -> bool:
    """Whether there are scores of a positive and its negatives, each text in a column of its own."""
    return "scores" in names and any(map(NEGATIVE.fullmatch, names))


def unnamed(names: Sequence[str]) -> bool:
    """Whether there are scores, and two columns whose names do not say that they are ids."""
    given = set(names)
    return len(given) == 3 and bool({"score", "scores"} & given) and not (IDS & given or mined(names))


def _fits_table(head: Head) -> int:
    if head.names is None:
        return 0
    with suppress(FormatError):
        if head.columns and _table_columns(head.names, head.columns):
            return 3
    if head.has(*LISTS) or (unnamed(head.names) and not TEXTS & set(head.names)):  # of the latter also texts do
        return 2
    with suppress(FormatError):
        return int(head.table or bool(_table_columns(head.names)))
    return 0


def _write_pylate(rows: Iterable[ScoredList], path: str | Path, *, overwrite: bool = False) -> None:
    """Write ``{"query_id": ..., "document_ids": [...], "scores": [...]}`` per line."""

    def lines() -> Iterator[str]:
        for row in rows:
            ids = json.dumps(row.query_id, ensure_ascii=False), json.dumps(list(row.document_ids), ensure_ascii=False)
            scores = ", ".join(decimals(row.scores))  # float32 digits; json would write those of a double
            yield f'{{"query_id": {ids[0]}, "document_ids": {ids[1]}, "scores": [{scores}]}}\n'

    write_lines(lines(), path, overwrite)


def _by_line(text: str) -> list[str]:
    return text.split("\n")


def _header(line: str, *, strict: bool = True) -> tuple[list[str], str]:
    """The names in a header, and what stands between them."""
    delimiter = max("\t,;", key=line.count)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=strict), []), delimiter
    except csv.Error as error:
        raise FormatError(str(error)) from None


def _read_csv(reading: Reading, columns: Mapping[str, str] | None = None) -> Iterator[ScoredList]:
    """Read a table of one scored pair per line, with a header; commas, semicolons or tabs.

    Each query's lines, wherever they stand, become one row in the order of the file. Queries come in the order of
    their ids.
    """
    lines = reading.lines()
    number, header = next(lines, (1, ""))
    try:
        names, delimiter = _header(header)
        places = [names.index(name) for name in find_columns(names, LONG, columns)]
    except FormatError as error:
        raise FormatError(error.message, file=str(reading.path), line=number) from None

    def parse(line: str, number: int) -> Pair:
        try:
            # Line by line: ids have no line breaks, and an open quote must not swallow the rest of the file.
            fields = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise FormatError(str(error)) from None
        if len(fields) != len(names):
            raise FormatError(f"expected {len(names)} fields as in the header, got {len(fields)}.")
        ids = reading.query_id(fields[places[0]]), reading.document_id(fields[places[1]])
        return Pair(*ids, None, check_score(fields[places[2]]), False, number)

    return group_pairs(reading.parsed(parse, lines), reading)


def _fits_csv(head: Head) -> int:
    for columns in (head.columns, {}):
        with suppress(FormatError):
            if head.lines and find_columns(_header(head.lines[0], strict=False)[0], LONG, columns):
                return len(head.lines) + bool(columns)
    return 0


def _write_csv(rows: Iterable[ScoredList], path: str | Path, *, overwrite: bool = False) -> None:
    """Write ``query_id,document_id,score`` lines under a header.

    Raises:
        FormatError: On an id with a line break.
    """
    echo: Any = SimpleNamespace(write=str)  # whose writers return the line
    plain, careful = (csv.writer(echo, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))

    def lines() -> Iterator[Any]:
        yield plain.writerow(LONG)
        for row in rows:
            query_id = one_field(row.query_id, _by_line)
            for document_id, score in zip(row.document_ids, decimals(row.scores), strict=True):
                cells = [query_id, one_field(document_id, _by_line), score]
                # Ids that look like formulas are quoted, not changed: they have to be read back.
                yield (careful if any(cell.startswith(("=", "@")) for cell in cells) else plain).writerow(cells)

    write_lines(lines(), path, overwrite)


PYLATE = Format(
    "pylate",
    _read_table,
    lambda head: 0 if head.table else _fits_table(head),
    meaning="ids: name the columns",
    option="columns",
    suffixes=(".jsonl",),
    write=_write_pylate,
)
PARQUET = Format(
    "parquet",
    _read_table,
    lambda head: _fits_table(head) if head.table else 0,
    meaning="ids: name the columns",
    option="columns",
)
CSV = Format(
    "csv",
    _read_csv,
    _fits_csv,
    meaning="a teacher's scores",
    option="columns",
    suffixes=(".csv",),
    write=_write_csv,
)
