"""Relevance judgements as BEIR reads them: where it is lenient the last judgement counts, and it is said so."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from st_m3se.evaluation.findings import Finding, found
from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.reading import INTEGER, Reading, parse_object
from st_m3se.scores.rows import short

__all__ = ["Judgements", "check_judgements", "read_judgements"]

Judgements = dict[str, dict[str, int]]

QUERY_COLUMNS = ("query-id", "query_id", "qid")
DOCUMENT_COLUMNS = ("corpus-id", "corpus_id", "doc_id", "docid", "document_id", "pid")
GRADE_COLUMNS = ("score", "relevance", "label", "grade")

Judgement = tuple[str, str, int]


def read_judgements(path: Path) -> tuple[Judgements, list[Finding]]:
    """Read qrels: BEIR's TSV, TREC's four columns, or the hub's Parquet (a file or a folder) or jsonl files.

    In Parquet and jsonl files a missing grade column means that all pairs are relevant, as in NanoBEIR, where a row
    may also name several documents.

    Returns:
        Query id to document id to grade in the order of the file, and what was unusual.

    Raises:
        FormatError: With ``file:line``, on a line that is no judgement, or if there is none.
    """
    findings: list[Finding] = []
    rows: Iterator[Judgement]
    if path.is_dir() or path.suffix == ".parquet":
        rows = (row for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path]) for row in _parquet(file))
    elif ".jsonl" in path.suffixes:
        rows = _jsonl(path)
    else:
        rows = _lines(path, findings)
    qrels: Judgements = {}
    twice: list[str] = []
    contradicted: list[str] = []
    for query, document, grade in rows:
        grades = qrels.setdefault(query, {})
        if (known := grades.get(document)) is not None:
            (twice if known == grade else contradicted).append(f"{query} {document}")
        grades[document] = grade
    if not qrels:
        raise FormatError("the file has no judgement.", file=str(path))
    findings += found("judgements that repeat", twice, "equal ones: each pair counts once")
    findings += found("contradictory judgements", contradicted, "the last one in the file counts, as in BEIR")
    return qrels, findings


def check_judgements(qrels: Mapping[Any, Mapping[Any, Any]]) -> Judgements:
    """A copy of judgements that were given as a mapping, with ids as text.

    Raises:
        FormatError: If a grade is not an integer, or two ids become one.
    """
    copy: Judgements = {}
    for query, grades in qrels.items():
        judged = {str(document): _grade(grade) for document, grade in grades.items()}
        if str(query) in copy or len(judged) < len(grades):
            raise FormatError(f"ids of the judgements of query {query!r:.80} stand twice, as text and as number.")
        copy[str(query)] = judged
    if not any(copy.values()):
        raise FormatError("there is no judgement.")
    return copy


def _lines(path: Path, findings: list[Finding]) -> Iterator[Judgement]:
    reading = Reading(path)
    layout: int | None = None

    def parse(line: str, number: int) -> Judgement | None:
        nonlocal layout
        fields = line.split("\t")
        if layout is None:
            layout = 3 if len(fields) == 3 else 4
            if layout == 3 and not INTEGER.fullmatch(fields[2].strip()):
                return None  # the header
            if layout == 3:
                effect = "the first line is a judgement and counts; BEIR's loader would take it for the header"
                findings.extend(found("judgements without a header", [path.name], effect))
        if layout == 4:
            fields = line.split()
            del fields[1:2]
        elif '"' in line:
            fields = next(csv.reader([line], delimiter="\t"))
        if len(fields) != 3:
            raise FormatError(
                "expected `query-id<TAB>corpus-id<TAB>score` or `query 0 document relevance`"
                + (", as on the first line" if number > 1 else "")
                + f", got {line!r:.100}."
            )
        query, document = str(reading.query_id(fields[0])), str(reading.document_id(fields[1]))
        return query, document, _grade(fields[2].strip())

    return (row for row in reading.parsed(parse) if row is not None)


def _jsonl(path: Path) -> Iterator[Judgement]:
    def parse(line: str, number: int) -> list[Judgement]:
        record = parse_object(line, ())
        return _judgements(*(record[name] if name else 1 for name in _columns(record)))

    return (row for rows in Reading(path).parsed(parse) for row in rows)


def _parquet(file: Path) -> Iterator[Judgement]:
    number = 0
    try:
        source = pq.ParquetFile(file)
        names = _columns(source.schema_arrow.names)
        for batch in source.iter_batches(16_384, columns=[name for name in names if name], use_threads=False):
            columns = [batch.column(name).to_pylist() if name else [1] * len(batch) for name in names]
            for values in zip(*columns, strict=True):
                number += 1
                yield from _judgements(*values)
    except FormatError as error:
        raise FormatError(error.message, file=str(file), line=number or None) from None
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"this is not a Parquet file that can be read: {error}", file=str(file)) from error


def _columns(names: Iterable[str]) -> tuple[str, str, str]:
    """The names of query, document and grade; "" where there is no grade."""
    given = list(names)

    def choose(known: tuple[str, ...]) -> str:
        return next((name for name in known if name in given), "")

    query, document = choose(QUERY_COLUMNS), choose(DOCUMENT_COLUMNS)
    if not query or not document:
        raise FormatError(f"expected query-id, corpus-id and, unless all are relevant, score; got {given!r:.200}.")
    return query, document, choose(GRADE_COLUMNS)


def _judgements(query: Any, documents: Any, grade: Any) -> list[Judgement]:
    checked = _grade(grade)
    return [
        (_text(query, "query"), _text(document, "document"), checked)
        for document in (documents if isinstance(documents, list) else [documents])
    ]


def _text(value: Any, name: str) -> str:
    if type(value) not in (str, int) or value == "":
        raise FormatError(f"the {name} id must be a text or an integer, got {short(value)}.")
    return str(value)


def _grade(value: Any) -> int:
    if isinstance(value, str) and INTEGER.fullmatch(value) and len(value) < 10:
        return int(value)
    if not isinstance(value, (str, bool)) and hasattr(value, "__int__") and int(value) == value:
        return int(value)  # also 1.0, as Parquet files have it, and NumPy's
    raise FormatError(f"the relevance must be an integer, got {short(value)}.")
