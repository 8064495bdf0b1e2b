"""A tiny BEIR folder, tiny models, and teachers that are good or bad at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("bm25s", "ir_measures", "scipy"):
    pytest.importorskip(package, reason=f'distillation needs {package}: pip install -e ".[eval]"')

from example_fixtures import make_beir, make_student, make_teacher, shared_words  # noqa: E402

FAST = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 8, "scored": 4, "pool": 8, "show": False}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {"student": str(make_student(folder)), "teacher": str(make_teacher(folder))}


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    return make_beir(tmp_path / "beir")


@pytest.fixture
def run(beir: Path, models: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A small distillation from a teacher that counts shared words; options may change anything."""
    from st_m3se import distill

    def start(**changes: Any) -> dict[str, Any]:
        options = {"data": beir, "teacher": {"shared words": shared_words}, "student": models["student"]}
        return distill(**{**options, "output": tmp_path / "out", **FAST, **changes})

    return start
