"""Teacher scores, texts and judgements joined on disk: one row per trainable query, its usable candidates in order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from st_m3se.core.errors import FormatError
from st_m3se.core.files import damage, read_checked_json, scratch_folder, seal, sweep, write_checked_json
from st_m3se.core.ids import Id
from st_m3se.core.ragged import list_array, list_lengths, list_values, owners
from st_m3se.data.texts import Texts
from st_m3se.scores import TeacherScores
from st_m3se.scores.describe import ScoreRange
from st_m3se.training.sampling import likely_false_negatives, repeated_texts, teacher_top

__all__ = ["JoinCounts", "JoinOptions", "join_lists"]

logger = logging.getLogger(__name__)

CACHE_VERSION = 6  # part of every cache file's name: raise it when what is cached changes
BLOCK_SCORES = 1 << 22  # joined together: some hundred megabytes
BATCH_QUERIES = 1_000  # in one Arrow batch
TEXTS_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class JoinOptions:
    """What decides which queries and candidates are usable; see :func:`~st_m3se.build_distillation_dataset`."""

    teacher_positives: int
    min_relevance: int
    absolute_margin: float | None
    relative_margin: float | None
    relabel: bool
    min_negatives: int


@dataclass
class JoinCounts:
    """What came of a join: queries in, and where they and their candidates went."""

    queries: int = 0
    without_positive: int = 0
    without_negative: int = 0
    too_few_negatives: int = 0
    judged: int = 0
    judged_unscored: int = 0
    copies: int = 0
    false_negatives: int = 0
    relabelled: int = 0
    lowest: float | None = None
    highest: float | None = None

    @property
    def kept(self) -> int:
        """The queries that have a list."""
        return self.queries - self.without_positive - self.without_negative - self.too_few_negatives

    def describe(self, min_negatives: int) -> str:
        """Say it in a sentence or some."""
        reasons = {
            "without a scored positive": self.without_positive,
            "without a negative": self.without_negative,
            f"with fewer than {min_negatives} negatives": self.too_few_negatives,
        }
        message = f"{self.kept} of {self.queries} queries of the teacher scores have a training list."
        if found := [f"{count} {reason}" for reason, count in reasons.items() if count]:
            message += f" Left out: {', '.join(found)}."
        if self.judged_unscored:
            message += (
                f" {self.judged_unscored} of their {self.judged} relevant documents have no teacher score and "
                "are in no list: put the positives among the candidates before scoring."
            )
        if self.copies:
            message += f" {self.copies} candidates repeat another candidate's text and are left out."
        if self.false_negatives:
            message += f" {self.false_negatives} negatives within the margin of a positive are left out."
        if self.relabelled:
            message += f" {self.relabelled} candidates within the margin of a positive are positives, too."
        return message


def join_lists(
    scores: TeacherScores,
    queries: Texts,
    corpus: Texts,
    qrels: Mapping[Any, Mapping[Any, int]] | None,
    options: JoinOptions,
    cache_dir: Path,
) -> tuple[Path, JoinCounts]:
    """Join and check everything, once: the same join is found again in ``cache_dir``, by any process.

    What is found is compared with its checksum, and made anew if it is damaged.

    Returns:
        An Arrow file with ``qid``, ``candidate_ids``, ``scores``, ``num_positives`` (the first ones of the list;
        positives and negatives each by falling score) and ``relevant_ids`` (the positives, and what is judged relevant
        without a teacher score), and the counts.

    Raises:
        FormatError: If a text is missing, naming its id, ids are of different types, or the store is not valid.
        ValueError: If no query is left.
    """
    relevant = _relevant(qrels, queries, corpus, options.min_relevance)
    key = _key(scores, queries, corpus, relevant, options)
    path = cache_dir / f"lists-{key}.arrow"
    counted = path.with_suffix(".json")
    sweep(path)
    if path.is_file() and counted.is_file():
        try:
            if (why := damage(path, path.name)) is None:
                return path, JoinCounts(**read_checked_json(counted))
        except (ValueError, TypeError, OSError) as error:
            why = f"{counted.name}: {error}"
        logger.warning(f"{path}, the joined lists in the cache, is damaged: {why}. It is made anew.")

    from tqdm.auto import tqdm

    counts = JoinCounts()
    join = _Join(queries, corpus, relevant, options, counts)
    with scratch_folder(path) as folder:
        part = folder / "part.arrow"
        with (
            tqdm(total=len(scores), desc="Joining scores and texts", unit=" queries", delay=1.0) as bar,
            pa.OSFile(str(part), "wb") as sink,
            pa.ipc.new_stream(sink, _schema(scores)) as writer,
        ):
            for block in _blocks(scores):
                writer.write_table(join(block), max_chunksize=BATCH_QUERIES)
                bar.update(len(block))
        if counts.kept == 0:
            raise ValueError(
                f"there is nothing to train on. {counts.describe(options.min_negatives)} {_advice(counts)}"
            )
        write_checked_json(counted, asdict(counts))
        seal(part, path.name)
        part.replace(path)  # last, and whole, whoever else makes it too
    return path, counts


class _Join:
    """Turns blocks of a store into rows of usable candidates, and counts."""

    def __init__(
        self,
        queries: Texts,
        corpus: Texts,
        relevant: Mapping[Id, Sequence[int]] | None,
        options: JoinOptions,
        counts: JoinCounts,
    ) -> None:
        self.queries, self.corpus, self.relevant = queries, corpus, relevant
        self.options, self.counts = options, counts
        self._hashes = np.zeros(len(corpus), dtype=np.int64)
        self._hashed = np.zeros(len(corpus), dtype=bool)
        self._range = ScoreRange()

    def __call__(self, block: pa.Table) -> pa.Table:
        options, counts, count = self.options, self.counts, len(block)
        _find(block.column("query_id").combine_chunks(), self.queries)
        document_ids, scores, lengths = _flat(block)
        self._range.add(scores)
        if len(scores):
            counts.lowest, counts.highest = self._range.low, self._range.high
        rows = owners(lengths)
        documents = _find(document_ids, self.corpus)
        positives, judged = self._judged(block, rows, documents)

        places = np.arange(len(rows))
        copies = repeated_texts(rows, self._text_hashes(documents), scores, positives)
        rows, scores, positives, places = (values[~copies] for values in (rows, scores, positives, places))
        positives |= teacher_top(rows, scores, options.teacher_positives)
        near = likely_false_negatives(rows, scores, positives, options.absolute_margin, options.relative_margin)
        if options.relabel:
            positives |= near
            counts.relabelled += int(near.sum())
        else:
            counts.false_negatives += int(near.sum())
            rows, scores, positives, places = (values[~near] for values in (rows, scores, positives, places))

        num_positives = np.bincount(rows[positives], minlength=count)
        num_negatives = np.bincount(rows[~positives], minlength=count)
        usable = (num_positives > 0) & (num_negatives >= options.min_negatives)
        counts.queries += count
        counts.without_positive += int((num_positives == 0).sum())
        counts.without_negative += int(((num_positives > 0) & (num_negatives == 0)).sum())
        few = (num_negatives > 0) & (num_negatives < options.min_negatives)
        counts.too_few_negatives += int(((num_positives > 0) & few).sum())
        counts.copies += int(copies.sum())

        order = np.lexsort((-scores, ~positives, rows))
        order = order[usable[rows[order]]]
        kept = np.flatnonzero(usable)
        sizes = (num_positives + num_negatives)[kept]
        size = len(self.corpus)
        relevant = np.unique(np.concatenate([judged, rows[positives] * size + documents[places[positives]]]))
        relevant = relevant[usable[relevant // size]]
        relevant_counts = np.bincount(relevant // size, minlength=count)[kept]
        relevant_ids = self.corpus.ids.take(pa.array(relevant % size)).to_pylist()
        return pa.table(
            {
                "qid": block.column("query_id").take(pa.array(kept)),
                "candidate_ids": list_array(document_ids.take(pa.array(places[order])), sizes),
                "scores": list_array(scores[order].astype(np.float32), sizes),
                "num_positives": pa.array(num_positives[kept], pa.int32()),
                "relevant_ids": list_array(pa.array(relevant_ids, document_ids.type), relevant_counts),
            }
        )

    def _judged(self, block: pa.Table, rows: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """True for the candidates that are judged relevant; and all judged so, as row * len(corpus) + document."""
        if self.relevant is None:
            return np.zeros(len(rows), dtype=bool), np.zeros(0, dtype=np.int64)
        pairs = [
            (row, document)
            for row, query_id in enumerate(block.column("query_id").to_pylist())
            for document in self.relevant.get(query_id, ())
        ]
        size = len(self.corpus)
        known = np.array([row * size + document for row, document in pairs if document >= 0], dtype=np.int64)
        candidates = rows * size + documents
        found = np.isin(candidates, known)
        self.counts.judged += len(pairs)
        self.counts.judged_unscored += len(pairs) - len(np.unique(candidates[found]))
        return found, known

    def _text_hashes(self, documents: np.ndarray) -> np.ndarray:
        """A number for each document's text, equal for equal texts; each text is read once."""
        new = np.unique(documents[~self._hashed[documents]])
        for start in range(0, len(new), TEXTS_AT_ONCE):
            some = new[start : start + TEXTS_AT_ONCE]
            texts = self.corpus.take(self.corpus.ids.take(pa.array(some)).to_pylist())
            self._hashes[some] = [hash(text) for text in texts]  # of 64 bits, and only compared within a query
        self._hashed[new] = True
        hashes: np.ndarray = self._hashes[documents]
        return hashes


