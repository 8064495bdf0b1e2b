"""Exact search: time and memory beside beir's, FAISS's and the bare matrix product, on the same vectors in one run.

Random vectors of unit length lie in a file, of which every way reads chunk by chunk what it asks for; FAISS's flat
index has to hold them all. Each way runs in a process of its own, one after the other. The memory is what the search
takes beyond what it was given: the highest resident memory during it less that before it. The floor is the matrix
product alone, in chunks that suit it, its results thrown away. At the end the lists are compared: documents may only
differ where scores are as good as equal.

The clock starts at the call of the search. beir gets its corpus of dicts and its ids before that, and its model
"encodes" by reading the file.

    python benchmarks/search.py --queries 1000 --documents 1000000 --dimension 384 --depth 1000   # 2 cores: 5 minutes
    python benchmarks/search.py --documents 100000 --output benchmarks/results/search.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_results import provenance, render, save, table

MIB = 2**20
CHUNK = 16_384  # documents that are read at once by this package's search and by the product
FLOOR = 4_096  # documents of one product
TOLERANCE = 1e-5
Found = tuple[np.ndarray, np.ndarray]  # documents and their scores, [queries, depth] each


@dataclass(frozen=True)
class Sizes:
    """What is searched for where."""

    queries: int
    documents: int
    dimension: int
    depth: int


def make(folder: Path, sizes: Sizes) -> None:
    """Write the vectors."""
    rng = np.random.default_rng(0)
    for name, count in (("queries", sizes.queries), ("documents", sizes.documents)):
        with (folder / name).open("wb") as file:
            for start in range(0, count, CHUNK):
                rows = rng.standard_normal((min(CHUNK, count - start), sizes.dimension), dtype=np.float32)
                file.write((rows / np.linalg.norm(rows, axis=1, keepdims=True)).tobytes())


def read(folder: Path, name: str, sizes: Sizes, start: int, count: int) -> torch.Tensor:
    """Some of the vectors, read into memory of their own."""
    width = 4 * sizes.dimension
    with (folder / name).open("rb") as file:
        file.seek(start * width)
        content = bytearray(count * width)
        file.readinto(content)
    return torch.frombuffer(content, dtype=torch.float32).view(count, sizes.dimension)


def chunks(folder: Path, sizes: Sizes, size: int) -> Iterator[torch.Tensor]:
    """All documents, chunk by chunk."""
    for start in range(0, sizes.documents, size):
        yield read(folder, "documents", sizes, start, min(size, sizes.documents - start))


# The ways to search: each prepares, and returns the search itself as a function to be timed.


def ours(folder: Path, sizes: Sizes) -> Callable[[], Any]:
    """This package's."""
    from st_m3se.retrieval.search import search

    queries = read(folder, "queries", sizes, 0, sizes.queries)
    return lambda: tuple(search(queries, chunks(folder, sizes, CHUNK), sizes.depth))


def beir(folder: Path, sizes: Sizes) -> Callable[[], Any]:
    """beir's, with a model whose embeddings are known."""
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    class Reader:
        def encode_queries(self, queries: list[str], **_: Any) -> torch.Tensor:
            return read(folder, "queries", sizes, 0, len(queries))

        def encode_corpus(self, corpus: list[dict[str, str]], **_: Any) -> torch.Tensor:
            return read(folder, "documents", sizes, int(corpus[0]["text"]), len(corpus))

    # beir sorts by length, so that texts of one length keep their order.
    corpus = {str(row): {"title": "", "text": f"{row:012d}"} for row in range(sizes.documents)}
    queries = {f"q{row}": "" for row in range(sizes.queries)}
    search = DenseRetrievalExactSearch(Reader(), show_progress_bar=False)

    def run() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = search.search(corpus, queries, sizes.depth, "dot")
        return found

    return run


def faiss_flat(folder: Path, sizes: Sizes) -> Callable[[], Any]:
    """FAISS's exact index."""
    import faiss

    queries = read(folder, "queries", sizes, 0, sizes.queries).numpy()

    def run() -> Found:
        index = faiss.IndexFlatIP(sizes.dimension)
        for chunk in chunks(folder, sizes, CHUNK):
            index.add(chunk.numpy())
        scores, rows = index.search(queries, sizes.depth)
        return rows, scores

    return run


def product(folder: Path, sizes: Sizes) -> Callable[[], Any]:
    """All scores, and nothing done with them."""
    queries = read(folder, "queries", sizes, 0, sizes.queries)
    into = torch.empty(sizes.queries, FLOOR)

    def run() -> None:
        for chunk in chunks(folder, sizes, CHUNK):
            for part in chunk.split(FLOOR):
                torch.mm(queries, part.T, out=into[:, : len(part)] if len(part) == FLOOR else None)

    return run


