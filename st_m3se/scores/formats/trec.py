"""TREC runs, and relevance judgements (qrels) as TREC and as BEIR write them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.grouping import Pair, group_pairs
from st_m3se.scores.formats.reading import INTEGER, IdType, OnError, Reading
from st_m3se.scores.rows import Id, ScoredList, check_score

__all__ = ["Qrels", "read_qrels", "read_run", "run_layout"]

Qrels = dict[Id, dict[Id, int]]

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


def read_qrels(path: str | Path, *, id_type: IdType = "str", on_error: OnError = "raise") -> Qrels:
    """Read relevance judgements, TREC (``query 0 document relevance``) or BEIR (``query-id corpus-id score``).

    Args:
        path: The file, plain, gz or zst.
        id_type: What the ids of the store are: "str" or "int".
        on_error: "raise" or "skip".

    Returns:
        Query id to document id to relevance; above 0 is relevant.

    Raises:
        FormatError: With ``file:line``, on a bad line or a judgement that contradicts an earlier one.
    """
    reading = Reading(Path(path), on_error=on_error, id_type=id_type)
    qrels: Qrels = {}
    beir = False
    first = True
    for number, line in reading.lines():
        fields = line.split("\t") if beir else line.split()
        if first and fields == HEADER:
            beir = True
        first, was_first = False, first
        if beir and was_first:
            continue
        try:
            if len(fields) != (3 if beir else 4):
                expected = "`query-id corpus-id score` with tabs" if beir else "`query 0 document relevance`"
                raise FormatError(f"expected {expected}, got {len(fields)} fields.")
            query_id, document_id = reading.query_id(fields[0]), reading.document_id(fields[-2])
            if not INTEGER.fullmatch(fields[-1]) or len(fields[-1]) > 9:
                raise FormatError(f"the relevance must be an integer, got {fields[-1]!r:.80}.")
            relevance = int(fields[-1])
            if qrels.get(query_id, {}).get(document_id, relevance) != relevance:
                raise FormatError(f"query {query_id!r:.80} and document {document_id!r:.80} were judged otherwise.")
        except FormatError as error:
            reading.reject(number, error)
            continue
        qrels.setdefault(query_id, {})[document_id] = relevance
    return qrels


def _is_rank(text: str) -> bool:
    return len(text) < 12 and INTEGER.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    try:
        check_score(text)
    except FormatError:
        return False
    return True
