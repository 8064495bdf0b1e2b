"""Writing a store: rows stream into Parquet shards in a temporary folder, which takes its name only when whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from st_m3se.core.errors import FormatError
from st_m3se.core.files import checked_json, digest, place_folder, replace_folder, scratch_folder, sweep, sync
from st_m3se.core.ids import Id, check_id
from st_m3se.core.ragged import list_array, list_lengths, offsets
from st_m3se.scores.shard import problems, store_schema

__all__ = ["MANIFEST", "MANIFEST_FIELDS", "SHARD_NAME", "UNFINISHED", "VERSION", "TeacherScoresWriter", "identity"]

MANIFEST = "manifest.json"
UNFINISHED = "scoring.json"  # where it stands without a manifest, scoring is under way
SHARD_NAME = "scores-{:05d}.parquet"
FORMAT = "st-m3se teacher scores"
VERSION = 2  # 1 had no checksums
MANIFEST_FIELDS = (
    *("teacher", "revision", "max_length", "dtype", "activation", "inputs", "scale", "source", "parents"),
)
GROUP_SCORES = 16_000  # what a look-up has to decode
GROUP_QUERIES = 4_096
SHARD_SCORES = 20_000_000


class TeacherScoresWriter:
    """Write a store of teacher scores row by row, in bounded memory, and whole or not at all.

    Rows go to Parquet shards in a temporary folder beside ``path``. Leaving the ``with`` block writes the manifest,
    with a checksum of each file, brings everything to the disk and renames the folder; leaving it by an exception
    removes the folder. Of several processes that replace one store the last wins, and whoever opens it finds one whole.

    Args:
        path: The folder to make.
        manifest: What is known of the scores: :data:`MANIFEST_FIELDS`, of which "inputs" is a fingerprint of queries,
            corpus and candidates, and "scale" is "margin" where only differences mean anything.
        overwrite: Replace a store that is there.
        shard_scores: Scores per shard file, at least; a query is never divided.

    Raises:
        FileExistsError: If ``path`` exists, and is not a store or ``overwrite`` is False.

    Example:
        >>> with TeacherScoresWriter("scores", manifest={"teacher": "my/cross-encoder"}) as writer:  # doctest: +SKIP
        ...     writer.write("q1", ["d7", "d3"], [8.5, -2.25])
    """

    def __init__(
        self,
        path: str | Path,
        *,
        manifest: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        shard_scores: int = SHARD_SCORES,
    ) -> None:
        self.path = Path(path)
        if unknown := set(manifest or ()) - set(MANIFEST_FIELDS):
            raise ValueError(f"the manifest has no field {sorted(unknown)}; it has {list(MANIFEST_FIELDS)}.")
        if shard_scores < 1:
            raise ValueError(f"shard_scores must be at least 1, got {shard_scores}.")
        self._manifest = dict(manifest or {})
        self._overwrite, self._shard_scores = overwrite, shard_scores
        sweep(self.path)
        self._check_destination()
        self._types: list[type | None] = [None, None]
        self._queries: list[Id] = []
        self._documents: list[Sequence[Id]] = []
        self._scores: list[Any] = []
        self._buffered = 0
        self._shards: list[dict[str, Any]] = []
        self._shard: pq.ParquetWriter | None = None
        self._folder: Path | None = None
        self._scratch = ExitStack()

    def _check_destination(self) -> None:
        if not os.path.lexists(self.path):
            return
        if not self._overwrite:
            raise FileExistsError(f"{self.path} exists. Choose another name, or overwrite=True to replace a store.")
        if not (self.path / MANIFEST).is_file():
            raise FileExistsError(f"{self.path} exists and is not a store (it has no {MANIFEST}); it is left alone.")

    @property
    def folder(self) -> Path:
        """The temporary folder, for files that belong beside the shards; available inside the ``with`` block."""
        if self._folder is None:
            raise RuntimeError("use the writer in a `with` block: it is what makes the store whole or not at all.")
        return self._folder

    def __enter__(self) -> TeacherScoresWriter:
        self._folder = self._scratch.enter_context(scratch_folder(self.path)) / self.path.name
        self._folder.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        folder, self._folder = self.folder, None
        with self._scratch:
            try:
                if kind is None:
                    self._finish(folder)
            finally:
                if self._shard is not None:
                    self._shard.close()

    def write(self, query_id: Id, document_ids: Sequence[Id], scores: Any) -> None:
        """Add one query's list.

        Args:
            query_id: A str or int, the same type for all queries.
            document_ids: Of one type too; a list, or a NumPy array of integers.
            scores: As many, finite; kept as float32. Raw logits: a sigmoid squeezes the margins away.
        """
        folder = self.folder
        if len(document_ids) != len(scores):
            raise FormatError(f"query {query_id!r:.80} has {len(document_ids)} documents and {len(scores)} scores.")
        try:
            with np.errstate(over="ignore"):
                values = np.asarray(scores, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise FormatError(f"the scores of query {query_id!r:.80} are not numbers: {error}") from None
        if values.ndim != 1 or not np.isfinite(values).all():
            raise FormatError(f"the scores of query {query_id!r:.80} must be a flat list of finite float32 numbers.")
        if isinstance(query_id, np.integer):
            query_id = int(query_id)
        query_id = check_id(query_id, "query id")
        documents = self._check_documents(document_ids)
        self._expect(0, type(query_id), "query")
        if len(documents):
            self._expect(1, int if isinstance(documents, np.ndarray) else type(documents[0]), "document")
        self._queries.append(query_id)
        self._documents.append(documents)
        self._scores.append(values)
        self._buffered += len(values)
        # While all lists are empty the type of the document ids is not known; such rows cost next to nothing.
        if self._types[1] and (self._buffered >= GROUP_SCORES or len(self._queries) >= GROUP_QUERIES):
            self._flush(folder)

    def write_table(self, table: pa.Table) -> None:
        """Add the rows of an Arrow table with the three columns of a store: :meth:`write` for many, without loops.

        Raises:
            FormatError: As :meth:`write`, and if a document stands twice in a list.
        """
        folder = self.folder
        if found := problems(table):
            raise FormatError(f"the rows are not valid: {'; '.join(found)}.")
        types = table.schema.field("query_id").type, table.schema.field("document_ids").type.value_type
        for place, (name, kind) in enumerate(zip(("query", "document"), types, strict=True)):
            self._expect(place, int if pa.types.is_integer(kind) else str, name)
        self._flush(folder)
        schema = self._schema()
        table = table.select(schema.names).cast(schema).combine_chunks()
        ends = offsets(list_lengths(table.column("scores").combine_chunks()))
        start = 0
        while start < len(table):
            stop = int(np.searchsorted(ends, ends[start] + GROUP_SCORES, side="right")) - 1
            stop = min(max(start + 1, stop), start + GROUP_QUERIES)
            self._write_group(folder, table.slice(start, stop - start), int(ends[stop] - ends[start]))
            start = stop

    @staticmethod
    def _check_documents(document_ids: Sequence[Id]) -> Any:
        if isinstance(document_ids, np.ndarray):
            if document_ids.dtype.kind == "i":
                return document_ids.astype(np.int64)
            document_ids = document_ids.tolist()
        documents = [check_id(value, "document id") for value in document_ids]
        if len({type(value) for value in documents}) > 1:
            raise FormatError(f"document ids are of one type, str or int; got both: {documents!r:.80}.")
        return documents

    def _expect(self, place: int, kind: type, name: str) -> None:
        known = self._types[place] = self._types[place] or kind
        if kind is not known:
            raise FormatError(
                f"{name} ids of this store are {known.__name__}, got {kind.__name__}. Ids are never converted "
                "silently: make them all one type."
            )

    def _schema(self) -> pa.Schema:
        return store_schema(*(pa.string() if kind is str else pa.int64() for kind in self._types))

    def _flush(self, folder: Path) -> None:
        if not self._queries:
            return
        schema, lengths = self._schema(), [len(scores) for scores in self._scores]
        kind = schema.types[1].value_type
        documents: Any = (
            np.concatenate([np.asarray(part, dtype=np.int64) for part in self._documents])
            if kind == pa.int64()
            else list(chain.from_iterable(self._documents))
        )
        columns = [
            pa.array(self._queries, type=schema.types[0]),
            list_array(pa.array(documents, type=kind), lengths),
            list_array(np.concatenate(self._scores), lengths),
        ]
        self._write_group(folder, pa.table(columns, schema=schema), self._buffered)
        for buffer in (self._queries, self._documents, self._scores):
            buffer.clear()
        self._buffered = 0

    def _write_group(self, folder: Path, table: pa.Table, scores: int) -> None:
        if self._shard is None:
            name = SHARD_NAME.format(len(self._shards))
            self._shards.append({"file": name, "queries": 0, "scores": 0})
            strings = pa.types.is_string(table.schema.types[1].value_type)
            self._shard = pq.ParquetWriter(
                folder / name,
                table.schema,
                compression="zstd",
                use_dictionary=False,
                column_encoding={
                    "query_id": "PLAIN",
                    "document_ids.list.element": "DELTA_LENGTH_BYTE_ARRAY" if strings else "PLAIN",
                    "scores.list.element": "BYTE_STREAM_SPLIT",
                },
                write_statistics=False,
                write_page_checksum=True,  # for whoever reads the file without the manifest
            )
        self._shard.write_table(table)
        self._shards[-1]["queries"] += len(table)
        self._shards[-1]["scores"] += scores
        if self._shards[-1]["scores"] >= self._shard_scores:
            self._close_shard(folder)

    def _close_shard(self, folder: Path) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None
            self._shards[-1] |= identity(folder / self._shards[-1]["file"])

    def _finish(self, folder: Path) -> None:
        self._flush(folder)
        self._close_shard(folder)
        query, document = (kind and kind.__name__ for kind in self._types)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            **{field: self._manifest.get(field) for field in MANIFEST_FIELDS},
            "query_id_type": query,
            "document_id_type": document,
            "queries": sum(shard["queries"] for shard in self._shards),
            "scores": sum(shard["scores"] for shard in self._shards),
            "shards": self._shards,
            "files": [
                {"file": path.relative_to(folder).as_posix(), **identity(path)}
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.suffix != ".parquet"
            ],
        }
        (folder / MANIFEST).write_text(checked_json(manifest), encoding="utf-8")
        for path in folder.rglob("*"):
            sync(path)
        sync(folder)
        self._check_destination()
        if not place_folder(folder, self.path):
            self._check_destination()
            replace_folder(folder, self.path)


def identity(path: Path) -> dict[str, Any]:
    """What tells a file from any other one."""
    return {"bytes": path.stat().st_size, "xxh3": digest(path)}
