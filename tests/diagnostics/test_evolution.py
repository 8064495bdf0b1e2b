"""The callback in real trainings: it sees what the model gives at that step, and the training does not see it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from transformers import TrainerCallback

from st_m3se import DistillationCollator, M3SELoss
from st_m3se.diagnostics import Evolution, ScoreEvolutionCallback, TrackedList, track

STEPS = 7


def lists_of(rows: list[dict[str, Any]]) -> list[TrackedList]:
    """Two queries of the training rows, with ids of their own."""
    return [
        TrackedList(
            f"q{place}",
            rows[place]["query"],
            tuple(f"d{place}.{number}" for number in range(len(rows[place]["documents"]))),
            tuple(rows[place]["documents"]),
            tuple(number == 0 for number in range(len(rows[place]["documents"]))),
        )
        for place in (2, 3)
    ]


class Watch(TrainerCallback):
    """Keeps the model's own scores at each step, and whether it was left in training mode."""

    def __init__(self, tracked: list[TrackedList]) -> None:
        self.tracked, self.scores, self.modes = tracked, {}, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.modes.append(all(module.training for module in model.modules()))
        values: list[float] = []
        model.eval()
        for each in self.tracked:
            if isinstance(model, CrossEncoder):
                features = model.preprocess([(each.query, text) for text in each.documents])
                with torch.no_grad():
                    values += model(features)["scores"].flatten().tolist()
            else:
                with torch.no_grad():
                    query, documents = (
                        model(model.preprocess(texts))["sentence_embedding"]
                        for texts in ([each.query], list(each.documents))
                    )
                values += torch.nn.functional.cosine_similarity(query, documents).tolist()
        model.train()
        self.scores[state.global_step] = values


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def train_student(make_model: Any, arguments: Callable[..., Any], ragged_rows: list[dict[str, Any]]) -> Any:
    def train(callbacks: list[Any], resume: str | None = None, **changes: Any) -> SentenceTransformer:
        model = make_model(dropout=0.2)
        SentenceTransformerTrainer(
            model=model,
            args=arguments(**{"max_steps": STEPS, "seed": 5, **changes}),
            train_dataset=Dataset.from_list(ragged_rows),
            loss=M3SELoss(model, scale=3.0),
            data_collator=DistillationCollator(preprocess_fn=model.preprocess),
            callbacks=callbacks,
        ).train(resume_from_checkpoint=resume)
        return model

    return train


@pytest.fixture
def train_cross_encoder(cross_encoder: Path, tmp_path: Path) -> Any:
    def train(callbacks: list[Any], **changes: Any) -> CrossEncoder:
        torch.manual_seed(0)
        model = CrossEncoder(str(cross_encoder), device="cpu")
        words = ["red cat", "green dog", "blue cow", "white hen"]
        rows = [
            {"query": f"where is the {one}", "document": f"the {other} sleeps", "label": float(one == other)}
            for one in words
            for other in words
        ]
        options = {
            "output_dir": str(tmp_path / "cross"),
            "use_cpu": True,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 5,
        }
        CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(**options | changes),
            train_dataset=Dataset.from_list(rows),
            loss=BinaryCrossEntropyLoss(model),
            callbacks=callbacks,
        ).train()
        return model

    return train


@pytest.mark.parametrize("every", [1, 3])
def test_the_training_is_the_same_bit_for_bit_with_and_without(
    train_student: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path, every: int
) -> None:
    """With dropout: prevents a forward pass that moves the random state, and a model left in evaluation mode."""
    alone = weights(train_student([]))
    tracked = lists_of(ragged_rows)
    watch = Watch(tracked)
    output = tmp_path / "student.csv"
    followed = weights(train_student([ScoreEvolutionCallback(tracked, every_steps=every, output=output), watch]))
    assert all(watch.modes)
    assert torch.equal(alone, followed)
    assert not torch.equal(alone, weights(train_student([], seed=6))), "no seed matters, so this would say nothing"


def test_a_cross_encoders_training_is_the_same_too(train_cross_encoder: Any, tmp_path: Path) -> None:
    tracked = [TrackedList("q", "where is the red cat", ("a", "b"), ("the red cat", "the dog"), (True, False))]
    alone = weights(train_cross_encoder([]))
    watch = Watch(tracked)
    followed = weights(train_cross_encoder([ScoreEvolutionCallback(tracked, every_steps=2), watch]))
    assert all(watch.modes)
    assert torch.equal(alone, followed)
    found = Evolution.read(tmp_path / "cross" / "score_evolution.csv")
    assert found.name == "cross-encoder"
    assert found.steps.tolist() == [0, 2, 4, 6, 7]
    for place, step in enumerate(found.steps.tolist()):
        if step:
            np.testing.assert_allclose(found.scores[place], watch.scores[step], atol=1e-5)
    assert np.ptp(found.scores, axis=0).min() > 1e-3, "the scores never moved"
    assert json.loads((tmp_path / "cross" / "score_evolution.json").read_text())["score"] == "raw logit"


