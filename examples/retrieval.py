"""Candidates, teacher scores and metrics: everything of the example that is not training.

A *run* is {query id: {document id: score}}, best first or not: metrics sort by score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import bm25s
import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from demo_models import RERANKER, demo_teacher_folder, weights_folder
from ir_measures import RR, nDCG
from retrieval_data import Qrels, RetrievalData, UsageError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from scipy.stats import permutation_test
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoTokenizer

Run = dict[str, dict[str, float]]
PairScorer = Callable[[list[tuple[str, str]]], np.ndarray]

METRICS = {"MRR@10": RR @ 10, "nDCG@10": nDCG @ 10}
CHUNK_PAIRS = 512


def progress() -> Progress:
    """The progress bar of every stage."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def bm25_run(data: RetrievalData, queries: Sequence[str], k: int) -> Run:
    """The best ``k`` documents of the whole corpus by BM25 (Lucene's form, k1 = 1.5, b = 0.75, English stop words)."""
    ids = list(data.corpus)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(data.corpus.values()), stopwords="en", show_progress=False), show_progress=False)
    run: Run = {}
    for query in track(queries, description="BM25", transient=True):
        tokens = bm25s.tokenize([data.queries[query]], stopwords="en", return_ids=False, show_progress=False)[0]
        scores = np.asarray(index.get_scores(tokens)) if tokens else np.zeros(len(ids))
        best = np.argsort(-scores, kind="stable")[:k]
        run[query] = {ids[i]: float(scores[i]) for i in best if scores[i] > 0}
    return run


def encode(model: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    """Unit-length embeddings, so that their dot products are cosines."""
    vectors = model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=len(texts) > 500)
    return np.asarray(vectors, dtype=np.float32).reshape(len(texts), -1)


class DenseIndex:
    """Exact search over the whole corpus with a bi-encoder."""

    def __init__(self, model: SentenceTransformer, data: RetrievalData) -> None:
        """Encode the corpus."""
        self.model, self.data = model, data
        self.ids = list(data.corpus)
        self.row = {document: row for row, document in enumerate(self.ids)}
        self.vectors = encode(model, list(data.corpus.values()))
        self._queries: dict[str, np.ndarray] = {}

    def query_vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode query texts, each once in the life of the index."""
        new = list(dict.fromkeys(text for text in texts if text not in self._queries))
        if new:
            self._queries.update(zip(new, encode(self.model, new), strict=True))
        return [self._queries[text] for text in texts]

    def search(self, texts: Mapping[str, str], k: int) -> Run:
        """The best ``k`` documents for each query text."""
        run: Run = {}
        vectors = self.query_vectors(list(texts.values()))
        for query, vector in zip(texts, vectors, strict=True):
            scores = self.vectors @ vector
            best = np.argsort(-scores, kind="stable")[:k]
            run[query] = {self.ids[i]: float(scores[i]) for i in best}
        return run

    def score(self, texts: Mapping[str, str], pools: Mapping[str, Sequence[str]]) -> Run:
        """The cosine of each query with the documents of its pool."""
        vectors = self.query_vectors([texts[query] for query in pools])
        return {
            query: {d: float(self.vectors[self.row[d]] @ vector) for d in pool}
            for (query, pool), vector in zip(pools.items(), vectors, strict=True)
        }


def onnx_scorer(max_length: int) -> PairScorer:
    """Score with the demo teacher's own int8 ONNX weights: on a CPU about twice as fast as torch in bfloat16."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(weights_folder(*RERANKER) / "model.onnx"), options)
    tokenizer = AutoTokenizer.from_pretrained(demo_teacher_folder())

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        features = tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="np",
        )
        logits = session.run(None, {name: array.astype(np.int64) for name, array in features.items()})[0]
        return np.asarray(logits[:, 0], dtype=np.float32)

    return score


