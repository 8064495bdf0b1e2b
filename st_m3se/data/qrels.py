"""Relevance judgements (qrels): the one reader, and what is the same wherever they are used.

Where files are unusual the reader does what BEIR's loader and trec_eval do, and says so: see :func:`read_judgements`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.findings import Finding, found, report
from st_m3se.core.ids import Id, short
from st_m3se.core.reading import INTEGER, WHOLE, IdType, Reading
from st_m3se.core.records import Record, column_names, is_table, parts_of, records

__all__ = ["Judgements", "Qrels", "check_judgements", "is_own_document", "read_judgements", "read_qrels", "typed_id"]

Qrels = dict[Id, dict[Id, int]]
Judgements = dict[str, dict[str, int]]
"""The same with all ids as text, as in evaluation."""

QUERY_COLUMNS = ("query-id", "query_id", "qid", "queryid", "topic", "topic_id")
DOCUMENT_COLUMNS = (
    *("corpus-id", "corpus_id", "doc_id", "docid", "docno", "document_id", "document-id", "pid", "passage_id"),
)
GRADE_COLUMNS = ("score", "relevance", "label", "grade", "rel", "judgement", "judgment")

COLUMNS = (QUERY_COLUMNS, DOCUMENT_COLUMNS, GRADE_COLUMNS)
Judgement = tuple[Id, Id, int]


def read_judgements(
    path: str | Path, *, query_ids: IdType = "str", document_ids: IdType = "str"
) -> tuple[Qrels, list[Finding]]:
    """Read qrels, whatever the file is called: plain, gz or zst text, or Parquet.

    - BEIR: ``query-id<TAB>corpus-id<TAB>score``, with tabs or commas, quoted as CSV is, with or without a header. A
      header may name the columns otherwise, and in another order.
    - TREC: ``query 0 document relevance``, with tabs or blanks.
    - jsonl and Parquet (a file, or a folder of them): columns of these names. Without a grade all pairs are relevant,
      as in NanoBEIR, where a row may also name several documents.

    A grade is an integer; above 0 is relevant. Of a pair that is judged twice the last one counts, which is a finding.

    Args:
        path: The file, or a folder of Parquet files.
        query_ids: The type that the query ids shall have: that of the queries, or the store, that they belong to.
        document_ids: The same of the document ids.

    Returns:
        Query id to document id to grade in the order of the file, and what was unusual.

    Raises:
        FormatError: With ``file:line``, on a line that is no judgement or an id that cannot be of its type; or if there
            is no judgement.
    """
    path = Path(path)
    findings: list[Finding] = []
    first = "{" if is_table(path) else next(Reading(path, on_error="skip").lines(), (0, ""))[1]
    if first.lstrip().startswith("{"):
        rows: Iterator[list[Judgement]] = chain.from_iterable(map(_records, parts_of(path)))
    else:
        rows = _fields(Reading(path, id_type="str"), first, findings)
    qrels: Qrels = {}
    twice: list[str] = []
    contradicted: list[str] = []
    for query, document, grade in chain.from_iterable(rows):
        grades = qrels.setdefault(typed_id(query, query_ids, path), {})
        document = typed_id(document, document_ids, path)
        if (known := grades.get(document)) is not None:
            (twice if known == grade else contradicted).append(f"{query} {document}")
        grades[document] = grade
    if not qrels:
        raise FormatError("the file has no judgement.", file=str(path))
    findings += found("judgements that repeat", twice, "equal ones: each pair counts once")
    findings += found("contradictory judgements", contradicted, "the last one in the file counts, as in BEIR")
    return qrels, findings


def read_qrels(path: str | Path, *, id_type: IdType = "str", document_id_type: IdType | None = None) -> Qrels:
    """The judgements of :func:`read_judgements`; what is unusual is a warning.

    Args:
        path: The file.
        id_type: The type of the ids: that of the store or of the texts, "str" or "int".
        document_id_type: That of the document ids, if it is another one.
    """
    qrels, findings = read_judgements(path, query_ids=id_type, document_ids=document_id_type or id_type)
    report(str(path), findings)
    return qrels


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


def is_own_document(query: object, document: object, judged: Container[object] = ()) -> bool:
    """Whether ``exclude_same_id`` leaves a document out of a query's list: the one rule, wherever there is the option.

    BEIR leaves out the document with the query's own id (7 and "7" are the same here): in ArguAna and Quora queries are
    documents too, and each would find itself first. Where a set numbers questions and answers alike, that would take
    the answer away: a document in ``judged``, with whatever grade, is never left out.
    """
    return str(document) == str(query) and document not in judged


def typed_id(value: Id, kind: IdType, path: str | Path) -> Id:
    """An id of a file as the type that the texts or scores have, so that it can be found there.

    Raises:
        FormatError: If it cannot be that type and come back as the same text.
    """
    if kind == "str":
        return str(value)
    if isinstance(value, int):
        return value
    if INTEGER.fullmatch(value) and len(value) < 20 and str(int(value)) == value:
        return int(value)
    raise FormatError(
        f"the id {value!r:.80} is not an integer in its plain form, and the ids that it belongs to are integers: it "
        'would match none. Open those with str ids (id_type="str", --ids str).',
        file=str(path),
    )


def _records(file: Path) -> Iterator[list[Judgement]]:
    reading, used = Reading(file, id_type="str"), None
    if is_table(file):
        with errors_in(file):
            used = [name for name in _columns(column_names(file)) if name]

    def parse(record: Record, number: int) -> list[Judgement]:
        return _judgements(reading, *(record[name] if name else 1 for name in _columns(record)))

    return reading.parsed(parse, records(reading, used))


def _fields(reading: Reading, first: str, findings: list[Finding]) -> Iterator[list[Judgement]]:
    """The lines of a text whose first line this is."""
    blanks = first.split()
    split: Callable[[str], list[str]] = str.split
    if "\t" in first and len(_split(first, "\t")) in (3, 4):
        split = partial(_split, delimiter="\t")
    elif "," in first and len(blanks) not in (3, 4):
        split = partial(_split, delimiter=",")
    fields = split(first)
    count = len(fields)
    places: tuple[int, ...] = (0, 1, 2) if count == 3 else (0, 2, 3)
    header = count in (3, 4) and not _is_number(fields[-1])
    if header:
        names = [field.strip().strip('"').lower() for field in fields]
        named = [next((name for name in known if name in names), "") for known in COLUMNS]
        if all(named):
            places = tuple(map(names.index, named))
        elif count == 4:
            header = False  # TREC's files have none: the line is damaged, and the parser says how
        else:
            effect = "it names no column that is known: they are taken for query, document and grade, as in BEIR"
            findings += found("an unknown header", [first], effect)
    elif count == 3:
        effect = "the first line is a judgement and counts; BEIR's loader would take it for the header"
        findings += found("judgements without a header", [reading.path.name], effect)

    def parse(line: str, number: int) -> list[Judgement]:
        nonlocal header
        if header:
            header = False
            return []
        fields = split(line)
        if count == 4 != len(fields):
            fields = line.split()  # of TREC's files some mix tabs and blanks
        if len(fields) != count or count not in (3, 4):
            raise FormatError(
                "expected `query-id<TAB>corpus-id<TAB>score` or `query 0 document relevance`"
                + (", as on the first line" if number > 1 else "")
                + f", got {line!r:.100}."
            )
        return _judgements(reading, *(fields[place] for place in places))

    return reading.parsed(parse)


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == "\t" and '"' not in line:
        return line.split("\t")
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise FormatError(f"this is not quoted as CSV is ({error}): {line!r:.100}.") from None


def _columns(names: Iterable[str]) -> tuple[str, str, str]:
    """The names of query, document and grade; "" where there is no grade."""
    given = list(names)
    query, document, grade = (next((name for name in known if name in given), "") for known in COLUMNS)
    if not query or not document:
        raise FormatError(f"expected query-id, corpus-id and, unless all are relevant, score; got {given!r:.200}.")
    return query, document, grade


def _judgements(reading: Reading, query: Any, documents: Any, grade: Any) -> list[Judgement]:
    checked = _grade(grade)
    return [
        (reading.query_id(query), reading.document_id(document), checked)
        for document in (documents if isinstance(documents, list) else [documents])
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _grade(value: Any) -> int:
    if isinstance(value, str):
        text = value.strip()
        if WHOLE.fullmatch(text) and len(text) < 12:
            return int(float(text))
    elif not isinstance(value, bool) and hasattr(value, "__int__"):
        number = float(value)
        if math.isfinite(number) and number == int(number) and abs(number) < 1e9:
            return int(number)  # also 1.0, as Parquet files have it, and NumPy's
    raise FormatError(
        f"the relevance must be an integer, got {short(value)}. trec_eval would cut a fraction to one: scale the "
        "grades, for example by 10, or take a threshold."
    )
