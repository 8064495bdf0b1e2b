"""The layouts of other tools, whatever the file: jsonl, a JSON array, Parquet, or a folder of parts.

A layout is known by the names of its columns; README.md has the sets in which each was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short
from st_m3se.core.reading import Reading, check_keys, parse_json, parse_list, parse_object, parse_text, text_id
from st_m3se.core.records import Record, column_names, records
from st_m3se.core.scored_list import ScoredList, check_score
from st_m3se.scores.formats.format import Format, Head
from st_m3se.scores.formats.grouping import Pair, group_pairs
from st_m3se.scores.formats.pairs import string_ids
from st_m3se.scores.formats.tables import NEGATIVE, mined, unnamed
from st_m3se.scores.store import ScoredLists

__all__ = ["COLBERT", "FLAGEMBEDDING", "HARD_NEGATIVES", "RANKIFY", "RANK_LLM", "TEVATRON", "TUPLES"]


def _read_flagembedding(reading: Reading) -> Iterator[ScoredList]:
    """Read FlagEmbedding's ``query pos neg pos_scores neg_scores``, which has texts instead of ids.

    Likewise ``query pos_text negs_text pos_score negs_score``, with one positive. A text's id is
    :func:`~st_m3se.scores.text_id`; the texts go to ``reading.texts``. Several records with one query become one row.
    Queries come in the order of their ids.
    """

    def parse(record: Record, number: int) -> list[Pair]:
        names = ("pos", "neg", "pos_scores", "neg_scores")
        if "pos_text" in record:
            names = ("pos_text", "negs_text", "pos_score", "negs_score")
        check_keys(record, ("query", *names[:2]))
        if record.get(names[2]) is None or record.get(names[3]) is None:
            raise FormatError(f"there is no {names[2]} or no {names[3]}: the teacher has not scored this file.")
        documents, scores, flags = [], [], []
        for kind, scored, positive in ((names[0], names[2], True), (names[1], names[3], False)):
            single = kind == "pos_text"
            texts = [record[kind]] if single else parse_list(record[kind], kind)
            values = [record[scored]] if single else parse_list(record[scored], scored)
            if len(texts) != len(values):
                raise FormatError(f"{kind} has {len(texts)} documents and {len(values)} scores.")
            documents += [parse_text(text, f"an entry of {kind}") for text in texts]
            scores += values
            flags += [positive] * len(texts)
        return _text_pairs(reading, record["query"], documents, scores, flags, number)

    return _text_rows(reading, parse)


def _read_tuples(reading: Reading) -> Iterator[ScoredList]:
    """Read texts as ``mine_hard_negatives(output_scores=True)`` gives them, in each of its formats.

    ``query positive negative_1 ... negative_n scores``, of which ``negative`` alone is a triplet; ``query documents
    scores``, a labeled list; or ``query document score``, a labeled pair. The query and its positive or documents are
    the first two columns beside these, whatever they are called. ``scores`` has the positive's score first; pairs do
    not say which documents are positives.
    """
    names = column_names(reading.path)
    negatives = [name for name in names if NEGATIVE.fullmatch(name)]
    score = "score" if not negatives and "score" in names else "scores"
    others = [name for name in names if name not in (*negatives, score)]
    if len(others) != 2:
        raise FormatError(
            f"expected a query, a positive, {', '.join(negatives[:2])}, ... and scores, got {names!r:.200}: which are "
            "the query and the positive? Select the columns.",
            file=str(reading.path),
        )

    def parse(record: Record, number: int) -> list[Pair]:
        check_keys(record, (*others, *negatives, score))
        given = [record[name] for name in (others[1], *negatives)]
        if not negatives and score == "scores":
            given = parse_list(record[others[1]], others[1])
        texts = [parse_text(text, others[1]) for text in given]
        scores = [record[score]] if score == "score" else parse_list(record[score], score)
        if len(scores) != len(texts):
            raise FormatError(f"there are {len(texts)} documents and {len(scores)} scores.")
        flags = [score == "scores", *[False] * (len(texts) - 1)]
        return _text_pairs(reading, record[others[0]], texts, scores, flags, number)

    return _text_rows(reading, parse)


def _text_rows(reading: Reading, parse: Callable[[Record, int], list[Pair]]) -> Iterator[ScoredList]:
    string_ids(reading)
    return group_pairs(chain.from_iterable(reading.parsed(parse, records(reading))), reading)


def _text_pairs(
    reading: Reading, query: Any, texts: Sequence[str], scores: Sequence[Any], positives: Sequence[bool], number: int
) -> list[Pair]:
    query_id = reading.query_id(text_id(parse_text(query, "query")))
    ids = [reading.document_id(text_id(text)) for text in texts]
    pairs = [
        Pair(query_id, document, None, check_score(score), positive, number)
        for document, score, positive in zip(ids, scores, positives, strict=True)
    ]
    _keep(reading, query_id, query, ids, [(text, "") for text in texts])
    return pairs


def _read_tevatron(reading: Reading) -> Iterator[ScoredList]:
    """Read Tevatron's ``query_id query positive_passages negative_passages``, each passage with a ``score``.

    And what its annotation by a teacher writes: ``query_id query passages scores``, with the positive first, and
    texts without ids, which get theirs by :func:`~st_m3se.scores.text_id`.
    """

    def parse(record: Record, number: int) -> ScoredList:
        if "passages" in record:
            return annotated(record, number)
        check_keys(record, ("query_id", "positive_passages", "negative_passages"))
        passages: list[Any] = []
        for key in ("positive_passages", "negative_passages"):
            expected = f"an entry of {key} must be an object with a docid"
            passages += _objects(parse_list(record[key], key), expected, "docid")
        for passage in passages:
            if passage.get("score") is None:
                raise FormatError(f"document {short(passage['docid'])} has no score.")
        documents = [reading.document_id(passage["docid"]) for passage in passages]
        scores = [passage["score"] for passage in passages]
        relevant = documents[: len(record["positive_passages"])]
        return _texts_kept(
            reading, (record["query_id"], documents, scores, relevant, number), record.get("query"), passages
        )

    def annotated(record: Record, number: int) -> ScoredList:
        check_keys(record, ("query_id", "query", "passages", "scores"))
        passages = _objects(
            parse_list(record["passages"], "passages"), "an entry of passages must be an object with a text"
        )
        documents = [reading.document_id(text_id(f"{title} {text}".strip())) for text, title in map(_text, passages)]
        scores = parse_list(record["scores"], "scores")
        if len(scores) == len(documents):  # of a text that recurs the first counts
            places = sorted({document: place for place, document in reversed(list(enumerate(documents)))}.values())
            documents, scores = [documents[place] for place in places], [scores[place] for place in places]
            passages = [passages[place] for place in places]
        return _texts_kept(
            reading, (record["query_id"], documents, scores, documents[:1], number), record["query"], passages
        )

    return reading.parsed(parse, records(reading))


def _read_rank_llm(reading: Reading) -> Iterator[ScoredList]:
    """Read rank_llm's ``query {qid, text}, candidates [{docid, score, doc}]``."""

    def parse(record: Record, number: int) -> ScoredList:
        check_keys(record, ("query", "candidates"))
        (query,) = _objects([record["query"]], "the query must be an object with a qid", "qid")
        candidates = parse_list(record["candidates"], "candidates")
        candidates = _objects(candidates, "a candidate must be an object with a docid and a score", "docid", "score")
        documents = [reading.document_id(each["docid"]) for each in candidates]
        passages = [each["doc"] if isinstance(each.get("doc"), dict) else {} for each in candidates]
        row = (query["qid"], documents, [each["score"] for each in candidates], (), number)
        return _texts_kept(reading, row, query.get("text"), passages)

    return reading.parsed(parse, records(reading))


