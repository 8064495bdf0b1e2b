"""Training pairs, tab-separated: MarginMSE by ids and by texts, and GPL's margins; and margins as records."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id
from st_m3se.core.reading import Reading, check_keys, text_id
from st_m3se.core.records import Record, records
from st_m3se.core.scored_list import ScoredList, check_score, is_score
from st_m3se.scores.formats.format import Format, Head, decimals, one_field, write_lines
from st_m3se.scores.formats.grouping import Pair, agree, group_pairs, grouped

__all__ = ["GPL", "MARGINMSE", "MARGINMSE_TEXT", "MARGINS", "string_ids"]

MARGIN_KEYS = ("query_id", "positive_id", "negative_id", "score")


def _read_marginmse(reading: Reading) -> Iterator[ScoredList]:
    """Read ``pos_score neg_score query_id positive_id negative_id``.

    Each query's pairs, wherever they stand, become one row: its positives first. Queries come in the order of their
    ids.
    """

    def parse(line: str, number: int) -> list[Pair]:
        first, second, query, positive, negative = _fields(line, 5)
        query_id = reading.query_id(query)
        return _two(query_id, reading.document_id(positive), reading.document_id(negative), first, second, number)

    return group_pairs(chain.from_iterable(reading.parsed(parse)), reading)


def _read_marginmse_text(reading: Reading) -> Iterator[ScoredList]:
    """Read ``pos_score neg_score query positive negative``, texts instead of ids.

    A text's id is :func:`~st_m3se.scores.text_id`; the texts go to ``reading.texts``.
    """

    def parse(line: str, number: int) -> list[Pair]:
        first, second, query, positive, negative = _fields(line, 5)
        query_id = reading.query_id(text_id(query))
        ids = [reading.document_id(text_id(text)) for text in (positive, negative)]
        pairs = _two(query_id, ids[0], ids[1], first, second, number)
        if reading.texts is not None:
            reading.texts.query(query_id, query)
            for document_id, text in zip(ids, (positive, negative), strict=True):
                reading.texts.document(document_id, text)
        return pairs

    string_ids(reading)
    return group_pairs(chain.from_iterable(reading.parsed(parse)), reading)


def string_ids(reading: Reading) -> None:
    """Refuse integer ids, for formats that have texts instead of ids."""
    if reading.id_type == "int":
        raise FormatError("this format has texts, whose ids are strings.", file=str(reading.path))


def _write_marginmse(rows: Iterable[ScoredList], path: str | Path, *, overwrite: bool = False) -> None:
    """Write ``pos_score neg_score query_id positive_id negative_id`` with tabs.

    Every positive is paired with every other document of the list. A query without either is left out.

    Raises:
        FormatError: On an id with a tab or line break.
    """

    def split(text: str) -> list[str]:
        return text.replace("\n", "\t").split("\t")

    def lines() -> Iterator[str]:
        for row in rows:
            scores = dict(zip(row.document_ids, decimals(row.scores), strict=True))
            relevant = set(row.positives)
            for positive in [document for document in scores if document in relevant]:
                for negative in [document for document in scores if document not in relevant]:
                    ids = "\t".join(one_field(value, split) for value in (row.query_id, positive, negative))
                    yield f"{scores[positive]}\t{scores[negative]}\t{ids}\n"

    write_lines(lines(), path, overwrite)


def _read_gpl(reading: Reading) -> Iterator[ScoredList]:
    """Read GPL's ``query_id positive_id negative_id margin``; see :func:`_margin_rows`."""
    return _margin_rows(reading.parsed(lambda line, number: _margin(reading, number, _fields(line, 4))), reading)


def _read_margins(reading: Reading) -> Iterator[ScoredList]:
    """Read ``query_id positive_id negative_id score``, the score being a margin; see :func:`_margin_rows`."""

    def parse(record: Record, number: int) -> Pair:
        check_keys(record, MARGIN_KEYS)
        return _margin(reading, number, [record[name] for name in MARGIN_KEYS])

    return _margin_rows(reading.parsed(parse, records(reading)), reading)


def _margin(reading: Reading, number: int, fields: Sequence[Any]) -> Pair:
    query, positive, negative, margin = fields
    query_id = reading.query_id(query)
    document_id, other = reading.document_id(positive), reading.document_id(negative)
    _check_two(document_id, other)
    return Pair(query_id, document_id, other, check_score(margin, "margin"), True, number)


