"""The score store: opening, size on disk, look-ups, ensembles and conversion, beside a pickled dict of dicts.

Default: stores of 4 million scores, some five minutes of two idle cores, half a gigabyte of disk. `--full` measures the
first at the size of MS MARCO's distillation sets, 800,000 queries x 200: 1.2 GB of disk, three minutes more. `--store`
measures one that exists. Every measurement runs in a process of its own, so that its memory is its own, and files are
dropped from the page cache before they are opened.

    python benchmarks/store.py
    python benchmarks/store.py --full --output benchmarks/results/store.json
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
from benchmark_results import provenance, render, save, table

from st_m3se.scores import TeacherScores, TeacherScoresWriter, combine, convert

DOCUMENTS = 8_841_823  # as many as MS MARCO has passages
BLOCK = 2_000
MIB = 2**20
WORDS = [f"{a}{b}{c}" for a in "bdfklmnprst" for b in "aeiou" for c in ("n", "r", "st", "lm", "")]
CONVERTED = (
    "marginmse", "marginmse-text", "gpl", "hard-negatives", "score-pickle", "flagembedding", "pylate", "tevatron",
    "colbert", "trec", "csv",
)  # fmt: skip


def synthetic(queries: int, list_size: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of query ids [Q], document ids [Q, D] (distinct in a list) and scores [Q, D], random in all their bits."""
    rng = np.random.default_rng(seed)
    ids = np.random.default_rng(1).permutation(queries * 3 // 2)[:queries]  # the same queries whatever the seed
    step = DOCUMENTS // list_size
    for start in range(0, queries, BLOCK):
        block = ids[start : start + BLOCK]
        same = np.random.default_rng(start)  # and the same documents: seeds differ in scores, as teachers do
        documents = np.arange(list_size) * step + same.integers(0, step, (len(block), list_size))
        scores = rng.normal(-2, 5, documents.shape).astype(np.float32)
        yield block, same.permuted(documents, axis=1), scores


# What is measured: functions that run in a process of their own, and return what goes into the tables.


def build(path: str, queries: int, list_size: int, ids: str, seed: int) -> dict[str, float]:
    """Write a store."""
    start = time.perf_counter()
    with TeacherScoresWriter(path) as writer:
        for query_ids, documents, scores in synthetic(queries, list_size, seed):
            kind = pa.int64() if ids == "int" else pa.string()
            offsets = pa.array(np.arange(len(query_ids) + 1) * list_size, pa.int32())
            columns = {
                "query_id": pa.array(query_ids).cast(kind),
                "document_ids": pa.ListArray.from_arrays(offsets, pa.array(documents.ravel()).cast(kind)),
                "scores": pa.ListArray.from_arrays(offsets, pa.array(scores.ravel())),
            }
            writer.write_table(pa.table(columns))
    return {"seconds": time.perf_counter() - start, "bytes": _size(Path(path))}


def open_store(path: str) -> dict[str, float]:
    """Open a store and look queries up in it."""
    _forget(Path(path))
    before = _resident()
    start = time.perf_counter()
    store = TeacherScores.open(path)
    opened = time.perf_counter() - start
    result = {"open": opened, "before": before, "after": _resident()}
    ids = store.query_ids().slice(0, 1000).to_pylist()
    start = time.perf_counter()
    _ = store[ids[0]]
    result["first"] = time.perf_counter() - start
    some = np.random.default_rng(0).integers(0, len(store), 1000)
    wanted = store.query_ids().take(pa.array(some)).to_pylist()
    start = time.perf_counter()
    for query_id in wanted:
        _ = store[query_id]
    result["lookup"] = (time.perf_counter() - start) / len(wanted)
    return {**result, "lookup_peak": _peak()}


def read_store(path: str) -> dict[str, float]:
    """Read all of a store in order."""
    start, scores = time.perf_counter(), 0
    for each in TeacherScores.open(path).tables():
        scores += len(each.column("scores").combine_chunks().flatten())
    return {"rate": scores / (time.perf_counter() - start), "peak": _peak()}


def dump_pickle(store: str, path: str) -> dict[str, float]:
    """Write the same scores as a pickled dict of dicts, as `msmarco-hard-negatives` publishes them."""
    nested = {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in TeacherScores.open(store)}
    with Path(path).open("wb") as file:
        pickle.dump(nested, file, protocol=pickle.HIGHEST_PROTOCOL)
    return {"bytes": Path(path).stat().st_size}


def load_pickle(path: str) -> dict[str, float]:
    """Load such a pickle."""
    _forget(Path(path))
    before = _resident()
    start = time.perf_counter()
    with Path(path).open("rb") as file:
        nested = pickle.load(file)
    result = {"open": time.perf_counter() - start, "before": before, "after": _resident()}
    wanted = np.random.default_rng(0).choice(list(nested), 1000).tolist()
    start = time.perf_counter()
    for query_id in wanted:
        _ = list(nested[query_id]), list(nested[query_id].values())
    return {**result, "lookup": (time.perf_counter() - start) / len(wanted)}


def convert_file(source: str, destination: str) -> dict[str, Any]:
    """Convert a file to a store."""
    start = time.perf_counter()
    done = convert(source, destination)
    seconds = time.perf_counter() - start
    return {"format": done.source_format, "rate": done.scores / seconds, "scores": done.scores, "peak": _peak()}


def combine_stores(first: str, second: str, output: str) -> dict[str, float]:
    """Combine two stores."""
    start = time.perf_counter()
    both = combine([first, second], output)
    return {"rate": both.manifest["scores"] / (time.perf_counter() - start), "peak": _peak()}


def idle() -> dict[str, float]:
    """Nothing: the memory of the interpreter and the imports alone."""
    return {"peak": _peak()}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "open_store": open_store,
    "read_store": read_store,
    "dump_pickle": dump_pickle,
    "load_pickle": load_pickle,
    "convert_file": convert_file,
    "combine_stores": combine_stores,
    "idle": idle,
}


