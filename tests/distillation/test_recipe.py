"""Every loss and every kind of student trains; and which of a training's states is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from students import multi_vector_student, sparse_student

from st_m3se.distillation.config import LOSS_NAMES, DistillationConfig
from st_m3se.distillation.recipe import load_student, train_student

FAST = DistillationConfig(epochs=1, batch_size=8, learning_rate=1e-2, scale=5.0)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_every_loss_trains(loss: str, make_model: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    student = make_model()
    before = student.encode("copy a file")
    made = train_student(student, Dataset.from_list(ragged_rows), loss, tmp_path, FAST, seed=0, show=False)
    assert made == {"curve": [], "kept": 2, "start_weight": 0.3, "value": None, "steps": 2, "lists": 16}
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


class Scripted:
    """An evaluator of four queries that finds what it is told to find, one list a measurement, and keeps the states."""

    measures = ("nDCG@10",)

    def __init__(self, *values: list[float]) -> None:
        self.values = iter(values)
        self.states: list[dict[str, torch.Tensor]] = []

    def evaluate_queries(self, model: Any) -> dict[str, Any]:
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"nDCG@10": np.array(next(self.values))}


RISES = ([0.1] * 4, [0.5] * 4, [0.9] * 4)
FALLS = ([0.1] * 4, [0.9] * 4, [0.5] * 4)  # for certain: no query says otherwise
CHANCE = ([0.1] * 4, [0.9, 0.1, 0.9, 0.5], [0.1, 0.9, 0.5, 0.8])
HARM = ([0.5] * 4, [0.4] * 4, [0.3] * 4)
BELOW = ([0.55] * 4, [0.9, 0.2, 0.6, 0.6], [0.2, 0.9, 0.5, 0.5])  # the last is within chance, but below the start


@pytest.mark.parametrize(
    ("measured", "average", "keep_start", "kept", "weight"),
    [
        (RISES, [0.9] * 4, True, 2, 0.4),  # averaged where dev says nothing against it
        (RISES, [0.7, 1.0, 0.9, 0.9], True, 2, 0.4),  # worse by chance
        (RISES, [0.8] * 4, True, 2, 0.0),  # worse for certain: not averaged
        (FALLS, [0.9] * 4, True, 1, 0.4),
        (CHANCE, [0.6] * 4, True, 2, 0.4),  # of what dev cannot tell apart, the longest training
        (HARM, [0.2] * 4, True, 0, 0.0),
        (HARM, [0.2] * 4, False, 1, 0.0),
        (HARM, [0.6] * 4, True, 1, 0.4),  # better than both of which it is the average
        (BELOW, [0.1] * 4, True, 1, 0.0),
    ],
)
def test_what_becomes_the_model(
    measured: tuple[list[float], ...],
    average: list[float],
    keep_start: bool,
    kept: int,
    weight: float,
    make_model: Any,
    ragged_rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    evaluator: Any = Scripted(*measured, average)
    config = replace(FAST, start_weight=0.4, evaluations=2)
    lists = Dataset.from_list(ragged_rows)
    made = train_student(
        make_model(),
        lists,
        "m3se",
        tmp_path,
        config,
        seed=0,
        evaluator=evaluator,
        keep_start=keep_start,
        show=False,
    )
    assert (made["kept"], made["start_weight"]) == (kept, weight)
    assert made["value"] == pytest.approx(np.mean(average if weight else measured[kept]))
    start, state = evaluator.states[0], evaluator.states[kept]
    model = load_student(str(tmp_path / "model"), config).state_dict()
    for name, value in model.items():
        torch.testing.assert_close(value, (1 - weight) * state[name] + weight * start[name])


def test_without_dev_the_model_is_the_average(
    make_model: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    lists, models = Dataset.from_list(ragged_rows), []
    for weight in (0.0, 0.25):
        folder = tmp_path / str(weight)
        train_student(make_model(), lists, "m3se", folder, replace(FAST, start_weight=weight), seed=0, show=False)
        models.append(load_student(str(folder / "model"), FAST).state_dict())
    for name, start in make_model().state_dict().items():
        torch.testing.assert_close(models[1][name], 0.75 * models[0][name] + 0.25 * start)
