"""The layouts in which scores are published, whatever the file: jsonl, a JSON array, Parquet, or a folder of parts.

A layout is known by the names of its columns; README.md has the sets in which each was seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import Id, short
from st_m3se.core.reading import Reading, parse_list, parse_text, text_id
from st_m3se.core.scored_list import ScoredList, check_score
from st_m3se.scores.formats.grouping import Pair, group_pairs
from st_m3se.scores.formats.jsonl import decode_list
from st_m3se.scores.formats.records import Record, column_names, is_table, parsed_records, records
from st_m3se.scores.formats.tables import ALIASES, find_columns
from st_m3se.scores.formats.tsv import group_margins

__all__ = [
    "LAYOUTS",
    "layouts_of",
    "read_flagembedding",
    "read_margins",
    "read_rank_llm",
    "read_rankify",
    "read_table",
    "read_tevatron",
    "read_tuples",
    "table_columns",
]

NEGATIVE = re.compile(r"negative(_[0-9]+)?")
LAYOUTS: dict[str, tuple[frozenset[str], ...]] = {
    "tevatron": (
        frozenset({"query_id", "positive_passages", "negative_passages"}),
        frozenset({"query_id", "query", "passages", "scores"}),
    ),
    "flagembedding": (frozenset({"query", "pos", "neg"}), frozenset({"query", "pos_text", "negs_text"})),
    "hard-negatives": (frozenset({"qid", "pos", "neg"}),),
    "margins": (frozenset({"query_id", "positive_id", "negative_id"}),),
    "rank-llm": (frozenset({"query", "candidates"}),),
    "rankify": (frozenset({"question", "ctxs"}),),
}
"""The columns of which each layout has one set or another."""
IDS = frozenset(name for kind in ("query_id", "document_id", "document_ids") for name in ALIASES[kind])
TEXTS = frozenset({"anchor", "query", "question"})
"""What the column of a query's text is called, by which texts are told from ids."""


def layouts_of(names: Sequence[str]) -> list[str]:
    """The layouts that columns of these names could be, tables of ids and scores ("parquet") apart."""
    given = set(names)
    found = [name for name, sets in LAYOUTS.items() if any(needed <= given for needed in sets)]
    if "scores" in given and any(NEGATIVE.fullmatch(name) for name in names):
        found.append("tuples")
    elif len(given) == 3 and given & {"score", "scores"} and not given & IDS:
        found += ["tuples"] if given & TEXTS else ["parquet", "tuples"]  # ids, or texts, under names of the user's own
    return found


def read_table(reading: Reading, columns: Mapping[str, str] | None = None) -> Iterator[ScoredList]:
    """Read a table of lists (``query_id document_ids scores``) or of pairs (``query_id document_id score``).

    Lists may be encoded as texts. Without a column of scores the order of the lists is all there is: each score is
    minus the rank. A column ``positive_ids`` names the relevant documents. Where several rows have one query, they
    become one list, and queries come in the order of their ids.
    """
    names = column_names(reading.path)
    try:
        found = table_columns(names, columns, str(reading.path))
    except FormatError:
        if columns or is_table(reading.path):
            raise
        found = ("query_id", "document_ids", "scores", None)  # what the first object lacks is told as the others' lacks
    query, documents, score, positives = found
    used = [name for name in found if name is not None]
    example = next((record for _, record in records(_quiet(reading), used)), {})
    named = documents in ALIASES["document_ids"] or documents == (columns or {}).get("document_ids")
    if not named and not _is_list(example.get(documents)):
        if score is None:
            raise FormatError(f"pairs need a score, and the columns are {names!r:.200}.", file=str(reading.path))

        def pair(record: Record, number: int) -> Pair:
            _need(record, (query, documents, score))
            ids = reading.query_id(record[query]), reading.document_id(record[documents])
            return Pair(*ids, None, check_score(record[score]), False, number)

        yield from group_pairs(parsed_records(reading, pair, used), reading)
        return

    def row(record: Record, number: int) -> ScoredList:
        _need(record, (query, documents, *([] if score is None else [score])))
        ids = decode_list(record[documents], documents)
        scores = [-rank for rank in range(1, len(ids) + 1)] if score is None else decode_list(record[score], score)
        relevant: list[Id] = []
        if positives is not None and record.get(positives) is not None:
            relevant = [reading.document_id(value) for value in decode_list(record[positives], positives)]
        return reading.row(record[query], ids, scores, relevant, number)

    if score is None:
        reading.scale = "rank"
    if _repeats(reading, query):
        yield from _grouped(parsed_records(reading, row, used), reading)
    else:
        yield from parsed_records(reading, row, used)


