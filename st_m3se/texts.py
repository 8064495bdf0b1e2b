"""Queries and documents by id: looked up in a file that Arrow maps into memory, without loading them all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.reading import INTEGER, IdType, Reading, parse_object, parse_text
from st_m3se.scores.ids import SortedIds
from st_m3se.scores.rows import Id, short

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Texts"]

ID_COLUMNS = ("_id", "id", "query_id", "document_id", "doc_id", "docid", "passage_id", "qid", "pid")
TEXT_COLUMNS = ("text", "query", "document", "passage")
PACKED = ("", ".gz", ".zst")
CACHE_VERSION = 1  # part of every cache file's name: raise it when what is cached changes
GROUP_TEXTS = 16_384
GROUP_CHARACTERS = 1 << 26
MANY_A_CHUNK = 16  # texts of a chunk that are taken faster together than one by one

REPEATED = b"repeated"  # in the schema of a cached copy: the ids of which only the last text was kept

Duplicates = Literal["raise", "last"]

Row = tuple[int, Id, str]
"""The line, or for Parquet the row, counted from 1; the id; the text."""


class Texts(Mapping[Id, str]):
    """Texts by id, in the order of their source. Millions of them cost their ids and 8 bytes each in memory.

    Open with :meth:`open`. It is a mapping from id to text that also takes many ids at once (:meth:`take`) and
    iterates in batches (:meth:`batches`). Ids are str or int and stay so: "7" and 7 are two.

    A ``title`` goes in front of the text as BEIR does it: ``title + " " + text``, without blanks at the ends. Texts
    without a title are left as they are, and a text may be empty.

    Attributes:
        name: What these texts are, "corpus" or "queries", for messages.
        source: Where they come from, for messages.
    """

    def __init__(self, origin: Path | pa.Table | Dataset, name: str, source: str) -> None:
        self.name, self.source = name, source
        self._origin = origin
        self._connect()

    def _connect(self) -> None:
        table = _table(self._origin)
        ids = table.column(0)
        self._ids: pa.ChunkedArray = ids.cast(pa.int64()) if pa.types.is_integer(ids.type) else ids
        self._chunks = table.column(1).chunks
        self._starts = np.concatenate([[0], np.cumsum([len(chunk) for chunk in self._chunks], dtype=np.int64)])
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
            source: One of

                - a mapping from id to text, or to BEIR's ``{"title", "text"}``;
                - a ``datasets.Dataset`` with an id column (``_id``, ``id``, ``query_id``, ``document_id``, ``doc_id``,
                  ``docid``, ``passage_id``, ``qid`` or ``pid``), a text column (``text``, ``query``, ``document`` or
                  ``passage``), and optionally ``title``;
                - a jsonl file with these keys, such as BEIR's; a TSV of ``id<TAB>text``, such as MS MARCO's; both
                  plain, gz or zst; a Parquet file, or a folder of them;
                - a BEIR folder, in which ``name`` chooses ``corpus.jsonl`` or ``queries.jsonl``;
                - Texts, which come back as they are.
            name: "corpus" or "queries".
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
            path = _choose(Path(source), name)
            return cls(_cached(path, name, id_type, duplicates, cache_dir), name, str(source))
        if isinstance(source, Mapping) and not hasattr(source, "column_names"):  # a DatasetDict is a dict as well
            if not source:
                raise FormatError(f"the mapping of {name} is empty.")
            table = pa.Table.from_batches(list(_batches(_from_mapping(source, name, id_type))))
            texts = cls(table, name, f"a mapping of {len(source)} texts")
        else:
            texts = cls(_from_dataset(source, name, id_type), name, "a Dataset")
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
        ids: list[Id] = json.loads((_table(self._origin).schema.metadata or {}).get(REPEATED, b"[]"))
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
        return self._at(np.array([row]))[0]

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
        raise FormatError(message)

    def take(self, ids: Sequence[Id]) -> list[str]:
        """The texts of these ids, in their order; 512 of a million take about a millisecond.

        Raises:
            FormatError: If ids are missing: how many, the first, and whether it is there as the other type.
        """
        return self._at(self.rows(ids))

    def batches(self, size: int = GROUP_TEXTS) -> Iterator[tuple[list[Id], list[str]]]:
        """The ids and texts in order, ``size`` at a time."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        for start in range(0, len(self), size):
            rows = np.arange(start, min(start + size, len(self)))
            yield self._ids.slice(start, len(rows)).to_pylist(), self._at(rows)

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

    def _at(self, rows: np.ndarray) -> list[str]:
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[chunks]
        texts = self._chunks
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

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the same file; of a mapping it gets a copy.
        return {"name": self.name, "source": self.source, "_origin": self._origin}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()


