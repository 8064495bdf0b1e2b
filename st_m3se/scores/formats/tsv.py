"""Tab-separated training pairs: MarginMSE by ids and by texts, and GPL's margins."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id
from st_m3se.core.reading import Reading, text_id
from st_m3se.core.scored_list import ScoredList, check_score
from st_m3se.scores.formats.grouping import Grouper, Pair, agree, group_pairs

__all__ = ["group_margins", "read_gpl", "read_marginmse", "read_marginmse_text"]

Parse = Callable[[str, int], list[Pair]]


def read_marginmse(reading: Reading) -> Iterator[ScoredList]:
    """Read ``pos_score neg_score query_id positive_id negative_id``.

    Each query's pairs, wherever they stand, become one row: its positives first. Queries come in the order of their
    ids.
    """

    def parse(line: str, number: int) -> list[Pair]:
        first, second, query, positive, negative = _fields(line, 5)
        query_id = reading.query_id(query)
        return _two(query_id, reading.document_id(positive), reading.document_id(negative), first, second, number)

    return group_pairs(_pairs(reading, parse), reading)


def read_marginmse_text(reading: Reading) -> Iterator[ScoredList]:
    """Read ``pos_score neg_score query positive negative``, texts instead of ids.

    A text's id is :func:`~st_m3se.scores.formats.text_id`; the texts go to ``reading.texts``.
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

    if reading.id_type == "int":
        raise FormatError("this format has texts, whose ids are strings.", file=str(reading.path))
    return group_pairs(_pairs(reading, parse), reading)


def read_gpl(reading: Reading) -> Iterator[ScoredList]:
    """Read GPL's ``query_id positive_id negative_id margin``.

    The file has margins ``score(positive) - score(negative)`` and no scores. A row puts the query's first positive
    at 0 and each negative at minus its margin: every difference between two scores is the teacher's, and only
    differences mean anything. A further positive is placed through a negative that both have; one that shares none
    has no place on that scale and is rejected.
    """

    def parse(line: str, number: int) -> list[Pair]:
        query, positive, negative, margin = _fields(line, 4)
        query_id = reading.query_id(query)
        document_id, other = reading.document_id(positive), reading.document_id(negative)
        if document_id == other:
            raise FormatError(f"document {other!r:.80} is the positive and the negative.")
        return [Pair(query_id, document_id, other, check_score(margin, "margin"), True, number)]

    return group_margins(_pairs(reading, parse), reading)


def group_margins(pairs: Iterator[Pair], reading: Reading) -> Iterator[ScoredList]:
    """One row per query from pairs of a positive and a negative with their margin; see :func:`read_gpl`."""
    reading.scale = "margin"
    with closing(Grouper(reading)) as grouper:
        for pair in pairs:
            grouper.add(pair)
        for group in grouper:
            scores = _place(group, reading)
            named = dict.fromkeys(pair.document_id for pair in group if pair.document_id in scores)
            documents = [*named, *(document for document in scores if document not in named)]
            positives = tuple(named)
            values = [scores[document] for document in documents]
            try:
                for value in values:
                    check_score(value)  # a sum of margins may leave float32
            except FormatError as error:
                reading.reject(group[0].line, error)
                continue
            yield ScoredList(group[0].query_id, documents, values, positives, group[0].line)


def _place(group: list[Pair], reading: Reading) -> dict[Id, float]:
    """The scores that the margins of one query imply, with its first positive at 0."""
    scores: dict[Id, float] = {group[0].document_id: 0.0}
    pairs_of: dict[Id, list[int]] = {}
    for place, pair in enumerate(group):
        assert pair.other is not None
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


def _two(query_id: Id, positive: Id, negative: Id, first: str, second: str, line: int) -> list[Pair]:
    if positive == negative:
        raise FormatError(f"document {positive!r:.80} is the positive and the negative.")
    return [
        Pair(query_id, positive, None, check_score(first, "the positive's score"), True, line),
        Pair(query_id, negative, None, check_score(second, "the negative's score"), False, line),
    ]


def _pairs(reading: Reading, parse: Parse) -> Iterator[Pair]:
    return chain.from_iterable(reading.parsed(parse))