def read_margins(reading: Reading) -> Iterator[ScoredList]:
    """Read ``query_id positive_id negative_id score``, the score being a margin; see :func:`read_gpl`."""

    def parse(record: Record, number: int) -> Pair:
        missing = [name for name in ("query_id", "positive_id", "negative_id", "score") if name not in record]
        if missing:
            raise FormatError(f"the record lacks {missing}; it has {list(record)!r:.200}.")
        positive, negative = (reading.document_id(record[name]) for name in ("positive_id", "negative_id"))
        if positive == negative:
            raise FormatError(f"document {negative!r:.80} is the positive and the negative.")
        margin = check_score(record["score"], "margin")
        return Pair(reading.query_id(record["query_id"]), positive, negative, margin, True, number)

    return group_margins(parsed_records(reading, parse), reading)


def read_flagembedding(reading: Reading) -> Iterator[ScoredList]:
    """Read FlagEmbedding's ``query pos neg pos_scores neg_scores``, which has texts instead of ids.

    Likewise ``query pos_text negs_text pos_score negs_score``, with one positive. A text's id is
    :func:`~st_m3se.scores.formats.text_id`; the texts go to ``reading.texts``. Several records with one query become
    one row. Queries come in the order of their ids.
    """

    def parse(record: Record, number: int) -> list[Pair]:
        names = ("pos", "neg", "pos_scores", "neg_scores")
        if "pos_text" in record:
            names = ("pos_text", "negs_text", "pos_score", "negs_score")
        _need(record, ("query", *names[:2]))
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
        return _text_pairs(reading, parse_text(record["query"], "query"), documents, scores, flags, number)

    return _grouped_texts(reading, parse)


