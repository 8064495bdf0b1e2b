"""Random judged lists, and a tiny BEIR folder with models to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from example_fixtures import make_beir, make_student, make_teacher

from st_m3se.diagnostics import JudgedLists


def random_lists(seed: int = 0, queries: int = 30) -> JudgedLists:
    """Ragged lists with one positive or several, the positives in any place."""
    random = np.random.default_rng(seed)
    candidates, qrels = {}, {}
    for query in range(queries):
        documents = [f"d{query}-{place}" for place in range(int(random.integers(2, 12)))]
        candidates[f"q{query}"] = documents
        chosen = random.permutation(len(documents))[: int(random.integers(1, max(2, len(documents) // 2)))]
        qrels[f"q{query}"] = {documents[place]: 1 for place in chosen.tolist()}
    return JudgedLists.of(candidates, qrels)


def random_scores(lists: JudgedLists, seed: int = 1, *, rounded: int | None = None) -> np.ndarray:
    """Scores in which positives are better in the mean, with an offset of its own for each query; or with ties."""
    random = np.random.default_rng(seed)
    scores = random.normal(size=len(lists.positives)) + 1.5 * lists.positives
    scores += random.normal(size=len(lists))[lists.owner]
    return scores if rounded is None else np.round(scores, rounded)


@pytest.fixture(scope="session")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_beir(tmp_path_factory.mktemp("data") / "animals")


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Without ranks of an outer launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return lambda: None
