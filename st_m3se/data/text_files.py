"""Texts on their way into Arrow: read from a file, a mapping or a dataset, checked, and kept in a cache on disk."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.files import cache_key, damage, scratch_folder, seal, sealed_bytes, sweep
from st_m3se.core.ids import Id, SortedIds, short
from st_m3se.core.ragged import offsets
from st_m3se.core.reading import IdType, Reading, parse_text
from st_m3se.core.records import Record, column_names, is_table, records

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["PACKED", "SHARD", "cached_copy", "choose_file", "default_cache", "parquet_of_split", "texts_at"]

logger = logging.getLogger(__name__)

ID_COLUMNS = ("_id", "id", "query_id", "document_id", "doc_id", "docid", "passage_id", "qid", "pid")
TEXT_COLUMNS = ("text", "query", "document", "passage")
PACKED = ("", ".gz", ".zst")
SHARD = re.compile(r"-\d+-of-\d+$")

CACHE_VERSION = 2  # part of every cache file's name: raise it when what is cached changes
GROUP_TEXTS = 16_384
GROUP_CHARACTERS = 1 << 26
MANY_A_CHUNK = 16  # texts of a chunk that are taken faster together than one by one
REPEATED = b"repeated"  # in the schema of a cached copy: the ids of which only the last text was kept

Duplicates = Literal["raise", "last"]
Row = tuple[int, Id, str]
"""The line, or for Parquet the row, counted from 1; the id; the text."""


# Reading.


def _columns(names: Sequence[str]) -> tuple[str, str, str | None]:
    """The names of the id, the text and, where there is one, the title."""

    def choose(known: tuple[str, ...], kind: str, sure: int) -> str:
        found = [name for name in known if name in names]
        if not found or (len(found) > 1 and found[0] not in known[:sure]):
            given = f"got {found}" if found else f"the columns are {list(names)!r:.200}"
            raise FormatError(f"expected one {kind} among {list(known)}; {given}.")
        return found[0]

    return choose(ID_COLUMNS, "id", 2), choose(TEXT_COLUMNS, "text", 1), "title" if "title" in names else None


def _joined(title: Any, text: Any) -> str:
    """The text with its title in front, checked."""
    front = "" if title is None else parse_text(title, "the title")
    return f"{front} {parse_text(text, 'the text')}".strip()


def choose_file(path: Path, name: str, split: str | None = None) -> Path:
    """The file, or folder of Parquet files, that holds the texts of a folder; a file comes back as it is.

    ``corpus.jsonl`` as BEIR, ``corpus.tsv`` or ``collection.tsv`` as MS MARCO, plain, gz or zst; ``corpus.parquet``; or
    a folder ``corpus/`` of Parquet files as on the hub; queries likewise, also those of a ``split``.
    """
    if not path.exists():
        raise FormatError("there is no such file or folder.", file=str(path))
    if not path.is_dir():
        return path
    stems = ["corpus", "collection"] if name == "corpus" else [name]
    if name == "queries" and split is not None:
        stems = [f"queries.{split}", f"queries.{split}.small", *stems]
    for stem in stems:
        for ending in (".jsonl", ".tsv"):
            for packed in PACKED:
                if (file := path / f"{stem}{ending}{packed}").is_file():
                    return file
        if (file := path / f"{stem}.parquet").is_file():
            return file
        if any((path / stem).glob("*.parquet")):
            return parquet_of_split(path / stem, split)
    if any(path.glob("*.parquet")):
        return path
    raise FormatError(
        f"the folder has no {name}: expected {stems[-1] if name == 'queries' else stems[0]}.jsonl, .tsv (plain, .gz or "
        ".zst) or .parquet, or a folder of Parquet files of that name.",
        file=str(path),
    )


def parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder as on the hub, by their split."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        files.setdefault(SHARD.sub("", file.stem), []).append(file)
    return files


def parquet_of_split(folder: Path, split: str | None) -> Path:
    """The Parquet files of a folder as on the hub: of its only split, or of the one that is asked for."""
    files = parquet_splits(folder)
    if split is None or len(files) == 1:
        return folder
    if len(files.get(split, [])) == 1:
        return files[split][0]
    raise FormatError(
        f"the folder holds {', '.join(files)}: choose one with split, which now is {split!r}"
        + (", of several files. Move them to a folder of their own." if split in files else "."),
        file=str(folder),
    )


def _files_of(path: Path) -> list[Path]:
    """The file, or the Parquet files of a folder, in their order."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FormatError("the folder has no Parquet files.", file=str(path))
    return files