def _blocks(scores: TeacherScores) -> Iterator[pa.Table]:
    tables: list[pa.Table] = []
    held = 0
    for table in scores.tables():
        tables.append(table)
        held += sum(len(chunk.values) for chunk in table.column("scores").chunks)
        if held >= BLOCK_SCORES:
            yield pa.concat_tables(tables)
            tables, held = [], 0
    if tables:
        yield pa.concat_tables(tables)


def _schema(scores: TeacherScores) -> pa.Schema:
    table = next(scores.tables(), None)
    if table is None:
        raise ValueError("there is nothing to train on: the teacher scores have no rows.")
    kinds = {name: table.schema.field(name).type for name in ("query_id", "document_ids", "scores")}
    # `scores` has the name of a label, `qid` and `candidate_ids` have not: see ListReader.
    return pa.schema(
        {
            "qid": kinds["query_id"],
            "candidate_ids": kinds["document_ids"],
            "scores": kinds["scores"],
            "num_positives": pa.int32(),
            "relevant_ids": kinds["document_ids"],
        }
    )


def _flat(block: pa.Table) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """All document ids, their scores (float64), and the lists' lengths."""
    documents, (scores, score_lengths) = block.column("document_ids").combine_chunks(), list_values(block, "scores")
    lengths, values = list_lengths(documents), scores.astype(np.float64)
    same = lengths == score_lengths
    if not same.all() or not np.isfinite(values).all():
        row = int(np.argmin(same if not same.all() else np.isfinite(values)))
        place = row if not same.all() else int(np.searchsorted(np.cumsum(lengths), row, side="right"))
        raise FormatError(
            f"query {block.column('query_id')[place].as_py()!r:.80} has lists of different lengths, or a score that is "
            "missing or not finite. scores.validate() names all such rows; st-m3se convert makes a store without them."
        )
    return documents.flatten(), values, lengths


