"""Reading texts: rows of (line, id, text) from a file, a mapping or a dataset, each row checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.ids import Id, short
from st_m3se.core.reading import IdType, Reading, parse_object, parse_text
from st_m3se.core.records import Record, column_names, records

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SHARD", "Row", "choose_file", "files_of", "from_dataset", "from_mapping", "parquet_of_split", "read_texts"]

ID_COLUMNS = ("_id", "id", "query_id", "document_id", "doc_id", "docid", "passage_id", "qid", "pid")
TEXT_COLUMNS = ("text", "query", "document", "passage")
PACKED = ("", ".gz", ".zst")

SHARD = re.compile(r"-\d+-of-\d+$")

Row = tuple[int, Id, str]
"""The line, or for Parquet the row, counted from 1; the id; the text."""


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


def choose_file(path: Path, name: str, split: str | None = None) -> Path:
    """The file, or folder of Parquet files, that holds the texts.

    Args:
        path: It, or a folder: ``corpus.jsonl`` as BEIR, ``corpus.tsv`` or ``collection.tsv`` as MS MARCO, plain, gz or
            zst; ``corpus.parquet``; or a folder ``corpus/`` of Parquet files as on the hub; queries likewise.
        name: "corpus" or "queries".
        split: The split whose queries are meant, where there are several.
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


def parquet_of_split(folder: Path, split: str | None) -> Path:
    """The Parquet files of a folder as on the hub: of its only split, or of the one that is asked for."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        files.setdefault(SHARD.sub("", file.stem), []).append(file)
    if split is None or len(files) == 1:
        return folder
    if len(files.get(split, [])) == 1:
        return files[split][0]
    raise FormatError(
        f"the folder holds {', '.join(files)}: choose one with split, which now is {split!r}"
        + (", of several files. Move them to a folder of their own." if split in files else "."),
        file=str(folder),
    )


def files_of(path: Path) -> list[Path]:
    """The file, or the Parquet files of a folder, in their order."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FormatError("the folder has no Parquet files.", file=str(path))
    return files


def read_texts(path: Path, name: str, id_type: IdType | None) -> Iterator[Row]:
    """The rows of a file, or of the Parquet files of a folder; the ids are converted and checked."""
    for file in files_of(path):
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
    with errors_in(reading.path):
        text_id, text, title = _columns(column_names(reading.path))

    def parse(record: Record, number: int) -> Row:
        value = parse_text(record[text], text) if title is None else _joined(record[title], record[text])
        return number, check(record[text_id]), value

    return reading.parsed(parse, records(reading, [name for name in (text_id, text, title) if name]))


def from_mapping(texts: Mapping[Any, Any], name: str, id_type: IdType | None) -> Iterator[Row]:
    """The rows of a mapping, numbered in its order."""
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
