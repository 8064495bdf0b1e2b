"""Queries and documents by id: looked up in a file that Arrow maps into memory, without loading them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, SortedIds, short
from st_m3se.core.ragged import offsets
from st_m3se.core.reading import INTEGER, IdType
from st_m3se.data.text_files import (
    GROUP_TEXTS,
    REPEATED,
    Duplicates,
    cached_copy,
    choose_file,
    from_dataset,
    from_mapping,
    record_batches,
    table_of,
    texts_at,
)

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Texts"]


class Texts(Mapping[Id, str]):
    """Texts by id, in the order of their source. Millions of them cost their ids and 8 bytes each in memory.

    A mapping from id to text that also takes many ids at once (:meth:`take`) and iterates in batches (:meth:`batches`).
    Ids are str or int and stay so: "7" and 7 are two. A ``title`` goes in front of the text as BEIR does it: ``title +
    " " + text``, without blanks at the ends. A text may be empty.

    Attributes:
        name: What these texts are, "corpus" or "queries", for messages.
        source: Where they come from, for messages.
    """

    def __init__(self, origin: Path | pa.Table | Dataset, name: str, source: str) -> None:
        self.name, self.source = name, source
        self._origin = origin
        self._connect()

    def _connect(self) -> None:
        table = table_of(self._origin)
        ids = table.column(0)
        self._ids: pa.ChunkedArray = ids.cast(pa.int64()) if pa.types.is_integer(ids.type) else ids
        self._chunks = table.column(1).chunks
        self._starts = offsets([len(chunk) for chunk in self._chunks])
        self._index: SortedIds | None = None
        self._fingerprint: str | None = None

    @classmethod
    def open(
        cls,
        source: Texts | Mapping[Any, Any] | Dataset | str | Path,
        name: str = "corpus",
        *,
        id_type: IdType | None = None,
        duplicates: Duplicates = "raise",
        cache_dir: str | Path | None = None,
    ) -> Texts:
        """Open texts from wherever they are.

        A file is read once, checked, and kept in Arrow's form in the cache of the datasets library; as long as its
        size and time do not change, opening it again only maps that copy into memory.

        Args:
            source: A mapping from id to text, or to BEIR's ``{"title", "text"}``; a ``datasets.Dataset`` with a column
                of ids (``_id``, ``id``, ``query_id``, ``docid`` ...), one of texts (``text``, ``query``, ``document``
                or ``passage``), and optionally ``title``; a jsonl file with these keys or a TSV of ``id<TAB>text``,
                plain, gz or zst; a Parquet file, or a folder of them; a BEIR folder; or Texts, which come back as they
                are.
            name: "corpus" or "queries", which also chooses the file of a folder.
            id_type: "str" or "int" converts the ids, and refuses those that would not survive the way back. None
                leaves them; those of TSV files are strings.
            duplicates: What happens to an id that repeats in a file: "raise", or "last", which keeps its last text in
                the place of its first, as BEIR's loader does; :attr:`repeated` names them.
            cache_dir: Where to keep the Arrow copy of a file. None is the cache of the datasets library.

        Raises:
            FormatError: If an id or text is missing or an id repeats, with ``file:line`` where there is one.
        """
        if isinstance(source, Texts):
            if id_type not in (None, source.id_type):
                raise FormatError(f"the ids of {source!r} are {source.id_type}. Open its source with id_type.")
            return source
        if isinstance(source, (str, Path)):
            path = choose_file(Path(source), name)
            return cls(cached_copy(path, name, id_type, duplicates, cache_dir), name, str(source))
        if isinstance(source, Mapping) and not hasattr(source, "column_names"):  # a DatasetDict is a dict as well
            if not source:
                raise FormatError(f"the mapping of {name} is empty.")
            table = pa.Table.from_batches(list(record_batches(from_mapping(source, name, id_type))))
            texts = cls(table, name, f"a mapping of {len(source)} texts")
        else:
            texts = cls(from_dataset(source, name, id_type), name, "a Dataset")
        if (twice := texts._sorted().first_duplicate()) is not None:
            raise FormatError(
                f"the id {twice[0]!r:.80} stands twice in the {name}, the second time in row {twice[1] + 1}."
            )
        return texts

    @property
    def id_type(self) -> IdType:
        """The type of the ids, "str" or "int"."""
        return "int" if pa.types.is_integer(self._ids.type) else "str"

    @property
    def ids(self) -> pa.ChunkedArray:
        """The ids in order, as Arrow holds them."""
        return self._ids

    @property
    def repeated(self) -> list[Id]:
        """The ids that repeat in the file, of which the last text was kept: opened with ``duplicates="last"``."""
        ids: list[Id] = json.loads((table_of(self._origin).schema.metadata or {}).get(REPEATED, b"[]"))
        return ids

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Id]:
        for chunk in self._ids.chunks:
            for start in range(0, len(chunk), GROUP_TEXTS):
                yield from chunk[start : start + GROUP_TEXTS].to_pylist()

    def __contains__(self, text_id: object) -> bool:
        return self._sorted().find(text_id) is not None

    def __getitem__(self, text_id: Id) -> str:
        """The text of one id.

        Raises:
            KeyError: If there is none.
        """
        row = self._sorted().find(text_id)
        if row is None:
            raise KeyError(text_id)
        return texts_at(self._chunks, self._starts, np.array([row]))[0]

    def __repr__(self) -> str:
        return f"Texts({len(self)} {self.name}, ids {self.id_type}, from {self.source})"

    def find(self, ids: Sequence[Id]) -> np.ndarray:
        """The row of each id in the order of the source, counted from 0, or -1 where there is none: int64."""
        return self._sorted().find_all(ids)

    def blank(self) -> np.ndarray:
        """The rows whose text is empty or white space alone, counted from 0: int64."""
        found = [np.empty(0, dtype=np.int64)]
        for start, chunk in zip(self._starts.tolist(), self._chunks, strict=False):
            blank = pc.or_(pc.equal(pc.binary_length(chunk), 0), pc.utf8_is_space(chunk))
            found.append(np.flatnonzero(blank.to_numpy(zero_copy_only=False)) + start)
        return np.concatenate(found)

    def rows(self, ids: Sequence[Id]) -> np.ndarray:
        """The row of each id in the order of the source, counted from 0: int64.

        Raises:
            FormatError: If ids are missing: how many, the first, and whether it is there as the other type.
        """
        rows = self.find(ids)
        missing = np.flatnonzero(rows < 0)
        if not len(missing):
            return rows
        first = ids[int(missing[0])]
        message = f"{len(missing)} of {len(ids)} ids are not in the {self.name} ({self.source}), first {short(first)}."
        other = _as_other_type(first)
        if other is not None and other in self:
            message += (
                f" It is {type(first).__name__} and the {self.name} has {short(other)} ({type(other).__name__}): open "
                f'one of the two with id_type="{type(first).__name__}" or convert the other.'
            )
        else:
            message += f" Give the {self.name} that they are from, or leave them out."
        raise FormatError(message)

    def take(self, ids: Sequence[Id]) -> list[str]:
        """The texts of these ids, in their order; 512 of a million take about a millisecond.

        Raises:
            FormatError: If ids are missing: how many, the first, and whether it is there as the other type.
        """
        return texts_at(self._chunks, self._starts, self.rows(ids))

    def batches(self, size: int = GROUP_TEXTS) -> Iterator[tuple[list[Id], list[str]]]:
        """The ids and texts in order, ``size`` at a time."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield self._ids.slice(start, len(rows)).to_pylist(), texts_at(self._chunks, self._starts, rows)

    @property
    def fingerprint(self) -> str:
        """A hash of the ids and texts in their order, 32 hexadecimal digits: equal wherever these are, in any file."""
        if self._fingerprint is None:
            whole = blake2b(f"{self.id_type} {len(self)}".encode(), digest_size=16)
            for chunks in (self._ids.chunks, self._chunks):
                # Lengths and contents apart, so that neither chunk borders nor Arrow's types change the hash.
                lengths, contents = blake2b(), blake2b()
                for chunk in chunks:
                    if pa.types.is_integer(chunk.type):
                        contents.update(chunk.to_numpy().astype("<i8").tobytes())
                    elif len(chunk):
                        ends, data = _buffers(chunk)
                        lengths.update(np.diff(ends).astype("<i8").tobytes())
                        contents.update(data)
                whole.update(lengths.digest() + contents.digest())
            self._fingerprint = whole.hexdigest()
        return self._fingerprint

    def _sorted(self) -> SortedIds:
        if self._index is None:
            self._index = SortedIds(self._ids)
        return self._index

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the same file; of a mapping it gets a copy.
        return {"name": self.name, "source": self.source, "_origin": self._origin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()


def _buffers(chunk: pa.Array) -> tuple[np.ndarray, memoryview]:
    """The borders of the strings of an array, one more than there are, and the bytes between the first and last."""
    _, offsets, data = chunk.buffers()
    kind = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    ends = np.frombuffer(offsets, dtype=kind)[chunk.offset : chunk.offset + len(chunk) + 1]
    return ends, memoryview(data or b"")[ends[0] : ends[-1]]


def _as_other_type(value: Id) -> Id | None:
    if isinstance(value, str):
        return int(value) if len(value) < 20 and INTEGER.fullmatch(value) else None
    return str(value)