def _table(origin: Path | pa.Table | Dataset) -> pa.Table:
    if isinstance(origin, Path):
        return pa.ipc.open_file(pa.memory_map(str(origin))).read_all()
    return origin if isinstance(origin, pa.Table) else origin.data.table


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


def _columns(names: Sequence[str], what: str = "columns") -> tuple[str, str, str | None]:
    """The names of the id, the text and, where there is one, the title."""

    def choose(known: tuple[str, ...], kind: str, sure: int) -> str:
        found = [name for name in known if name in names]
        if not found or (len(found) > 1 and found[0] not in known[:sure]):
            given = f"got {found}" if found else f"the {what} are {list(names)!r:.200}"
            raise FormatError(f"expected one {kind} among {list(known)}; {given}.")
        return found[0]

    return choose(ID_COLUMNS, "id", 2), choose(TEXT_COLUMNS, "text", 1), "title" if "title" in names else None


def _joined(title: Any, text: Any) -> str:
    """The text with its title in front, checked."""
    front = "" if title is None else parse_text(title, "the title")
    return f"{front} {parse_text(text, 'the text')}".strip()


# Readers: rows of (line, id, text) from one kind of source each.


def _choose(path: Path, name: str) -> Path:
    """The file, or folder of Parquet files, that holds the texts."""
    if not path.exists():
        raise FormatError("there is no such file or folder.", file=str(path))
    if not path.is_dir():
        return path
    names = [f"{name}{kind}{packed}" for kind in (".jsonl", ".tsv") for packed in PACKED] + [f"{name}.parquet", name]
    for candidate in names:
        if (path / candidate).exists():
            return path / candidate
    if any(path.glob("*.parquet")):
        return path
    raise FormatError(
        f"the folder has none of {', '.join(names[:-1])}, and no Parquet files. Name the file itself.", file=str(path)
    )


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FormatError("the folder has no Parquet files.", file=str(path))
    return files


def _read(path: Path, name: str, id_type: IdType | None) -> Iterator[Row]:
    for file in _files(path):
        reading = Reading(file, id_type=id_type)
        check = reading.query_id if name == "queries" else reading.document_id
        suffixes = [suffix for suffix in file.suffixes if suffix not in PACKED]
        kind = suffixes[-1] if suffixes else ""
        if kind == ".parquet":
            yield from _read_parquet(reading, check)
        elif kind in (".jsonl", ".json"):
            yield from _read_jsonl(reading, check)
        elif kind in (".tsv", ".txt"):
            yield from _read_tsv(reading, check)
        else:
            raise FormatError(
                "the name does not say what it is. Known are .jsonl and .tsv, plain, .gz or .zst, and .parquet.",
                file=str(file),
            )


def _read_jsonl(reading: Reading, check: Callable[[Any], Id]) -> Iterator[Row]:
    known: dict[tuple[str, ...], tuple[str, str, str | None]] = {}

    def parse(line: str, number: int) -> Row:
        record = parse_object(line, ())
        keys = tuple(record)
        if keys not in known:
            if len(known) > 100:  # records with keys of their own
                known.clear()
            known[keys] = _columns(keys, "keys")
        text_id, text, title = known[keys]
        value = parse_text(record[text], text) if title is None else _joined(record[title], record[text])
        return number, check(record[text_id]), value

    return reading.parsed(parse)


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