def _read_rankify(reading: Reading) -> Iterator[ScoredList]:
    """Read Rankify's ``question, ctxs [{id, score, text, title}]``, and DPR's, which is the same.

    The query's id is ``query_id``, or else that of its text. Of ``reranked_ctxs`` only the order is the re-ranker's:
    where they are given, each score is minus the rank.
    """

    def parse(record: Record, number: int) -> ScoredList:
        check_keys(record, ("question", "ctxs"))
        ranked = record.get("reranked_ctxs")
        contexts = parse_list(record["ctxs"] if ranked is None else ranked, "ctxs")
        contexts = _objects(contexts, "an entry of ctxs must be an object with an id and a score", "id")
        documents = [reading.document_id(each["id"]) for each in contexts]
        scores = [each.get("score") for each in contexts]
        if ranked is not None:
            reading.scale = "rank"
            scores = [-rank for rank in range(1, len(documents) + 1)]
        question = parse_text(record["question"], "question")
        row = (record.get("query_id", text_id(question)), documents, scores, (), number)
        return _texts_kept(reading, row, question, contexts)

    return reading.parsed(parse, records(reading))


def _objects(values: list[Any], expected: str, *keys: str) -> list[dict[str, Any]]:
    """The values, each of which must be an object with these keys."""
    for value in values:
        if not isinstance(value, dict) or not set(keys) <= value.keys():
            raise FormatError(f"{expected}, got {short(value)}.")
    return values


