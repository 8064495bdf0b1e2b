"""Exact search: the best documents of a corpus for each query, in the memory of a small part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from st_m3se.retrieval.similarity import Similarity, number, part

__all__ = ["Search", "SearchResult", "search"]

QUERIES = {"cpu": 1_024, "gpu": 4_096}  # that are compared at once
SCORES = {"cpu": 1 << 21, "gpu": 1 << 26}  # that are computed at once: 8 MB, which caches like, and 256 MB
DOCUMENTS = (1_024, 16_384)  # that are compared at once, at least and on a CPU at most; fewer waste the matrix product
ALIGNED = 256  # documents: a product of other widths takes a third longer
TOKENS = 512  # documents of many vectors each: sentence-transformers bounds the memory of their scores itself
ROOM = 256  # places beyond the depth, at least
TOGETHER = 128  # queries whose lists are sorted at once

Pairs = tuple[np.ndarray, np.ndarray]
"""The places of queries and of documents, int ``[pairs]`` each."""


class SearchResult(NamedTuple):
    """The best documents of each query, best first, equal ones in the order of the corpus.

    Attributes:
        rows: int32 ``[queries, depth]``, the documents' places in the corpus; -1 where there are no more.
        scores: float32 ``[queries, depth]``; 0 where there are no more.
    """

    rows: np.ndarray
    scores: np.ndarray


def search(
    queries: Any,
    corpus: Any,
    depth: int,
    *,
    similarity: str | Callable[[Any, Any], Tensor] = "dot",
    excluded: Pairs | None = None,
    excluded_documents: Sequence[int] | np.ndarray = (),
    device: str | torch.device | None = None,
    show_progress_bar: bool = False,
) -> SearchResult:
    """Find the best documents of each query, exactly.

    The search goes through the corpus once. Documents are compared a few thousand at a time; of these scores only
    those above a query's ``depth``-th best so far are looked at again, which after the first part of a corpus is one
    in a hundred or less. So the time is about that of the matrix product, and the memory is 8 MB of scores (256 MB on
    a GPU), the chunk at hand, and two to three times the result.

    Why not ``sentence_transformers.util.semantic_search``: it takes the whole corpus as one tensor, selects anew from
    all scores of each chunk, merges lists in Python, and leaves the order of equal scores to chance.

    Args:
        queries: What ``encode_query`` of a model returns: ``[queries, dimension]``, dense or (SparseEncoder) as a
            sparse COO tensor, or (MultiVectorEncoder) a list of ``[tokens, dimension]``. Scores are computed in
            float32, whatever their precision is.
        corpus: The documents' embeddings alike, in one piece; or an iterable of consecutive chunks of them of any
            sizes, such as :class:`~st_m3se.retrieval.embeddings.CorpusEmbeddings` or a generator that encodes.
        depth: Documents per query, at most. A document is found even where it has no term in common with a sparse
            query, as ``model.similarity`` scores it, too.
        similarity: What ``model.similarity_fn_name`` says: "dot", "cosine", "euclidean", "manhattan" (the latter two
            negative distances), and for multi-vectors "maxsim" or "meanmaxsim". Or a function such as
            ``model.similarity``, from queries and documents to ``[queries, documents]``: names are faster. A score of
            minus infinity means "not to be found".
        excluded: Pairs that are not to be found, such as a query and itself as a document.
        excluded_documents: Places of documents that are not to be found by any query.
        device: Where to search. None is where the queries are. Chunks are moved there one by one.
        show_progress_bar: Show progress over the documents.

    Raises:
        ValueError: If queries and documents do not fit together, a score is not finite, or ``depth`` is below 1.
        TypeError: If something is not embeddings.

    Example:
        ::

            corpus = embed_corpus(model, Texts.open("scifact"), "cache")
            queries = embed_queries(model, texts)
            rows, scores = search(queries, corpus, 1000, similarity=model.similarity_fn_name)
    """
    from tqdm.auto import tqdm

    under_way = Search(
        queries,
        depth,
        similarity=similarity,
        excluded=excluded,
        excluded_documents=excluded_documents,
        device=device,
    )
    total = _total(under_way.kind, corpus) if show_progress_bar else None
    with tqdm(total=total, desc="Searching", unit=" documents", disable=not show_progress_bar) as bar:
        for chunk in _chunks(under_way.kind, corpus):
            under_way.add(chunk, bar.update)
            del chunk  # before the next one is made
    return under_way.result()


class Search:
    """A search under way, for those who have the documents chunk by chunk: :func:`search` in three steps.

    Args:
        queries: As for :func:`search`, and so are the other arguments.
        depth: Documents per query, at most.
        similarity: A name or a function.
        excluded: Pairs that are not to be found.
        excluded_documents: Documents that are not to be found.
        wanted: Pairs whose scores are asked for, whether they are found or not, excluded or not.
        device: Where to search.

    Attributes:
        kind: "dense", "sparse" or "multi-vector".
        seen: Documents so far.
        wanted_scores: float32 ``[pairs]``, the scores of the wanted pairs; 0 for documents that did not come yet.
    """

    def __init__(
        self,
        queries: Any,
        depth: int,
        *,
        similarity: str | Callable[[Any, Any], Tensor] = "dot",
        excluded: Pairs | None = None,
        excluded_documents: Sequence[int] | np.ndarray = (),
        wanted: Pairs | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 1:
            raise ValueError(f"depth must be an integer of at least 1, got {depth!r}.")
        with torch.inference_mode():
            self._similarity = Similarity(queries, similarity, torch.device(device or _device_of(queries)))
        self.kind = self._similarity.kind
        self.seen = 0
        self._queries = self._similarity.number
        self._best = _Best(self._queries, int(depth))
        self._excluded = _Places(excluded, self._queries, "excluded")
        self._wanted = _Places(wanted, self._queries, "wanted")
        self.wanted_scores = np.zeros(len(self._wanted.queries), dtype=np.float32)
        self._nowhere = np.unique(np.asarray(excluded_documents, dtype=np.int64))

    @torch.inference_mode()
    def add(self, documents: Any, advance: Callable[[int], object] | None = None) -> None:
        """Take the next chunk of the corpus; calls ``advance`` with numbers of documents as they are done.

        Raises:
            ValueError: If they do not fit the queries, or a score is not finite.
        """
        total = number(documents)
        place = "cpu" if self._similarity.device.type == "cpu" else "gpu"
        block = max(1, min(QUERIES[place], self._queries))
        step = SCORES[place] // block
        step = TOKENS if self.kind == "multi-vector" else max(DOCUMENTS[0], step - step % ALIGNED)
        if place == "cpu":
            step = min(step, DOCUMENTS[1])
        for start in range(0, total, step):
            stop = min(start + step, total)
            ready = self._similarity.documents(part(documents, start, stop))
            for first in range(0, self._queries, block):
                last = min(first + block, self._queries)
                scores = self._similarity.scores(first, last, ready, stop - start)
                self._look(scores, first, self.seen)
            self.seen += stop - start
            if advance is not None:
                advance(stop - start)

    def _look(self, scores: Tensor, first: int, start: int) -> None:
        """Take over what is wanted and what is good enough, of queries from ``first`` and documents from ``start``."""
        stop, last = start + scores.shape[1], first + len(scores)
        places, queries, columns = self._wanted.within(first, last, start, stop)
        if len(places):
            asked = scores[queries, columns].cpu().numpy()
            _check(asked, start, stop)
            self.wanted_scores[places] = asked
        _, queries, columns = self._excluded.within(first, last, start, stop)
        low, high = np.searchsorted(self._nowhere, [start, stop]).tolist()
        if len(queries) or high > low:
            if not self._similarity.product:
                scores = scores.clone()  # it may be a function's own
            scores[queries, columns] = -torch.inf
            scores[:, torch.from_numpy(self._nowhere[low:high] - start).to(scores.device)] = -torch.inf
        self._best.offer(scores, slice(first, last), start)

    def result(self) -> SearchResult:
        """The best of the documents so far."""
        return self._best.sorted()


class _Best:
    """Per query, in the order of the corpus, those documents that may still be among the best.

    A list has ``depth`` places and room for more. What is not better than ``least`` never comes in; when a list is
    full, it is cut to its best ``depth``, whose last score is then the new ``least``. An equal score further down in
    the corpus is not better, and a cut keeps the first of equal ones: so ties keep the order of the corpus.

    The device compares and prunes. The lists are NumPy's: little of the corpus gets there, and many small operations
    suit neither a GPU nor threads that wait for each other on a busy CPU.
    """

    def __init__(self, queries: int, depth: int) -> None:
        self.depth, self.room = depth, max(depth, ROOM)
        self.width = depth + self.room
        self.scores = np.empty((queries, self.width), dtype=np.float32)
        self.rows = np.empty((queries, self.width), dtype=np.int32)
        self.counts = np.zeros(queries, dtype=np.int64)
        self.least = np.full((queries, 1), -np.inf, dtype=np.float32)

    def offer(self, scores: Tensor, part: slice, start: int) -> None:
        """Take what is good enough of ``[queries, documents]``."""
        places, found, better = _better(scores, self.least[part], start)
        full = self.counts[part] + found > self.width
        if full.any():
            # Lists that are half full are cut along, so that lists do not fill up one by one.
            full |= self.counts[part] > self.depth + self.room // 2
            self._cut(np.flatnonzero(full & (self.counts[part] > self.depth)) + part.start)
            places, found, better = _better(scores, self.least[part], start)
            full = self.counts[part] + found > self.width
        if full.any() and scores.shape[1] > self.depth:
            # So many at once, as at the beginning: what is not among the best of these alone cannot be among all.
            queries = np.flatnonzero(full)
            below = np.nextafter(_nth(scores[queries], self.depth), np.float32(-np.inf))
            self.least[queries + part.start] = np.maximum(self.least[queries + part.start], below)
            places, found, better = _better(scores, self.least[part], start)
            full = self.counts[part] + found > self.width
        if full.any():
            for first in range(0, scores.shape[1], self.room):
                self.offer(scores[:, first : first + self.room], part, start + first)
            return
        # Each query's first place in the block, and where in its list the first document goes to.
        begins = np.arange(len(scores)) * scores.shape[1]
        ends = (np.arange(len(scores)) + part.start) * self.width + self.counts[part]
        into = np.arange(len(places)) + np.repeat(ends - np.cumsum(found) + found, found)
        self.scores.reshape(-1)[into] = better
        self.rows.reshape(-1)[into] = places - np.repeat(begins - start, found)
        self.counts[part] += found

    def _cut(self, queries: np.ndarray) -> None:
        """Keep the best ``depth`` of lists that have more."""
        for first in range(0, len(queries), TOGETHER):
            some = queries[first : first + TOGETHER]
            scores = self._filled(some)
            least = _nth(scores, self.depth)
            keep = scores >= least
            if keep.sum() > len(some) * self.depth:  # more than one has the last place
                above, equal = scores > least, scores == least
                keep = above | (equal & (equal.cumsum(axis=1) <= self.depth - above.sum(axis=1, keepdims=True)))
            columns = np.flatnonzero(keep).reshape(len(some), self.depth) % self.width
            self.scores[some, : self.depth] = np.take_along_axis(scores, columns, axis=1)
            self.rows[some, : self.depth] = np.take_along_axis(self.rows[some], columns, axis=1)
            self.counts[some] = self.depth
            self.least[some] = least

    def _filled(self, some: np.ndarray) -> np.ndarray:
        """The scores of some lists, minus infinity in places that are free."""
        scores: np.ndarray = self.scores[some]
        scores[np.arange(self.width) >= self.counts[some, None]] = -np.inf
        return scores

    def sorted(self) -> SearchResult:
        """The lists, best first."""
        shape = len(self.counts), self.depth
        result = SearchResult(np.full(shape, -1, np.int32), np.zeros(shape, np.float32))
        for first in range(0, shape[0], TOGETHER):
            some = np.arange(first, min(first + TOGETHER, shape[0]))
            scores = self._filled(some)
            order = np.argsort(-scores, axis=1, kind="stable")[:, : self.depth]
            scores = np.take_along_axis(scores, order, axis=1)
            there = scores > -np.inf
            result.rows[some] = np.where(there, np.take_along_axis(self.rows[some], order, axis=1), -1)
            result.scores[some] = np.where(there, scores, 0)
        return result


def _better(scores: Tensor, least: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is above ``least``: places in the block, in order; how many there are of each query; and their scores."""
    # Not "greater", so that what is no number comes in as well, and is seen.
    if scores.device.type == "cpu":
        array = scores.numpy()
        with np.errstate(invalid="ignore"):
            above = np.less_equal(array, least)
        places = np.flatnonzero(np.logical_not(above, out=above))  # which skips over long stretches of nothing
        better = array.reshape(-1)[places]
    else:
        found = torch.le(scores, torch.from_numpy(least).to(scores.device)).logical_not_().reshape(-1).nonzero()[:, 0]
        places, better = found.cpu().numpy(), scores.reshape(-1)[found].cpu().numpy()
    _check(better, start, start + scores.shape[1])
    return places, np.diff(np.searchsorted(places, np.arange(len(scores) + 1) * scores.shape[1])), better


