"""From scattered pairs to one list per query, in bounded memory: SQLite holds what does not fit."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from st_m3se.core.errors import errors_in
from st_m3se.core.ids import Id, short
from st_m3se.core.limits import VALUES
from st_m3se.core.reading import Reading
from st_m3se.core.scored_list import ScoredList

__all__ = ["Pair", "TextStore", "agree", "group_pairs", "grouped"]

SCORE_TOLERANCE = 1e-3
CACHE_KIB = 64 * 1024


class Pair(NamedTuple):
    """A scored (query, document) pair, or with ``other`` a pair of documents and their margin."""

    query_id: Id
    document_id: Id
    other: Id | None
    score: float
    positive: bool
    line: int


def agree(one: float, other: float) -> bool:
    """Whether two scores of the same pair are one score, written or computed in two batches."""
    return abs(one - other) <= SCORE_TOLERANCE * max(1.0, abs(one), abs(other))


def _spill(schema: str) -> sqlite3.Connection:
    """A private SQLite database that is in memory while it is small and in a temporary file beyond."""
    # No name: SQLite makes the file when the cache is full, where SQLITE_TMPDIR or TMPDIR says, and removes it.
    database = sqlite3.connect("", isolation_level=None)
    database.executescript(
        f"PRAGMA cache_size = -{CACHE_KIB}; PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF; {schema}; BEGIN"
    )
    return database


def grouped(pairs: Iterable[Pair], reading: Reading) -> Iterator[list[Pair]]:
    """The pairs of each query, in the order they came; the queries in the order of their ids.

    Raises:
        FormatError: If one query has more of them than a list may have.
    """

    def checked() -> Iterator[Pair]:
        last, in_a_row = None, 0
        for pair in pairs:
            in_a_row = in_a_row + 1 if pair.query_id == last else 1
            last = pair.query_id
            check(in_a_row, last)
            yield pair

    def check(count: int, query_id: Id) -> None:
        if count > VALUES.value:
            raise VALUES.error(f"query {short(query_id)} has ever more lines")

    # Columns without a type keep an int an int and a str a str.
    schema = "CREATE TABLE pair (q, d, o, s REAL, p INTEGER, line INTEGER)"
    with closing(_spill(schema)) as database, errors_in(reading.path):
        database.executemany("INSERT INTO pair VALUES (?, ?, ?, ?, ?, ?)", checked())
        group: list[Pair] = []
        for row in database.execute("SELECT q, d, o, s, p, line FROM pair ORDER BY q, rowid"):
            pair = Pair(*row)
            if group and group[0].query_id != pair.query_id:
                yield group
                group = []
            group.append(pair)
            check(len(group), pair.query_id)
        if group:
            yield group


def group_pairs(pairs: Iterable[Pair], reading: Reading) -> Iterator[ScoredList]:
    """One row per query: positives first, then the order of the file; a pair that recurs counts once.

    A pair with two scores that do not agree is rejected, and under "skip" keeps the first.
    """
    for group in grouped(pairs, reading):
        scores: dict[Id, float] = {}
        positives: dict[Id, None] = {}
        for pair in group:
            known = scores.setdefault(pair.document_id, pair.score)
            if not agree(known, pair.score):
                reading.reject(
                    pair.line,
                    f"query {pair.query_id!r:.80} and document {pair.document_id!r:.80} have the score "
                    f"{pair.score!r} here and {known!r} on an earlier line.",
                )
            elif pair.positive:
                positives[pair.document_id] = None
        documents = list({**positives, **scores})
        values = [scores[document] for document in documents]
        yield ScoredList(group[0].query_id, documents, values, tuple(positives), group[0].line)


class TextStore:
    """Collects texts by id, each id once (its first text), for ``queries.jsonl`` and ``corpus.jsonl``."""

    def __init__(self) -> None:
        columns = "(id PRIMARY KEY, title TEXT, text TEXT)"
        self._database = _spill(f"CREATE TABLE query {columns}; CREATE TABLE document {columns}")

    def close(self) -> None:
        """Drop the database and its temporary file."""
        self._database.close()

    def query(self, query_id: Id, text: str) -> None:
        """Take a query's text."""
        self._database.execute("INSERT OR IGNORE INTO query VALUES (?, '', ?)", (query_id, text))

    def document(self, document_id: Id, text: str, title: str = "") -> None:
        """Take a document's text."""
        self._database.execute("INSERT OR IGNORE INTO document VALUES (?, ?, ?)", (document_id, title, text))

    def write(self, folder: Path) -> list[str]:
        """Write those of the two BEIR files that have content, and return their names."""
        written = []
        for table, name in (("query", "queries.jsonl"), ("document", "corpus.jsonl")):
            if not self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]:
                continue
            with (folder / name).open("w", encoding="utf-8") as file:
                for identity, title, text in self._database.execute(f"SELECT * FROM {table} ORDER BY rowid"):
                    titled = {"title": title} if table == "document" else {}
                    file.write(json.dumps({"_id": identity, **titled, "text": text}, ensure_ascii=False) + "\n")
            written.append(name)
        return written
