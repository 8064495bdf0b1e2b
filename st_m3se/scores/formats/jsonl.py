"""One JSON value per line: PyLate and LightOn, FlagEmbedding, Tevatron, ColBERTv2, sentence-transformers."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from st_m3se.scores.errors import FormatError
from st_m3se.scores.formats.grouping import Pair, group_pairs
from st_m3se.scores.formats.reading import Reading, parse_json, parse_list, parse_object, parse_text, text_id
from st_m3se.scores.rows import Id, ScoredList, check_score, short
from st_m3se.scores.store import TeacherScores

__all__ = ["decode_list", "read_colbert", "read_flagembedding", "read_hard_negatives", "read_pylate", "read_tevatron"]


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


def read_pylate(reading: Reading) -> Iterator[ScoredList]:
    """Read ``{"query_id": ..., "document_ids": [...], "scores": [...]}``; the lists may be encoded as texts."""

    def parse(line: str, number: int) -> ScoredList:
        value = parse_object(line, ("query_id", "document_ids", "scores"))
        documents = decode_list(value["document_ids"], "document_ids")
        return reading.row(value["query_id"], documents, decode_list(value["scores"], "scores"), (), number)

    return reading.parsed(parse)


def read_colbert(reading: Reading) -> Iterator[ScoredList]:
    """Read ColBERTv2's n-way examples: ``[query_id, [document_id, score], [document_id, score], ...]``."""

    def parse(line: str, number: int) -> ScoredList:
        value = parse_list(parse_json(line), "a line")
        if not value or not all(isinstance(pair, list) and len(pair) == 2 for pair in value[1:]):
            raise FormatError("expected [query_id, [document_id, score], ...].")
        return reading.row(value[0], [pair[0] for pair in value[1:]], [pair[1] for pair in value[1:]], (), number)

    return reading.parsed(parse)


def read_tevatron(reading: Reading) -> Iterator[ScoredList]:
    """Read Tevatron's ``query_id query positive_passages negative_passages``, each passage with a ``score``."""

    def parse(line: str, number: int) -> ScoredList:
        value = parse_object(line, ("query_id", "positive_passages", "negative_passages"))
        documents: list[Id] = []
        scores: list[Any] = []
        texts: list[tuple[str, str]] = []
        for key in ("positive_passages", "negative_passages"):
            for passage in parse_list(value[key], key):
                if not isinstance(passage, dict) or "docid" not in passage:
                    raise FormatError(f"an entry of {key} must be an object with a docid, got {short(passage)}.")
                if "score" not in passage:
                    raise FormatError(f"document {short(passage['docid'])} has no score.")
                documents.append(reading.document_id(passage["docid"]))
                scores.append(passage["score"])
                text, title = (parse_text(passage.get(name, ""), name) for name in ("text", "title"))
                texts.append((text, title))
        relevant = documents[: len(value["positive_passages"])]
        row = reading.row(value["query_id"], documents, scores, relevant, number)
        if reading.texts is not None:
            if query := parse_text(value.get("query", ""), "query"):
                reading.texts.query(row.query_id, query)
            for document_id, (text, title) in zip(documents, texts, strict=True):
                if text or title:
                    reading.texts.document(document_id, text, title)
        return row

    return reading.parsed(parse)


def read_flagembedding(reading: Reading) -> Iterator[ScoredList]:
    """Read FlagEmbedding's ``query pos neg pos_scores neg_scores``, which has texts instead of ids.

    A text's id is :func:`~st_m3se.scores.formats.text_id`; the texts go to ``reading.texts``. Several lines with one
    query become one row. Queries come in the order of their ids.
    """

    def parse(line: str, number: int) -> list[Pair]:
        value = parse_object(line, ("query", "pos", "neg"))
        if value.get("pos_scores") is None or value.get("neg_scores") is None:
            raise FormatError("there is no pos_scores or no neg_scores: the teacher has not scored this file.")
        query = parse_text(value["query"], "query")
        query_id = reading.query_id(text_id(query))
        pairs, texts = [], []
        for kind in ("pos", "neg"):
            documents = parse_list(value[kind], kind)
            scores = parse_list(value[f"{kind}_scores"], f"{kind}_scores")
            if len(documents) != len(scores):
                raise FormatError(f"{kind} has {len(documents)} documents and {len(scores)} scores.")
            for document, score in zip(documents, scores, strict=True):
                text = parse_text(document, f"an entry of {kind}")
                document_id = reading.document_id(text_id(text))
                pairs.append(Pair(query_id, document_id, None, check_score(score), kind == "pos", number))
                texts.append((document_id, text))
        if reading.texts is not None:
            reading.texts.query(query_id, query)
            for document_id, text in texts:
                reading.texts.document(document_id, text)
        return pairs

    if reading.id_type == "int":
        raise FormatError("this format has texts, whose ids are strings.", file=str(reading.path))
    return group_pairs(chain.from_iterable(reading.parsed(parse)), reading)


def read_hard_negatives(reading: Reading, scores: TeacherScores | str | Path | None = None) -> Iterator[ScoredList]:
    """Read the ``qid pos neg`` of msmarco-hard-negatives, ``neg`` being lists by the system that found them.

    Args:
        reading: The file. Its entries are ids, or objects with ``pid`` and ``ce-score``.
        scores: Where the scores of plain ids are: a store, such as the one made from the score pickle.

    Yields:
        The positives, then each negative once. Without a score for every one the line is rejected.
    """
    store = TeacherScores.open(scores) if isinstance(scores, (str, Path)) else scores

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
                        "Convert that to a store and name it (scores=..., --scores)."
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
