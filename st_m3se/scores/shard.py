"""One Parquet file of a store."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from st_m3se.scores.errors import FormatError
from st_m3se.scores.rows import ScoredList

__all__ = ["COLUMNS", "Shard"]

COLUMNS = ["query_id", "document_ids", "scores"]
KEPT_GROUPS = 8


class Shard:
    """A Parquet file with the three columns; keeps the last few groups of rows that it decoded.

    Raises:
        FormatError: If the file is missing, damaged, or has other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except (pa.ArrowException, OSError) as error:
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
        self.groups = metadata.num_row_groups
        sizes = [metadata.row_group(group).num_rows for group in range(self.groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _file(self) -> pq.ParquetFile:
        # Plain reads: the packed pages are unpacked in any case, and mapped ones would stay in the process as well.
        return pq.ParquetFile(self.path, memory_map=False, pre_buffer=False)

    def locate(self, row: int) -> tuple[int, int]:
        """The group of a row, and its place in it."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return group, row - int(self.starts[group])

    def table(self, group: int) -> pa.Table:
        """The decoded rows of one group."""
        if group not in self._tables:
            while len(self._tables) >= KEPT_GROUPS:
                self._tables.pop(next(iter(self._tables)))
            try:
                table = self._file.read_row_group(group, columns=COLUMNS, use_threads=False)
                self._tables[group] = table.select(COLUMNS).cast(self._schema)
            except (pa.ArrowException, OSError) as error:
                raise FormatError(f"the shard is damaged: {error}", file=str(self.path)) from error
        return self._tables[group]

    def row(self, group: int, place: int) -> ScoredList:
        """One row."""
        table = self.table(group)
        return ScoredList(*(table.column(name)[place].as_py() for name in COLUMNS))

    def query_ids(self) -> pa.ChunkedArray:
        """The column of query ids alone."""
        try:
            return self._file.read(columns=["query_id"], use_threads=False).column(0).cast(self.id_types[0])
        except (pa.ArrowException, OSError) as error:
            raise FormatError(f"the shard is damaged: {error}", file=str(self.path)) from error


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
