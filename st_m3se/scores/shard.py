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

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.ids import short
from st_m3se.core.ragged import list_lengths, list_values, offsets, owners
from st_m3se.core.records import check_footer, check_groups, check_values, dictionaries
from st_m3se.core.scored_list import ScoredList

__all__ = ["COLUMNS", "Shard", "check_complete", "problems", "store_schema"]

COLUMNS = ["query_id", "document_ids", "scores"]
KEPT_GROUPS = 8
BLOCK = 1 << 20


def store_schema(query: pa.DataType, document: pa.DataType) -> pa.Schema:
    """The columns of a store, whose ids have these types."""
    lists = pa.list_(document), pa.list_(pa.float32())
    return pa.schema(list(zip(COLUMNS, (query, *lists), strict=True)))


class Shard:
    """A Parquet file with the three columns; keeps the last few groups of rows that it decoded.

    The file stays open, so that one that takes its name later does not mix in. Its content is compared with ``facts``,
    what the manifest says of it, before the first row is read.

    Attributes:
        id_types: Arrow's types of the query and document ids: int64 or string.
        starts: The row at which each group starts, and at the end their number.

    Raises:
        FormatError: If the file is missing, damaged, has other columns, or is not the one of the manifest.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.facts = path, dict(facts or {})
        self._lock = Lock()
        self._foreign = "xxh3" not in self.facts  # of an unknown writer, or of one that could not say what it wrote
        self._verified = self._foreign
        try:
            # Plain reads: the packed pages are unpacked in any case, and mapped ones would stay in the process as well.
            self._source = pa.OSFile(str(path))
            size = self._source.size()
            if not self._foreign and size != self.facts.get("bytes"):
                raise self._damaged(f"it has {size} bytes and the manifest says {self.facts.get('bytes')}")
            if self._foreign:
                check_footer(path)
            metadata = pq.read_metadata(self._source)
            self._file = pq.ParquetFile(
                self._source,
                metadata=metadata,
                memory_map=False,
                pre_buffer=False,
                page_checksum_verification=True,
                read_dictionary=dictionaries(metadata) if self._foreign else None,
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
        with errors_in(path, (UnicodeDecodeError,), "this is not a readable Parquet file"):  # the name of a column
            self.id_types = _id_types(schema)
            if self._foreign:
                check_groups(metadata, COLUMNS)
        self.starts = offsets([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
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
        if not self.path.exists() or _identity(self.path) != _identity(self._source.fileno()):
            raise FormatError("the store was replaced since it was opened. Open it again.", file=str(self.path))

    def verify(self) -> None:
        """Read all bytes once, and compare them with the checksum of the manifest, where there is one.

        Raises:
            FormatError: If they are not those that were written.
        """
        with self._lock:
            self._verified = self._foreign
            self._verify()

    def _verify(self) -> None:
        if self._verified:
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

    def _damaged(self, why: str) -> FormatError:
        return FormatError(
            f"the shard is damaged, or belongs to another store: {why}. It was changed after it was written, and its "
            "scores may be wrong: restore it from a copy, or make the store again.",
            file=str(self.path),
        )

    def table(self, group: int) -> pa.Table:
        """The decoded rows of one group."""
        with self._lock:  # threads share what is kept
            if group not in self._tables:
                table = self._read(lambda: self._file.read_row_group(group, columns=COLUMNS, use_threads=False))
                while len(self._tables) >= KEPT_GROUPS:
                    self._tables.pop(next(iter(self._tables)))
                self._tables[group] = table
            return self._tables[group]

    def row(self, group: int, place: int) -> ScoredList:
        """One row."""
        table = self.table(group)
        check_complete(table)
        return ScoredList(*(table.column(name)[place].as_py() for name in COLUMNS))

    def query_ids(self) -> pa.ChunkedArray:
        """The column of query ids alone."""
        with self._lock:
            return self._read(lambda: self._file.read(columns=COLUMNS[:1], use_threads=False)).column(0)

    def _read(self, read: Callable[[], pa.Table]) -> pa.Table:
        self._verify()
        try:
            table = read()
            if self._foreign:  # its strings may be no UTF-8, and one of them may be repeated a million times
                for name in table.column_names:
                    for chunk in table.column(name).chunks:
                        check_values(chunk, name)
            columns = [name for name in COLUMNS if name in table.column_names]
            schema = store_schema(*self.id_types)
            table = table.select(columns).cast(pa.schema([schema.field(name) for name in columns]))
            if self._foreign:
                table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(str(error)) from error
        return table


def _id_types(schema: pa.Schema) -> tuple[pa.DataType, pa.DataType]:
    """The types that the ids of a file will have.

    Raises:
        FormatError: If its columns are not those of a store.
    """
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise FormatError(f"the file lacks the columns {missing}; it has {schema.names!r:.200}.")
    query, documents, scores = (schema.field(name).type for name in COLUMNS)
    lists = all(pa.types.is_list(kind) or pa.types.is_large_list(kind) for kind in (documents, scores))
    if not lists or not pa.types.is_floating(scores.value_type):
        raise FormatError(
            f"document_ids and scores must be lists, and scores of floats; got {documents} and {scores}. Lists "
            "that are encoded as texts are read by convert."
        )
    for kind in (query, documents.value_type):
        if not (pa.types.is_signed_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise FormatError(f"ids must be strings or integers, got {kind}.")
    first, second = (pa.int64() if pa.types.is_integer(kind) else pa.string() for kind in (query, documents.value_type))
    return first, second


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
        for chunk in table.column(name).chunks:
            if not (chunk.null_count or (name != "query_id" and chunk.flatten().null_count)):
                continue
            rows = enumerate(table.column(name).to_pylist())
            place = next(row for row, value in rows if value is None or (isinstance(value, list) and None in value))
            raise FormatError(
                f"query {short(table.column('query_id')[place].as_py())} has a gap in {name}. scores.validate() names "
                "all such rows; st-m3se convert --on-error skip makes a store without them."
            )


def problems(table: pa.Table) -> list[str]:
    """What is wrong with the rows of a table, one message each, at most ten."""
    found: list[str] = []
    queries = table.column("query_id").combine_chunks()
    documents = table.column("document_ids").combine_chunks()
    counts, (values, score_counts) = list_lengths(documents), list_values(table, "scores")

    def query(row: int) -> str:
        return f"query {queries[int(row)].as_py()!r:.80}"

    if queries.null_count:
        found.append(f"{queries.null_count} rows have no query id")
    if missing := max(documents.null_count, table.column("scores").null_count):
        found.append(f"{missing} rows have no list")
    for row in np.flatnonzero(counts != score_counts)[:10]:
        found.append(f"{query(row)} has {counts[row]} documents and {score_counts[row]} scores")
    flat, owner = documents.flatten(), owners(counts)
    if flat.null_count:
        found.append(f"{flat.null_count} document ids are missing")
    encoded = flat.dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    keys = owner * (len(encoded.dictionary) + 1) + codes
    order = np.argsort(keys, kind="stable")
    for place in order[1:][(keys[order][1:] == keys[order][:-1]) & (codes[order][1:] >= 0)][:10]:
        found.append(f"document {flat[int(place)].as_py()!r:.80} stands twice in the list of {query(owner[place])}")
    owner = owners(score_counts)
    for place in np.flatnonzero(~np.isfinite(values))[:10]:
        found.append(f"{query(owner[place])} has the score {values[place]}")
    return found[:10]
