"""Queries, documents and judgements that belong together, and what is unusual about them.

Evaluation, candidates, teacher scoring and training go on with what is unusual in the same way, which is that of BEIR's
loader and trec_eval, and say so; ``strict`` refuses it everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.findings import EXAMPLES, Finding, found
from st_m3se.core.ids import Id
from st_m3se.core.reading import IdType
from st_m3se.data.texts import Texts

__all__ = ["absent_documents", "absent_queries", "open_texts", "text_findings"]


def open_texts(
    source: Any, name: str, *, id_type: IdType | None = None, cache_dir: str | Path | None = None
) -> tuple[Texts, list[Finding]]:
    """Open texts, and what is unusual about them; of an id that repeats in a file the last text counts.

    Args:
        source: Whatever :meth:`~st_m3se.data.texts.Texts.open` takes. Of Texts, which are open, nothing is said again.
        name: "corpus" or "queries".
        id_type: See :meth:`~st_m3se.data.texts.Texts.open`.
        cache_dir: Likewise.
    """
    texts = Texts.open(source, name, id_type=id_type, duplicates="last", cache_dir=cache_dir)
    return texts, [] if isinstance(source, Texts) else text_findings(texts)


def text_findings(texts: Texts, among: Collection[Id] | None = None) -> list[Finding]:
    """Ids that repeat, and texts that are empty; ``among`` only these ids."""
    what = "queries" if texts.name == "queries" else "documents"
    effect = "searched as the empty text" if what == "queries" else "indexed as the empty text"
    repeated = [text_id for text_id in texts.repeated if among is None or text_id in among]
    rows = texts.blank().tolist()
    blank = (texts.ids[row].as_py() for row in rows)
    named = [text_id for text_id in blank if text_id in among] if among is not None else []
    count = len(rows) if among is None else len(named)
    named = named or [texts.ids[row].as_py() for row in rows[:EXAMPLES]]
    return [
        *found(f"{what} whose id repeats", repeated, "the last text counts, as in BEIR"),
        *(
            finding._replace(count=count)
            for finding in found(f"empty {what}", named if count else [], f"kept, as in BEIR: {effect}")
        ),
    ]


def absent_queries(judged: Mapping[Any, Any], queries: Texts) -> list[Id]:
    """The judged queries that have no text.

    Raises:
        FormatError: If none has one.
    """
    there = queries.find(list(judged)) >= 0
    absent = [query for query, known in zip(judged, there.tolist(), strict=True) if not known]
    if len(absent) == len(judged):
        example = next(iter(judged), None)
        raise FormatError(
            f"none of the {len(judged)} judged queries, such as {example!r:.80}, is among {queries!r}, "
            f"such as {next(iter(queries), None)!r:.80}: queries and judgements belong to different sets."
        )
    return absent


def absent_documents(judged: Mapping[Any, Mapping[Any, int]], corpus: Texts, effect: str) -> list[Finding]:
    """What is to be said of judged documents that the corpus does not have.

    Args:
        judged: Query id to document id to grade.
        corpus: The documents.
        effect: What becomes of them, after "N of them are relevant: ".
    """
    pairs = [(query, document, grade) for query, grades in judged.items() for document, grade in grades.items()]
    missing = [pairs[place] for place in (corpus.find([pair[1] for pair in pairs]) < 0).nonzero()[0].tolist()]
    relevant = sum(grade > 0 for _, _, grade in missing)
    return found(
        "judgements of absent documents",
        [f"{query} {document}" for query, document, _ in missing],
        f"{relevant} of them are relevant: {effect}",
    )