def read_tuples(reading: Reading) -> Iterator[ScoredList]:
    """Read texts as ``mine_hard_negatives(output_scores=True)`` gives them, in each of its formats.

    ``query positive negative_1 ... negative_n scores``, of which ``negative`` alone is a triplet; ``query documents
    scores``, a labeled list; or ``query document score``, a labeled pair. The query and its positive or documents are
    the first two columns beside these, whatever they are called. ``scores`` has the positive's score first; pairs do
    not say which documents are positives. The scores are a bi-encoder's unless the mining had a cross-encoder.
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
        _need(record, (*others, *negatives, score))
        given = [record[name] for name in (others[1], *negatives)]
        if not negatives and score == "scores":
            given = parse_list(record[others[1]], others[1])
        texts = [parse_text(text, others[1]) for text in given]
        scores = [record[score]] if score == "score" else parse_list(record[score], score)
        if len(scores) != len(texts):
            raise FormatError(f"there are {len(texts)} documents and {len(scores)} scores.")
        flags = [score == "scores", *[False] * (len(texts) - 1)]
        return _text_pairs(reading, parse_text(record[others[0]], others[0]), texts, scores, flags, number)

    return _grouped_texts(reading, parse)


def read_tevatron(reading: Reading) -> Iterator[ScoredList]:
    """Read Tevatron's ``query_id query positive_passages negative_passages``, each passage with a ``score``.

    And what its annotation by a teacher writes: ``query_id query passages scores``, with the positive first, and
    texts without ids, which get theirs by :func:`~st_m3se.scores.formats.text_id`.
    """

    def parse(record: Record, number: int) -> ScoredList:
        if "passages" in record:
            return _annotated(record, number)
        _need(record, ("query_id", "positive_passages", "negative_passages"))
        documents: list[Id] = []
        scores: list[Any] = []
        texts: list[tuple[str, str]] = []
        for key in ("positive_passages", "negative_passages"):
            for passage in parse_list(record[key], key):
                if not isinstance(passage, dict) or "docid" not in passage:
                    raise FormatError(f"an entry of {key} must be an object with a docid, got {short(passage)}.")
                if passage.get("score") is None:
                    raise FormatError(f"document {short(passage['docid'])} has no score.")
                documents.append(reading.document_id(passage["docid"]))
                scores.append(passage["score"])
                texts.append(_passage(passage))
        relevant = documents[: len(record["positive_passages"])]
        row = reading.row(record["query_id"], documents, scores, relevant, number)
        _keep(reading, row.query_id, record.get("query"), documents, texts)
        return row

    def _annotated(record: Record, number: int) -> ScoredList:
        _need(record, ("query_id", "query", "passages", "scores"))
        passages = parse_list(record["passages"], "passages")
        if not all(isinstance(passage, dict) for passage in passages):
            raise FormatError("an entry of passages must be an object with a text.")
        texts = [_passage(passage) for passage in passages]
        documents = [reading.document_id(text_id(f"{title} {text}".strip())) for text, title in texts]
        scores = parse_list(record["scores"], "scores")
        kept = {document: place for place, document in reversed(list(enumerate(documents)))}  # a text that recurs
        if len(scores) == len(documents):
            places = sorted(kept.values())
            documents, texts = [documents[place] for place in places], [texts[place] for place in places]
            scores = [scores[place] for place in places]
        row = reading.row(record["query_id"], documents, scores, documents[:1], number)
        _keep(reading, row.query_id, record.get("query"), documents, texts)
        return row

    return parsed_records(reading, parse)


def read_rank_llm(reading: Reading) -> Iterator[ScoredList]:
    """Read rank_llm's ``query {qid, text}, candidates [{docid, score, doc}]``."""

    def parse(record: Record, number: int) -> ScoredList:
        _need(record, ("query", "candidates"))
        query, candidates = record["query"], parse_list(record["candidates"], "candidates")
        if not isinstance(query, dict) or "qid" not in query:
            raise FormatError(f"the query must be an object with a qid, got {short(query)}.")
        if not all(isinstance(each, dict) and {"docid", "score"} <= each.keys() for each in candidates):
            raise FormatError("a candidate must be an object with a docid and a score.")
        documents = [reading.document_id(each["docid"]) for each in candidates]
        row = reading.row(query["qid"], documents, [each["score"] for each in candidates], (), number)
        texts = [_passage(each["doc"] if isinstance(each.get("doc"), dict) else {}) for each in candidates]
        _keep(reading, row.query_id, query.get("text"), documents, texts)
        return row

    return parsed_records(reading, parse)


def read_rankify(reading: Reading) -> Iterator[ScoredList]:
    """Read Rankify's ``question, ctxs [{id, score, text, title}]``, and DPR's, which is the same.

    The query's id is ``query_id``, or else that of its text. Of ``reranked_ctxs`` only the order is the re-ranker's:
    where they are given, each score is minus the rank.
    """

    def parse(record: Record, number: int) -> ScoredList:
        _need(record, ("question", "ctxs"))
        ranked = record.get("reranked_ctxs")
        contexts = parse_list(record["ctxs"] if ranked is None else ranked, "ctxs")
        if not all(isinstance(each, dict) and "id" in each for each in contexts):
            raise FormatError("an entry of ctxs must be an object with an id and a score.")
        documents = [reading.document_id(each["id"]) for each in contexts]
        scores = [each.get("score") for each in contexts]
        if ranked is not None:
            reading.scale = "rank"
            scores = [-rank for rank in range(1, len(documents) + 1)]
        question = parse_text(record["question"], "question")
        row = reading.row(record.get("query_id", text_id(question)), documents, scores, (), number)
        _keep(reading, row.query_id, question, documents, [_passage(each) for each in contexts])
        return row

    return parsed_records(reading, parse)


