"""Every loss and every kind of student trains; and which of a training's states is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from students import multi_vector_student, sparse_student

from st_m3se.distillation.config import LOSS_NAMES, DistillationConfig
from st_m3se.distillation.recipe import chosen, load_student, train_student

FAST = DistillationConfig(epochs=1, batch_size=8, learning_rate=1e-2, scale=5.0)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_every_loss_trains(loss: str, make_model: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    student = make_model()
    before = student.encode("copy a file")
    made = train_student(student, Dataset.from_list(ragged_rows), loss, tmp_path, FAST, seed=0, show=False)
    assert made == {"curve": [], "kept": 2, "steps": 2, "lists": 16}
    after = load_student(str(tmp_path / "model"), FAST).encode("copy a file")
    assert abs(after - before).max() > 1e-4


@pytest.mark.parametrize("build", [sparse_student, multi_vector_student])
@pytest.mark.parametrize("loss", ["combined", "softmax-cross-entropy"])
def test_every_kind_of_student_trains_and_comes_back(
    build: Any, loss: str, checkpoint: Path, ragged_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    student = build(checkpoint)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    train_student(student, Dataset.from_list(ragged_rows), loss, tmp_path, FAST, seed=0, show=False)
    after = load_student(str(tmp_path / "model"), FAST)
    assert type(after) is type(student)
    assert any(not torch.equal(before[name], value) for name, value in after.state_dict().items())


def points(*values: list[float]) -> list[dict[str, Any]]:
    return [{"step": 5 * turn, "value": sum(each) / len(each), "values": each} for turn, each in enumerate(values)]


@pytest.mark.parametrize(
    ("measured", "kept"),
    [
        (([0.1] * 4, [0.5] * 4, [0.9] * 4), 10),  # it rises
        (([0.1] * 4, [0.9] * 4, [0.5] * 4), 5),  # it falls again, for certain: no query says otherwise
        (([0.1] * 4, [0.9, 0.1, 0.9, 0.5], [0.1, 0.9, 0.5, 0.8]), 10),  # by chance: the longest training
        (([0.5] * 4, [0.4] * 4, [0.3] * 4), 0),  # worse than the start
        (([0.55] * 4, [0.9, 0.2, 0.6, 0.6], [0.2, 0.9, 0.5, 0.5]), 5),  # the last is within chance, but below the start
    ],
)
def test_which_state_is_kept(measured: tuple[list[float], ...], kept: int) -> None:
    assert chosen(points(*measured), keep_start=True) == kept
    assert chosen(points(*measured), keep_start=False) > 0
