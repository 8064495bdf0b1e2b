"""Tables with named columns: which column is what, and CSV (or TSV with a header)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence

from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.core.scored_list import ScoredList, check_score
from st_m3se.scores.formats.grouping import Pair, group_pairs

__all__ = ["ALIASES", "LONG", "find_columns", "read_csv"]

ALIASES = {
    "query_id": ("query_id", "query-id", "qid", "queryid"),
    "document_id": (
        *("document_id", "document-id", "doc_id", "docid", "docno", "corpus-id", "corpus_id", "pid", "passage_id"),
    ),
    "score": ("score", "teacher_score", "ce_score"),
    "document_ids": ("document_ids", "doc_ids"),
    "scores": ("scores",),
}
LONG = ("query_id", "document_id", "score")


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