def torch_scorer(teacher: CrossEncoder) -> PairScorer:
    """Score with a cross-encoder in torch: raw logits, since a sigmoid would squeeze the margins away."""

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.asarray(
            teacher.predict(pairs, batch_size=32, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        )

    return score


def score_pools(
    scorer: PairScorer, data: RetrievalData, pools: Mapping[str, Sequence[str]], cache: Path, label: str
) -> tuple[Run, float]:
    """Score every pool with the teacher; resume from ``cache`` (Parquet: query_id, document_ids, scores).

    Pairs are scored in order of length, so that no batch is mostly padding, and the file is rewritten after every
    few hundred pairs: a run that was stopped goes on where it was.

    Returns:
        The scores and the speed in pairs per second (0 where everything was in the cache).
    """
    known = read_scores(cache) if cache.is_file() else {}
    todo = [(q, d) for q, pool in pools.items() for d in pool if d not in known.get(q, {})]
    todo.sort(key=lambda pair: len(data.queries[pair[0]]) + len(data.corpus[pair[1]]))
    start = time.perf_counter()
    with progress() as bar:
        task = bar.add_task(label, total=len(todo))
        for first in range(0, len(todo), 16):
            batch = todo[first : first + 16]
            scores = scorer([(data.queries[q], data.corpus[d]) for q, d in batch])
            for (query, document), score in zip(batch, scores, strict=True):
                known.setdefault(query, {})[document] = float(score)
            bar.advance(task, len(batch))
            if (first + 16) % CHUNK_PAIRS == 0 or first + 16 >= len(todo):
                write_scores(known, cache)
    speed = len(todo) / (time.perf_counter() - start) if todo else 0.0
    return {query: {d: known[query][d] for d in pool} for query, pool in pools.items()}, speed


def write_scores(run: Run, path: Path) -> None:
    """Write a run in the layout of the published distillation sets, never leaving half a file behind."""
    table = pa.table(
        {
            "query_id": list(run),
            "document_ids": [list(scores) for scores in run.values()],
            "scores": pa.array([list(scores.values()) for scores in run.values()], pa.list_(pa.float32())),
        }
    )
    scratch = path.with_suffix(".partial")
    pq.write_table(table, scratch)
    scratch.replace(path)


def read_scores(path: Path) -> Run:
    """Read teacher scores from a Parquet file, or from all Parquet files of a folder."""
    from score_columns import rows_to_run

    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise UsageError(
            f"--scores {path}: expected a Parquet file, or a folder of them, with the columns query_id, document_ids "
            "and scores, found none. Without --scores the teacher scores the candidates itself."
        )
    run: Run = {}
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(f"{file}: expected a Parquet file, got: {str(error).splitlines()[0]}") from error
        run.update(rows_to_run(table.to_pylist(), str(file)))
    return run


def z_scores(run: Run) -> Run:
    """Each query's scores with mean 0 and standard deviation 1, so that scorers can be averaged."""
    normal: Run = {}
    for query, scores in run.items():
        values = np.array(list(scores.values()), dtype=np.float64)
        spread = values.std() or 1.0
        normal[query] = {d: float((s - values.mean()) / spread) for d, s in scores.items()}
    return normal


def ensemble(first: Run, second: Run) -> Run:
    """The mean of two runs' per-query z-scores, over the same documents, in the first run's spread.

    The spread is one number for the whole run (the mean of the per-query standard deviations), so that margins stay
    in the units of the first scorer.
    """
    spread = float(np.mean([np.std(list(scores.values())) for scores in first.values()]))
    left, right = z_scores(first), z_scores({q: {d: second[q][d] for d in scores} for q, scores in first.items()})
    return {q: {d: spread * (s + right[q][d]) / 2 for d, s in scores.items()} for q, scores in left.items()}


def per_query(run: Run, qrels: Qrels) -> dict[str, list[float]]:
    """Each metric for each judged query, in the order of ``qrels``; a query without results counts 0."""
    found: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    names = {measure: name for name, measure in METRICS.items()}
    judged = {query: dict(relevant) for query, relevant in qrels.items()}
    for value in ir_measures.iter_calc(list(METRICS.values()), judged, {q: run.get(q, {}) for q in judged}):
        found[names[value.measure]][value.query_id] = float(value.value)
    return {name: [values.get(query, 0.0) for query in qrels] for name, values in found.items()}


def p_value(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided paired permutation test (random sign flips of the per-query differences)."""
    left, right = np.asarray(first), np.asarray(second)
    if len(left) < 2 or np.array_equal(left, right):
        return 1.0
    test = permutation_test(
        (left, right),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)