def read_texts(path: Path, name: str, id_type: IdType | None) -> Iterator[Row]:
    """The rows of a file, or of the Parquet files of a folder; the ids are converted and checked."""
    for file in _files_of(path):
        reading = Reading(file, id_type=id_type)
        check = _id_check(reading, name)
        kind = next((suffix for suffix in reversed(file.suffixes) if suffix not in PACKED), "")
        if kind in (".tsv", ".txt"):
            yield from _read_tsv(reading, check)
        elif kind in (".jsonl", ".json", ".parquet"):
            yield from _read_records(reading, check)
        else:
            raise FormatError(
                "the name does not say what it is. Known are .jsonl and .tsv, plain, .gz or .zst, and .parquet.",
                file=str(file),
            )


def _id_check(reading: Reading, name: str) -> Callable[[Any], Id]:
    return reading.query_id if name == "queries" else reading.document_id


def _read_records(reading: Reading, check: Callable[[Any], Id]) -> Iterator[Row]:
    known: dict[tuple[str, ...], tuple[str, str, str | None]] = {}

    def parse(record: Record, number: int) -> Row:
        keys = tuple(record)
        if keys not in known:
            if len(known) > 100:  # records with keys of their own
                known.clear()
            known[keys] = _columns(keys)
        text_id, text, title = known[keys]
        value = parse_text(record[text], text) if title is None else _joined(record[title], record[text])
        return number, check(record[text_id]), value

    used = None
    if is_table(reading.path):
        with errors_in(reading.path):
            used = [name for name in _columns(column_names(reading.path)) if name]
    return reading.parsed(parse, records(reading, used))


def _read_tsv(reading: Reading, check: Callable[[Any], Id]) -> Iterator[Row]:
    first = True

    def parse(line: str, number: int) -> Row | None:
        nonlocal first
        was_first, first = first, False
        fields = line.split("\t")
        if len(fields) != 2:
            raise FormatError(f"expected `id<TAB>text`, got {len(fields)} fields.")
        if was_first and fields[0] in ID_COLUMNS and fields[1] in TEXT_COLUMNS:
            return None
        return number, check(fields[0]), fields[1]

    return (row for row in reading.parsed(parse) if row is not None)


def from_mapping(texts: Mapping[Any, Any], name: str, id_type: IdType | None) -> Iterator[Row]:
    """The rows of a mapping, numbered in its order."""
    reading = Reading(Path(f"the mapping of {name}"), id_type=id_type)
    check = _id_check(reading, name)
    for number, (text_id, value) in enumerate(texts.items(), start=1):
        try:
            if isinstance(value, Mapping):
                if "text" not in value:
                    raise FormatError(f"expected a text, or a mapping with `text`; got {short(value)}.")
                value = _joined(value["title"], value["text"]) if "title" in value else value["text"]
            row = number, check(text_id), parse_text(value, "the text")
        except FormatError as error:
            raise FormatError(f"{name}, id {short(text_id)}: {error.message}") from None
        yield row


