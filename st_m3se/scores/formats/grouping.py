"""From scattered pairs to one list per query, in bounded memory: SQLite holds what does not fit."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short
from st_m3se.core.limits import VALUES
from st_m3se.core.reading import Reading
from st_m3se.core.scored_list import ScoredList

__all__ = ["SCORE_TOLERANCE", "Grouper", "Pair", "TextStore", "agree", "group_pairs"]

SCORE_TOLERANCE = 1e-3
BATCH = 10_000
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


class _Spill:
    """A private SQLite database that is in memory while it is small and in a temporary file beyond."""

    def __init__(self, schema: str) -> None:
        # No name: SQLite makes the file when the cache is full, where SQLITE_TMPDIR or TMPDIR says, and removes it.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.executescript(schema)
        self._database.execute("BEGIN")

    def close(self) -> None:
        """Drop the database and its temporary file."""
        self._database.close()


class Grouper(_Spill):
    """Takes pairs in any order and gives them back query by query, each query's in the order they came."""

    def __init__(self, reading: Reading) -> None:
        self._file = str(reading.path)
        self._last: Id | None = None
        self._in_a_row = 0
        # Columns without a type keep an int an int and a str a str.
        super().__init__("CREATE TABLE pair (q, d, o, s REAL, p INTEGER, line INTEGER)")
        self._batch: list[Pair] = []

    def add(self, pair: Pair) -> None:
        """Take a pair.

        Raises:
            FormatError: If one query has more of them in a row than a list may have.
        """
        self._in_a_row = self._in_a_row + 1 if pair.query_id == self._last else 1
        self._last = pair.query_id
        if self._in_a_row > VALUES.value:
            raise self._too_many(pair.query_id)
        self._batch.append(pair)
        if len(self._batch) == BATCH:
            self._flush()

    def _too_many(self, query_id: Id) -> FormatError:
        return FormatError(VALUES.error(f"query {short(query_id)} has ever more lines").message, file=self._file)

    def _flush(self) -> None:
        self._database.executemany("INSERT INTO pair VALUES (?, ?, ?, ?, ?, ?)", self._batch)
        self._batch.clear()

    def __iter__(self) -> Iterator[list[Pair]]:
        """The pairs of each query; the queries in the order of their ids."""
        self._flush()
        group: list[Pair] = []
        for row in self._database.execute("SELECT q, d, o, s, p, line FROM pair ORDER BY q, rowid"):
            pair = Pair(row[0], row[1], row[2], row[3], bool(row[4]), row[5])
            if group and group[0].query_id != pair.query_id:
                yield group
                group = []
            group.append(pair)
            if len(group) > VALUES.value:
                raise self._too_many(pair.query_id)
        if group:
            yield group


def group_pairs(pairs: Iterator[Pair], reading: Reading) -> Iterator[ScoredList]:
    """One row per query: positives first, then the order of the file; a pair that recurs counts once.

    A pair with two scores that do not agree is rejected, and under "skip" keeps the first.
    """
    with closing(Grouper(reading)) as grouper:
        for pair in pairs:
            grouper.add(pair)
        for group in grouper:
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
            documents = [*positives, *(document for document in scores if document not in positives)]
            yield ScoredList(
                group[0].query_id,
                documents,
                [scores[document] for document in documents],
                tuple(positives),
                group[0].line,
            )


class TextStore(_Spill):
    """Collects texts by id, each id once (its first text), for ``queries.jsonl`` and ``corpus.jsonl``."""

    def __init__(self) -> None:
        super().__init__(
            "CREATE TABLE query (id PRIMARY KEY, title TEXT, text TEXT);"
            "CREATE TABLE document (id PRIMARY KEY, title TEXT, text TEXT)"
        )

    def query(self, query_id: Id, text: str) -> None:
        """Take a query's text."""
        self._database.execute("INSERT OR IGNORE INTO query VALUES (?, '', ?)", (query_id, text))

    def document(self, document_id: Id, text: str, title: str = "") -> None:
        """Take a document's text."""
        self._database.execute("INSERT OR IGNORE INTO document VALUES (?, ?, ?)", (document_id, title, text))

    def _rows(self, table: str) -> Iterator[tuple[Id, str, str]]:
        yield from self._database.execute(f"SELECT id, title, text FROM {table} ORDER BY rowid")

    def write(self, folder: Path) -> list[str]:
        """Write those of the two BEIR files that have content, and return their names."""
        written = []
        for table, name in (("query", "queries.jsonl"), ("document", "corpus.jsonl")):
            if not self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]:
                continue
            with (folder / name).open("w", encoding="utf-8") as file:
                for identity, title, text in self._rows(table):
                    record = {"_id": identity, "title": title, "text": text}
                    if table == "query":
                        del record["title"]
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            written.append(name)
        return written
