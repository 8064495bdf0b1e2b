"""A run of scoring on disk: what it is, which shards are done, who works on which, and the store that it becomes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file, read_checked_json, sweep, sync, write_checked_json
from st_m3se.core.ragged import list_array, list_lengths
from st_m3se.retrieval.candidate_lists import CandidateLists
from st_m3se.scores.writer import MANIFEST, UNFINISHED, TeacherScoresWriter

__all__ = ["ScoringRun"]

VERSION = 1
TARGET_SHARDS = 256
UNDONE = ".some"  # the ending of what is kept of a shard that is not done
SHARD_SCORES = (1_024, 65_536)  # seconds of a fast teacher's work, and what fits into memory whatever the texts


class ScoringRun:
    """The folder of a run, from its first shard to the finished store.

    While scores are missing the folder holds ``scoring.json`` (what the scores depend on, and how the work is cut)
    and ``parts/``: a file of scores for each finished shard, one of what is kept of each begun one, and lock files,
    which say that a process works on one and which the system releases when that process ends, however it ends. When
    all parts are there they become a store,
    whose ``manifest.json`` is the last file to appear. Every file appears whole (write, fsync, rename).

    Args:
        output: The folder: new, empty, or this run's own.
        settings: What must not change between the processes of a run: teacher, precision, inputs. ``teacher`` and
            ``revision`` are names, and compared only where no ``weights`` identify the teacher better.
        candidates: The lists to score.
        shard_queries: Queries in a shard. None goes on as begun, or takes so many that there are 256 shards, but
            of 1,024 to 65,536 scores.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If the run was begun with other settings; the message says which.
    """

    def __init__(
        self, output: Path, settings: Mapping[str, Any], candidates: CandidateLists, shard_queries: int | None = None
    ) -> None:
        if shard_queries is not None and shard_queries < 1:
            raise ValueError(f"shard_queries must be at least 1, got {shard_queries}.")
        self.output, self._candidates = output, candidates
        self._parts = output / "parts"
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"{output} is a file. The scores make a folder: choose another name.")
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / ".lock"):
            plan = self._begin(dict(settings), shard_queries)
        self.shard_queries: int = plan["shard_queries"]
        starts = np.arange(0, len(candidates.lengths), self.shard_queries)
        self.sizes = np.add.reduceat(candidates.lengths.astype(np.int64), starts)
        self._claims: dict[int, FileLock] = {}

    def _begin(self, settings: dict[str, Any], shard_queries: int | None) -> dict[str, Any]:
        path = self.output / UNFINISHED
        sweep(path)
        if path.is_file():
            plan = _read_plan(path)
            _compare(self.output, plan, settings, shard_queries)
            return plan
        if [entry for entry in self.output.iterdir() if not entry.name.startswith(".")]:
            raise FileExistsError(
                f"{self.output} exists and was not begun by scoring (it has no {UNFINISHED}); it is left alone. Choose "
                "another name."
            )
        lengths = self._candidates.lengths
        if shard_queries is None:
            low, high = SHARD_SCORES
            mean = max(1.0, float(lengths.mean()))
            shard_queries = max(1, round(min(max(lengths.sum() / TARGET_SHARDS, low), high) / mean))
        plan = {"version": VERSION, "settings": settings, "shard_queries": shard_queries}
        write_checked_json(path, plan)
        return plan

    @property
    def finished(self) -> bool:
        """Whether the store is there."""
        return (self.output / MANIFEST).is_file()

    def missing(self) -> list[int]:
        """The shards without scores, by number."""
        if self.finished:
            return []
        done = {path.name for path in self._parts.glob("*.parquet")} if self._parts.is_dir() else set()
        return [number for number in range(len(self.sizes)) if self._part(number).name not in done]

    def claim(self, number: int) -> bool:
        """Take a shard for this process, unless it is done or another process, or this one, has taken it."""
        if number in self._claims:
            return False
        self._parts.mkdir(exist_ok=True)
        lock = FileLock(self._part(number).with_suffix(".lock"), thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        if self.finished or self._part(number).is_file():
            lock.release()
            return False
        self._claims[number] = lock
        return True

    def release(self, number: int | None = None) -> None:
        """Give one claimed shard back, or all."""
        for claimed in list(self._claims) if number is None else [number]:
            self._claims.pop(claimed).release()

    def save(self, number: int, scores: np.ndarray) -> None:
        """Bring the scores of a claimed shard to the disk, float32 in the order of the candidates, and release it."""
        _write(self._part(number), scores)
        self._part(number).with_suffix(UNDONE).unlink(missing_ok=True)
        self.release(number)

    def save_some(self, number: int, scores: np.ndarray) -> None:
        """Keep what there is of a claimed shard: NaN is what there is not."""
        _write(self._part(number).with_suffix(UNDONE), scores)

    def kept(self, number: int) -> np.ndarray:
        """What is kept of a shard, float32 with NaN for what is not; a damaged file is as none."""
        path = self._part(number).with_suffix(UNDONE)
        if path.is_file():
            with suppress(FormatError):
                return np.array(self._read(path, number))
        return np.full(self.sizes[number], np.nan, dtype=np.float32)

    @property
    def saved(self) -> int:
        """Pairs whose scores are on the disk."""
        missing = self.missing()
        some = sum(int(np.isfinite(self.kept(number)).sum()) for number in missing)
        return int(self.sizes.sum() - self.sizes[missing].sum()) + some

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Join the parts of all shards into the store; one process does it, and others that come wait for it.

        Raises:
            FormatError: If a part was damaged since it was written.
        """
        with FileLock(self.output / ".lock"):
            if not self.finished:
                self._join(manifest)
            shutil.rmtree(self._parts, ignore_errors=True)
            with suppress(OSError):
                (self.output / "store").rmdir()
        with suppress(OSError):  # whoever still waits for the lock, or makes a new one, finds the store finished
            (self.output / ".lock").unlink()

    def _join(self, manifest: Mapping[str, Any]) -> None:
        # The writer makes a store of its own inside the folder; its files move up, the manifest last. Killed at any
        # point, the next process begins this again from the parts.
        store = self.output / "store"
        for leftover in [store, *self.output.glob(".store.*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        with TeacherScoresWriter(store, manifest=manifest) as writer:
            for number, table in self._candidates.shards(self.shard_queries, range(len(self.sizes))):
                documents = table.column("document_ids").combine_chunks()
                scores = list_array(self._load(number), list_lengths(documents))
                writer.write_table(table.append_column("scores", scores))
        files = sorted(path for path in store.iterdir() if path.name != MANIFEST)
        for path in [*files, store / MANIFEST]:
            if path.name == MANIFEST:
                sync(self.output)
            path.replace(self.output / path.name)
        sync(self.output)

    def _load(self, number: int) -> pa.Array:
        return self._read(self._part(number), number)

    def _read(self, path: Path, number: int) -> pa.Array:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                scores = file.read(columns=["scores"], use_threads=False).column(0).combine_chunks()
            if len(scores) != self.sizes[number] or scores.null_count or scores.type != pa.float32():
                raise ValueError(f"it has {len(scores)} scores of {scores.type}, not {self.sizes[number]} of float")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise FormatError(
                f"the scores of this shard were damaged after they were written: {error}. Delete the file and run the "
                "same command again: this shard alone is scored again.",
                file=str(path),
            ) from error
        return scores

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:06d}.parquet"


def _write(path: Path, scores: np.ndarray) -> None:
    with atomic_file(path, overwrite=True) as temporary:
        table = pa.table({"scores": pa.array(scores, pa.float32())})
        pq.write_table(
            table,
            temporary,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = read_checked_json(path, required=False)  # runs of the first version have no checksum
        version, _, shard_queries = plan["version"], dict(plan["settings"]), plan["shard_queries"]
        if version != VERSION or not isinstance(shard_queries, int) or shard_queries < 1:
            raise ValueError(f"version {version!r}, shard_queries {shard_queries!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"this does not describe a run of scoring that this version can go on with: {error!r}", file=str(path)
        ) from None
    return dict(plan)


def _compare(output: Path, plan: Mapping[str, Any], settings: Mapping[str, Any], shard_queries: int | None) -> None:
    begun = dict(plan["settings"])
    now = json.loads(json.dumps(settings))
    if begun.get("weights") and now.get("weights"):  # a folder may be moved, a branch may be called by its commit
        for name in ("teacher", "revision"):
            begun.pop(name, None)
            now.pop(name, None)
    if shard_queries is not None:
        begun["shard_queries"], now["shard_queries"] = plan["shard_queries"], shard_queries
    differences = [
        f"{name} was {begun.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*begun, *now])
        if begun.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{output} was begun with something else: {'; '.join(differences)}. Its scores and the new ones would not "
            "belong together: go on with what it was begun with, or choose another output."
        )
