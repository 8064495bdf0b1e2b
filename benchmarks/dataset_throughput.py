"""Reading training lists: time a batch and memory, beside a join in Python dicts and the host's resolve_ids.

Batches of 32 queries x 16 documents, drawn from 100 scored candidates each, with the texts (some 60 words each) of a
corpus of a million: what one data-loader worker does before tokenisation. The peers get the same scores and texts. A
dict of all texts is what a script writes first; resolve_ids joins lazily as well, but takes the first 16 candidates as
they are stored, every epoch the same. Every measurement runs in a process of its own, so that its memory is its own,
and reads rows in the same random order; texts are in the page cache. On a machine that is busy otherwise, the processor
time says more than the wall time.

Default: some five minutes of one idle core, 2 GB of disk.

    python benchmarks/dataset_throughput.py
    python benchmarks/dataset_throughput.py --output benchmarks/results/dataset_throughput.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benchmark_results import provenance, render, save, table

from st_m3se.scores import TeacherScores, TeacherScoresWriter

BATCH, LIST_SIZE, WORDS = 32, 16, 60
BLOCK = 10_000
WARM_UP = 100
MIB = 2**20


def make(folder: Path, documents: int, queries: int, candidates: int) -> None:
    """Write texts as Parquet and scores as a store; each query's first candidate has the highest score."""
    rng = np.random.default_rng(0)
    vocabulary = np.array(
        ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in rng.integers(2, 10, 20_000)]
    )
    stream = rng.choice(vocabulary, documents + 2 * WORDS).tolist()
    for name, prefix, count, length in (("corpus", "d", documents, WORDS), ("queries", "q", queries, 8)):
        with pq.ParquetWriter(
            folder / f"{name}.parquet", pa.schema({"id": pa.string(), "text": pa.string()})
        ) as writer:
            for start in range(0, count, BLOCK):
                rows = range(start, min(start + BLOCK, count))
                texts = [f"{prefix}{row} {' '.join(stream[row : row + length])}" for row in rows]
                writer.write_table(pa.table({"id": [f"{prefix}{row}" for row in rows], "text": texts}))
    with TeacherScoresWriter(folder / "scores") as writer:
        for query in range(queries):
            chosen = rng.choice(documents, candidates, replace=False)
            scores = np.sort(rng.normal(-2, 5, candidates))[::-1]
            writer.write(f"q{query}", [f"d{row}" for row in chosen], scores.tolist())


# The ways to read: each returns a dataset whose rows are read by `dataset.__getitems__(places)`, as a data loader does.


def ours(folder: Path, sampling: Any) -> Any:
    """This package's dataset."""
    from st_m3se import build_distillation_dataset

    return build_distillation_dataset(
        folder / "scores",
        folder / "queries.parquet",
        folder / "corpus.parquet",
        list_size=LIST_SIZE,
        sampling=sampling,
        cache_dir=folder / "cache",
    )


def lookup_datasets(folder: Path) -> Any:
    """The texts, as the datasets library maps them into memory."""
    from datasets import Dataset

    return (
        Dataset.from_parquet(str(folder / f"{name}.parquet"), cache_dir=str(folder / "datasets"))
        for name in ("queries", "corpus")
    )


def scores_dataset(folder: Path) -> Any:
    """The scores, alike."""
    from datasets import Dataset

    files = [str(file) for file in sorted((folder / "scores").glob("*.parquet"))]
    return Dataset.from_parquet(files, cache_dir=str(folder / "datasets"))


def with_resolve_ids(folder: Path) -> Any:
    """The host's lazy join."""
    from sentence_transformers.util import resolve_ids

    queries, corpus = lookup_datasets(folder)
    lookups = {"query_id": queries, "document_ids": corpus}
    return scores_dataset(folder).with_transform(resolve_ids(lookups, output_format="lists", max_list_length=LIST_SIZE))


def with_dicts(folder: Path) -> Any:
    """All texts in two dicts, and a random list in Python."""
    queries, corpus = (dict(zip(texts["id"], texts["text"], strict=True)) for texts in lookup_datasets(folder))

    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {"query": [], "documents": [], "scores": [], "positives": []}
        for query_id, ids, scores in zip(batch["query_id"], batch["document_ids"], batch["scores"], strict=True):
            places = [0, *random.sample(range(1, len(ids)), LIST_SIZE - 1)]
            rows["query"].append(queries[query_id])
            rows["documents"].append([corpus[ids[place]] for place in places])
            rows["scores"].append([scores[place] for place in places])
            rows["positives"].append([place == 0 for place in places])
        return rows

    return scores_dataset(folder).with_transform(join)


