"""Exact search: the best documents of a corpus for each query, in the memory of one chunk of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["SearchResult", "search"]


class SearchResult(NamedTuple):
    """The best documents of each query, best first, equal ones in the order of the corpus.

    Attributes:
        rows: int32 ``[queries, depth]``, places of documents in the corpus; -1 where there are no more.
        scores: float32 ``[queries, depth]``; 0 where there are no more.
    """

    rows: np.ndarray
    scores: np.ndarray


def search(
    queries: Any,
    corpus: Tensor | np.ndarray | Iterable[Any],
    depth: int,
    *,
    similarity: str | Callable[[Any, Any], Tensor] = "dot",
    excluded: tuple[np.ndarray, np.ndarray] | None = None,
    device: str | torch.device | None = None,
) -> SearchResult:
    """Find the best documents of each query.

    Args:
        queries: What ``model.encode_query`` returns: a dense ``[queries, dimension]`` tensor or array, a sparse COO
            tensor of this shape (SparseEncoder), or a list of ``[tokens, dimension]`` (MultiVectorEncoder).
        corpus: The documents in the same form, in one piece or as an iterable of consecutive chunks, such as
            :class:`~st_m3se.evaluation.embeddings.CorpusEmbeddings`.
        depth: Documents per query, at most.
        similarity: "dot", "cosine", "euclidean", "manhattan", or for multi-vectors "maxsim", "meanmaxsim": what
            ``model.similarity_fn_name`` says; or a function such as ``model.similarity``, from queries and documents to
            their ``[queries, documents]`` scores.
        excluded: Pairs that are not to be found: the places of queries and of documents, int ``[pairs]`` each.
        device: Where to search. None is where the queries are.
    """
    raise NotImplementedError
