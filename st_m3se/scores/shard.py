"""One Parquet file of a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import short
from st_m3se.core.records import check_footer, check_groups, check_values, dictionaries
from st_m3se.core.scored_list import ScoredList

__all__ = ["COLUMNS", "Shard", "check_complete", "list_lengths", "problems"]

COLUMNS = ["query_id", "document_ids", "scores"]
KEPT_GROUPS = 8
BLOCK = 1 << 20


class Shard:
    """A Parquet file with the three columns; keeps the last few groups of rows that it decoded.

    The file stays open, so that one that takes its name later does not mix in. Its content is compared with what the
    manifest says before the first row is read.

    Args:
        path: The file.
        facts: What the manifest says of it: "queries" and, from the second version of stores on, "bytes" and "xxh3".

    Raises:
        FormatError: If the file is missing, damaged, has other columns, or is not the one of the manifest.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.facts = path, dict(facts or {})
        self._lock = Lock()
        self._verified = "xxh3" not in self.facts
        try:
            # Plain reads: the packed pages are unpacked in any case, and mapped ones would stay in the process as well.
            self._source = pa.OSFile(str(path))
            self._check_size()
            foreign = "xxh3" not in self.facts
            if foreign:
                check_footer(path)
            metadata = pq.read_metadata(self._source)
            self._file = pq.ParquetFile(
                self._source,
                metadata=metadata,
                memory_map=False,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=dictionaries(metadata) if foreign else None,
            )
            schema = metadata.schema.to_arrow_schema()
        except FileNotFoundError as error:
            if not self.facts:
                raise FormatError("there is no such file.", file=str(path)) from error
            raise FormatError(
                f"the manifest names this shard of {self.facts.get('queries')} queries and it is not there. Restore it "
                "from a copy, or make the store again: without it queries would be missing.",
                file=str(path),
            ) from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if self.facts:
                raise self._damaged(f"it is not a readable Parquet file: {error}") from error
            raise FormatError(
                f"this is not a readable Parquet file: {error}. If it holds scores in another "
                f"format, such as a TREC run, make a store of it: st-m3se convert {path} STORE",
                file=str(path),
            ) from error
        if missing := [name for name in COLUMNS if name not in schema.names]:
            raise FormatError(f"the file lacks the columns {missing}; it has {schema.names!r:.200}.", file=str(path))
        query, documents, scores = (schema.field(name).type for name in COLUMNS)
        if not (_is_list(documents) and _is_list(scores) and pa.types.is_floating(scores.value_type)):
            raise FormatError(
                f"document_ids and scores must be lists, and scores of floats; got {documents} and {scores}. Lists "
                "that are encoded as texts are read by convert.",
                file=str(path),
            )
        for kind in (query, documents.value_type):
            if not (pa.types.is_signed_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise FormatError(f"ids must be strings or integers, got {kind}.", file=str(path))
        self.id_types = tuple(
            pa.int64() if pa.types.is_integer(kind) else pa.string() for kind in (query, documents.value_type)
        )
        self._schema = pa.schema(
            {
                "query_id": self.id_types[0],
                "document_ids": pa.list_(self.id_types[1]),
                "scores": pa.list_(pa.float32()),
            }
        )
        if foreign:
            try:
                check_groups(metadata, COLUMNS)
            except FormatError as error:
                raise FormatError(error.message, file=str(path)) from None
            except UnicodeDecodeError as error:  # the name of a column, where its values are
                raise FormatError(f"this is not a readable Parquet file: {error}", file=str(path)) from error
        self.groups = metadata.num_row_groups
        sizes = [metadata.row_group(group).num_rows for group in range(self.groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if len(self) != self.facts.get("queries", len(self)):
            raise self._damaged(f"it has {len(self)} queries and the manifest says {self.facts['queries']}")
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the file itself, and must find the same one there.
        return _same_shard, (self.path, self.facts, _identity(self._source.fileno()))

    def check_path(self) -> None:
        """Refuse if another file has taken the name of the open one, for those who read it by its name.

        Raises:
            FormatError: If so.
        """
        try:
            there = _identity(self.path)
        except OSError:
            there = None
        if there != _identity(self._source.fileno()):
            raise FormatError("the store was replaced since it was opened. Open it again.", file=str(self.path))

    def verify(self) -> None:
        """Read all bytes once, and compare them with the checksum of the manifest, where there is one.

        Raises:
            FormatError: If they are not those that were written.
        """
        with self._lock:
            self._verify(again=True)

    def _verify(self, again: bool = False) -> None:
        if self._verified and not (again and "xxh3" in self.facts):
            return
        whole, place = xxhash.xxh3_128(), 0
        try:
            while block := self._source.read_at(BLOCK, place):
                whole.update(block)
                place += len(block)
        except OSError as error:
            raise self._damaged(f"it cannot be read: {error}") from error
        if whole.hexdigest() != self.facts["xxh3"]:
            raise self._damaged("its content has another checksum than the manifest says")
        self._verified = True

    def _check_size(self) -> None:
        size, expected = self._source.size(), self.facts.get("bytes")
        if "xxh3" in self.facts and size != expected:
            raise self._damaged(f"it has {size} bytes and the manifest says {expected}")

    def _damaged(self, why: str) -> FormatError:
        return FormatError(
            f"the shard is damaged, or belongs to another store: {why}. It was changed after it was written, and its "
            "scores may be wrong: restore it from a copy, or make the store again.",
            file=str(self.path),
        )

    def locate(self, row: int) -> tuple[int, int]:
        """The group of a row, and its place in it."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return group, row - int(self.starts[group])

    def table(self, group: int) -> pa.Table:
        """The decoded rows of one group."""
        with self._lock:  # threads share what is kept
            if group not in self._tables:
                table = self._read(lambda: self._decoded(group))
                while len(self._tables) >= KEPT_GROUPS:
                    self._tables.pop(next(iter(self._tables)))
                self._tables[group] = table
            return self._tables[group]

    def _decoded(self, group: int) -> pa.Table:
        table = self._file.read_row_group(group, columns=COLUMNS, use_threads=False)
        if "xxh3" in self.facts:
            return table.select(COLUMNS).cast(self._schema)
        # Of an unknown writer: its strings may be no UTF-8, and one of them may be repeated a million times.
        for name in COLUMNS:
            for chunk in table.column(name).chunks:
                check_values(chunk, name)
        table = table.select(COLUMNS).cast(self._schema)
        table.validate(full=True)
        return table

    def row(self, group: int, place: int) -> ScoredList:
        """One row."""
        table = self.table(group)
        check_complete(table)
        return ScoredList(*(table.column(name)[place].as_py() for name in COLUMNS))

    def query_ids(self) -> pa.ChunkedArray:
        """The column of query ids alone."""
        with self._lock:
            return self._read(self._query_ids)

    def _query_ids(self) -> pa.ChunkedArray:
        ids = self._file.read(columns=["query_id"], use_threads=False).column(0)
        for chunk in ids.chunks:
            check_values(chunk, "query_id")
        ids = ids.cast(self.id_types[0])
        if "xxh3" not in self.facts:
            ids.validate(full=True)
        return ids

    def _read(self, read: Callable[[], Any]) -> Any:
        self._verify()
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(str(error)) from error


def _identity(file: Path | int) -> tuple[int, int, int, int]:
    status = os.fstat(file) if isinstance(file, int) else file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _same_shard(path: Path, facts: Mapping[str, Any], identity: tuple[int, int, int, int]) -> Shard:
    shard = Shard(path, facts)
    if _identity(shard._source.fileno()) != identity:
        raise FormatError("the store was replaced since it was opened. Open it again.", file=str(path))
    return shard


def check_complete(table: pa.Table) -> None:
    """Refuse a table with gaps, before they become None among ids and scores.

    Raises:
        FormatError: Naming the query.
    """
    for name in COLUMNS:
        start = 0
        for chunk in table.column(name).chunks:
            values = chunk if name == "query_id" else chunk.flatten()
            if not (chunk.null_count or values.null_count):
                start += len(chunk)
                continue
            gaps = chunk.is_null().to_numpy(zero_copy_only=False)
            if not gaps.any():
                gaps = np.array([not row.is_valid or None in row.as_py() for row in chunk])
            place = start + int(np.argmax(gaps))
            query = table.column("query_id")[place].as_py()
            raise FormatError(
                f"query {short(query)} has a gap in {name}. scores.validate() names all such rows; st-m3se convert "
                "--on-error skip makes a store without them."
            )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def problems(table: pa.Table) -> list[str]:
    """What is wrong with the rows of a table, one message each, at most ten."""
    found: list[str] = []
    queries = table.column("query_id").combine_chunks()
    documents, scores = (table.column(name).combine_chunks() for name in ("document_ids", "scores"))
    if queries.null_count:
        found.append(f"{queries.null_count} rows have no query id")
    if missing := max(documents.null_count, scores.null_count):
        found.append(f"{missing} rows have no list")
    document_counts, score_counts = list_lengths(documents), list_lengths(scores)
    for row in np.flatnonzero(document_counts != score_counts)[:10]:
        found.append(
            f"query {queries[row].as_py()!r:.80} has {document_counts[row]} documents and {score_counts[row]} scores"
        )
    flat = documents.flatten()
    if flat.null_count:
        found.append(f"{flat.null_count} document ids are missing")
    owner = np.repeat(np.arange(len(document_counts)), document_counts)
    encoded = flat.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    keys = owner * (len(encoded.dictionary) + 1) + codes
    order = np.argsort(keys, kind="stable")
    twice = order[1:][(keys[order][1:] == keys[order][:-1]) & (codes[order][1:] >= 0)]
    for place in twice[:10]:
        found.append(
            f"document {flat[int(place)].as_py()!r:.80} stands twice in the list of query "
            f"{queries[int(owner[place])].as_py()!r:.80}"
        )
    values = scores.flatten().to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(score_counts)), score_counts)
    for place in np.flatnonzero(~np.isfinite(values))[:10]:
        found.append(f"query {queries[int(owner[place])].as_py()!r:.80} has the score {values[place]}")
    return found[:10]


def list_lengths(lists: pa.ListArray) -> np.ndarray:
    """How many values each list has, 0 where one is missing: int ``[lists]``."""
    return np.asarray(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
