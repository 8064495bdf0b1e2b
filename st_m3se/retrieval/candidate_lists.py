"""Each query's candidate documents, in shards of whole queries, from a store or a mapping."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, SortedIds, check_id
from st_m3se.core.ragged import list_array, list_lengths
from st_m3se.scores.shard import problems
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["CandidateLists"]

MAPPING_QUERIES = 4_096


class CandidateLists:
    """Lists of document ids by query id, read in order, as often as needed, in bounded memory.

    Args:
        source: A store, or the path of one, whose scores are ignored; or a mapping from query id to a sequence (or a
            mapping, as in a run of dicts) of document ids.

    Attributes:
        lengths: Documents of each query, int32 ``[queries]``.
        fingerprint: A hash of all ids in their order, 32 hexadecimal digits.

    Raises:
        FormatError: If a query has two lists, a list has a document twice, or an id is missing or neither str nor int.
    """

    def __init__(self, source: TeacherScores | Mapping[Any, Iterable[Any]] | str | Path) -> None:
        if isinstance(source, (str, Path)):
            source = _open(Path(source))
        self._source: TeacherScores | list[pa.Table]
        if isinstance(source, TeacherScores):
            self._source = source
        elif isinstance(source, Mapping):
            self._source = list(_from_mapping(source))
        else:
            raise TypeError(
                "candidates must be TeacherScores, the path of a store, or a mapping from query id to document ids, "
                f"got {type(source).__name__}."
            )
        self.lengths, self.fingerprint = self._read()

    def shards(self, size: int, wanted: Collection[int]) -> Iterator[tuple[int, pa.Table]]:
        """The shards of ``size`` queries whose numbers are in ``wanted``, in order, each as (number, table).

        A table has the columns ``query_id`` and ``document_ids``.
        """
        number, rows, parts = 0, 0, []
        for table in self._tables():
            while len(table):
                part = table.slice(0, size - rows)
                table = table.slice(len(part))
                rows += len(part)
                if number in wanted:
                    parts.append(part)
                if rows == size:
                    if parts:
                        yield number, pa.concat_tables(parts)
                    number, rows, parts = number + 1, 0, []
        if parts:
            yield number, pa.concat_tables(parts)

    def _tables(self) -> Iterator[pa.Table]:
        tables = self._source.tables() if isinstance(self._source, TeacherScores) else self._source
        return (table.select(["query_id", "document_ids"]) for table in tables)

    def _read(self) -> tuple[np.ndarray, str]:
        lengths, query_ids = [], []
        hashes = {"query": _IdsHash(), "document": _IdsHash()}
        for table in self._tables():
            documents = table.column("document_ids").combine_chunks()
            counts = list_lengths(documents).astype(np.int32)
            unscored = list_array(np.zeros(int(counts.sum()), dtype=np.float32), counts)
            if found := problems(table.append_column("scores", unscored)):
                raise FormatError(f"the candidates are not valid: {'; '.join(found)}.")
            lengths.append(counts)
            query_ids += table.column("query_id").chunks
            for chunk in table.column("query_id").chunks:
                hashes["query"].update(chunk)
            hashes["document"].update(documents.flatten())
        if not query_ids:
            raise FormatError("there are no candidates: not one query.")
        if (twice := SortedIds(pa.chunked_array(query_ids)).first_duplicate()) is not None:
            raise FormatError(f"the candidates are not valid: query {twice[0]!r:.80} has two lists.")
        whole = blake2b(np.concatenate(lengths).astype("<i4").tobytes(), digest_size=16)
        for ids in hashes.values():
            whole.update(ids.digest())
        return np.concatenate(lengths), whole.hexdigest()


class _IdsHash:
    """A hash of a column of ids that does not depend on how it is cut into chunks."""

    def __init__(self) -> None:
        self._lengths, self._contents = blake2b(), blake2b()

    def update(self, ids: pa.Array) -> None:
        if pa.types.is_integer(ids.type):
            self._contents.update(ids.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        elif len(ids):
            _, offsets, data = ids.cast(pa.large_string()).buffers()
            ends = np.frombuffer(offsets, dtype=np.int64)[ids.offset : ids.offset + len(ids) + 1]
            self._lengths.update(np.diff(ends).astype("<i8").tobytes())
            self._contents.update(memoryview(data or b"")[ends[0] : ends[-1]])

    def digest(self) -> bytes:
        return self._lengths.digest() + self._contents.digest()


def _open(path: Path) -> TeacherScores:
    if path.is_file() and path.suffix != ".parquet":
        raise FormatError(
            f"candidates are a store, and this is a file. Make a store of it: `st-m3se convert {path} STORE`.",
            file=str(path),
        )
    return TeacherScores.open(path)


def _from_mapping(candidates: Mapping[Any, Iterable[Any]]) -> Iterator[pa.Table]:
    types: list[pa.DataType | None] = [None, None]
    empty: list[pa.Table] = []  # lists without documents, while the type of the document ids is not known
    items = iter(candidates.items())
    while batch := list(islice(items, MAPPING_QUERIES)):
        queries: list[Id] = []
        documents: list[Id] = []
        lengths: list[int] = []
        for query_id, listed in batch:
            queries.append(check_id(_plain(query_id), "query id"))
            if isinstance(listed, (str, bytes, set, frozenset)) or not isinstance(listed, Iterable):
                raise FormatError(
                    f"the candidates of query {query_id!r:.80} must be a list of document ids in an order of their "
                    f"own, got {type(listed).__name__}."
                )
            start = len(documents)
            documents += [check_id(_plain(value), "document id") for value in listed]
            lengths.append(len(documents) - start)
        columns = []
        for place, (name, ids) in enumerate((("query", queries), ("document", documents))):
            kinds: set[pa.DataType] = {pa.string() if isinstance(value, str) else pa.int64() for value in ids}
            if len(kinds | ({types[place]} - {None})) > 1:
                raise FormatError(f"{name} ids are of one type, str or int; the candidates have both.")
            types[place] = types[place] or next(iter(kinds), None)
            columns.append(pa.array(ids, types[place] or pa.null()))
        if types[1] is None:
            empty.append(pa.table({"query_id": columns[0], "document_ids": list_array(columns[1], lengths)}))
            continue
        for table in empty:
            yield table.cast(pa.schema({"query_id": table.schema.types[0], "document_ids": pa.list_(types[1])}))
        empty.clear()
        yield pa.table({"query_id": columns[0], "document_ids": list_array(columns[1], lengths)})
    for table in empty:
        yield table.cast(pa.schema({"query_id": table.schema.types[0], "document_ids": pa.list_(pa.int64())}))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