def table_columns(
    names: Sequence[str], chosen: Mapping[str, str] | None = None, file: str | None = None
) -> tuple[str, str, str | None, str | None]:
    """The columns of query, document or documents, score or scores, and positives."""
    chosen = chosen or {}
    if not chosen and set(names) & {"label", "labels"} and not set(names) & {*ALIASES["score"], *ALIASES["scores"]}:
        raise FormatError("it has labels and no scores: these are judgements, not a teacher's.", file=file)
    try:
        query = find_columns(names, ("query_id",), chosen)[0]
        plural = not {"document_id", "score"} & chosen.keys() and bool(
            {"document_ids", "scores"} & chosen.keys() or {"document_ids", "doc_ids", "scores"} & set(names)
        )
        documents = find_columns(names, ("document_ids" if plural else "document_id",), chosen)[0]
        kind = "scores" if plural and "score" not in names else "score"
        if not plural or kind in chosen or kind in names or set(names) - {query, documents, "positive_ids"}:
            return query, documents, find_columns(names, (kind,), chosen)[0], _positives(names)
    except FormatError as error:
        raise FormatError(error.message, file=file) from None
    return query, documents, None, _positives(names)


def _positives(names: Sequence[str]) -> str | None:
    return "positive_ids" if "positive_ids" in names else None


def _quiet(reading: Reading) -> Reading:
    """The same file, for a look ahead: what is wrong in it is told when the rows are read."""
    return Reading(reading.path, on_error="skip")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


def _repeats(reading: Reading, query: str) -> bool:
    """Whether a query has several rows."""
    seen: set[Any] = set()
    for _, record in records(_quiet(reading), [query]):
        value = record.get(query)
        if not isinstance(value, (str, int)):
            continue  # which is an error when the rows are read
        if value in seen:
            return True
        seen.add(value)
    return False


def _grouped(rows: Iterator[ScoredList], reading: Reading) -> Iterator[ScoredList]:
    def pairs() -> Iterator[Pair]:
        for row in rows:
            relevant = set(row.positives)
            for document, score in zip(row.document_ids, row.scores, strict=True):
                yield Pair(row.query_id, document, None, score, document in relevant, row.line or 0)

    return group_pairs(pairs(), reading)


def _grouped_texts(reading: Reading, parse: Callable[[Record, int], list[Pair]]) -> Iterator[ScoredList]:
    if reading.id_type == "int":
        raise FormatError("this format has texts, whose ids are strings.", file=str(reading.path))
    return group_pairs(chain.from_iterable(parsed_records(reading, parse)), reading)


def _text_pairs(
    reading: Reading, query: str, texts: Sequence[str], scores: Sequence[Any], positives: Sequence[bool], number: int
) -> list[Pair]:
    query_id = reading.query_id(text_id(query))
    ids = [reading.document_id(text_id(text)) for text in texts]
    pairs = [
        Pair(query_id, document, None, check_score(score), positive, number)
        for document, score, positive in zip(ids, scores, positives, strict=True)
    ]
    _keep(reading, query_id, query, ids, [(text, "") for text in texts])
    return pairs


def _passage(passage: Mapping[str, Any]) -> tuple[str, str]:
    """The text and the title of a passage, "" where there is none."""
    text = next((passage[name] for name in ("text", "contents", "segment", "body") if passage.get(name)), "")
    return parse_text(text, "text"), parse_text(passage.get("title") or "", "title")


def _keep(
    reading: Reading, query_id: Id, query: Any, documents: Sequence[Id], texts: Sequence[tuple[str, str]]
) -> None:
    """Hand the texts on."""
    if reading.texts is None:
        return
    if query:
        reading.texts.query(query_id, parse_text(query, "query"))
    for document_id, (text, title) in zip(documents, texts, strict=True):
        if text or title:
            reading.texts.document(document_id, text, title)


def _need(record: Record, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in record]:
        raise FormatError(f"the object lacks {missing}; it has {list(record)!r:.200}.")
