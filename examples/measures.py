"""Measures and their significance, per query and in the mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import ir_measures
import numpy as np
from ir_measures import RR, nDCG
from retrieval_data import Qrels
from scipy.stats import permutation_test

from st_m3se.scores import TeacherScores

Run = dict[str, dict[str, float]]

METRICS = {"MRR@10": RR @ 10, "nDCG@10": nDCG @ 10}


def run_of(store: TeacherScores, queries: Iterable[str]) -> Run:
    """A store's lists of some queries as {query id: {document id: score}}; measures sort by score themselves."""
    return {
        str(row.query_id): {str(d): score for d, score in zip(row.document_ids, row.scores, strict=True)}
        for row in store.select(queries)
    }


def per_query(run: Run, qrels: Qrels) -> dict[str, list[float]]:
    """Each metric for each judged query, in the order of ``qrels``; a query without results counts 0."""
    found: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    names = {measure: name for name, measure in METRICS.items()}
    judged = {query: dict(relevant) for query, relevant in qrels.items()}
    for value in ir_measures.iter_calc(list(METRICS.values()), judged, {q: run.get(q, {}) for q in judged}):
        found[names[value.measure]][value.query_id] = float(value.value)
    return {name: [values.get(query, 0.0) for query in qrels] for name, values in found.items()}


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each metric over the queries."""
    return {metric: float(np.mean(scores)) for metric, scores in values.items()}


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
