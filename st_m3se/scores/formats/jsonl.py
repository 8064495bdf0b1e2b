"""One JSON value per line, with a layout of its own: ColBERTv2, and the hard negatives of sentence-transformers."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short
from st_m3se.core.reading import Reading, parse_json, parse_list, parse_object
from st_m3se.core.scored_list import ScoredList
from st_m3se.scores.store import ScoredLists

__all__ = ["decode_list", "read_colbert", "read_hard_negatives"]


LITERAL = 1 << 20  # characters; Python's syntax trees take some hundred times their memory


def decode_list(value: Any, name: str) -> list[Any]:
    """A list, or the text of one as JSON or as Python writes it."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except FormatError:
            if len(value) > LITERAL:
                raise FormatError(
                    f"{name} is a text of {len(value):,} characters that is no JSON. Lists as Python writes them are "
                    f"read up to {LITERAL:,} characters: write them as JSON, or as lists."
                ) from None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)
                    value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                raise FormatError(f"{name} is a text that holds no list: {value!r:.80}.") from None
    return parse_list(value, name)


def read_colbert(reading: Reading) -> Iterator[ScoredList]:
    """Read ColBERTv2's n-way examples: ``[query_id, [document_id, score], [document_id, score], ...]``."""

    def parse(line: str, number: int) -> ScoredList:
        value = parse_list(parse_json(line), "a line")
        if not value or not all(isinstance(pair, list) and len(pair) == 2 for pair in value[1:]):
            raise FormatError("expected [query_id, [document_id, score], ...].")
        return reading.row(value[0], [pair[0] for pair in value[1:]], [pair[1] for pair in value[1:]], (), number)

    return reading.parsed(parse)


def read_hard_negatives(reading: Reading, scores: ScoredLists | str | Path | None = None) -> Iterator[ScoredList]:
    """Read the ``qid pos neg`` of msmarco-hard-negatives, ``neg`` being lists by the system that found them.

    Args:
        reading: The file. Its entries are ids, or objects with ``pid`` and ``ce-score``.
        scores: Where the scores of plain ids are: a store, such as the one made from the score pickle.

    Yields:
        The positives, then each negative once. Without a score for every one the line is rejected.
    """
    store = ScoredLists.open(scores) if isinstance(scores, (str, Path)) else scores

    def parse(line: str, number: int) -> ScoredList:
        value = parse_object(line, ("qid", "pos", "neg"))
        entries: list[tuple[Any, bool]] = [(entry, True) for entry in parse_list(value["pos"], "pos")]
        systems = value["neg"] if isinstance(value["neg"], dict) else {"": value["neg"]}
        for name, negatives in systems.items():
            entries += [(entry, False) for entry in parse_list(negatives, f"neg {name!r:.80}".strip())]
        query_id = reading.query_id(value["qid"])
        known: dict[Id, float] | None = None
        found: dict[Id, Any] = {}
        positives: list[Id] = []
        for entry, positive in entries:
            score = None
            if isinstance(entry, dict):
                if "pid" not in entry:
                    raise FormatError(f"an entry must be an id or an object with a pid, got {short(entry)}.")
                entry, score = entry["pid"], entry.get("ce-score")
            document_id = reading.document_id(entry)
            if document_id in found:
                continue  # several systems find the same negative, and some of them a positive
            if score is None:
                if store is None:
                    raise FormatError(
                        f"document {document_id!r:.80} has no score: this format keeps them in a separate pickle. "
                        "Convert that to a store and name it (scores=...)."
                    )
                if known is None:
                    row = store[query_id] if query_id in store else ScoredList(query_id, (), ())
                    known = dict(zip(row.document_ids, row.scores, strict=True))
                if document_id not in known:
                    raise FormatError(f"query {query_id!r:.80} and document {document_id!r:.80} have no score.")
                score = known[document_id]
            found[document_id] = score
            if positive:
                positives.append(document_id)
        return reading.row(query_id, list(found), list(found.values()), positives, number)

    return reading.parsed(parse)
