"""Exclusions from files, with ids of the types that the queries and the corpus have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id
from st_m3se.core.reading import Reading
from st_m3se.core.records import is_table
from st_m3se.data.qrels import read_judgements, typed_id
from st_m3se.data.texts import Texts

__all__ = ["read_exclusions"]


def read_exclusions(paths: Sequence[str | Path], queries: Texts, corpus: Texts) -> tuple[dict[Id, set[Id]], list[Id]]:
    """Read what shall not be a candidate: the pairs of qrels files, and of files of one id a line the documents.

    Returns:
        Query id to the documents that are not for it; and the documents that are for no query.

    Raises:
        FormatError: If a line is neither, or an id cannot be one of the queries' or the corpus' type.
    """
    pairs: dict[Id, set[Id]] = {}
    documents: list[Id] = []
    for path in map(Path, paths):
        first = None
        if not is_table(path):
            first = next(Reading(path).lines(), None)
            if first is None:
                raise FormatError("the file excludes nothing.", file=str(path))
        if first is None or any(character in first[1].strip() for character in " \t,{"):
            judged, _ = read_judgements(path, query_ids=queries.id_type, document_ids=corpus.id_type)
            for query, grades in judged.items():
                pairs.setdefault(query, set()).update(grades)
            continue
        for number, line in Reading(path).lines():
            if len(line.split()) != 1:
                raise FormatError(
                    "expected one document id, as on the first line; pairs of query and document go into a file of "
                    "their own, as qrels.",
                    file=str(path),
                    line=number,
                )
            documents.append(typed_id(line.strip(), corpus.id_type, path))
    return pairs, documents
