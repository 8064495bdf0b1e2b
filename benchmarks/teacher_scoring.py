"""Scoring with a teacher: score_candidates beside CrossEncoder.predict, and its own overhead with a stub teacher.

The first part scores real pairs of mixed length from BEIR folders with both, block by block in turn, at the same
precision on the same device, and compares the scores: the best 20 documents of BM25 for each query, as a teacher gets
them. score_candidates pays for all that it does: fingerprints, shards on disk, the finished store. On a GPU predict
runs as it comes (float32, 32 pairs a batch) as well; on a CPU score_candidates runs in int8, too, and Kendall's tau of
its lists to predict's says how much of the order is left.
Where other work shares the CPU, its seconds are the fairer measure.
20,000 pairs of up to 512 tokens with a 12-layer MiniLM take an hour or more on two CPU cores, and a minute on a GPU;
--pairs 1000 says the same in minutes. The second part (--stub-pairs) scores that many pairs with a function that costs
next to nothing, in a process of its own: what is left is the package's overhead. 10 million: a minute or two.

    python benchmarks/teacher_scoring.py --teacher TEACHER --data BEIR_FOLDER --data ... --pairs 1000
    python benchmarks/teacher_scoring.py --stub-pairs 10000000 --output benchmarks/results/teacher_scoring.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS = 5
LIST_SIZE = 20
STUB_DOCUMENTS = 1_000_000
STUB_LIST_SIZE = 100
MIB = 2**20


def real_pairs(folders: list[Path], count: int) -> tuple[dict[str, list[str]], dict[str, str], dict[str, str]]:
    """Candidates, queries and documents: of each folder as many queries, and BM25's best 20 documents for each.

    A folder with fewer queries gives all of them, and the others the rest.
    """
    from st_m3se import find_candidates

    rng = random.Random(0)
    candidates: dict[str, list[str]] = {}
    queries: dict[str, str] = {}
    corpus: dict[str, str] = {}
    wanted = max(len(folders), count // LIST_SIZE)
    sets = {folder.name: (_texts(folder, "queries"), _texts(folder, "corpus")) for folder in folders}
    for place, (asked, documents) in enumerate(sorted(sets.values(), key=lambda texts: len(texts[0]))):
        share = (wanted - len(queries)) // (len(sets) - place)
        chosen = {query_id: asked[query_id] for query_id in rng.sample(sorted(asked), min(share, len(asked)))}
        with tempfile.TemporaryDirectory() as folder:
            found = find_candidates(chosen, documents, ["bm25"], Path(folder) / "run", depth=LIST_SIZE)
            candidates |= {row.query_id: list(row.document_ids) for row in found if len(row.document_ids) == LIST_SIZE}
        queries |= chosen
        corpus |= documents
    items = list(candidates.items())
    rng.shuffle(items)
    return dict(items), queries, corpus


def _texts(folder: Path, kind: str) -> dict[str, str]:
    with (folder / f"{kind}.jsonl").open(encoding="utf-8") as file:
        return {
            f"{folder.name}/{record['_id']}": f"{record.get('title') or ''} {record['text']}".strip()
            for record in map(json.loads, file)
        }


def against_predict(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds and rates of both, and how far their scores are apart."""
    import torch
    from benchmark_results import table
    from scipy.stats import kendalltau
    from sentence_transformers import CrossEncoder

    from st_m3se import score_candidates

    candidates, queries, corpus = real_pairs(options.data, options.pairs)
    model = CrossEncoder(str(options.teacher), device=options.device, max_length=options.max_length)
    gpu = model.device.type != "cpu"
    precision = "bfloat16" if gpu else "float32"
    cast = CrossEncoder(
        str(options.teacher),
        device=options.device,
        max_length=options.max_length,
        model_kwargs={"dtype": getattr(torch, precision)},
    )
    runs: dict[str, Any] = {f"CrossEncoder.predict, {precision}": cast, "score_candidates": None}
    if gpu:
        runs["CrossEncoder.predict, as it comes"] = model
    else:
        runs["score_candidates, int8"] = "int8"
    seconds, busy = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0.0)
    apart, taus, pairs, tokens = dict.fromkeys(runs, 0.0), {name: [] for name in runs}, 0, []
    identity = torch.nn.Identity()
    warm = list(candidates.items())[:2]
    texts = [(queries[query], corpus[document]) for query, documents in warm for document in documents]
    for each in {cast, model}:
        each.predict(texts, activation_fn=identity)
    ids = list(candidates)
    with tempfile.TemporaryDirectory() as folder:
        for block in range(BLOCKS):
            part = {query: candidates[query] for query in ids[block::BLOCKS]}
            texts = [(queries[query], corpus[document]) for query, documents in part.items() for document in documents]
            pairs += len(texts)
            tokens += [len(each) for each in model.tokenizer(*zip(*texts, strict=True), truncation=True)["input_ids"]]
            scores = {}
            for name in list(runs) if block % 2 else list(runs)[::-1]:  # neither is always first
                started, working = time.perf_counter(), time.process_time()
                if name.startswith("CrossEncoder"):
                    scores[name] = runs[name].predict(texts, activation_fn=identity)
                else:
                    store = score_candidates(
                        cast,
                        part,
                        {query: queries[query] for query in part},
                        {document: corpus[document] for documents in part.values() for document in documents},
                        Path(folder) / f"{name} {block}",
                        dtype=runs[name],
                        batch_tokens=options.batch_tokens,
                        show_progress_bar=False,
                    )
                    scores[name] = np.concatenate([row.scores for row in store])
                seconds[name] += time.perf_counter() - started
                busy[name] += time.process_time() - working
            reference = scores[next(iter(runs))]
            for name, found in scores.items():
                apart[name] = max(apart[name], float(np.abs(found - reference).max()))
                lists = zip(found.reshape(-1, LIST_SIZE), reference.reshape(-1, LIST_SIZE), strict=True)
                taus[name] += [kendalltau(*each).statistic for each in lists]
            print(f"block {block + 1} of {BLOCKS}:", {name: round(value, 1) for name, value in seconds.items()})
    ours, first = seconds["score_candidates"], next(iter(runs))
    rows = [
        [name, value, pairs / value, value / ours, busy[name], busy[name] / busy["score_candidates"]]
        + ([None] * 3 if name == first else [f"{apart[name]:.1e}", *_tau(taus[name])])
        for name, value in seconds.items()
    ]
    short, middle, long = np.percentile(tokens, [5, 50, 95])
    title = (
        f"{pairs:,} real pairs, {short:.0f} / {middle:.0f} / {long:.0f} tokens (5th / 50th / 95th percentile, at most "
        f"{options.max_length}), {model.device.type}, {torch.get_num_threads()} threads, score_candidates: {precision}"
    )
    columns = ["", "seconds", "pairs/s", "to score_candidates'", "CPU seconds", "to score_candidates'"]
    columns += ["largest difference to predict's scores", "Kendall's tau of the lists, mean", "lowest 1 %"]
    return [table(title, columns, rows)]