WAYS: dict[str, Callable[[Path], Any]] = {
    "st-m3se, stratified": lambda folder: ours(folder, "stratified"),
    "st-m3se, random": lambda folder: ours(folder, "random"),
    "st-m3se, top": lambda folder: ours(folder, "top"),
    "dict of all texts, random": with_dicts,
    "resolve_ids, first 16 always": with_resolve_ids,
}


def resident(kind: str) -> float:
    """This process's memory in MiB: RssAnon is its own, RssFile what it looked at of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith(kind))


def measure(folder: Path, way: str, batches: int) -> dict[str, float]:
    """Open, warm up, and read batches in a random order."""
    import datasets  # noqa: F401  what the imports take is not what opening takes
    import sentence_transformers.util  # noqa: F401
    import torch

    import st_m3se.training.dataset  # noqa: F401

    torch.set_num_threads(1)
    before = resident("RssAnon")
    start = time.perf_counter()
    dataset = WAYS[way](folder)
    opening = time.perf_counter() - start
    rng = np.random.default_rng(1)
    order = np.concatenate(
        [rng.permutation(len(dataset)) for _ in range(1 + (batches + WARM_UP) * BATCH // len(dataset))]
    )
    times, cpu, memory = [], [], []
    for number in range(WARM_UP + batches):
        places = order[number * BATCH : (number + 1) * BATCH].tolist()
        start, used = time.perf_counter(), time.process_time()
        rows = dataset.__getitems__(places)
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        if number == 0 and not all(len(row["documents"]) == LIST_SIZE and row["query"] for row in rows):
            raise AssertionError("these are not the lists that were asked for")
        if number >= WARM_UP - 1:
            memory.append(resident("RssAnon"))
    milliseconds = np.array(times[WARM_UP:]) * 1000
    return {
        "opening": opening,
        "median": float(np.median(milliseconds)),
        "cpu": float(np.mean(cpu[WARM_UP:]) * 1000),
        "p99": float(np.percentile(milliseconds, 99)),
        "memory": memory[0] - before,
        "growth": memory[-1] - memory[0],
        "mapped": resident("RssFile"),
    }


def in_own_process(folder: Path, way: str, batches: int) -> dict[str, float]:
    """Measure one way in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", way, "--folder", str(folder), "--batches", str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Make the data, measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--batches", type=int, default=3_000, help="batches that are timed, for each way")
    parser.add_argument("--folder", type=Path, help="keep the data here; none: a temporary folder")
    parser.add_argument("--output", type=Path, help="write the tables here, as JSON")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure, options.batches)))
        return
    facts = provenance()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "scores").exists():
            folder.mkdir(parents=True, exist_ok=True)
            print("making texts and scores ...", file=sys.stderr)
            make(folder, options.documents, options.queries, options.candidates)
        scores = len(TeacherScores.open(folder / "scores")) * options.candidates
        rows = []
        for way in ["first run", *WAYS]:
            print(f"{way} ...", file=sys.stderr)
            name = next(iter(WAYS)) if way == "first run" else way
            found = in_own_process(folder, name, options.batches)
            if way == "first run":
                first = found["opening"]  # the files are read, checked, joined and kept; from now on they are mapped
                continue
            cells = ("median", "p99", "cpu", "opening", "memory", "growth", "mapped")
            rows.append([way, *(found[cell] for cell in cells)])
    title = (
        f"Batches of {BATCH} x {LIST_SIZE} texts, {options.documents:,} documents, {scores:,} scores, "
        f"{options.batches:,} batches after {WARM_UP}"
    )
    columns = [
        "way",
        "ms a batch (median)",
        "ms (99 %)",
        "CPU ms (mean)",
        "seconds to open",
        "own memory, MiB",
        "its growth over the batches, MiB",
        "mapped files looked at, MiB",
    ]
    tables = [
        table(title, columns, rows),
        table("The first run only", ["what", "seconds"], [["reading, checking and joining all ids and texts", first]]),
    ]
    result = {"command": "", "provenance": facts, "tables": tables}
    print(render({**result, "command": "python benchmarks/dataset_throughput.py"}))
    if options.output:
        save(options.output, "dataset_throughput", facts, tables)


if __name__ == "__main__":
    main()