def _find(ids: pa.Array, texts: Texts) -> np.ndarray:
    """The row of each id: int64.

    Raises:
        FormatError: If one is missing, with its name.
    """
    rows = _look_up(ids, texts)
    if (rows < 0).any():
        texts.rows(pc.unique(ids).to_pylist())  # which finds nothing either, and says what is wrong
        raise AssertionError("two look-ups of one id disagree")
    return rows


def _look_up(ids: pa.Array, texts: Texts) -> np.ndarray:
    """The row of each id, -1 where there is none: int64."""
    if pa.types.is_integer(ids.type) != pa.types.is_integer(texts.ids.type):
        return np.full(len(ids), -1, dtype=np.int64)
    kind = pa.int64() if pa.types.is_integer(ids.type) else texts.ids.type
    rows = pc.index_in(ids.cast(kind), value_set=texts.ids.cast(kind))
    return np.asarray(rows.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _relevant(
    qrels: Mapping[Any, Mapping[Any, int]] | None, queries: Texts, corpus: Texts, min_relevance: int
) -> dict[Id, list[int]] | None:
    """Each query's relevant documents as rows of the corpus, -1 for those that are not in it."""
    if qrels is None:
        return None
    query_ids: list[Id] = []
    document_ids: list[Id] = []
    for query_id, judged in qrels.items():
        for document_id, relevance in judged.items():
            if relevance >= min_relevance:
                query_ids.append(query_id)
                document_ids.append(document_id)
    for name, ids, texts in (("query", query_ids, queries), ("document", document_ids, corpus)):
        wrong = int if texts.id_type == "str" else str
        if ids and isinstance(ids[0], wrong):
            raise FormatError(
                f"the {name} ids of the qrels are {wrong.__name__}, such as {ids[0]!r:.80}, and those of the "
                f"{texts.name} are {texts.id_type}: no relevant document would be found. Convert one of the two."
            )
    relevant: dict[Id, list[int]] = {}
    rows = _look_up(pa.array(document_ids, pa.int64() if corpus.id_type == "int" else pa.string()), corpus)
    for query_id, row in zip(query_ids, rows.tolist(), strict=True):
        relevant.setdefault(query_id, []).append(row)
    return relevant


def _advice(counts: JoinCounts) -> str:
    if counts.judged == 0 and counts.without_positive:
        return "The qrels know none of these queries: compare the ids, or give teacher_positives=1."
    return "Score more candidates per query, the positives among them, or lower list_size or the margin."


def _key(
    scores: TeacherScores,
    queries: Texts,
    corpus: Texts,
    relevant: Mapping[Id, Sequence[int]] | None,
    options: JoinOptions,
) -> str:
    """A name for the join: equal only if all that goes into it is equal."""
    content = blake2b(digest_size=16)
    for table in scores.tables():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        content.update(sink.getvalue())
    judged = None if relevant is None else sorted(((repr(query), rows) for query, rows in relevant.items()))
    parts = [CACHE_VERSION, queries.fingerprint, corpus.fingerprint, content.hexdigest(), judged, asdict(options)]
    return blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