def _tau(found: list[float]) -> list[float]:
    return [float(np.mean(found)), float(np.quantile(found, 0.01))]


def stub_run(pairs: int, ids: str, folder: str) -> dict[str, float]:
    """Score with a function that returns the documents' lengths; runs in a process of its own."""
    import psutil

    from st_m3se import score_candidates
    from st_m3se.data.texts import Texts
    from st_m3se.scores import TeacherScores

    root = Path(folder)
    queries, corpus = (Texts.open(root / f"{name}.tsv", name, id_type=ids) for name in ("queries", "corpus"))
    candidates = TeacherScores.open(root / "candidates")
    before = psutil.Process().memory_info().rss
    _forget_peak()

    def stub(texts: list[tuple[str, str]]) -> np.ndarray:
        return np.fromiter((len(document) for _, document in texts), np.float32, len(texts))

    started, busy = time.perf_counter(), time.process_time()
    store = score_candidates(stub, candidates, queries, corpus, root / "scores", name="stub", show_progress_bar=False)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    if store.manifest["scores"] != pairs:
        raise AssertionError(f"{store.manifest['scores']} scores of {pairs} pairs")
    cpu = psutil.Process().cpu_times()
    return {
        "seconds": seconds,
        "cpu": cpu.user + cpu.system,
        "beyond": (_peak() - before) / MIB,
        "before": before / MIB,
    }