def test_the_record_holds_the_models_scores_at_each_step(
    train_student: Any, ragged_rows: list[dict[str, Any]], make_model: Any, tmp_path: Path
) -> None:
    tracked = lists_of(ragged_rows)
    watch, output = Watch(tracked), tmp_path / "record" / "student.csv"
    train_student([ScoreEvolutionCallback(tracked, every_steps=2, output=output, name="tiny"), watch])
    found = Evolution.read(output)
    assert found.name == "tiny"
    assert found.steps.tolist() == [0, 2, 4, 6, 7]
    assert found.document_ids == tuple(document for each in tracked for document in each.document_ids)
    assert found.query_ids == tuple(each.query_id for each in tracked for _ in each.documents)
    assert found.positives.tolist() == [flag for each in tracked for flag in each.positives]
    assert found.queries == {each.query_id: each.query for each in tracked}
    before = make_model(dropout=0.2).eval()
    expected = [
        before.similarity(before.encode([each.query]), before.encode(list(each.documents)))[0] for each in tracked
    ]
    np.testing.assert_allclose(found.scores[0], torch.cat(expected), atol=1e-5)
    for place, step in list(enumerate(found.steps.tolist()))[1:]:
        np.testing.assert_allclose(found.scores[place], watch.scores[step], atol=1e-5)
    assert np.ptp(found.scores, axis=0).max() > 1e-3, "the scores never moved"
    about = json.loads(output.with_suffix(".json").read_text())
    assert about["every_steps"] == 2
    assert 0 < about["share"] < 1
    assert about["tracked"][0]["documents"] == list(tracked[0].documents)


def test_a_resumed_training_goes_on_with_its_record(
    train_student: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A stretch that was lost with the process must not stand in the record twice, nor a hole in it."""
    tracked = lists_of(ragged_rows)
    folders = {name: tmp_path / name for name in ("unbroken", "broken")}
    saving = {"save_strategy": "steps", "save_steps": 3}

    def follow() -> ScoreEvolutionCallback:
        return ScoreEvolutionCallback(tracked, every_steps=2)

    unbroken = weights(train_student([follow()], output_dir=str(folders["unbroken"]), **saving))
    record = folders["broken"] / "score_evolution.csv"
    train_student([follow(), StopAfter(5)], output_dir=str(folders["broken"]), **saving)
    with record.open("a") as stream:
        stream.write("6,1.5,q2,d2.0,1,0.")  # and the kill came while it was written
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    resume = str(folders["broken"] / "checkpoint-3")
    resumed = weights(train_student([follow()], resume, output_dir=str(folders["broken"]), **saving))
    assert torch.equal(unbroken, resumed)
    assert record.read_text() == (folders["unbroken"] / "score_evolution.csv").read_text()
    assert Evolution.read(record).steps.tolist() == [0, 2, 4, 6, 7]
    other = [ScoreEvolutionCallback(tracked[:1])]
    with pytest.raises(ValueError, match="is the record of other documents"):
        train_student(other, resume, output_dir=str(folders["broken"]), **saving)


def test_a_new_training_in_the_same_folder_begins_a_new_record(
    train_student: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "record.csv"
    for tracked in (lists_of(ragged_rows), lists_of(ragged_rows)[:1]):
        train_student([ScoreEvolutionCallback(tracked, every_steps=4, output=output)])
        assert Evolution.read(output).steps.tolist() == [0, 4, 7]


def test_it_is_the_first_process_alone_that_follows(
    train_student: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = ScoreEvolutionCallback(lists_of(ragged_rows), every_steps=1, output=tmp_path / "no.csv")

    class Second(TrainerCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.is_world_process_zero = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.is_world_process_zero = False

    train_student([Second(), callback])
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.slow
def test_two_processes_train_as_without_it_and_write_one_record(student: Path, tmp_path: Path) -> None:
    """Prevents a random state that only the first process moves, and two writers of one file."""
    script = Path(__file__).with_name("evolution_process.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(student), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)] == ["2 True"] * 2
    found = Evolution.read(tmp_path / "record.csv")
    assert found.steps.tolist() == [0, 2, 4, 5]
    assert np.ptp(found.scores, axis=0).min() > 1e-3, "the scores never moved"


def test_the_steps_between_records_fit_the_training(
    train_student: Any, ragged_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """By default a record costs a hundredth at most: 9 texts, batches of 4 rows, so no second one in 7 steps."""
    tracked = lists_of(ragged_rows)
    output = tmp_path / "record.csv"
    train_student([ScoreEvolutionCallback(tracked, output=output)])
    texts = sum(len(each.documents) for each in tracked)
    assert json.loads(output.with_suffix(".json").read_text())["every_steps"] == -(-50 * texts // 4)
    assert Evolution.read(output).steps.tolist() == [0, STEPS]


def test_what_cannot_be_followed_is_refused(train_student: Any, ragged_rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="every_steps"):
        ScoreEvolutionCallback(lists_of(ragged_rows), every_steps=0)
    with pytest.raises(ValueError, match="tracked"):
        ScoreEvolutionCallback([])
    callback = ScoreEvolutionCallback(lists_of(ragged_rows))
    sharded: Any = type("Args", (), {"fsdp": ["full_shard"]})()
    with pytest.raises(ValueError, match=r"FSDP or DeepSpeed ZeRO-3"):
        callback.on_train_begin(sharded, None, None, model=None)  # type: ignore[arg-type]


def test_what_track_draws_is_what_the_callback_takes(beir: Path, train_student: Any, tmp_path: Path) -> None:
    from st_m3se.data.qrels import read_qrels

    path = beir / "qrels" / "train.tsv"
    qrels = read_qrels(path)
    candidates = {query: [f"d{colour}{animal}" for colour in range(3) for animal in range(4)] for query in qrels}
    tracked = track(candidates, beir, beir, qrels)
    assert track(candidates, beir, beir, path) == tracked
    train_student([ScoreEvolutionCallback(tracked, every_steps=3, output=tmp_path / "x.csv")])
    found = Evolution.read(tmp_path / "x.csv")
    assert found.positives.tolist() == [True] + [False] * 5