def _nth(scores: Tensor | np.ndarray, rank: int) -> np.ndarray:
    """Each row's score of this rank: ``[rows, 1]``."""
    if isinstance(scores, Tensor):
        if scores.device.type != "cpu":
            scores = scores.topk(rank, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
            return np.asarray(scores.cpu().numpy())
        scores = scores.numpy()
    place = scores.shape[1] - rank
    return np.partition(scores, place, axis=1)[:, place : place + 1]


class _Places:
    """Pairs of a query and a document, to be looked up by blocks of both."""

    def __init__(self, pairs: Pairs | None, queries: int, name: str) -> None:
        first, second = ((), ()) if pairs is None else pairs
        self.queries, self.documents = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
        if self.queries.ndim != 1 or self.queries.shape != self.documents.shape:
            raise ValueError(
                f"{name} must be two arrays of as many places, those of the queries and those of the documents, got "
                f"{self.queries.shape} and {self.documents.shape}."
            )
        if len(self.queries) and (self.queries.min() < 0 or self.queries.max() >= queries):
            raise ValueError(f"{name} names queries {self.queries.min()} to {self.queries.max()} of {queries}.")
        self._order = np.argsort(self.documents, kind="stable")
        self._sorted = self.documents[self._order]

    def within(self, first: int, last: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of a block: their places in the list, and in the block row and column."""
        low, high = np.searchsorted(self._sorted, [start, stop]).tolist()
        places = self._order[low:high]
        queries = self.queries[places]
        places = places[(queries >= first) & (queries < last)]
        return places, self.queries[places] - first, self.documents[places] - start


def _check(scores: np.ndarray, start: int, stop: int) -> None:
    if len(scores) and not np.isfinite(scores.max()):  # which is NaN if there is one
        raise ValueError(
            f"there are similarities that are not finite, for documents {start + 1} to {stop} of the corpus among "
            "others: they have no order. In half precision large embeddings overflow: load the model in float32."
        )


def _device_of(embeddings: Any) -> torch.device:
    first = embeddings[0] if isinstance(embeddings, (list, tuple)) and len(embeddings) else embeddings
    return first.device if isinstance(first, Tensor) else torch.device("cpu")


def _total(kind: str, corpus: Any) -> int | None:
    """How many documents there are; a generator does not say."""
    from st_m3se.retrieval.embeddings import CorpusEmbeddings

    if isinstance(corpus, CorpusEmbeddings):
        return len(corpus)
    return number(corpus) if _in_one_piece(kind, corpus) else None


def _in_one_piece(kind: str, corpus: Any) -> bool:
    if isinstance(corpus, (Tensor, np.ndarray)):
        return True
    # A list of [tokens, dimension] are documents; of anything else, and for other queries, chunks.
    return kind == "multi-vector" and isinstance(corpus, list) and all(getattr(each, "ndim", 0) == 2 for each in corpus)


def _chunks(kind: str, corpus: Any) -> Iterator[Any]:
    if _in_one_piece(kind, corpus):
        yield corpus
    elif isinstance(corpus, Iterable):
        yield from corpus
    else:
        raise TypeError(
            f"the corpus must be embeddings or an iterable of chunks of them, got {type(corpus).__name__}. Encode it, "
            "for instance with embed_corpus."
        )
