"""Texts as Arrow tables: made from rows in batches, taken by row, and the copy of a file in the cache on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from st_m3se.core.errors import FormatError
from st_m3se.core.files import damage, scratch_folder, seal, sealed_bytes, sweep
from st_m3se.core.ids import Id, SortedIds
from st_m3se.core.reading import IdType
from st_m3se.data.text_files import Row, files_of, read_texts

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "GROUP_TEXTS",
    "REPEATED",
    "Duplicates",
    "cached_copy",
    "chunk_starts",
    "record_batches",
    "table_of",
    "texts_at",
]

logger = logging.getLogger(__name__)

CACHE_VERSION = 2  # part of every cache file's name: raise it when what is cached changes
GROUP_TEXTS = 16_384
GROUP_CHARACTERS = 1 << 26
MANY_A_CHUNK = 16  # texts of a chunk that are taken faster together than one by one

REPEATED = b"repeated"  # in the schema of a cached copy: the ids of which only the last text was kept

Duplicates = Literal["raise", "last"]


def table_of(origin: Path | pa.Table | Dataset) -> pa.Table:
    """The ids and texts, mapped into memory where they are a file of the cache."""
    if isinstance(origin, Path):
        return _mapped(origin, sealed_bytes(origin))
    return origin if isinstance(origin, pa.Table) else origin.data.table


def _mapped(path: Path, size: int) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path)).read_buffer(size)).read_all()


def chunk_starts(chunks: Sequence[pa.Array]) -> np.ndarray:
    """The row at which each chunk of a column starts, counted from 0, and at the end their number: int64."""
    return np.concatenate([[0], np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)])


def texts_at(texts: Sequence[pa.Array], starts: np.ndarray, rows: np.ndarray) -> list[str]:
    """The texts in these rows, from the chunks of a column and the row at which each of them starts."""
    chunks = np.searchsorted(starts, rows, side="right") - 1
    places = rows - starts[chunks]
    if len(rows) < MANY_A_CHUNK * len(texts):
        return [texts[chunk][place].as_py() for chunk, place in zip(chunks.tolist(), places.tolist(), strict=True)]
    order = np.argsort(chunks, kind="stable")
    found: list[str] = []
    borders = np.searchsorted(chunks[order], np.arange(len(texts) + 1))
    for chunk, (start, stop) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        if start < stop:
            found += texts[chunk].take(pa.array(places[order[start:stop]])).to_pylist()
    values = np.empty(len(rows), dtype=object)
    values[order] = found
    result: list[str] = values.tolist()
    return result


def record_batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Record batches of an id and a text column, each of at most some ten megabytes."""
    ids: list[Id] = []
    texts: list[str] = []
    characters = 0

    def batch() -> pa.RecordBatch:
        kind = pa.int64() if ids and isinstance(ids[0], int) else pa.string()
        return pa.RecordBatch.from_arrays([pa.array(ids, kind), pa.array(texts, pa.large_string())], ["id", "text"])

    for _, text_id, text in rows:
        ids.append(text_id)
        texts.append(text)
        characters += len(text)
        if len(ids) == GROUP_TEXTS or characters >= GROUP_CHARACTERS:
            yield batch()
            ids, texts, characters = [], [], 0
    if ids:
        yield batch()


def cached_copy(
    path: Path, name: str, id_type: IdType | None, duplicates: Duplicates, cache_dir: str | Path | None
) -> Path:
    """The Arrow copy of a file, made unless it is there already. It appears only whole, whoever else makes it too.

    A copy that is there is read and compared with its checksum, some gigabytes a second: Arrow follows the offsets in a
    mapped file without looking whether they lead out of it. A damaged one is made anew.
    """
    if cache_dir is None:
        from datasets import config

        cache_dir = Path(config.HF_DATASETS_CACHE) / "st-m3se-texts"
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(path)]
    key = blake2b(json.dumps([CACHE_VERSION, id_type, stamps]).encode(), digest_size=12).hexdigest()
    cached = Path(cache_dir) / f"{name}-{key}.arrow"
    without = cached.with_suffix(".last.arrow")  # only where there are duplicates
    sweep(cached)
    for copy in [cached, without] if duplicates == "last" else [cached]:
        if not copy.is_file():
            continue
        if (why := damage(copy, copy.name)) is None:
            return copy
        logger.warning(f"{copy}, the copy of {path} in the cache, is damaged: {why}. It is made anew.")

    from tqdm.auto import tqdm

    with scratch_folder(cached) as folder:
        part = folder / "part.arrow"
        rows = tqdm(read_texts(path, name, id_type), desc=f"Reading the {name}", unit=" texts", delay=1.0)
        batches = record_batches(rows)
        first = next(batches, None)
        if first is None:
            raise FormatError("the file holds no texts.", file=str(path))
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        index = SortedIds(_mapped(part, part.stat().st_size).column(0))
        if (twice := index.first_duplicate()) is not None:
            if duplicates == "last":
                copy = _last_wins(part, index)
                seal(copy, without.name)
                copy.replace(without)
                return without
            line, file = _place(path, name, id_type, twice[1])
            raise FormatError(
                f"the id {twice[0]!r:.80} stands here for the second time: which of its texts is meant?",
                file=str(file),
                line=line,
            )
        seal(part, cached.name)
        part.replace(cached)
    return cached


def _last_wins(part: Path, index: SortedIds) -> Path:
    """A copy in which each id has its last text, in the place of its first; its schema names those that repeat."""
    table = _mapped(part, part.stat().st_size)
    texts = table.column(1).chunks
    starts = chunk_starts(texts)
    first, last = index.first_and_last()
    rows = last[np.argsort(first)]
    # One array: a selection from chunks joins them each time; large_string, since they may pass 2 GiB.
    ids = (table.column(0) if index.is_int else table.column(0).cast(pa.large_string())).combine_chunks()
    repeated = ids.take(pa.array(np.sort(first[first != last]))).to_pylist()
    copy = part.with_name("last.arrow")
    schema = table.schema.with_metadata({REPEATED: json.dumps(repeated).encode()})
    with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(rows), GROUP_TEXTS):
            chosen = rows[start : start + GROUP_TEXTS]
            kept = zip(
                chosen.tolist(), ids.take(pa.array(chosen)).to_pylist(), texts_at(texts, starts, chosen), strict=True
            )
            for batch in record_batches(kept):
                writer.write_batch(batch)
    return copy


def _place(path: Path, name: str, id_type: IdType | None, row: int) -> tuple[int, Path]:
    """The line, and the file, that a row came from."""
    for file in files_of(path):
        for line, _, _ in read_texts(file, name, id_type):
            if row == 0:
                return line, file
            row -= 1
    raise FormatError("the file changed while it was read. Try again.", file=str(path))
