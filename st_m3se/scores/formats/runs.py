"""Runs: TREC's, and the rankings of ColBERT and MS MARCO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.reading import INTEGER, Reading
from st_m3se.core.scored_list import ScoredList, check_score, is_score
from st_m3se.scores.formats.format import Format, Head, decimals, one_field, write_lines
from st_m3se.scores.formats.grouping import Pair, group_pairs

__all__ = ["ITERATION", "RANKING", "TREC", "is_ranking", "read_run", "write_run"]

ITERATION = ("q0", "0")


def run_layout(line: str) -> tuple[int, int, int, int] | None:
    """The columns of document, rank and score in a line of a TREC run, and their number; None if it is none.

    ``query Q0 document rank score tag``, without the tag, or without the ``Q0``.
    """
    fields = line.split(None, 5)
    if len(fields) == 6 and _is_rank(fields[3]) and is_score(fields[4]):
        return 2, 3, 4, 6
    if len(fields) == 5:
        if fields[1].lower() in ITERATION and _is_rank(fields[3]) and is_score(fields[4]):
            return 2, 3, 4, 5
        if _is_rank(fields[2]) and is_score(fields[3]) and not is_score(fields[4]):
            return 1, 2, 3, 5
    return None


def read_run(reading: Reading) -> Iterator[ScoredList]:
    """Read a TREC run: spaces or tabs, with or without the ``Q0`` column; the first good line decides which.

    Each query's lines, wherever they stand, become one row in the order of the file. Queries come in the order of
    their ids.
    """
    layout = None

    def parse(line: str, number: int) -> Pair:
        nonlocal layout
        layout = layout or run_layout(line)
        if layout is None:
            raise FormatError("expected `query Q0 document rank score tag`, with or without Q0.")
        document, rank, score, count = layout
        fields = line.split(None, 5)
        if len(fields) != count:
            raise FormatError(f"expected {count} fields as on the first line, got {len(fields)}.")
        if not _is_rank(fields[rank]):
            raise FormatError(f"the rank must be an integer, got {fields[rank]!r:.80}.")
        ids = reading.query_id(fields[0]), reading.document_id(fields[document])
        return Pair(*ids, None, check_score(fields[score]), False, number)

    return group_pairs(reading.parsed(parse), reading)


def write_run(rows: Iterable[ScoredList], path: str | Path, *, tag: str = "st-m3se", overwrite: bool = False) -> None:
    """Write a TREC run, ``query Q0 document rank score tag``, each list by falling score.

    Raises:
        FormatError: On an id that holds white space, which a reader would take for two columns.
    """
    if tag.split() != [tag]:
        raise ValueError(f"the tag must be one word, got {tag!r}.")

    def split(text: str) -> list[str]:
        return text.removeprefix("\ufeff").split()  # at the start of a file it would be a byte order mark

    def lines() -> Iterator[str]:
        for row in rows:
            query_id, scores = one_field(row.query_id, split), decimals(row.scores)
            for rank, place in enumerate(np.argsort(-np.asarray(row.scores, dtype=np.float32), kind="stable"), start=1):
                yield f"{query_id} Q0 {one_field(row.document_ids[place], split)} {rank} {scores[place]} {tag}\n"

    write_lines(lines(), path, overwrite)


def is_ranking(rows: Sequence[Sequence[str]]) -> bool:
    """Whether these lines can be a ranking: each query's ranks count from 0 or 1, and no score rises.

    Args:
        rows: The first lines of a file, split at tabs: ``qid pid rank score`` or ``qid pid rank``.
    """
    last: dict[str, tuple[int, float]] = {}
    for row in rows:
        if len(row) != len(rows[0]) or len(row) not in (3, 4) or not _is_rank(row[2]) or not is_score(row[-1]):
            return False
        rank, score = int(row[2]), check_score(row[3]) if len(row) == 4 else 0.0
        if row[0] not in last and rank not in (0, 1):
            return False
        before, bound = last.get(row[0], (rank - 1, score))
        if rank != before + 1 or score > bound:
            return False
        last[row[0]] = rank, score
    return bool(rows)


def _read_ranking(reading: Reading) -> Iterator[ScoredList]:
    """Read ``qid pid rank score`` with tabs, as ColBERT saves a ranking, or MS MARCO's ``qid pid rank``.

    Where there is no score it is minus the rank: of such scores only the order means anything. Each query's lines,
    wherever they stand, become one row in the order of the file. Queries come in the order of their ids.
    """
    count: int | None = None

    def parse(line: str, number: int) -> Pair:
        nonlocal count
        fields = line.split("\t")
        count = count or len(fields)
        if len(fields) != count or count not in (3, 4) or not _is_rank(fields[2]) or int(fields[2]) < 0:
            raise FormatError(
                f"expected `qid pid rank{' score' * (count == 4)}` with tabs, as on the first line, got {line!r:.100}."
            )
        ids = reading.query_id(fields[0]), reading.document_id(fields[1])
        if count == 3:
            reading.scale = "rank"
        return Pair(*ids, None, check_score(fields[3] if count == 4 else -float(fields[2])), False, number)

    return group_pairs(reading.parsed(parse), reading)


def _is_rank(text: str) -> bool:
    return len(text) < 12 and INTEGER.fullmatch(text) is not None


def _ranked_lines(head: Head) -> int:
    return len(head.lines) if is_ranking([line.split("\t") for line in head.lines]) else 0


TREC = Format(
    "trec",
    read_run,
    lambda head: sum(run_layout(line) is not None for line in head.lines),
    suffixes=(".run", ".trec"),
    write=write_run,
)
RANKING = Format("ranking", _read_ranking, _ranked_lines, meaning="query, document, rank, score")