WAYS: dict[str, Callable[[Path, Sizes], Callable[[], Any]]] = {
    "matrix product alone": product,
    "st-m3se": ours,
    "beir": beir,
    "FAISS, Flat": faiss_flat,
}


def resident() -> float:
    """This process's memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


class Peak:
    """The highest resident memory while the block runs, by looking every few milliseconds."""

    def __enter__(self) -> Peak:
        """Begin to look."""
        self.before = self.highest = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self._done.set()
        self._thread.join()
        self.highest = max(self.highest, resident())


def measure(folder: Path, way: str, sizes: Sizes) -> dict[str, float]:
    """Search once, and leave the lists in the folder."""
    run = WAYS[way](folder, sizes)
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))  # threads and kernels are there
    used = resource.getrusage(resource.RUSAGE_SELF)
    with Peak() as memory:
        start = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_SELF)
    if isinstance(found, dict):
        lists = [sorted(found[f"q{row}"].items(), key=lambda pair: -pair[1]) for row in range(sizes.queries)]
        found = (
            np.array([[int(key) for key, _ in each] for each in lists]),
            np.array([[score for _, score in each] for each in lists]),
        )
    if found is not None:
        np.savez(folder / f"{way}.npz", rows=found[0].astype(np.int64), scores=found[1].astype(np.float64))
    return {
        "seconds": seconds,
        "cpu": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        "memory": memory.highest - memory.before,
        "whole": memory.highest,
    }


def in_own_process(folder: Path, way: str, sizes: Sizes) -> dict[str, float]:
    """The same in a process of its own."""
    arguments = [f"--{key}={value}" for key, value in asdict(sizes).items()]
    command = [sys.executable, __file__, *arguments, "--folder", str(folder), "--measure", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(folder: Path, way: str) -> float:
    """The largest difference of scores to this package's lists.

    Raises:
        ValueError: If scores differ, or a document is missing whose score is not that of the last one.
    """
    mine, other = (dict(np.load(folder / f"{name}.npz")) for name in ("st-m3se", way))
    differences = np.abs(mine["scores"] - other["scores"]).max(axis=1)
    for query, (left, right) in enumerate(zip(mine["rows"], other["rows"], strict=True)):
        worst = mine["scores"][query].min()
        for result, documents in ((mine, np.setdiff1d(left, right)), (other, np.setdiff1d(right, left))):
            scores = result["scores"][query][np.isin(result["rows"][query], documents)]
            if differences[query] > TOLERANCE or scores.max(initial=worst) > worst + TOLERANCE:
                raise ValueError(
                    f"query {query}: {way} and st-m3se differ, by {differences[query]:.1e} in scores and in documents "
                    f"{documents[:3].tolist()}, which are not as good as equal to the last."
                )
    return float(differences.max())


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--depth", type=int, default=1_000)
    parser.add_argument("--folder", type=Path, help="keep the vectors and lists here; none: a temporary folder")
    parser.add_argument("--output", type=Path, help="write the table here, as JSON")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = Sizes(options.queries, options.documents, options.dimension, options.depth)
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure, sizes)))
        return
    facts = provenance()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print("making vectors ...", file=sys.stderr)
        make(folder, sizes)
        ways = [way for way in WAYS if way != "FAISS, Flat" or find_spec("faiss") is not None]
        found = {}
        for way in ways:
            print(f"{way} ...", file=sys.stderr)
            found[way] = in_own_process(folder, way, sizes)
        rows = []
        mine, floor = found["st-m3se"], found["matrix product alone"]
        for way in ways:
            each = found[way]
            difference = None if way in ("matrix product alone", "st-m3se") else f"{compare(folder, way):.0e}"
            rows.append(
                [
                    way,
                    each["seconds"],
                    each["seconds"] / mine["seconds"],
                    each["seconds"] / floor["seconds"],
                    each["cpu"],
                    each["memory"],
                    each["whole"],
                    difference,
                ]
            )
    columns = [
        "way",
        "seconds",
        "to st-m3se's",
        "to the product's",
        "CPU seconds",
        "memory of the search, MiB",
        "of the whole process, MiB",
        "largest difference of scores to st-m3se's",
    ]
    title = (
        f"{sizes.queries:,} queries x {sizes.documents:,} documents x {sizes.dimension}, top {sizes.depth:,}, float32, "
        f"{torch.get_num_threads()} threads"
    )
    tables = [table(title, columns, rows)]
    print(render({"command": "python benchmarks/search.py", "provenance": facts, "tables": tables}))
    if options.output:
        save(options.output, "search", facts, tables)


if __name__ == "__main__":
    main()