def measure(name: str, **arguments: Any) -> Any:
    """Run one of MEASUREMENTS in a fresh interpreter."""
    print(f"{name} {' '.join(map(str, arguments.values()))}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, json.dumps(arguments)], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


# Files of every format, for the conversions.


def write_file(path: Path, kind: str, pairs: int) -> None:
    """A file with ``pairs`` scores, 20 to a query, one positive each."""
    rng = np.random.default_rng(0)
    size = 20
    if kind == "score-pickle":
        nested = {
            int(query): dict(zip(documents.tolist(), scores.tolist(), strict=True))
            for block in synthetic(pairs // size, size)
            for query, documents, scores in zip(*block, strict=True)
        }
        path.write_bytes(pickle.dumps(nested, protocol=4))
        return
    line = LINES[kind]
    with path.open("w", encoding="utf-8") as file:
        if kind == "csv":
            file.write("query_id,document_id,score\n")
        for block in synthetic(pairs // size, size):
            for query, documents, scores in zip(*block, strict=True):
                file.writelines(line(int(query), documents.tolist(), [round(s, 4) for s in scores.tolist()], rng))


def _text(rng: np.random.Generator, words: int = 50) -> str:
    return " ".join(WORDS[place] for place in rng.integers(0, len(WORDS), words))


def _pairs(template: str) -> Callable[..., Iterator[str]]:
    def lines(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Iterator[str]:
        for document, score in zip(documents[1:], scores[1:], strict=True):
            yield template.format(
                p=scores[0], n=score, q=query, pos=documents[0], neg=document, margin=round(scores[0] - score, 4)
            )

    return lines


def _text_pairs(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Iterator[str]:
    question, positive = _text(rng, 8), _text(rng)
    for score in scores[1:]:
        yield f"{scores[0]}\t{score}\t{question}\t{positive}\t{_text(rng)}\n"


def _singles(template: str) -> Callable[..., Iterator[str]]:
    def lines(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Iterator[str]:
        for rank, (document, score) in enumerate(zip(documents, scores, strict=True), start=1):
            yield template.format(q=query, d=document, rank=rank, s=score)

    return lines


def _json(shape: Callable[..., Any]) -> Callable[..., Iterator[str]]:
    def lines(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Iterator[str]:
        yield json.dumps(shape(query, documents, scores, rng)) + "\n"

    return lines


def _hard_negatives(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Any:
    scored = [{"pid": d, "ce-score": s} for d, s in zip(documents, scores, strict=True)]
    return {"qid": query, "pos": scored[:1], "neg": {"bm25": scored[1:10], "dense": scored[10:]}}


def _flagembedding(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Any:
    texts = [_text(rng) for _ in documents]
    return {
        "query": _text(rng, 8), "pos": texts[:1], "neg": texts[1:], "pos_scores": scores[:1], "neg_scores": scores[1:],
    }  # fmt: skip


def _tevatron(query: int, documents: list[int], scores: list[float], rng: np.random.Generator) -> Any:
    passages = [
        {"docid": str(d), "title": "", "text": _text(rng), "score": s} for d, s in zip(documents, scores, strict=True)
    ]
    return {
        "query_id": str(query), "query": _text(rng, 8), "positive_passages": passages[:1],
        "negative_passages": passages[1:],
    }  # fmt: skip


LINES: dict[str, Callable[..., Iterator[str]]] = {
    "marginmse": _pairs("{p}\t{n}\t{q}\t{pos}\t{neg}\n"),
    "marginmse-text": _text_pairs,
    "gpl": _pairs("{q}\t{pos}\t{neg}\t{margin}\n"),
    "hard-negatives": _json(_hard_negatives),
    "flagembedding": _json(_flagembedding),
    "pylate": _json(lambda q, d, s, rng: {"query_id": q, "document_ids": d, "scores": s}),
    "tevatron": _json(_tevatron),
    "colbert": _json(lambda q, d, s, rng: [q, *([document, score] for document, score in zip(d, s, strict=True))]),
    "trec": _singles("{q} Q0 {d} {rank} {s} teacher\n"),
    "csv": _singles("{q},{d},{s}\n"),
}


# The tables.


def store_table(folder: Path, queries: int, list_size: int, small: int, store: Path | None) -> Any:
    """The large store, which has integer ids if it is made here, and a small one with strings."""
    rows = []
    for path, count, ids in ((store or folder / "large", queries, "int"), (folder / "strings", small, "str")):
        built = None
        if path != store:
            built = measure("build", path=str(path), queries=count, list_size=list_size, ids=ids, seed=0)
        known = TeacherScores.open(path)
        scores = known.manifest["scores"]
        opened, read = measure("open_store", path=str(path)), measure("read_store", path=str(path))
        rows.append([
            known.id_types[1].__name__, len(known), scores, _size(path) / scores, opened["open"],
            opened["after"] / MIB, opened["before"] / MIB, opened["first"], opened["lookup"] * 1000,
            opened["lookup_peak"] / MIB, read["rate"] / 1e6, built and scores / built["seconds"] / 1e6,
        ])  # fmt: skip
        if path != store:
            _remove(path)
    columns = [
        "document ids", "queries", "scores", "bytes a score", "open, s", "resident after, MiB", "of it before, MiB",
        "first look-up, s", "look-up, ms", "peak of look-ups, MiB", "read, M scores/s", "write, M scores/s",
    ]  # fmt: skip
    return table("Stores", columns, rows)


def ensemble_table(folder: Path, queries: int, list_size: int) -> Any:
    """Two stores combined, and two of a quarter of their size: the peak must not follow the size."""
    row: list[Any] = [queries * list_size]
    for count in (queries // 4, queries):
        for seed in (0, 1):
            path = folder / f"teacher-{seed}"
            measure("build", path=str(path), queries=count, list_size=list_size, ids="int", seed=seed)
        both = measure(
            "combine_stores",
            first=str(folder / "teacher-0"),
            second=str(folder / "teacher-1"),
            output=str(folder / "both"),
        )
        row.append(both["peak"] / MIB)
        for name in ("teacher-0", "teacher-1", "both"):
            _remove(folder / name)
    row.insert(1, both["rate"] / 1e6)
    columns = ["scores of each", "M scores/s", "peak at a quarter of the size, MiB", "peak, MiB"]
    return table("The mean of two stores' z-scores", columns, [row])


def peer_table(folder: Path, queries: int, list_size: int) -> Any:
    """The store beside a pickled dict of dicts, at a size where that fits."""
    store, file = folder / "small", folder / "small.pkl"
    built = measure("build", path=str(store), queries=queries, list_size=list_size, ids="int", seed=0)
    dumped = measure("dump_pickle", store=str(store), path=str(file))
    ours, theirs = measure("open_store", path=str(store)), measure("load_pickle", path=str(file))
    rows = [
        ["file, MiB", built["bytes"] / MIB, dumped["bytes"] / MIB],
        ["open, s", ours["open"], theirs["open"]],
        ["memory that opening takes, MiB", (ours["after"] - ours["before"]) / MIB,
         (theirs["after"] - theirs["before"]) / MIB],
        ["look-up of a query's list, ms", ours["lookup"] * 1000, theirs["lookup"] * 1000],
    ]  # fmt: skip
    _remove(store)
    file.unlink()
    title = f"The same {queries * list_size:,} scores as a store and as a pickled dict of dicts"
    return table(
        title, ["", "store", "pickle", "pickle / store"], [[*row, row[2] / row[1] if row[1] else None] for row in rows]
    )


def conversion_table(folder: Path, pairs: int) -> Any:
    """One file of each format, and one of a quarter of its size: the peak must not follow the size."""
    rows = []
    base = measure("idle")["peak"]
    for kind in CONVERTED:
        peaks = []
        for count in (pairs // 4, pairs):
            write_file(folder / "file", kind, count)
            size = (folder / "file").stat().st_size
            done = measure("convert_file", source=str(folder / "file"), destination=str(folder / "converted"))
            if done["format"] != kind:
                raise RuntimeError(f"the file of {kind} was read as {done['format']}.")
            peaks.append((done["peak"] - base) / MIB)
            _remove(folder / "converted")
        rows.append([kind, size / MIB, done["scores"], done["rate"], *peaks])
    (folder / "file").unlink()
    columns = [
        "format", "file, MiB", "scores", "scores/s", "peak at a quarter of the size, MiB", "peak, MiB",
    ]  # fmt: skip
    title = f"Conversion to a store; memory beyond the {base / MIB:.0f} MiB of the interpreter and its imports"
    return table(title, columns, rows)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def _forget(path: Path) -> None:
    """Drop a file, or a folder's files, from the page cache, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """The most memory that this process ever had; Linux's rusage would count the parent's before exec."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure, print the tables, and write them where --output says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=20_000, help="of the large store (20,000)")
    parser.add_argument("--full", action="store_true", help="the same as --queries 800000")
    parser.add_argument("--store", type=Path, help="a store that exists, to be measured as the large one")
    parser.add_argument("--small", type=int, default=20_000, help="queries of all other stores (20,000)")
    parser.add_argument("--list-size", type=int, default=200, help="documents of each query (200)")
    parser.add_argument("--pairs", type=int, default=200_000, help="scores in each file to convert (200,000)")
    parser.add_argument("--folder", type=Path, help="where the files are made and removed again")
    parser.add_argument("--output", type=Path, help="where the result is written as JSON")
    options = parser.parse_args()
    queries = 800_000 if options.full else options.queries
    facts = provenance()
    tables: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        for make, sizes in (
            (store_table, (queries, options.list_size, options.small, options.store)),
            (ensemble_table, (options.small, options.list_size)),
            (peer_table, (options.small, options.list_size)),
            (conversion_table, (options.pairs,)),
        ):
            tables.append(make(folder, *sizes))
            if options.output is not None:  # after each: the next may take long
                save(options.output, "store", facts, tables)
    print(render({"command": " ".join(sys.argv), "provenance": facts, "tables": tables}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(MEASUREMENTS[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main()
