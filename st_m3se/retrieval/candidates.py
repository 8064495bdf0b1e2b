"""From queries and a corpus to a run, with one source of candidates or several."""

from __future__ import annotations

import math
from collections.abc import Collection as IdCollection
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from st_m3se.core.findings import found as found_unusual
from st_m3se.core.findings import report
from st_m3se.core.ids import Id
from st_m3se.data.collection import Collection, absent_documents
from st_m3se.data.texts import Texts
from st_m3se.retrieval.bm25 import BM25, load_bm25, search_bm25
from st_m3se.retrieval.models import describe_encoder, encoder_name, load_encoder
from st_m3se.retrieval.sources import Found, Job, Pairs, rows_of
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import TeacherScoresWriter

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

__all__ = ["find_candidates"]

RRF_K = 60  # Cormack, Clarke and Buettcher, SIGIR 2009, and every search engine since
WRITTEN_TOGETHER = 4_096


def find_candidates(
    queries: Texts | Mapping[Any, Any] | Dataset | str | Path,
    corpus: Texts | Mapping[Any, Any] | Dataset | str | Path,
    sources: Sequence[str | Path | BM25 | SentenceTransformer | SparseEncoder | MultiVectorEncoder],
    output: str | Path,
    *,
    depth: int = 50,
    positives: Mapping[Any, Mapping[Any, int]] | None = None,
    judged: Mapping[Any, IdCollection[Id]] | None = None,
    exclude: Mapping[Any, IdCollection[Id]] | None = None,
    exclude_documents: IdCollection[Id] = (),
    exclude_same_id: bool = False,
    device: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int = 32,
    chunk_size: int = 16_384,
    strict: bool = False,
    show_progress_bar: bool = True,
    overwrite: bool = False,
) -> TeacherScores:
    """Find the best documents of a corpus for each query, and write them as a store: one row per query, best first.

    The store has the layout of teacher scores, so that a teacher can score its lists, ``TeacherScores.open`` reads
    them and ``st-m3se convert`` writes them as a TREC run. Its scores are those of the search, not of a teacher:

    - one source: BM25 scores, or the model's own similarity;
    - several: reciprocal rank fusion, the sum of ``1 / (60 + rank)`` over the sources that have the document among
      their best ``depth``. Ranks are all that BM25 scores and cosines have in common. Documents that several sources
      agree on come first, the others take turns by rank, so that each source has its part in the list.

    Equal scores stand in the order of the corpus. A query that no source finds anything for gets an empty list.

    Why not ``sentence_transformers.util.mine_hard_negatives``: it searches with one bi-encoder, not with BM25, holds
    the embeddings of the whole corpus, and returns texts as training triplets, where a teacher needs lists by id.

    Args:
        queries: Whatever :meth:`Texts.open` takes.
        corpus: Likewise.
        sources: "bm25" or :class:`BM25`, which need the extra ``candidates``; and SentenceTransformers, SparseEncoders
            and MultiVectorEncoders, or their names or folders, whose configuration says what they are. They encode with
            ``encode_query`` and ``encode_document`` and thus with their own prompts, and search exactly, with their own
            similarity.
        output: The folder to make.
        depth: Documents per query, at most.
        positives: Relevance judgements, query id to document id to relevance. A query's documents above 0 that are not
            in its list come at its end, so that it grows beyond ``depth``; with the score that the one source gives
            them, or with several sources the 0.0 of a document that none ranked.
        judged: The documents that are judged for each query, for ``exclude_same_id``. None is those of ``positives``.
        exclude: Documents by query that shall not be in its list, as positives neither.
        exclude_documents: Documents that shall be in no list.
        exclude_same_id: Leave out the document that has the query's own id, where queries are documents as well, unless
            it is judged for the query.
        device: Where sources that are given by name or folder run. None is what there is.
        trust_remote_code: Let models by name run code of their own.
        batch_size: Texts that a model encodes at once.
        chunk_size: Documents whose embeddings are held at a time. Memory is that of one chunk, of the queries'
            embeddings, and of the result.
        strict: Refuse what is unusual: ids that repeat, empty texts, judged or excluded documents that are absent. Else
            this is reported and dealt with as in evaluation, see :func:`~st_m3se.evaluation.open_set`.
        show_progress_bar: Show progress.
        overwrite: Replace a store that is there.

    Raises:
        FormatError: If none of the documents of ``positives`` or of the exclusions is in the corpus, none of their
            queries is among the queries, or in strict mode.
        FileExistsError: If ``output`` exists and ``overwrite`` is False.
        ImportError: If BM25 is asked for without its packages.
    """
    if depth < 1 or chunk_size < 1 or batch_size < 1:
        raise ValueError(
            f"depth, chunk_size and batch_size must be at least 1, got {depth}, {chunk_size} and {batch_size}."
        )
    if isinstance(sources, (str, Path)) or not sources:
        raise ValueError(f'sources must be a list such as ["bm25", "my/bi-encoder"], got {sources!r}.')
    keys = [BM25() if source == "bm25" else str(source) if isinstance(source, Path) else source for source in sources]
    if len(set(keys)) < len(keys):
        raise ValueError(f"a source is named twice in {sources!r}: it would only count twice.")
    chosen = [_chosen(source, device, trust_remote_code) for source in keys]
    opened = Collection.open(queries=queries, corpus=corpus)
    queries, corpus = opened.texts
    findings = [*opened.findings, *absent_documents(positives or {}, corpus, "they are in no list")]
    excluded_pairs = {query: dict.fromkeys(documents, 0) for query, documents in (exclude or {}).items()}
    findings += [
        finding._replace(kind="exclusions of absent documents", effect="there is nothing to leave out")
        for finding in absent_documents(excluded_pairs, corpus, "")
    ]
    banned = corpus.find(list(exclude_documents))
    if len(banned) and (banned < 0).all():
        rows_of(exclude_documents, corpus, "exclude_documents")
    absent = [document for document, row in zip(exclude_documents, banned.tolist(), strict=True) if row < 0]
    findings += found_unusual("excluded documents that are absent", absent, "there is nothing to leave out")
    report("candidates", findings, strict=strict)

    wanted = Pairs.of(_relevant(positives or {}), queries, corpus, "positives")
    excluded = Pairs.of(exclude or {}, queries, corpus, "exclude")
    if exclude_same_id:
        excluded = excluded.with_pairs(Pairs.of_same_ids(queries, corpus, judged or positives or {}))
    everywhere = np.zeros(len(corpus), dtype=bool)
    everywhere[banned[banned >= 0]] = True

    manifest = {
        "source": {
            "candidates": [description for _, description in chosen],
            "merged_by": None if len(chosen) == 1 else f"reciprocal rank fusion, k = {RRF_K}",
            "depth": depth,
            "positives_included": positives is not None,
            "excluded": {"pairs": len(excluded), "documents": int(everywhere.sum()), "same_id": exclude_same_id},
        },
        "inputs": {"queries": queries.fingerprint, "corpus": corpus.fingerprint},
    }
    # The writer comes first, so that no night of searching ends at a destination that is taken.
    with TeacherScoresWriter(output, manifest=manifest, overwrite=overwrite) as writer:
        job = Job(queries, corpus, depth, excluded, everywhere, wanted, batch_size, chunk_size, show_progress_bar)
        _write(job, [_search(source, description["name"], job) for source, description in chosen], writer)
    return TeacherScores.open(output)


