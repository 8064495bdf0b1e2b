"""Judgements and exclusions from files, with ids of the types that the queries and the corpus have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.reading import INTEGER, IdType, Reading
from st_m3se.scores.formats.trec import Qrels, read_qrels
from st_m3se.scores.rows import Id
from st_m3se.texts import Texts

__all__ = ["read_exclusions", "read_judgements"]


def read_judgements(path: str | Path, queries: Texts, corpus: Texts) -> Qrels:
    """Read TREC or BEIR qrels.

    Raises:
        FormatError: If a line is none, or an id cannot be one of the queries' or the corpus' type.
    """
    judged = read_qrels(path)
    if not judged:
        raise FormatError("the file has no judgement.", file=str(path))
    if queries.id_type == corpus.id_type == "str":
        return judged
    return {
        _typed(query, queries.id_type, path): {
            _typed(document, corpus.id_type, path): grade for document, grade in grades.items()
        }
        for query, grades in judged.items()
    }


def read_exclusions(paths: Sequence[str | Path], queries: Texts, corpus: Texts) -> tuple[dict[Id, set[Id]], list[Id]]:
    """Read what shall not be a candidate: the pairs of qrels files, and of files of one id a line the documents.

    Returns:
        Query id to the documents that are not for it; and the documents that are for no query.

    Raises:
        FormatError: If a line is neither, or an id cannot be one of the queries' or the corpus' type.
    """
    pairs: dict[Id, set[Id]] = {}
    documents: list[Id] = []
    for path in paths:
        reading = Reading(Path(path))
        first = next(reading.lines(), None)
        if first is None:
            raise FormatError("the file excludes nothing.", file=str(path))
        if len(first[1].split()) > 1:
            for query, grades in read_judgements(path, queries, corpus).items():
                pairs.setdefault(query, set()).update(grades)
            continue
        for number, line in reading.lines():
            if len(line.split()) != 1:
                raise FormatError(
                    "expected one document id, as on the first line; pairs of query and document go into a file of "
                    "their own, as qrels.",
                    file=str(path),
                    line=number,
                )
            documents.append(_typed(line.strip(), corpus.id_type, path))
    return pairs, documents


def _typed(value: Id, kind: IdType, path: str | Path) -> Id:
    if kind == "str":
        return value
    if isinstance(value, str) and INTEGER.fullmatch(value) and len(value) < 20 and str(int(value)) == value:
        return int(value)
    raise FormatError(
        f"the id {value!r:.80} is not an integer, as those of the texts are. Open the texts with str ids "
        '(id_type="str", --ids str).',
        file=str(path),
    )
