"""From any format to any other, by way of the store's rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.files import scratch_folder, sweep
from st_m3se.core.ids import Id
from st_m3se.core.reading import IdType, OnError, Reading
from st_m3se.core.scored_list import ScoredList
from st_m3se.data.qrels import Qrels, read_qrels
from st_m3se.scores.describe import ScoreRange
from st_m3se.scores.formats import FORMATS, sniff
from st_m3se.scores.formats.grouping import TextStore
from st_m3se.scores.store import ScoredLists
from st_m3se.scores.writer import MANIFEST, MANIFEST_FIELDS, UNFINISHED, TeacherScoresWriter

__all__ = ["DESTINATIONS", "SOURCES", "Conversion", "convert", "read_rows", "run_tag"]

STORE = "store"
SOURCES = (STORE, *FORMATS)
DESTINATIONS = (STORE, *(name for name, each in FORMATS.items() if each.write))
SUFFIXES = {"": STORE, **{suffix: name for name, each in FORMATS.items() for suffix in each.suffixes}}
NOTES = {
    "margin": "the file has margins: each query's first positive is 0, and only differences count.",
    "rank": "the file has ranks and no scores: each score is minus the rank, and only the order means anything. "
    "`st-m3se combine STORE OUT --calibration log-rank` makes scores of them that a loss can learn from.",
}


@dataclass
class Conversion:
    """What :func:`convert` did.

    Attributes:
        source_format: The format it read.
        destination_format: The format it wrote.
        queries: Rows read.
        scores: Scores read.
        skipped: Lines, or documents, left out under ``on_error="skip"``.
        messages: The first of the reasons.
        files: What was written beside the shards of a store: texts and positives.
        notes: What the user should know.
    """

    source_format: str
    destination_format: str
    queries: int = 0
    scores: int = 0
    skipped: int = 0
    messages: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    source_format: str | None = None,
    destination_format: str | None = None,
    on_error: OnError = "raise",
    id_type: IdType | None = None,
    scores: str | Path | None = None,
    qrels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    manifest: Mapping[str, Any] | None = None,
    tag: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert teacher scores, in a stream: neither side has to fit into memory, and the result appears only whole.

    A store also gets what else the source knows, in the BEIR layout: ``queries.jsonl`` and ``corpus.jsonl`` from
    formats with texts, and ``qrels/train.tsv`` from those that name the positives.

    Args:
        source: A file in one of :data:`SOURCES`, plain, gz or zst; a store; or a folder of Parquet or Arrow files.
        destination: A folder for a store, or a file.
        source_format: None recognises it by the content.
        destination_format: One of :data:`DESTINATIONS`. None goes by the name: ``.run``, ``.trec``, ``.jsonl``
            (PyLate), ``.csv``, ``.tsv`` (MarginMSE), with ``.gz`` or ``.zst`` behind it, and no suffix for a store.
        on_error: "raise" at the first bad line with ``file:line``, or "skip" bad lines and count them.
        id_type: "str" or "int" converts the ids. None leaves them; those of text formats are strings.
        scores: For ``hard-negatives``: the score pickle, or a store made of it.
        qrels: The positives, needed to write MarginMSE pairs where the source does not name them.
        columns: A table's names for ``query_id``, ``document_id`` and ``score`` (or ``document_ids``, ``scores``).
        manifest: What is known of the scores, as for :class:`TeacherScoresWriter`.
        tag: Of a TREC run, one word by which others tell runs apart. None is the file's name without its endings.
        overwrite: Replace the destination.

    Raises:
        FormatError: If the source is not what it should be; nothing is left at the destination.
        FileExistsError: If the destination exists and ``overwrite`` is False.
    """
    source, destination = Path(source), Path(destination)
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}.')
    if id_type not in (None, "str", "int"):
        raise ValueError(f'id_type must be "str", "int" or None, got {id_type!r}.')
    kind = _source_format(source, source_format, columns)
    to = _destination_format(destination, destination_format)
    if qrels is not None and to != "marginmse":
        raise ValueError("qrels is only for writing MarginMSE pairs; scores of other formats need none.")
    for option, given in (("columns", columns), ("scores", scores)):
        takers = [name for name, each in FORMATS.items() if each.option == option]
        if given and kind not in takers:
            raise ValueError(f"{option} belongs to {', '.join(takers)}, and {source} is {kind}.")
    if tag is not None and to != "trec":
        raise ValueError("tag is for writing a TREC run.")
    if to != STORE and manifest:
        raise ValueError(f"a file of {to} scores has no manifest; the values {sorted(manifest)} would be lost.")
    sweep(destination)
    if destination.exists() and (not overwrite or destination.resolve() == source.resolve()):
        raise FileExistsError(f"{destination} exists. Choose another name, or overwrite=True to replace it.")

    result, span = Conversion(kind, to), ScoreRange()
    with closing(TextStore()) as texts, _scores_of(scores, destination, id_type) as known:
        reading = Reading(source, on_error=on_error, id_type=id_type, texts=texts if to == STORE else None)
        rows = _counted(read_rows(reading, kind, columns, known), reading, result, span)
        rows = chain([next(rows)], rows)  # with the first row the reader knows what kind of scores these are
        if to == STORE:
            with TeacherScoresWriter(
                destination, manifest=_manifest(manifest, kind, source, reading.scale), overwrite=overwrite
            ) as writer:
                positives = _write_rows(rows, writer)
                result.files = texts.write(writer.folder) + (["qrels/train.tsv"] if positives else [])
        else:
            if to == "marginmse":
                rows = _with_positives(rows, None if qrels is None else read_qrels(qrels), source)
            options = {"tag": tag or run_tag(destination)} if to == "trec" else {}
            write = FORMATS[to].write
            assert write is not None
            write(rows, destination, overwrite=overwrite, **options)
    result.skipped, result.messages = reading.skipped, reading.messages
    warning = span.warning(_manifest(manifest, kind, source, reading.scale))
    notes = (NOTES.get(reading.scale or ""), FORMATS[kind].note if kind in FORMATS else None, warning)
    result.notes = [note for note in notes if note]
    return result


