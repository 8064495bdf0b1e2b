"""A corpus as embeddings on disk: encoded once for a model, whatever happens meanwhile, and mapped into memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from st_m3se.core.errors import FormatError
from st_m3se.core.files import sweep_folder
from st_m3se.data.texts import Texts
from st_m3se.retrieval.embedding_shards import (
    PLAN,
    VERSION,
    Precision,
    damaged_shards,
    joined_shards,
    load_shard,
    missing_shards,
    read_plan,
    save_shard,
    shard_arrays,
    shard_count,
    write_plan,
)
from st_m3se.retrieval.fingerprint import content_hash, model_fingerprint
from st_m3se.retrieval.models import Kind, embed_queries, encode_texts, encoding_options, model_kind

__all__ = ["CorpusEmbeddings", "embed_corpus", "embed_queries"]

logger = logging.getLogger(__name__)

SHARD: dict[Kind, int] = {"dense": 2_048, "sparse": 2_048, "multi-vector": 512}  # documents: what a kill costs
CHUNK: dict[Kind, int] = {"dense": 8_192, "sparse": 8_192, "multi-vector": 512}  # documents that come at once, or more


class CorpusEmbeddings:
    """The embeddings of a corpus on disk, in its order. Made, and opened again, by :func:`embed_corpus`.

    Iterating gives consecutive chunks in the form in which :func:`~st_m3se.retrieval.search.search` takes them:
    float32 ``[documents, dimension]`` tensors, sparse COO tensors, or lists of ``[tokens, dimension]``. Only the chunk
    at hand is in memory. Each file is compared with its checksum before it is first used.

    Attributes:
        path: The folder.
        kind: "dense" (SentenceTransformer), "sparse" (SparseEncoder) or "multi-vector" (MultiVectorEncoder).
        fingerprint: Of the model, the options and the corpus together.
        dimension: Of each embedding.
        dtype: "float32" or "float16", the precision on the disk.
        seconds: What encoding took, all runs that had a part in it together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._verified: set[int] = set()
        plan = self._plan = read_plan(self.path / PLAN)
        self.kind: Kind = plan["kind"]
        self.fingerprint: str = plan["fingerprint"]
        self.dtype: Precision = plan["dtype"]
        self.dimension: int = plan["dimension"]
        self.seconds: float = plan["seconds"]
        self._documents: int = plan["documents"]
        self._shard: int = plan["shard_documents"]
        if missing := missing_shards(self.path, plan):
            raise FormatError(
                f"{len(missing)} of {shard_count(plan)} shards are not there yet. Run the same embed_corpus again: it "
                "goes on where it stopped.",
                file=str(self.path),
            )

    def __len__(self) -> int:
        return self._documents

    def __repr__(self) -> str:
        return f"CorpusEmbeddings({len(self)} {self.kind} embeddings, dimension {self.dimension}, {self.path})"

    def __iter__(self) -> Iterator[Any]:
        together = max(1, CHUNK[self.kind] // self._shard)
        count = -(-self._documents // self._shard)
        for first in range(0, count, together):
            shards = [self._load(shard) for shard in range(first, min(first + together, count))]
            yield joined_shards(self.kind, shards, self.dimension)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The dense embeddings of some documents, float32 ``[rows, dimension]``, read from the map."""
        if self.kind != "dense":
            raise ValueError(f"these are {self.kind} embeddings; rows are looked up among dense ones.")
        found = np.empty((len(rows), self.dimension), dtype=np.float32)
        shards = np.asarray(rows) // self._shard
        for shard in np.unique(shards).tolist():
            there = shards == shard
            found[there] = self._load(shard)[np.asarray(rows)[there] - shard * self._shard]
        return found

    def _load(self, shard: int) -> Any:
        loaded = load_shard(self.path, self._plan, shard, verify=shard not in self._verified)
        self._verified.add(shard)
        return loaded


def embed_corpus(
    model: Any,
    corpus: Texts,
    cache_dir: str | Path,
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    dtype: Precision = "float32",
    show_progress_bar: bool = True,
) -> CorpusEmbeddings:
    """Encode a corpus, or open what is there of it already.

    The embeddings lie in a folder of their own in ``cache_dir``, named by a fingerprint of all that they depend on:
    the corpus's ids and texts, every weight of the model, its modules' settings, tokenizer, prompt, maximum length and
    precision, and the options here. Whatever changes, the folder is another one; batch size and device do not count.
    A run that ended early, by whatever cause, goes on after its last whole shard: each is written to the disk under
    another name first. A second process with the same work waits for the first, and finds it done. What is there is
    read and compared with its checksums; a damaged shard is encoded anew.

    Args:
        model: A SentenceTransformer, SparseEncoder or MultiVectorEncoder. Its ``encode_document`` is used.
        corpus: The documents, in whose order the embeddings are stored.
        cache_dir: Where caches are; made if it is not there.
        batch_size: Texts that are encoded at once.
        prompt_name: The name of one of the model's prompts. None is what ``encode_document`` takes itself.
        prompt: The prompt itself.
        truncate_dim: The dimension to cut dense embeddings to. None is the model's own.
        dtype: The precision of what is stored. "float16" halves the disk and the reading, and rounds each number to 11
            bits: cosines change by less than 0.0005, in practice by 0.0001, so that close neighbours may change places.
            Searches compute in float32 with both.
        show_progress_bar: Show progress over the documents.

    Raises:
        TypeError: If the model is no encoder.
        ValueError: If embeddings are not finite, or an option is not for this kind of model.
    """
    kind = model_kind(model)
    if dtype not in ("float32", "float16"):
        raise ValueError(f'dtype must be "float32" or "float16", got {dtype!r}.')
    encoding = encoding_options(model, kind, "document", prompt_name, prompt, truncate_dim)
    known = {
        "model": model_fingerprint(model),
        "corpus": corpus.fingerprint,
        "prompt": encoding["prompt"],
        "prompt_name": encoding["prompt_name"],
        "truncate_dim": truncate_dim,
        "dtype": dtype,
    }
    fingerprint = content_hash({"version": VERSION, **known})
    folder = Path(cache_dir) / f"{kind}-{fingerprint}"
    sweep_folder(folder)
    plan = _known_plan(folder, fingerprint)
    if plan is not None and plan["dimension"] and not (missing_shards(folder, plan) or damaged_shards(folder, plan)):
        return _verified(folder)  # without the lock: the folder may be read-only
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        plan = _known_plan(folder, fingerprint)
        if plan is None:
            plan = {
                "version": VERSION,
                "fingerprint": fingerprint,
                "kind": kind,
                "documents": len(corpus),
                "shard_documents": SHARD[kind],
                "dimension": None,
                "seconds": 0.0,
                **known,
            }
            write_plan(folder, plan)
        damaged = damaged_shards(folder, plan)
        for shard, why in damaged.items():
            logger.warning(f"shard {shard} of the embeddings in {folder} is damaged: {why}. It is encoded anew.")
        missing = sorted([*missing_shards(folder, plan), *damaged])
        if not missing and plan["dimension"] is None:  # killed before it was written down, or the plan was damaged
            missing = [shard_count(plan) - 1]
        if missing:
            _encode_shards(model, corpus, folder, plan, missing, batch_size, encoding, show_progress_bar)
    return _verified(folder)


def _known_plan(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """What a folder holds, as far as encoding has begun there; a damaged plan is as good as none."""
    if not (folder / PLAN).is_file():
        return None
    try:
        plan = read_plan(folder / PLAN)
        if plan["fingerprint"] != fingerprint:
            raise FormatError("this describes other embeddings.", file=str(folder / PLAN))
    except FormatError as error:
        logger.warning(f"{error} It is made anew.")
        return None
    return plan


def _verified(folder: Path) -> CorpusEmbeddings:
    """The embeddings of a folder whose shards have just been read, or written."""
    embeddings = CorpusEmbeddings(folder)
    embeddings._verified.update(range(shard_count(embeddings._plan)))
    return embeddings


def _encode_shards(
    model: Any,
    corpus: Texts,
    folder: Path,
    plan: dict[str, Any],
    missing: Sequence[int],
    batch_size: int,
    encoding: dict[str, Any],
    show_progress_bar: bool,
) -> None:
    from tqdm.auto import tqdm

    kind, size, todo = plan["kind"], plan["shard_documents"], set(missing)
    there = (shard_count(plan) - len(missing)) * size
    bar = tqdm(
        total=len(corpus),
        initial=min(there, len(corpus)),
        desc="Encoding the corpus",
        unit=" documents",
        disable=not show_progress_bar,
    )
    with bar:
        for shard, (_, texts) in enumerate(corpus.batches(size)):
            if shard not in todo:
                continue
            start = time.perf_counter()
            embeddings = encode_texts(model.encode_document, texts, kind, batch_size, False, encoding)
            arrays, plan["dimension"] = shard_arrays(kind, embeddings, plan["dtype"])
            save_shard(folder, plan, shard, arrays)
            plan["seconds"] += time.perf_counter() - start
            write_plan(folder, plan)
            bar.update(len(texts))