def _read_parquet(reading: Reading, check: Callable[[Any], Id]) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(reading.path)
        try:
            text_id, text, title = _columns(file.schema_arrow.names)
        except FormatError as error:
            raise FormatError(error.message, file=str(reading.path)) from None
        names = [name for name in (text_id, text, title) if name is not None]
        number = 0
        for batch in file.iter_batches(4_096, columns=names, use_threads=False):
            columns = [batch.column(name).to_pylist() for name in names]
            for values in zip(*columns, strict=True):
                number += 1
                try:
                    value = parse_text(values[1], text) if title is None else _joined(values[2], values[1])
                    row = number, check(values[0]), value
                except FormatError as error:
                    raise FormatError(error.message, file=str(reading.path), line=number) from None
                yield row
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"this is not a readable Parquet file: {error}", file=str(reading.path)) from error


def _from_mapping(texts: Mapping[Any, Any], name: str, id_type: IdType | None) -> Iterator[Row]:
    reading = Reading(Path(f"the mapping of {name}"), id_type=id_type)
    check = reading.query_id if name == "queries" else reading.document_id
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


def _from_dataset(dataset: Any, name: str, id_type: IdType | None) -> Dataset:
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
    check = reading.query_id if name == "queries" else reading.document_id
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


# From rows to Arrow.


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
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


def _cached(
    path: Path, name: str, id_type: IdType | None, duplicates: Duplicates, cache_dir: str | Path | None
) -> Path:
    """The Arrow copy of a file, made unless it is there already. It appears only whole, whoever else makes it too."""
    if cache_dir is None:
        from datasets import config

        cache_dir = Path(config.HF_DATASETS_CACHE) / "st-m3se-texts"
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in _files(path)]
    key = blake2b(json.dumps([CACHE_VERSION, id_type, stamps]).encode(), digest_size=12).hexdigest()
    cached = Path(cache_dir) / f"{name}-{key}.arrow"
    if cached.is_file():
        return cached
    without = cached.with_suffix(".last.arrow")  # only where there are duplicates
    if duplicates == "last" and without.is_file():
        return without

    from tqdm.auto import tqdm

    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{cached.name}.", dir=cached.parent) as folder:
        part = Path(folder) / "part.arrow"
        rows = tqdm(_read(path, name, id_type), desc=f"Reading the {name}", unit=" texts", delay=1.0)
        batches = _batches(rows)
        first = next(batches, None)
        if first is None:
            raise FormatError("the file holds no texts.", file=str(path))
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        index = SortedIds(_table(part).column(0))
        if (twice := index.first_duplicate()) is not None:
            if duplicates == "last":
                _last_wins(part, index).replace(without)
                return without
            line, file = _place(path, name, id_type, twice[1])
            raise FormatError(
                f"the id {twice[0]!r:.80} stands here for the second time: which of its texts is meant?",
                file=str(file),
                line=line,
            )
        part.replace(cached)
    return cached


def _last_wins(part: Path, index: SortedIds) -> Path:
    """A copy in which each id has its last text, in the place of its first; its schema names those that repeat."""
    texts = Texts(part, "texts", str(part))
    first, last = index.first_and_last()
    rows = last[np.argsort(first)]
    # One array: a selection from chunks joins them each time; large_string, since they may pass 2 GiB.
    ids = (texts.ids if index.is_int else texts.ids.cast(pa.large_string())).combine_chunks()
    repeated = ids.take(pa.array(np.sort(first[first != last]))).to_pylist()
    copy = part.with_name("last.arrow")
    schema = _table(part).schema.with_metadata({REPEATED: json.dumps(repeated).encode()})
    with pa.OSFile(str(copy), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(rows), GROUP_TEXTS):
            chosen = rows[start : start + GROUP_TEXTS]
            kept = zip(chosen.tolist(), ids.take(pa.array(chosen)).to_pylist(), texts._at(chosen), strict=True)
            for batch in _batches(kept):
                writer.write_batch(batch)
    return copy


def _place(path: Path, name: str, id_type: IdType | None, row: int) -> tuple[int, Path]:
    """The line, and the file, that a row came from."""
    for file in _files(path):
        for line, _, _ in _read(file, name, id_type):
            if row == 0:
                return line, file
            row -= 1
    raise FormatError("the file changed while it was read. Try again.", file=str(path))
