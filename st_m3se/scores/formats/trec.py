"""TREC runs."""

from __future__ import annotations

from collections.abc import Iterator

from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.grouping import Pair, group_pairs
from st_m3se.scores.formats.reading import INTEGER, Reading
from st_m3se.scores.rows import ScoredList, check_score

__all__ = ["read_run", "run_layout"]

ITERATION = ("q0", "0")
HEADER = ["query-id", "corpus-id", "score"]


def run_layout(line: str) -> tuple[int, int, int, int] | None:
    """The columns of document, rank and score in a line of a TREC run, and their number; None if it is none.

    ``query Q0 document rank score tag``, without the tag, or without the ``Q0``.
    """
    fields = line.split(None, 5)
    if len(fields) == 6 and _is_rank(fields[3]) and _is_number(fields[4]):
        return 2, 3, 4, 6
    if len(fields) == 5:
        if fields[1].lower() in ITERATION and _is_rank(fields[3]) and _is_number(fields[4]):
            return 2, 3, 4, 5
        if _is_rank(fields[2]) and _is_number(fields[3]) and not _is_number(fields[4]):
            return 1, 2, 3, 5
    return None


def read_run(reading: Reading) -> Iterator[ScoredList]:
    """Read a TREC run: spaces or tabs, with or without the ``Q0`` column; the first good line decides which.

    Each query's lines, wherever they stand, become one row in the order of the file. Queries come in the order of
    their ids.
    """

    def pairs() -> Iterator[Pair]:
        layout = None
        for number, line in reading.lines():
            try:
                layout = layout or run_layout(line)
                if layout is None:
                    raise FormatError("expected `query Q0 document rank score tag`, with or without Q0.")
                document, rank, score, count = layout
                fields = line.split(None, 5)
                if len(fields) != count:
                    raise FormatError(f"expected {count} fields as on the first line, got {len(fields)}.")
                if not _is_rank(fields[rank]):
                    raise FormatError(f"the rank must be an integer, got {fields[rank]!r:.80}.")
                query_id, document_id = reading.query_id(fields[0]), reading.document_id(fields[document])
                value = check_score(fields[score])
            except FormatError as error:
                reading.reject(number, error)
                continue
            yield Pair(query_id, document_id, None, value, False, number)

    return group_pairs(pairs(), reading)


def _is_rank(text: str) -> bool:
    return len(text) < 12 and INTEGER.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    try:
        check_score(text)
    except FormatError:
        return False
    return True