def _chosen(source: Any, device: str | None, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """A source, loaded, and what the manifest says of it."""
    if isinstance(source, BM25):
        load_bm25(source)
        return source, source.description
    if isinstance(source, str):
        model = load_encoder(source, device=device, trust_remote_code=trust_remote_code)
        return model.eval(), describe_encoder(model, source)
    try:
        return source, describe_encoder(source, encoder_name(source))
    except (TypeError, AttributeError):
        raise TypeError(
            f'a source is "bm25", BM25(...), or an encoder or its name, got {type(source).__name__}. A cross-encoder '
            "cannot search: score the candidates with it."
        ) from None


def _search(source: Any, name: str, job: Job) -> Found:
    if isinstance(source, BM25):
        return search_bm25(source, job)
    from st_m3se.retrieval.dense import search_dense

    return search_dense(source, name, job)


def _relevant(qrels: Mapping[Any, Mapping[Any, int]]) -> dict[Any, list[Id]]:
    return {query: [document for document, grade in judged.items() if grade > 0] for query, judged in qrels.items()}


def _merged(job: Job, found: Sequence[Found], query: int) -> tuple[list[int], list[float]]:
    """One query's list, with the positives that it should have."""
    parts: dict[int, list[float]] = {}
    for one in found:
        rows = one.rows[query]
        rows = rows[rows >= 0].tolist()
        values = (
            one.scores[query].tolist() if len(found) == 1 else [1 / (RRF_K + 1 + place) for place in range(len(rows))]
        )
        for row, value in zip(rows, values, strict=False):
            parts.setdefault(row, []).append(value)
    # Exact sums, and as they will be stored: the same ranks in another order of the sources are a tie, and ties stand
    # in the order of the corpus.
    scores = {row: float(np.float32(math.fsum(values))) for row, values in parts.items()}
    best = sorted(scores, key=lambda row: (-scores[row], row))[: job.depth]
    pairs = job.wanted.range(query)
    if pairs.stop > pairs.start:
        without = {*best, *job.excluded.documents[job.excluded.range(query)].tolist()}
        alone = found[0].wanted[pairs].tolist() if len(found) == 1 else [0.0] * (pairs.stop - pairs.start)
        missing = {
            row: scores.get(row, score)
            for row, score in zip(job.wanted.documents[pairs].tolist(), alone, strict=True)
            if row not in without and not job.everywhere[row]
        }
        best += sorted(missing, key=lambda row: (-missing[row], row))
        scores.update(missing)
    return best, [scores[row] for row in best]


def _write(job: Job, found: Sequence[Found], writer: TeacherScoresWriter) -> None:
    corpus_ids = job.corpus.ids
    if pa.types.is_string(corpus_ids.type):
        corpus_ids = corpus_ids.cast(pa.large_string())
    corpus_ids = corpus_ids.combine_chunks()
    query = 0
    for query_ids, _ in job.queries.batches(WRITTEN_TOGETHER):
        lists = [_merged(job, found, query + place) for place in range(len(query_ids))]
        query += len(query_ids)
        rows = np.array([row for documents, _ in lists for row in documents], dtype=np.int64)
        documents = corpus_ids.take(pa.array(rows)).to_pylist()
        start = 0
        for query_id, (best, scores) in zip(query_ids, lists, strict=True):
            writer.write(query_id, documents[start : start + len(best)], scores)
            start += len(best)