def from_dataset(dataset: Any, name: str, id_type: IdType | None) -> Dataset:
    """The dataset cut down to an id and a text column; a copy in its cache only where there is something to change."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"the {name} must be Texts, a mapping, a datasets.Dataset or a path, got {type(dataset).__name__}. Of a "
            "DatasetDict choose a split; a streamed dataset has no look-up: load it without streaming."
        )
    text_id, text, title = _columns(dataset.column_names)
    dataset = dataset.with_format(None).select_columns([text_id, text] + ([] if title is None else [title]))
    ids, values = (dataset.data.table.schema.field(column).type for column in (text_id, text))
    if not (pa.types.is_integer(ids) or _is_string(ids)) or not _is_string(values):
        raise FormatError(f"the ids must be strings or integers and the texts strings, got {ids} and {values}.")
    converted = id_type is not None and id_type != ("int" if pa.types.is_integer(ids) else "str")
    # A selection or shuffle is a list of rows over the whole table; its private name is the only trace of it.
    if title is not None or converted or dataset._indices is not None:
        dataset = dataset.map(
            _plain_columns,
            batched=True,
            fn_kwargs={"text_id": text_id, "text": text, "title": title, "name": name, "id_type": id_type},
            remove_columns=dataset.column_names,
            desc=f"Preparing the {name}",
        ).select_columns(["id", "text"])
        text_id, text = "id", "text"
    for column, place in ((text_id, 0), (text, 1)):
        if missing := dataset.data.table.column(place).null_count:
            raise FormatError(f"{missing} of {len(dataset)} rows of the {name} have no {column}.")
    return dataset


def _plain_columns(
    batch: dict[str, list[Any]], text_id: str, text: str, title: str | None, name: str, id_type: IdType | None
) -> dict[str, list[Any]]:
    reading = Reading(Path(f"the {name}"), id_type=id_type)
    check = _id_check(reading, name)
    titles = [None] * len(batch[text]) if title is None else batch[title]
    return {
        "id": [check(value) for value in batch[text_id]],
        "text": [
            parse_text(value, text) if title is None else _joined(front, value)
            for front, value in zip(titles, batch[text], strict=True)
        ],
    }


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# In Arrow.


def table_of(origin: Path | pa.Table | Dataset) -> pa.Table:
    """The ids and texts, mapped into memory where they are a file of the cache."""
    if isinstance(origin, Path):
        return _mapped(origin, sealed_bytes(origin))
    return origin if isinstance(origin, pa.Table) else origin.data.table


def _mapped(path: Path, size: int) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path)).read_buffer(size)).read_all()


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


def default_cache(kind: str) -> Path:
    """Where downloads and copies are kept unless told otherwise: in the cache of the datasets library."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / f"st-m3se-{kind}"


def cached_copy(
    path: Path, name: str, id_type: IdType | None, duplicates: Duplicates, cache_dir: str | Path | None
) -> Path:
    """The Arrow copy of a file, made unless it is there already. It appears only whole, whoever else makes it too.

    A copy that is there is read and compared with its checksum, some gigabytes a second: Arrow follows the offsets in a
    mapped file without looking whether they lead out of it. A damaged one is made anew.
    """
    cache = default_cache("texts") if cache_dir is None else Path(cache_dir)
    cached = cache / f"{name}-{cache_key([CACHE_VERSION, id_type], _files_of(path))}.arrow"
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
        _write(part, first.schema, chain([first], batches))
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
    starts = offsets([len(chunk) for chunk in texts])
    first, last = index.first_and_last()
    rows = last[np.argsort(first)]
    # One array: a selection from chunks joins them each time; large_string, since they may pass 2 GiB.
    ids = (table.column(0) if index.is_int else table.column(0).cast(pa.large_string())).combine_chunks()
    repeated = ids.take(pa.array(np.sort(first[first != last]))).to_pylist()
    copy = part.with_name("last.arrow")
    schema = table.schema.with_metadata({REPEATED: json.dumps(repeated).encode()})

    def kept() -> Iterator[Row]:
        for start in range(0, len(rows), GROUP_TEXTS):
            chosen = rows[start : start + GROUP_TEXTS]
            values = ids.take(pa.array(chosen)).to_pylist(), texts_at(texts, starts, chosen)
            yield from zip(chosen.tolist(), *values, strict=True)

    _write(copy, schema, record_batches(kept()))
    return copy


def _write(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _place(path: Path, name: str, id_type: IdType | None, row: int) -> tuple[int, Path]:
    """The line, and the file, that a row came from."""
    places = ((line, file) for file in _files_of(path) for line, _, _ in read_texts(file, name, id_type))
    if (place := next(islice(places, row, None), None)) is None:
        raise FormatError("the file changed while it was read. Try again.", file=str(path))
    return place