def _text(passage: Mapping[str, Any]) -> tuple[str, str]:
    """The text and the title of a passage, "" where there is none."""
    text = next((passage[name] for name in ("text", "contents", "segment", "body") if passage.get(name)), "")
    return parse_text(text, "text"), parse_text(passage.get("title") or "", "title")


def _texts_kept(
    reading: Reading, row: tuple[Any, list[Id], list[Any], Sequence[Id], int], query: Any, passages: list[Any]
) -> ScoredList:
    """The checked row; the texts of its query and passages are handed on."""
    checked = reading.row(*row)
    _keep(reading, checked.query_id, query, checked.document_ids, [_text(passage) for passage in passages])
    return checked


def _keep(
    reading: Reading, query_id: Id, query: Any, documents: Sequence[Id], texts: Sequence[tuple[str, str]]
) -> None:
    if reading.texts is None:
        return
    if query:
        reading.texts.query(query_id, parse_text(query, "query"))
    for document_id, (text, title) in zip(documents, texts, strict=True):
        if text or title:
            reading.texts.document(document_id, text, title)


def _read_colbert(reading: Reading) -> Iterator[ScoredList]:
    """Read ColBERTv2's n-way examples: ``[query_id, [document_id, score], [document_id, score], ...]``."""

    def parse(line: str, number: int) -> ScoredList:
        value = parse_list(parse_json(line), "a line")
        if not value or not _are_pairs(value[1:]):
            raise FormatError("expected [query_id, [document_id, score], ...].")
        return reading.row(value[0], [pair[0] for pair in value[1:]], [pair[1] for pair in value[1:]], (), number)

    return reading.parsed(parse)


def _are_pairs(values: list[Any]) -> bool:
    return all(isinstance(pair, list) and len(pair) == 2 for pair in values)


def _fits_colbert(head: Head) -> int:
    return int(isinstance(head.first, list) and len(head.first) > 1 and _are_pairs(head.first[1:]))


def _read_hard_negatives(reading: Reading, store: ScoredLists | None = None) -> Iterator[ScoredList]:
    """Read the ``qid pos neg`` of msmarco-hard-negatives, ``neg`` being lists by the system that found them.

    Entries are ids, whose scores ``store`` has, or objects with ``pid`` and ``ce-score``. A row has the positives, then
    each negative once; without a score for every one the line is rejected.
    """

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


def _fits_tuples(head: Head) -> int:
    return 0 if head.names is None else 2 * (mined(head.names) or unnamed(head.names))


TEVATRON = Format(
    "tevatron",
    _read_tevatron,
    lambda head: (
        2
        * (
            head.has("query_id", "positive_passages", "negative_passages")
            or head.has("query_id", "query", "passages", "scores")
        )
    ),
)
FLAGEMBEDDING = Format(
    "flagembedding",
    _read_flagembedding,
    lambda head: 2 * (head.has("query", "pos", "neg") or head.has("query", "pos_text", "negs_text")),
)
HARD_NEGATIVES = Format(
    "hard-negatives", _read_hard_negatives, lambda head: 2 * head.has("qid", "pos", "neg"), option="scores"
)
RANK_LLM = Format("rank-llm", _read_rank_llm, lambda head: 2 * head.has("query", "candidates"))
RANKIFY = Format("rankify", _read_rankify, lambda head: 2 * head.has("question", "ctxs"))
TUPLES = Format(
    "tuples",
    _read_tuples,
    _fits_tuples,
    meaning="texts",
    note="mine_hard_negatives gives a bi-encoder's scores, unless it was given a cross-encoder and a margin, "
    "min_score or max_score.",
)
COLBERT = Format("colbert", _read_colbert, _fits_colbert)
