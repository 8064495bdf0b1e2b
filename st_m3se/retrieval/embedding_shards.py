"""The files in which embeddings of a corpus lie on disk: shards of consecutive documents, and a plan of them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file, damage, read_checked_json, seal, write_checked_json
from st_m3se.retrieval.models import Kind

__all__ = [
    "PLAN",
    "VERSION",
    "Precision",
    "damaged_shards",
    "joined_shards",
    "load_shard",
    "missing_shards",
    "read_plan",
    "save_shard",
    "shard_arrays",
    "shard_count",
    "write_plan",
]

VERSION = 2  # part of every fingerprint: raise it when what is stored changes
PLAN = "embeddings.json"

Precision = Literal["float32", "float16"]


def shard_count(plan: dict[str, Any]) -> int:
    """How many shards the whole corpus makes."""
    return -(-int(plan["documents"]) // int(plan["shard_documents"]))


def missing_shards(folder: Path, plan: dict[str, Any]) -> list[int]:
    """The shards that are not there yet, by their numbers."""
    done = {path.name for path in folder.iterdir()}
    return [shard for shard in range(shard_count(plan)) if _name(plan["kind"], shard) not in done]


def damaged_shards(folder: Path, plan: dict[str, Any]) -> dict[int, str]:
    """The shards that are there and are not what was written, and why; all of them are read."""
    found = {}
    for shard in set(range(shard_count(plan))).difference(missing_shards(folder, plan)):
        if (why := damage(folder / _name(plan["kind"], shard), _place(plan, shard))) is not None:
            found[shard] = why
    return found


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write down what the folder holds: whole, or not at all."""
    write_checked_json(folder / PLAN, plan)


def read_plan(path: Path) -> dict[str, Any]:
    """What a folder holds.

    Raises:
        FormatError: If the file does not say so.
    """
    try:
        plan = read_checked_json(path)
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


def shard_arrays(kind: Kind, embeddings: Any, dtype: Precision) -> tuple[dict[str, np.ndarray], int]:
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


def save_shard(folder: Path, plan: dict[str, Any], shard: int, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a shard: whole, or not at all."""
    kind = plan["kind"]
    with atomic_file(folder / _name(kind, shard), overwrite=True) as temporary, temporary.open("wb") as file:
        if kind == "dense":
            np.save(file, arrays["values"])
        else:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        seal(temporary, _place(plan, shard))


def load_shard(folder: Path, plan: dict[str, Any], shard: int, *, verify: bool = True) -> Any:
    """The arrays of a shard; dense ones are mapped into memory.

    Args:
        folder: Where the shards are.
        plan: What it holds.
        shard: The shard's number.
        verify: Compare the file with its checksum first.

    Raises:
        FormatError: If it was damaged since it was written.
    """
    kind, dimension, size = plan["kind"], plan["dimension"], plan["shard_documents"]
    path = folder / _name(kind, shard)
    expected = min(size, plan["documents"] - shard * size)
    if verify and (why := damage(path, _place(plan, shard))) is not None:
        raise _damaged(path, why)
    try:
        if kind == "dense":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            fits = found.shape == (expected, dimension) and found.dtype == plan["dtype"]
        else:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
            counts = found["lengths"]
            fits = len(counts) == expected and len(found["values"]) == counts.sum()
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise _damaged(path, error) from error
    if not fits:
        raise _damaged(path, f"it is not {expected} embeddings of dimension {dimension}")
    return found


def joined_shards(kind: Kind, shards: Sequence[Any], dimension: int) -> Any:
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


def _place(plan: dict[str, Any], shard: int) -> str:
    return f"{plan['fingerprint']} {shard}"


def _damaged(path: Path, why: object) -> FormatError:
    return FormatError(
        f"this shard was damaged after it was written: {why}. Run the same embed_corpus, or evaluation, again: it "
        "finds the shard and encodes it anew.",
        file=str(path),
    )
