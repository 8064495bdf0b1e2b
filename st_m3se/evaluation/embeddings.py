"""A corpus as embeddings on disk: encoded once for a model, whatever happens meanwhile, and mapped into memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from st_m3se.evaluation.similarity import Kind
from st_m3se.scores.errors import FormatError
from st_m3se.scores.writer import atomic_file
from st_m3se.texts import Texts

__all__ = ["CorpusEmbeddings", "embed_corpus", "embed_documents", "embed_queries", "model_fingerprint", "model_kind"]

VERSION = 1  # part of every fingerprint: raise it when what is stored changes
PLAN = "embeddings.json"
SHARD: dict[Kind, int] = {"dense": 2_048, "sparse": 2_048, "multi-vector": 512}  # documents: what a kill costs
CHUNK: dict[Kind, int] = {"dense": 8_192, "sparse": 8_192, "multi-vector": 512}  # documents that come at once, or more
EXPORTED = (".onnx", ".onnx_data", ".bin", ".xml")

Precision = Literal["float32", "float16"]


class CorpusEmbeddings:
    """The embeddings of a corpus on disk, in its order. Made, and opened again, by :func:`embed_corpus`.

    Iterating gives consecutive chunks in the form in which :func:`~st_m3se.evaluation.search.search` takes them:
    float32 ``[documents, dimension]`` tensors, sparse COO tensors, or lists of ``[tokens, dimension]``. Only the chunk
    at hand is in memory.

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
        plan = _read_plan(self.path / PLAN)
        self.kind: Kind = plan["kind"]
        self.fingerprint: str = plan["fingerprint"]
        self.dtype: Precision = plan["dtype"]
        self.dimension: int = plan["dimension"]
        self.seconds: float = plan["seconds"]
        self._documents: int = plan["documents"]
        self._shard: int = plan["shard_documents"]
        if missing := _missing(self.path, plan):
            raise FormatError(
                f"{len(missing)} of {_shards(plan)} shards are not there yet. Run the same embed_corpus again: it goes "
                "on where it stopped.",
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
            yield _joined(self.kind, shards, self.dimension)

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
        """The arrays of a shard; dense ones are mapped into memory."""
        path = self.path / _name(self.kind, shard)
        expected = min(self._shard, self._documents - shard * self._shard)
        try:
            if self.kind == "dense":
                found = np.load(path, mmap_mode="r", allow_pickle=False)
                fits = found.shape == (expected, self.dimension) and found.dtype == self.dtype
            else:
                with np.load(path, allow_pickle=False) as file:
                    found = {name: file[name] for name in file.files}
                counts = found["lengths"]
                fits = len(counts) == expected and len(found["values"]) == counts.sum()
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise _damaged(path, error) from error
        if not fits:
            raise _damaged(path, f"it is not {expected} embeddings of dimension {self.dimension}")
        return found


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
    another name first. A second process with the same work waits for the first, and finds it done.

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
        FormatError: If a shard was damaged since it was written.
    """
    kind = model_kind(model)
    if dtype not in ("float32", "float16"):
        raise ValueError(f'dtype must be "float32" or "float16", got {dtype!r}.')
    encoding = _options(model, kind, "document", prompt_name, prompt, truncate_dim)
    known = {
        "model": model_fingerprint(model),
        "corpus": corpus.fingerprint,
        "prompt": encoding["prompt"],
        "prompt_name": encoding["prompt_name"],
        "truncate_dim": truncate_dim,
        "dtype": dtype,
    }
    fingerprint = _hash({"version": VERSION, **known})
    folder = Path(cache_dir) / f"{kind}-{fingerprint}"
    if (folder / PLAN).is_file() and not _missing(folder, _read_plan(folder / PLAN)):
        return CorpusEmbeddings(folder)  # without the lock: the folder may be read-only
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for leftover in folder.glob(".*.tmp"):  # of a process that was killed; whoever lives holds the lock
            leftover.unlink()
        if not (folder / PLAN).is_file():
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
            _write_plan(folder, plan)
        plan = _read_plan(folder / PLAN)
        missing = _missing(folder, plan)
        if missing:
            _encode_shards(model, corpus, folder, plan, missing, batch_size, encoding, show_progress_bar)
    return CorpusEmbeddings(folder)


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
    there = (_shards(plan) - len(missing)) * size
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
            embeddings = _encode(model.encode_document, texts, kind, batch_size, False, encoding)
            arrays, plan["dimension"] = _arrays(kind, embeddings, plan["dtype"])
            with atomic_file(folder / _name(kind, shard), overwrite=True) as temporary, temporary.open("wb") as file:
                if kind == "dense":
                    np.save(file, arrays["values"])
                else:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
            plan["seconds"] += time.perf_counter() - start
            _write_plan(folder, plan)
            bar.update(len(texts))


def embed_queries(
    model: Any,
    queries: Sequence[str],
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    show_progress_bar: bool = False,
) -> Any:
    """The embeddings of queries, by ``encode_query``, on the model's device, as :func:`search` takes them.

    Args:
        model: A SentenceTransformer, SparseEncoder or MultiVectorEncoder.
        queries: Their texts.
        batch_size: Texts that are encoded at once.
        prompt_name: The name of one of the model's prompts. None is what ``encode_query`` takes itself.
        prompt: The prompt itself.
        truncate_dim: The dimension to cut dense embeddings to. None is the model's own.
        show_progress_bar: Show progress.
    """
    kind = model_kind(model)
    encoding = _options(model, kind, "query", prompt_name, prompt, truncate_dim)
    return _encode(model.encode_query, list(queries), kind, batch_size, show_progress_bar, encoding)


def embed_documents(
    model: Any,
    documents: Sequence[str],
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    show_progress_bar: bool = False,
) -> Any:
    """The same for documents, by ``encode_document``: a chunk of a corpus that is not kept."""
    kind = model_kind(model)
    encoding = _options(model, kind, "document", prompt_name, prompt, truncate_dim)
    return _encode(model.encode_document, list(documents), kind, batch_size, show_progress_bar, encoding)


def model_kind(model: Any) -> Kind:
    """The kind of embeddings that a model makes.

    Raises:
        TypeError: If it makes none.
    """
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

    kinds: tuple[tuple[Any, Kind], ...] = (
        (SparseEncoder, "sparse"),
        (MultiVectorEncoder, "multi-vector"),
        (SentenceTransformer, "dense"),
    )
    for host, kind in kinds:
        if isinstance(model, host):
            return kind
    raise TypeError(
        "the model must be a SentenceTransformer, SparseEncoder or MultiVectorEncoder of sentence-transformers, got "
        f"{type(model).__name__}. A CrossEncoder has no embeddings: it re-ranks."
    )


def model_fingerprint(model: Any) -> str:
    """A hash of all in a model that its embeddings depend on, 32 hexadecimal digits.

    These are its weights, every bit of them, with their precision; its modules' classes and settings, such as the
    pooling and the maximum length; the transformer's configuration; the tokenizer; prompts and ``truncate_dim``. Not
    its name or place: the same model is the same wherever it was loaded from.

    Raises:
        ValueError: If the model has no weights in torch (an exported one) and was not loaded from a local folder.
    """
    digest = blake2b(digest_size=16)
    state = model.state_dict()
    for key, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:  # what a quantised layer says of itself
            digest.update(_json([key, value]))
    if not state:
        _add_files(digest, model)
    seen: set[int] = set()
    for name, module in model.named_modules():
        described: list[Any] = [name, type(module).__qualname__, module.extra_repr()]
        if hasattr(module, "get_config_dict") and module is not model:
            described.append({key: value for key, value in module.get_config_dict().items() if key not in UNRELATED})
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            described.append({key: value for key, value in config.to_dict().items() if key not in UNRELATED})
        described += [getattr(module, attribute, None) for attribute in ADAPTER]
        digest.update(_json(described))
    tokenizer: Any = getattr(model, "tokenizer", None)
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = {
            key: value for key, value in json.loads(fast.to_str()).items() if key not in ("truncation", "padding")
        }
        digest.update(_json(content))
    elif hasattr(tokenizer, "get_vocab"):
        digest.update(_json([type(tokenizer).__qualname__, tokenizer.get_vocab(), tokenizer.special_tokens_map]))
    settings = {
        "max_seq_length": model.max_seq_length,
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "truncate_dim": getattr(model, "truncate_dim", None),
        "max_active_dims": getattr(model, "max_active_dims", None),
        "sides": [getattr(tokenizer, side, None) for side in ("padding_side", "truncation_side")],
    }
    digest.update(_json(settings))
    return digest.hexdigest()


UNRELATED = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "tokenizer_class"),
    *("dtype", "embedding_dimension"),
)
"""What stands in a configuration without changing an embedding, or follows from the weights: some modules fill the
dimension in when they run for the first time."""
ADAPTER = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
"""What a layer of peft goes by, beside its weights."""


def _add_files(digest: Any, model: Any) -> None:
    """The files of a model that was exported, whose weights torch does not know."""
    name = getattr(model.model_card_data, "base_model", None) or getattr(model.tokenizer, "name_or_path", None)
    files = sorted(path for path in Path(name or "").rglob("*") if path.suffix in EXPORTED) if name else []
    if not files:
        raise ValueError(
            f"nothing tells the weights of this model ({model.get_backend()} backend, {name!r}) from others, so that a "
            "cache of its embeddings could be mistaken for another's. Load it from a local folder."
        )
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)


def _options(
    model: Any, kind: Kind, task: str, prompt_name: str | None, prompt: str | None, truncate_dim: int | None
) -> dict[str, Any]:
    """What ``encode_query`` or ``encode_document`` gets beside the texts."""
    options: dict[str, Any] = {"prompt_name": prompt_name, "prompt": prompt}
    if prompt_name is not None and prompt is None and prompt_name not in model.prompts:
        raise ValueError(f"the model has no prompt {prompt_name!r}; it has {list(model.prompts)}.")
    if kind == "dense":
        options |= {"truncate_dim": truncate_dim}
    elif truncate_dim is not None:
        raise ValueError(f"truncate_dim={truncate_dim} is for dense embeddings; the {task} embeddings here are {kind}.")
    return options


def _encode(
    encode: Any, texts: list[str], kind: Kind, batch_size: int, show_progress_bar: bool, options: dict[str, Any]
) -> Any:
    tensors = {"convert_to_tensor": True} if kind != "multi-vector" else {}
    return encode(texts, batch_size=batch_size, show_progress_bar=show_progress_bar, **tensors, **options)


def _arrays(kind: Kind, embeddings: Any, dtype: Precision) -> tuple[dict[str, np.ndarray], int]:
    """What is stored of a shard, and the dimension."""
    if kind == "dense":
        arrays = {"values": embeddings.float().cpu().numpy()}
        dimension = int(embeddings.shape[1])
    elif kind == "sparse":
        embeddings = embeddings.coalesce().cpu()
        rows, columns = embeddings.indices().numpy()
        lengths = np.bincount(rows, minlength=embeddings.shape[0]).astype(np.int32)
        arrays = {
            "lengths": lengths,
            "columns": columns.astype(np.int32),
            "values": embeddings.values().float().numpy(),
        }
        dimension = int(embeddings.shape[1])
    else:
        lengths = np.array([len(each) for each in embeddings], dtype=np.int32)
        arrays = {"lengths": lengths, "values": torch.cat(list(embeddings)).float().cpu().numpy()}
        dimension = int(arrays["values"].shape[1])
    with np.errstate(over="ignore"):  # is an error below
        values = arrays["values"].astype(dtype)
    if not np.isfinite(values).all():
        remedy = 'store them with dtype="float32"' if np.isfinite(arrays["values"]).all() else "load it in float32"
        raise ValueError(
            f"the model gives embeddings that are not finite in {dtype}. Nothing is stored of them: {remedy}."
        )
    return {**arrays, "values": values}, dimension


def _joined(kind: Kind, shards: Sequence[Any], dimension: int) -> Any:
    """One chunk of consecutive shards."""
    if kind == "dense":
        return torch.from_numpy(np.concatenate(shards).astype(np.float32, copy=False))
    lengths, values = (np.concatenate([shard[name] for shard in shards]) for name in ("lengths", "values"))
    numbers = torch.from_numpy(values.astype(np.float32, copy=False))
    if kind == "multi-vector":
        return list(torch.split(numbers, lengths.tolist()))
    rows = np.repeat(np.arange(len(lengths)), lengths)
    indices = np.stack([rows, np.concatenate([shard["columns"] for shard in shards])])
    return torch.sparse_coo_tensor(
        torch.from_numpy(indices), numbers, (len(lengths), dimension), is_coalesced=True, check_invariants=False
    )


def _name(kind: Kind, shard: int) -> str:
    return f"{shard:06d}.{'npy' if kind == 'dense' else 'npz'}"


def _shards(plan: dict[str, Any]) -> int:
    return -(-int(plan["documents"]) // int(plan["shard_documents"]))


def _missing(folder: Path, plan: dict[str, Any]) -> list[int]:
    done = {path.name for path in folder.iterdir()}
    return [shard for shard in range(_shards(plan)) if _name(plan["kind"], shard) not in done]


def _write_plan(folder: Path, plan: dict[str, Any]) -> None:
    with atomic_file(folder / PLAN, overwrite=True) as temporary:
        temporary.write_text(json.dumps(plan, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        fields = ("fingerprint", "kind", "documents", "shard_documents", "dimension", "dtype", "seconds")
        if plan["version"] != VERSION or any(field not in plan for field in fields):
            raise ValueError(f"version {plan['version']!r}, fields {list(plan)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"this does not describe embeddings that this version can read: {error!r}. Delete the folder, and encode "
            "the corpus again.",
            file=str(path),
        ) from None
    return dict(plan)


def _damaged(path: Path, why: object) -> FormatError:
    return FormatError(
        f"this shard was damaged after it was written: {why}. Delete the file and run the same again: this shard alone "
        "is encoded again.",
        file=str(path),
    )


def _hash(content: dict[str, Any]) -> str:
    return blake2b(_json(content), digest_size=16).hexdigest()


def _json(content: Any) -> bytes:
    """Content as bytes that are the same in every process: of an object that JSON does not know, its class."""
    return json.dumps(content, sort_keys=True, default=lambda value: type(value).__qualname__).encode()
