"""How a search compares queries with a chunk of documents: dense, sparse and multi-vector embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from st_m3se.retrieval.models import Kind

__all__ = ["Similarity", "kind_of", "number", "part"]

Function = Callable[[Any, Any], Tensor]
PRODUCTS = ("dot", "cosine")
NAMES: dict[Kind, tuple[str, ...]] = {
    "dense": (*PRODUCTS, "euclidean", "manhattan"),
    "sparse": (*PRODUCTS, "euclidean", "manhattan"),
    "multi-vector": ("maxsim", "meanmaxsim"),
}


def kind_of(embeddings: Any) -> Kind:
    """What embeddings are by their form: ``[n, dimension]`` dense or sparse, or n times ``[tokens, dimension]``.

    Raises:
        TypeError: If they are nothing of this.
    """
    if isinstance(embeddings, Tensor) and embeddings.layout == torch.sparse_coo and embeddings.ndim == 2:
        return "sparse"
    if isinstance(embeddings, (Tensor, np.ndarray)) and getattr(embeddings, "layout", torch.strided) == torch.strided:
        if embeddings.ndim == 2:
            return "dense"
        if embeddings.ndim == 3:
            return "multi-vector"
    if isinstance(embeddings, (list, tuple)) and all(getattr(each, "ndim", 0) == 2 for each in embeddings):
        return "multi-vector"
    shape = f" {tuple(embeddings.shape)}" if hasattr(embeddings, "shape") else ""
    raise TypeError(
        "embeddings must be [n, dimension] as a tensor, a NumPy array or a sparse COO tensor, or a list of "
        f"[tokens, dimension], got {type(embeddings).__name__}{shape}. A single text's embedding needs a dimension in "
        "front: encode a list of texts."
    )


def number(embeddings: Any) -> int:
    """How many texts these are the embeddings of."""
    return len(embeddings) if isinstance(embeddings, (list, tuple)) else int(embeddings.shape[0])


def part(embeddings: Any, start: int, stop: int) -> Any:
    """The embeddings of consecutive texts; without a copy unless they are sparse."""
    if not (isinstance(embeddings, Tensor) and embeddings.is_sparse):
        return embeddings[start:stop]
    embeddings = embeddings.coalesce()
    indices, values = embeddings.indices(), embeddings.values()
    low, high = torch.searchsorted(indices[0].contiguous(), torch.tensor([start, stop], device=indices.device)).tolist()
    inner = indices[:, low:high].clone()
    inner[0] -= start
    shape = (min(stop, embeddings.shape[0]) - start, embeddings.shape[1])
    return torch.sparse_coo_tensor(inner, values[low:high], shape, is_coalesced=True, check_invariants=False)


class Similarity:
    """The queries of a search, ready to be compared with chunk after chunk of the documents.

    Dot products and cosines of dense embeddings are matrix products into memory that is used again and again; of sparse
    ones they are SciPy's on the CPU, which touch common terms alone. All else is sentence-transformers' own function.

    Args:
        queries: Their embeddings.
        similarity: A name that sentence-transformers gives to a function, or a function.
        device: Where to compute.

    Raises:
        ValueError: If the name is not one for embeddings of this kind.
    """

    def __init__(self, queries: Any, similarity: str | Function, device: torch.device) -> None:
        self.kind, self.device = kind_of(queries), device
        self.number = number(queries)
        self.product = similarity in PRODUCTS
        self._unit = similarity == "cosine"
        self._function: Function | None = None
        self._scores: Tensor | None = None
        if not callable(similarity):
            if similarity not in NAMES[self.kind]:
                raise ValueError(
                    f"{self.kind} embeddings are compared by one of {', '.join(NAMES[self.kind])}, got "
                    f"{similarity!r}. Pass similarity=model.similarity_fn_name."
                )
            if not (self.product and self.kind == "dense"):  # importing the host takes seconds
                from sentence_transformers.util import SimilarityFunction

                self._function = SimilarityFunction.to_similarity_fn(similarity)
        else:
            self._function = similarity
        self._scipy = self.product and self.kind == "sparse" and device.type == "cpu"
        self.dimension = _dimension(queries)
        prepared = self._ready(queries)
        self.queries = _csr(prepared) if self._scipy else prepared

    def _ready(self, embeddings: Any) -> Any:
        """On the device, in float32, and of unit length for cosines."""
        if self.kind == "multi-vector":
            if isinstance(embeddings, (Tensor, np.ndarray)):
                return _tensor(embeddings).to(self.device)
            return [_tensor(each).to(self.device) for each in embeddings]
        tensor = _tensor(embeddings).to(self.device).float()
        if not self._unit:
            return tensor
        if self.kind == "dense":
            return torch.nn.functional.normalize(tensor, dim=-1)
        from sentence_transformers.util import normalize_embeddings

        return normalize_embeddings(tensor)

    def documents(self, embeddings: Any) -> Any:
        """A chunk of documents, ready to be compared.

        Raises:
            ValueError: If they are of another kind or dimension than the queries.
        """
        kind, dimension = kind_of(embeddings), _dimension(embeddings)
        known = self.dimension is not None and dimension is not None
        if kind != self.kind or (known and dimension != self.dimension):
            raise ValueError(
                f"the queries are {self.kind} embeddings of dimension {self.dimension}, the documents {kind} ones of "
                f"dimension {dimension}. Encode both with the same model and the same truncate_dim."
            )
        ready = self._ready(embeddings)
        return _csr(ready).T.tocsr() if self._scipy else ready

    def scores(self, start: int, stop: int, documents: Any, count: int) -> Tensor:
        """The scores of queries from ``start`` to ``stop``: float32 ``[stop - start, count]``, valid until the next.

        Raises:
            ValueError: If a similarity function returns another shape.
        """
        shape = stop - start, count
        if self._scipy:
            into = self._memory(shape)
            # SciPy adds to what is there.
            (self.queries[start:stop] @ documents).toarray(out=into.zero_().numpy())
            return into
        queries = part(self.queries, start, stop)
        if self.product and self.kind == "dense":
            return torch.mm(queries, documents.T, out=self._memory(shape))
        assert self._function is not None
        scores = self._function(queries, documents)
        if tuple(scores.shape) != shape:
            raise ValueError(
                f"the similarity function returned {tuple(scores.shape)} for {shape[0]} queries and {shape[1]} "
                "documents; expected one score for each pair of them, as model.similarity returns."
            )
        return scores.detach().float()

    def _memory(self, shape: tuple[int, int]) -> Tensor:
        size = shape[0] * shape[1]
        if self._scores is None or self._scores.numel() < size:
            self._scores = torch.empty(size, device=self.device)
        return self._scores[:size].view(shape)


def _tensor(embeddings: Tensor | np.ndarray) -> Tensor:
    if isinstance(embeddings, Tensor):
        return embeddings
    # A tensor cannot be read-only, as a file that is mapped into memory is.
    return torch.from_numpy(embeddings if embeddings.flags.writeable else embeddings.copy())


def _dimension(embeddings: Any) -> int | None:
    """The embeddings' dimension; None where there is no embedding to tell."""
    if isinstance(embeddings, (Tensor, np.ndarray)):
        return int(embeddings.shape[-1])
    sequence: Sequence[Any] = embeddings
    return int(sequence[0].shape[-1]) if len(sequence) else None


def _csr(embeddings: Tensor) -> Any:
    """A sparse tensor as SciPy's compressed rows."""
    from scipy.sparse import csr_matrix

    embeddings = embeddings.coalesce()
    rows, columns = embeddings.indices().numpy()
    borders = np.searchsorted(rows, np.arange(embeddings.shape[0] + 1))
    return csr_matrix((embeddings.values().numpy(), columns, borders), shape=tuple(embeddings.shape))
