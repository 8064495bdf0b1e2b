"""A corpus as embeddings on disk: encoded once for a model, whatever happens meanwhile, and mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from st_m3se.texts import Texts

__all__ = ["CorpusEmbeddings", "embed_corpus", "embed_queries", "model_fingerprint"]

Kind = Literal["dense", "sparse", "multi-vector"]


class CorpusEmbeddings:
    """The embeddings of a corpus on disk; iterating gives consecutive chunks as tensors (lists for multi-vectors).

    Attributes:
        path: The folder.
        kind: "dense" (SentenceTransformer), "sparse" (SparseEncoder) or "multi-vector" (MultiVectorEncoder).
        fingerprint: Of the model, its settings and the corpus together.
        dimension: Of the embeddings.
        seconds: How long encoding took, all processes that had a part in it together.
    """

    path: Path
    kind: Kind
    fingerprint: str
    dimension: int
    seconds: float

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError


def model_fingerprint(model: Any) -> str:
    """A hash of all that a model's embeddings depend on: weights, modules, prompts, lengths, precision, dimension."""
    raise NotImplementedError


def embed_corpus(
    model: Any,
    corpus: Texts,
    cache_dir: str | Path,
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    show_progress_bar: bool = True,
) -> CorpusEmbeddings:
    """Encode a corpus with a SentenceTransformer, SparseEncoder or MultiVectorEncoder, or open what is there of it."""
    raise NotImplementedError


def embed_queries(
    model: Any,
    queries: Sequence[str],
    *,
    batch_size: int = 32,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    show_progress_bar: bool = False,
) -> Any:
    """The queries' embeddings, in the form in which ``search`` takes them."""
    raise NotImplementedError