def run_tag(path: Path) -> str:
    """The tag of a run: its file's name without the endings, as one word."""
    stem = re.sub(r"(\.(run|trec|txt|gz|zst))+$", "", path.name)
    return re.sub(r"\s+", "_", stem) or "st-m3se"


def _source_format(source: Path, chosen: str | None, columns: Mapping[str, str] | None) -> str:
    if chosen is not None and chosen not in SOURCES:
        raise ValueError(f"there is no format {chosen!r} to read; there are {', '.join(SOURCES)}.")
    if chosen is None and ((source / MANIFEST).is_file() or (source / UNFINISHED).is_file()):
        return STORE
    return chosen or sniff(source, columns)


def _destination_format(destination: Path, chosen: str | None) -> str:
    if chosen is not None:
        if chosen not in DESTINATIONS:
            raise ValueError(f"there is no format {chosen!r} to write; there are {', '.join(DESTINATIONS)}.")
        return chosen
    name = destination.with_suffix("") if destination.suffix in (".gz", ".zst") else destination
    if name.suffix not in SUFFIXES or (name is not destination and not name.suffix):
        known = ", ".join(suffix for suffix in SUFFIXES if suffix)
        raise ValueError(
            f"the name {destination.name!r} does not say what to write: use {known}, no suffix for a store, or "
            "destination_format=..."
        )
    return SUFFIXES[name.suffix]


def read_rows(
    reading: Reading, kind: str, columns: Mapping[str, str] | None = None, scores: ScoredLists | None = None
) -> Iterator[ScoredList]:
    """The rows of a file in one of :data:`SOURCES`; see :func:`convert`."""
    if kind == STORE:

        def parse(row: ScoredList, number: int) -> ScoredList:
            return reading.row(row.query_id, row.document_ids, row.scores, (), number)

        store = enumerate(ScoredLists.open(reading.path), start=1)
        return reading.parsed(parse, store)
    option = {"columns": columns, "scores": scores}.get(FORMATS[kind].option)
    return FORMATS[kind].read(reading) if option is None else FORMATS[kind].read(reading, option)


def _counted(
    rows: Iterator[ScoredList], reading: Reading, result: Conversion, span: ScoreRange
) -> Iterator[ScoredList]:
    """Count the rows, see where their scores lie, and reject a second one of the same query."""
    seen: set[Id] = set()
    for row in rows:
        if row.query_id in seen:
            reading.reject(row.line, f"query {row.query_id!r:.80} has a row already.")
            continue
        seen.add(row.query_id)
        result.queries += 1
        result.scores += len(row.scores)
        span.add(np.asarray(row.scores, dtype=np.float64))
        yield row
    if not result.queries:
        raise FormatError("there is no row of scores in it.", file=str(reading.path))


@contextmanager
def _scores_of(path: str | Path | None, destination: Path, id_type: IdType | None) -> Iterator[ScoredLists | None]:
    """The store beside a hard-negatives file; a pickle becomes one first, in a temporary folder."""
    if path is None or Path(path).is_dir():
        yield None if path is None else ScoredLists.open(path)
        return
    with scratch_folder(destination) as folder:
        convert(path, folder / STORE, id_type=id_type, destination_format=STORE)
        yield ScoredLists.open(folder / STORE)


def _manifest(given: Mapping[str, Any] | None, kind: str, source: Path, scale: str | None) -> dict[str, Any]:
    """What is known of the scores: given, from the manifest of the source, or from its format."""
    known: dict[str, Any] = {"source": {"file": source.name, "format": kind}}
    if scale is not None:
        known["scale"] = scale
    if kind == STORE and (source / MANIFEST).is_file():
        old = ScoredLists.open(source).manifest
        known = {name: old.get(name) for name in MANIFEST_FIELDS}
    return {**known, **(given or {})}


def _write_rows(rows: Iterator[ScoredList], writer: TeacherScoresWriter) -> int:
    """Write the rows and, as they pass, the positives that they name."""
    folder = writer.folder / "qrels"
    folder.mkdir()
    count = 0
    with (folder / "train.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["query-id", "corpus-id", "score"])
        for row in rows:
            writer.write(row.query_id, row.document_ids, row.scores)
            for document_id in row.positives:
                table.writerow([row.query_id, document_id, 1])
                count += 1
    if not count:
        (folder / "train.tsv").unlink()
        folder.rmdir()
    return count


def _with_positives(rows: Iterator[ScoredList], judged: Qrels | None, source: Path) -> Iterator[ScoredList]:
    """The rows with the positives that the judgements name; without judgements with their own."""
    pairs = False
    for row in rows:
        if judged is not None:  # read as strings, whatever the ids of the source are
            grades = judged.get(str(row.query_id), {})
            relevant = [document for document in row.document_ids if grades.get(str(document), 0) > 0]
            row = row._replace(positives=relevant)
        pairs = pairs or 0 < len(row.positives) < len(row.document_ids)
        yield row
    if not pairs:
        raise FormatError(
            "no query has a scored positive and a scored negative, so there is no pair to write. Name the "
            "positives (qrels=...).",
            file=str(source),
        )
