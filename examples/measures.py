"""Measures and their significance, per query and in the mean, by the package's evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from retrieval_data import Qrels

from st_m3se.evaluation import compare
from st_m3se.evaluation.measures import per_query as measured
from st_m3se.scores import ScoredList, TeacherScores

Run = dict[str, dict[str, float]]

METRICS = {"MRR@10": "RR@10", "nDCG@10": "nDCG@10"}


def run_of(store: TeacherScores, queries: Iterable[str]) -> Run:
    """A store's lists of some queries as {query id: {document id: score}}; measures sort by score themselves."""
    return {
        str(row.query_id): {str(d): score for d, score in zip(row.document_ids, row.scores, strict=True)}
        for row in store.select(queries)
    }


def per_query(run: Run, qrels: Qrels) -> dict[str, list[float]]:
    """Each metric for each judged query, in the order of ``qrels``; a query without results counts 0."""
    rows = (ScoredList(query, list(listed), list(listed.values())) for query, listed in run.items())
    values = measured(rows, qrels, list(METRICS.values()), exclude_same_id=False)
    return {name: values[measure].tolist() for name, measure in METRICS.items()}


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each metric over the queries."""
    return {metric: float(np.mean(scores)) for metric, scores in values.items()}


def p_value(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of the paired randomisation test."""
    values = {"first": np.asarray(first), "second": np.asarray(second)}
    return compare(values, "", seed=seed)[0].randomisation_p
