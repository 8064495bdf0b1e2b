"""Which format a file has, by its content; a refusal where that is not certain."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from st_m3se.core.errors import FormatError
from st_m3se.core.reading import INTEGER, WHOLE, open_binary, parse_json
from st_m3se.core.scored_list import check_score
from st_m3se.scores.formats.layouts import layouts_of, table_columns
from st_m3se.scores.formats.records import column_names, is_table
from st_m3se.scores.formats.tables import LONG, find_columns
from st_m3se.scores.formats.trec import HEADER, ITERATION, is_ranking, run_layout

__all__ = ["head_lines", "sniff"]

HEAD = 1 << 20
LINES = 50
MEANING = {
    "csv": " (a teacher's scores)",
    "judgements": " (to be passed as qrels)",
    "gpl": " (query, positive, negative, margin)",
    "ranking": " (query, document, rank, score)",
    "parquet": " (ids: name the columns)",
    "tuples": " (texts)",
}
GRADES = range(5)
QRELS = "these are relevance judgements, not a teacher's scores: pass them as qrels."


def sniff(path: str | Path, columns: Mapping[str, str] | None = None) -> str:
    """Name the format of a file, one of :data:`~st_m3se.scores.formats.READERS`; a table if it has the ``columns``.

    Raises:
        FormatError: If it is none that this package knows, or could be two.
    """
    path = Path(path)
    try:
        if columns:
            with suppress(FormatError):
                return _table(path, columns)
        return _sniff_columns(path, "parquet") if path.is_dir() else _sniff(path)
    except FormatError as error:
        raise error if error.file else FormatError(error.message, file=str(path)) from None


def _table(path: Path, columns: Mapping[str, str]) -> str:
    """The kind of a table that has columns of these names.

    Raises:
        FormatError: If it has not.
    """
    if path.is_dir() or is_table(path):
        table_columns(column_names(path), columns)
        return "parquet"
    with open_binary(path) as file:
        line = head_lines(file.read(HEAD))[0]
    if line.lstrip().startswith(("{", "[")):
        table_columns(column_names(path), columns)
        return "pylate"
    find_columns(_fields(line), LONG, columns)
    return "csv"


def _fields(line: str) -> list[str]:
    """The fields of a line of CSV, whatever stands between them."""
    try:
        return next(csv.reader([line], delimiter=max("\t,;", key=line.count)), [])
    except csv.Error as error:
        raise FormatError(str(error)) from None


def head_lines(head: bytes) -> list[str]:
    """The first lines of a text file that are not blank, from its first bytes, without their ends.

    Raises:
        FormatError: If the first line is no text, or there is none.
    """
    lines = [line for line in head.split(b"\n") if line.strip()]
    if len(lines) > 1 and len(head) == HEAD:
        lines.pop()  # cut in the middle
    try:
        texts = [line.decode(errors="replace" if place else "strict") for place, line in enumerate(lines[:LINES])]
    except UnicodeDecodeError:
        raise FormatError("this is neither text nor a packed file, Parquet or pickle that is known.") from None
    if not texts:
        raise FormatError("the file is empty.")
    return [text.rstrip("\r") for text in (texts[0].removeprefix("\ufeff"), *texts[1:])]


def _sniff(path: Path) -> str:
    with open_binary(path) as file:
        head = file.read(HEAD)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return _sniff_columns(path, "parquet")
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"}q", b"(d.")):
        return "score-pickle"
    lines = head_lines(head)
    return _sniff_json(path, lines[0]) if lines[0].lstrip().startswith(("{", "[")) else _sniff_fields(lines)


def _sniff_json(path: Path, line: str) -> str:
    if line.lstrip().startswith("["):
        try:
            value = parse_json(line)
        except FormatError:
            value = None
        if value is None or (isinstance(value, list) and value and isinstance(value[0], dict)):
            return _sniff_columns(path, "pylate")
        if len(value) > 1 and all(isinstance(x, list) and len(x) == 2 for x in value[1:]):
            return "colbert"
        raise _unsure([], "a list that is not [query_id, [document_id, score], ...]")
    try:
        value = parse_json(line)
    except FormatError as error:
        raise FormatError(
            f"the first line is not JSON by itself ({error.message}) Formats of this package have one value per line, "
            "or one array of objects."
        ) from None
    return _matched(list(value), "pylate")


def _sniff_columns(path: Path, table: str) -> str:
    return _matched(column_names(path), table)


def _matched(names: list[str], table: str) -> str:
    """The layout of columns or keys of these names; ``table`` is what one of ids and scores is called here."""
    matches = layouts_of(names)
    if {"query_id", "document_ids", "scores"} <= set(names) or (not matches and table == "parquet"):
        matches.insert(0, table)
    if not matches:
        with suppress(FormatError):
            table_columns(names)
            matches = [table]
    if len(matches) != 1:
        raise _unsure(matches, f"the names {names!r:.200}")
    return matches[0]


def _sniff_fields(lines: list[str]) -> str:
    if lines[0].split() == HEADER:
        _refuse_judgements(lines[1:])
    delimiter = max("\t,;", key=lines[0].count)
    try:
        find_columns(next(csv.reader([lines[0]], delimiter=delimiter)), LONG)
    except (FormatError, csv.Error, StopIteration):
        pass
    else:
        return "csv"
    rows = [line.split("\t") for line in lines]
    if 2 * sum(map(_is_judgement, lines)) > len(lines):
        raise FormatError(QRELS)
    pairs = [len(row) == 5 and _number(row[0]) and _number(row[1]) for row in rows]
    spaced = any(" " in field for row, fits in zip(rows, pairs, strict=True) if fits for field in row[2:])
    counts = {  # lines that fit: a bad one is the reader's to name
        "trec": sum(run_layout(line) is not None for line in lines),
        "marginmse-text" if spaced else "marginmse": sum(pairs),
        "gpl": sum(len(row) == 4 and _number(row[3]) for row in rows),
        "ranking": len(rows) if is_ranking(rows) else 0,
    }
    most = max(counts.values())
    matches = [name for name, count in counts.items() if count == most and 2 * count >= len(lines)]
    if matches == ["ranking"]:  # of three columns, as judgements without a header have them
        matches = ["ranking", "judgements"]
    if len(matches) != 1:
        raise _unsure(matches, f"lines such as {lines[0]!r:.120}")
    return matches[0]


def _refuse_judgements(lines: list[str]) -> None:
    """Refuse rows of query, document and number that are judgements, or may be: a fraction is a score, and no grade."""
    scores = [line.split()[-1] for line in lines]
    if any(_number(score) and not WHOLE.fullmatch(score) for score in scores):
        return
    if all(not _number(score) or float(score) in GRADES for score in scores):
        raise FormatError(QRELS)
    raise _unsure(["csv", "judgements"], f"the header of judgements and whole numbers such as {', '.join(scores[:3])}")


def _is_judgement(line: str) -> bool:
    fields = line.split()
    return len(fields) == 4 and fields[1].lower() in ITERATION and INTEGER.fullmatch(fields[3]) is not None


def _number(text: str) -> bool:
    try:
        check_score(text)
    except FormatError:
        return False
    return True


def _unsure(matches: list[str], came: str) -> FormatError:
    could = (
        f"could be {' or '.join(f'{name}{MEANING.get(name, str())}' for name in matches)}"
        if matches
        else "is in no format that is known"
    )
    return FormatError(f"this {could}: it has {came}. Say which format it is (format=...).")
