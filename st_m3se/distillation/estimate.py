"""About how long a distillation takes: a small batch of the teacher and of the student is timed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from st_m3se.distillation.config import DistillationConfig
from st_m3se.distillation.data import DistillationData
from st_m3se.retrieval.models import embed_documents
from st_m3se.retrieval.scoring import as_teacher
from st_m3se.retrieval.teacher import Pairs

__all__ = ["duration", "estimate"]

SAMPLE = 32  # texts, and pairs
STEP = 3.0  # a training step costs about three times the forward pass


def estimate(
    config: DistillationConfig,
    data: DistillationData,
    teachers: dict[str, Any],
    student: Any,
    pairs: dict[str, int],
    growth: float = 1.0,
) -> list[tuple[str, str, float]]:
    """Time a sample, and add up; there are ``growth`` times as many queries as ``data`` has.

    Returns:
        The stages of a distillation: name, what is in it, seconds.
    """
    ids = data.corpus.ids.to_pylist()
    documents = data.corpus.take(ids[:: max(1, len(ids) // SAMPLE)][:SAMPLE])
    asked = [query for split in data.qrels.values() for query in split]
    queries = data.queries.take(asked[:SAMPLE])
    pair = sum(_pair_seconds(config, name, teacher, queries, documents) for name, teacher in teachers.items())
    embed_documents(student, documents[:2])  # the first call also allocates
    start = time.perf_counter()
    embed_documents(student, documents)
    text = (time.perf_counter() - start) / len(documents)
    corpus, number = len(data.corpus), round(len(asked) * growth)
    lists = round(len(data.qrels["train"]) * growth) * config.epochs
    trainings = len(config.seeds) * (2 if config.control else 1)
    seconds = lists * (1 + config.list_size) * text * STEP
    return [
        ("candidates", f"{number:,} queries in {corpus:,} documents, BM25 and the student", corpus * text),
        *(
            (f"teacher {split}", f"{pairs[split]:,} pairs at {1 / pair:,.0f} a second", pairs[split] * pair)
            for split in ("dev", "train", "test")
        ),
        ("training", f"{trainings} x {lists:,.0f} lists of {config.list_size}", trainings * seconds),
        ("evaluation", f"{trainings} x {corpus:,} documents searched", trainings * corpus * text),
    ]


def _pair_seconds(
    config: DistillationConfig, name: str, teacher: Any, queries: list[str], documents: list[str]
) -> float:
    wrapped = as_teacher(teacher, name=name, **config.teacher_options(teacher))
    number = min(len(queries), len(documents))
    rows = np.arange(number)
    asked = Pairs(queries[:number], documents[:number], rows, rows)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        list(wrapped.score(wrapped.prepare(asked)))
        seconds.append(time.perf_counter() - start)
    return seconds[-1] / number


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
