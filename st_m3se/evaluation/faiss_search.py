"""Approximate search with FAISS, where exact search is too slow. Needs the extra ``faiss``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from st_m3se.evaluation.embeddings import CorpusEmbeddings
from st_m3se.evaluation.search import Pairs, SearchResult
from st_m3se.extras import require
from st_m3se.files import atomic_file, damage, seal, sweep

__all__ = ["FaissIndex"]

logger = logging.getLogger(__name__)

TRAINED_ON = 262_144  # embeddings, at most: 64 for each of 4,096 clusters
SIMILARITIES = ("dot", "cosine", "euclidean")


class FaissIndex:
    """A FAISS index of a corpus's embeddings, kept beside them.

    Args:
        embeddings: Dense embeddings of a corpus, as :func:`~st_m3se.evaluation.embeddings.embed_corpus` makes them.
        factory: What FAISS shall build, in its own words: "Flat" (exact, in memory), "IVF4096,Flat" (looks into
            ``nprobe`` of 4,096 clusters), "HNSW32" (a graph), "IVF4096,PQ48" (compressed), ...
        similarity: What ``model.similarity_fn_name`` says: "dot", "cosine" or "euclidean".
        seed: Of the choice of the embeddings that clusters are trained on.
        show_progress_bar: Show progress over the documents.

    Attributes:
        index: FAISS's own.
        path: Where it is kept. The name holds ``factory`` and ``similarity``; the folder is that of the embeddings, and
            so an index is never used with the embeddings of another model or corpus.

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If the embeddings are not dense, the similarity is none of FAISS's, FAISS does not understand
            ``factory``, or there are too few documents to train it.

    Example:
        ::

            index = FaissIndex(embed_corpus(model, corpus, "cache"), "IVF4096,Flat", similarity="cosine")
            rows, scores = index.search(embed_queries(model, texts), 1000, parameters="nprobe=64")
    """

    def __init__(
        self,
        embeddings: CorpusEmbeddings,
        factory: str = "Flat",
        *,
        similarity: str = "dot",
        seed: int = 0,
        show_progress_bar: bool = False,
    ) -> None:
        self._faiss = require("faiss", "faiss")
        if embeddings.kind != "dense":
            raise ValueError(f"FAISS indexes dense embeddings, got {embeddings!r}. Use search, which is exact.")
        if similarity not in SIMILARITIES:
            raise ValueError(f"FAISS compares by one of {', '.join(SIMILARITIES)}, got {similarity!r}. Use search.")
        self.similarity, self.dimension, self._documents = similarity, embeddings.dimension, len(embeddings)
        name = "".join(letter if letter.isalnum() else "_" for letter in factory)
        self.path = embeddings.path / f"faiss-{name}-{similarity}-{seed}.index"
        sweep(self.path)
        place = f"{embeddings.fingerprint} {self.path.name}"
        why = damage(self.path, place) if self.path.is_file() else None
        if why is not None:
            logger.warning(f"{self.path} is damaged: {why}. It is made anew.")
        if why is not None or not self.path.is_file():
            index = self._build(embeddings, factory, seed, show_progress_bar)
            with atomic_file(self.path, overwrite=True) as temporary:
                self._faiss.write_index(index, str(temporary))
                seal(temporary, place)
        self.index = self._faiss.read_index(str(self.path))
        if self.index.ntotal != self._documents or self.index.d != self.dimension:
            raise ValueError(
                f"{self.path} holds {self.index.ntotal} embeddings of dimension {self.index.d}, the corpus has "
                f"{self._documents} of {self.dimension}. Delete the file, and it is built again."
            )

    def _build(self, embeddings: CorpusEmbeddings, factory: str, seed: int, show_progress_bar: bool) -> Any:
        from tqdm.auto import tqdm

        metric = self._faiss.METRIC_L2 if self.similarity == "euclidean" else self._faiss.METRIC_INNER_PRODUCT
        try:
            index = self._faiss.index_factory(self.dimension, factory, metric)
        except RuntimeError as error:
            raise ValueError(f'FAISS does not understand {factory!r}. Write it as in "IVF4096,Flat": {error}') from None
        if not index.is_trained:
            count = min(TRAINED_ON, len(embeddings))
            sample = np.sort(np.random.default_rng(seed).choice(len(embeddings), count, replace=False))
            try:
                index.train(self._ready(embeddings.rows(sample)))
            except RuntimeError as error:
                raise ValueError(
                    f"{factory!r} cannot be trained on {count} documents, presumably because it has more clusters. "
                    f"Take fewer, or search exactly: {error}"
                ) from None
        bar = tqdm(total=len(embeddings), desc=f"Indexing, {factory}", unit=" documents", disable=not show_progress_bar)
        with bar:
            for chunk in embeddings:
                index.add(self._ready(chunk.numpy()))
                bar.update(len(chunk))
        return index

    def search(self, queries: Any, depth: int, *, parameters: str = "", excluded: Pairs | None = None) -> SearchResult:
        """Find good documents for each query.

        Args:
            queries: Their embeddings, ``[queries, dimension]``.
            depth: Documents per query, at most; an index that looks into few clusters may find less.
            parameters: FAISS's own, such as "nprobe=64" or "efSearch=128". They stay set. Without any an IVF index
                looks into a single cluster.
            excluded: Pairs that are not to be found: the places of queries and of documents, int ``[pairs]`` each.

        Returns:
            As :func:`~st_m3se.evaluation.search.search`, with equal scores in the order of the corpus, as far as FAISS
            finds them all; euclidean scores are negative distances.

        Raises:
            ValueError: If the dimension is another than that of the corpus, or FAISS does not know a parameter.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
        vectors = torch.as_tensor(queries).float().cpu().numpy()
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(
                f"queries must be [queries, {self.dimension}], got {vectors.shape}. Encode by the corpus's model "
                "and the same truncate_dim."
            )
        if parameters:
            try:
                self._faiss.ParameterSpace().set_index_parameters(self.index, parameters)
            except RuntimeError as error:
                raise ValueError(f"FAISS cannot set {parameters!r} for this index: {error}") from None
        without: dict[int, list[int]] = {}
        for query, document in zip(*((), ()) if excluded is None else excluded, strict=True):
            without.setdefault(int(query), []).append(int(document))
        more = max(map(len, without.values()), default=0)
        found, rows = self.index.search(self._ready(vectors), min(depth + more, self._documents))
        if self.similarity == "euclidean":
            found = -np.sqrt(np.maximum(found, 0))
        return _ordered(found, rows, depth, without)

    def _ready(self, vectors: np.ndarray) -> np.ndarray:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.similarity != "cosine":
            return vectors
        return np.asarray(torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1).numpy())


def _ordered(found: np.ndarray, rows: np.ndarray, depth: int, without: dict[int, list[int]]) -> SearchResult:
    result = SearchResult(
        np.full((len(rows), depth), -1, dtype=np.int32), np.zeros((len(rows), depth), dtype=np.float32)
    )
    nothing: Sequence[int] = ()
    for query, (scores, documents) in enumerate(zip(found, rows, strict=True)):
        keep = (documents >= 0) & ~np.isin(documents, without.get(query, nothing))
        scores, documents = scores[keep], documents[keep]
        order = np.lexsort((documents, -scores))[:depth]
        result.rows[query, : len(order)], result.scores[query, : len(order)] = documents[order], scores[order]
    return result