def _margin_rows(pairs: Iterable[Pair], reading: Reading) -> Iterator[ScoredList]:
    """One row per query from pairs of a positive and a negative with ``score(positive) - score(negative)``.

    A row puts the query's first positive at 0 and each negative at minus its margin: every difference between two
    scores is the teacher's, and only differences mean anything. A further positive is placed through a negative that
    both have; one that shares none has no place on that scale and is rejected.
    """
    reading.scale = "margin"
    for group in grouped(pairs, reading):
        scores = _place(group, reading)
        named = dict.fromkeys(pair.document_id for pair in group if pair.document_id in scores)
        documents = [*named, *(document for document in scores if document not in named)]
        values = [scores[document] for document in documents]
        try:
            for value in values:
                check_score(value)  # a sum of margins may leave float32
        except FormatError as error:
            reading.reject(group[0].line, error)
            continue
        yield ScoredList(group[0].query_id, documents, values, tuple(named), group[0].line)


def _place(group: list[Pair], reading: Reading) -> dict[Id, float]:
    """The scores that the margins of one query imply, with its first positive at 0."""
    scores: dict[Id, float] = {group[0].document_id: 0.0}
    pairs_of: dict[Id | None, list[int]] = {}
    for place, pair in enumerate(group):
        pairs_of.setdefault(pair.document_id, []).append(place)
        pairs_of.setdefault(pair.other, []).append(place)
    bad: dict[int, str] = {}
    used = [False] * len(group)
    waiting = deque([group[0].document_id])
    while waiting:  # each pair once, as soon as one of its documents has a score
        for place in pairs_of[waiting.popleft()]:
            if used[place]:
                continue
            used[place] = True
            pair = group[place]
            assert pair.other is not None
            positive, negative = scores.get(pair.document_id), scores.get(pair.other)
            if positive is not None and negative is not None:
                if not agree(positive - negative, pair.score):
                    bad[place] = (
                        f"the margin {pair.score!r} of query {pair.query_id!r:.80}, positive {pair.document_id!r:.80} "
                        f"and negative {pair.other!r:.80} contradicts other lines, from which "
                        f"{positive - negative!r} follows."
                    )
            elif positive is not None:
                scores[pair.other] = positive - pair.score
                waiting.append(pair.other)
            elif negative is not None:
                scores[pair.document_id] = negative + pair.score
                waiting.append(pair.document_id)
    for place, pair in enumerate(group):
        if not used[place]:
            bad[place] = (
                f"positive {pair.document_id!r:.80} of query {pair.query_id!r:.80} shares no negative with the query's "
                "first positive, so that its margins cannot be put on one scale."
            )
    for place in sorted(bad):
        reading.reject(group[place].line, bad[place])
    order = dict.fromkeys(document for pair in group for document in (pair.document_id, pair.other))
    return {document: scores[document] for document in order if document is not None and document in scores}


def _fields(line: str, count: int) -> list[str]:
    fields = line.split("\t")
    if len(fields) != count:
        raise FormatError(f"expected {count} fields with tabs between them, got {len(fields)}.")
    return fields


def _check_two(positive: Id, negative: Id) -> None:
    if positive == negative:
        raise FormatError(f"document {positive!r:.80} is the positive and the negative.")


def _two(query_id: Id, positive: Id, negative: Id, first: str, second: str, line: int) -> list[Pair]:
    _check_two(positive, negative)
    return [
        Pair(query_id, positive, None, check_score(first, "the positive's score"), True, line),
        Pair(query_id, negative, None, check_score(second, "the negative's score"), False, line),
    ]


def _scored_pairs(head: Head, *, texts: bool) -> int:
    """The lines that begin with two scores, if the other fields are texts, or are none."""
    rows = [row for row in (line.split("\t") for line in head.lines) if len(row) == 5]
    rows = [row for row in rows if is_score(row[0]) and is_score(row[1])]
    return len(rows) if any(" " in field for row in rows for field in row[2:]) is texts else 0


def _margin_lines(head: Head) -> int:
    rows = [line.split("\t") for line in head.lines]
    return sum(len(row) == 4 and is_score(row[3]) for row in rows)


MARGINMSE = Format(
    "marginmse", _read_marginmse, partial(_scored_pairs, texts=False), suffixes=(".tsv",), write=_write_marginmse
)
MARGINMSE_TEXT = Format("marginmse-text", _read_marginmse_text, partial(_scored_pairs, texts=True))
GPL = Format("gpl", _read_gpl, _margin_lines, meaning="query, positive, negative, margin")
MARGINS = Format("margins", _read_margins, lambda head: 2 * head.has(*MARGIN_KEYS[:3]))