def overhead(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rate and the memory of a run whose teacher costs nothing, at a tenth of the size and at the whole."""
    from benchmark_results import table

    rows = []
    for pairs in (options.stub_pairs // 10, options.stub_pairs):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _make_stub_inputs(Path(folder), pairs, options.ids)
            command = [sys.executable, __file__, "--child", str(pairs), options.ids, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
        rows.append([pairs, result["seconds"], pairs / result["seconds"], result["cpu"], result["beyond"]])
        print(rows[-1])
    title = (
        f"A stub teacher: lists of {STUB_LIST_SIZE} of {STUB_DOCUMENTS:,} documents, ids {options.ids}, in one process"
    )
    return [table(title, ["pairs", "seconds", "pairs/s", "CPU seconds", "peak memory beyond the start, MiB"], rows)]


def _make_stub_inputs(folder: Path, pairs: int, ids: str) -> None:
    from st_m3se.scores import TeacherScoresWriter

    count = pairs // STUB_LIST_SIZE
    rng = np.random.default_rng(0)
    for name, texts in (("queries", count), ("corpus", STUB_DOCUMENTS)):
        with (folder / f"{name}.tsv").open("w", encoding="utf-8") as file:
            file.writelines(
                f"{place}\tthe {name} text of number {place} {'and so on ' * (place % 7)}\n" for place in range(texts)
            )
    step = STUB_DOCUMENTS // STUB_LIST_SIZE
    with TeacherScoresWriter(folder / "candidates") as writer:
        for query in range(count):
            documents = np.arange(STUB_LIST_SIZE) * step + rng.integers(0, step, STUB_LIST_SIZE)
            listed = documents if ids == "int" else [str(document) for document in documents.tolist()]
            writer.write(query if ids == "int" else str(query), listed, np.zeros(STUB_LIST_SIZE, dtype=np.float32))


def _forget_peak() -> None:
    """Let Linux count the most memory from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak includes what was before the start", file=sys.stderr)


def _peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Measure, print the tables, and write them where --output says."""
    from benchmark_results import provenance, render, save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a cross-encoder's name or folder; without it only the stub runs")
    parser.add_argument("--data", type=Path, action="append", default=[], help="a BEIR folder to draw pairs from")
    parser.add_argument("--pairs", type=int, default=20_000, help="real pairs (20,000)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a pair (512)")
    parser.add_argument("--batch-tokens", type=int, help="of score_candidates; without it its default")
    parser.add_argument("--device", help="cpu, cuda, ...; without it the best there is")
    parser.add_argument("--stub-pairs", type=int, default=0, help="pairs for a stub teacher (none)")
    parser.add_argument("--ids", choices=["str", "int"], default="str", help="of the stub's queries and documents")
    parser.add_argument("--folder", type=Path, help="where the stub's files are made and removed again")
    parser.add_argument("--output", type=Path, help="where the result is written as JSON")
    options = parser.parse_args()
    if (options.teacher is None) != (not options.data) or (options.teacher is None and not options.stub_pairs):
        parser.error("give --teacher together with --data, or --stub-pairs, or all of them.")
    facts = provenance()
    tables = [] if options.teacher is None else against_predict(options)
    if options.stub_pairs:
        tables += overhead(options)
    print(render({"command": " ".join(sys.argv), "provenance": facts, "tables": tables}))
    if options.output is not None:
        save(options.output, "teacher_scoring", facts, tables)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(stub_run(int(sys.argv[2]), sys.argv[3], sys.argv[4])))
    else:
        main()
