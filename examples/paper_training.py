"""One training of `reproduce_paper.py`: a cross-encoder or a bi-encoder of some size, trained, measured and kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_task import SPLITS, Task
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Dense
from sentence_transformers.cross_encoder.losses import ListNetLoss
from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import TrainerCallback

import st_m3se
from st_m3se import DistillationCollator, SoftmaxCrossEntropyLoss, score_candidates
from st_m3se.core.files import write_checked_json
from st_m3se.diagnostics import ScoreEvolutionCallback, TrackedList
from st_m3se.distillation.config import LOSSES
from st_m3se.distillation.demo_models import load_student, load_teacher
from st_m3se.distillation.recipe import arguments as training_arguments
from st_m3se.distillation.stages import claim, identity, last_checkpoint, read_result, save_model
from st_m3se.scores import TeacherScores

Measured = dict[str, dict[str, np.ndarray]]
"""Split -> measure -> value of each query."""

CHECKPOINTS = 4  # of a training, so that a kill loses a quarter of it
RECORDS = 50  # of the scores of the followed documents, in a training


@dataclass(frozen=True)
class Unit:
    """What is trained.

    Attributes:
        kind: "cross-encoder" or "bi-encoder".
        loss: A key of LOSSES for a student; "no-teacher" for training on relevance alone.
        size: The size of the embedding: a linear layer from the trunk's mean to so many numbers, from which the
            bi-encoder takes the cosine and the cross-encoder its score.
        dropout: In the whole trunk.
        seed: Of weights, order and dropout.
    """

    kind: str
    loss: str
    size: int
    dropout: float
    seed: int

    @property
    def name(self) -> str:
        """For folders."""
        return f"{self.kind}-{self.loss}-size{self.size}-dropout{self.dropout:g}-seed{self.seed}"

    @property
    def system(self) -> str:
        """The name in figures and tables."""
        return self.kind if self.loss == "no-teacher" else f"{self.kind}+{self.loss}"


@dataclass(frozen=True)
class Budget:
    """What all trainings share: the lists, and how long and with what they are trained on."""

    student: str
    epochs: float
    batch_size: int
    learning_rate: float
    scale: float
    max_length: int


def build(unit: Unit, budget: Budget) -> SentenceTransformer | CrossEncoder:
    """The untrained model: one trunk for both kinds, with an embedding of the size asked for."""
    torch.manual_seed(unit.seed)
    start = load_student(budget.student)
    trunk: Any = start[0]
    width = trunk.get_embedding_dimension()
    trunk.max_seq_length = budget.max_length
    for module in trunk.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = unit.dropout
    pooling = Pooling(width, "mean")
    if unit.kind == "bi-encoder":
        projection = Dense(width, unit.size, bias=False, activation_function=torch.nn.Identity())
        torch.nn.init.orthogonal_(projection.linear.weight)  # keeps the angles that the trunk knows
        return SentenceTransformer(modules=[trunk, pooling, projection], device=str(start.device))
    head = [
        Dense(width, unit.size, activation_function=torch.nn.Tanh()),
        Dense(unit.size, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
    ]
    model: CrossEncoder = CrossEncoder(modules=[trunk, pooling, *head], device=str(start.device))
    return model


def run_unit(
    unit: Unit,
    task: Task,
    taught: TeacherScores | None,
    budget: Budget,
    folder: Path,
    tracked: Sequence[TrackedList] = (),
) -> Measured:
    """Train, score the measured lists of both splits and measure; or read what an earlier call has kept.

    ``folder`` gets ``scores/train`` and ``scores/test``, the run files from which every number can be computed again,
    ``result.json``, and with ``tracked`` the evolution of scores. A training that was killed goes on from its last
    checkpoint.

    Raises:
        ValueError: If the folder was begun with other settings, data or teacher.
    """
    settings = {
        **asdict(unit),
        **asdict(budget),
        "student": identity(budget.student),
        "data": task.fingerprint,
        "taught": None if taught is None else {name: taught.manifest[name] for name in ("inputs", "revision")},
    }
    claim(folder, settings)
    file, trained = folder / "result.json", folder / "model"
    if (content := read_result(file)) is not None:
        return {
            split: {measure: np.array(values) for measure, values in found.items()}
            for split, found in content["values"].items()
        }
    if not trained.is_dir():
        save_model(_train(unit, task, taught, budget, folder, tracked), trained)
    # From the disk: scores that a killed call began belong to these weights, and to no second training's.
    loader: Any = CrossEncoder if unit.kind == "cross-encoder" else SentenceTransformer
    model = loader(str(trained))
    values = {split: score(model, unit.name, task, split, folder, budget.max_length) for split in SPLITS}
    content = {
        "values": {
            split: {measure: found.tolist() for measure, found in measures.items()}
            for split, measures in values.items()
        },
    }
    write_checked_json(file, content)
    for done in ("checkpoints", "model"):
        shutil.rmtree(folder / done, ignore_errors=True)
    return values


def _train(
    unit: Unit,
    task: Task,
    taught: TeacherScores | None,
    budget: Budget,
    folder: Path,
    tracked: Sequence[TrackedList],
) -> Any:
    """The trained model."""
    model: Any = build(unit, budget)
    callbacks: list[TrainerCallback] = []
    if tracked:
        steps = budget.epochs * len(task.lists) / budget.batch_size
        every = max(1, round(steps / RECORDS))  # more than the callback's default: here the figure is what it is for
        callbacks.append(
            ScoreEvolutionCallback(tracked, output=folder / "score_evolution.csv", name=unit.system, every_steps=every)
        )
    arguments = training_arguments(
        folder / "checkpoints", budget.epochs, budget.batch_size, budget.learning_rate, unit.seed
    )
    if isinstance(model, CrossEncoder):
        train_cross_encoder(model, task, arguments, callbacks)
    else:
        train_bi_encoder(model, task, taught, unit.loss, budget.scale, arguments, callbacks)
    return model


def train_cross_encoder(
    model: CrossEncoder, task: Task, arguments: dict[str, Any], callbacks: list[TrainerCallback]
) -> None:
    """Softmax cross-entropy over each list, with its relevant documents as the target."""
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(**_saving(arguments, len(task.lists))),
        train_dataset=task.cross_encoder_dataset(),
        loss=ListNetLoss(model),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(arguments["output_dir"])))
    model.eval()


def train_bi_encoder(
    model: SentenceTransformer,
    task: Task,
    taught: TeacherScores | None,
    loss: str,
    scale: float,
    arguments: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> None:
    """A loss of the package on the teacher's scores; or softmax cross-entropy with the other lists as negatives."""
    if loss == "no-teacher":
        module: Any = SoftmaxCrossEntropyLoss(model, scale=scale, in_batch_negatives=True)
        taught = None
    else:
        loss_class, options = LOSSES[loss]
        module = getattr(st_m3se, loss_class)(model, scale=scale, **options)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**_saving(arguments, len(task.lists))),
        train_dataset=task.student_dataset(taught),
        loss=module,
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(arguments["output_dir"])))
    model.eval()


def prepare_teacher(
    name: str, task: Task, epochs: float, budget: Budget, folder: Path
) -> tuple[TeacherScores, Measured]:
    """Fine-tune a cross-encoder on the training lists, measure it, and let it score them; each step is kept.

    Returns:
        Its scores of the training lists, and its measures on both splits.

    Raises:
        ValueError: If the folder was begun with another teacher, other data or settings.
    """
    claim(
        folder,
        {
            "teacher": identity(name),
            "epochs": epochs,
            "batch_size": budget.batch_size,
            "max_length": budget.max_length,
            "data": task.fingerprint,
        },
    )
    saved = folder / "model"
    if not saved.is_dir():
        model = load_teacher(name, budget.max_length)
        if epochs > 0:
            train_cross_encoder(
                model, task, training_arguments(folder / "checkpoints", epochs, budget.batch_size, 2e-5, 1), []
            )
        save_model(model, saved)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    model = CrossEncoder(str(saved), max_length=budget.max_length)
    values = {split: score(model, "teacher", task, split, folder, budget.max_length) for split in SPLITS}
    taught = score_candidates(model, task.lists, task.queries, task.corpus, folder / "scores" / "lists", name="teacher")
    return taught, values


def score(
    model: SentenceTransformer | CrossEncoder, name: str, task: Task, split: str, folder: Path, max_length: int
) -> dict[str, np.ndarray]:
    """Score the measured lists of a split into a store, and measure."""
    store = score_candidates(
        model,
        task.candidates(split),
        task.queries,
        task.corpus,
        folder / "scores" / split,
        name=name,
        max_length=max_length,
        dtype="float32",
    )
    return task.measured(split, store)


def _saving(arguments: dict[str, Any], lists: int) -> dict[str, Any]:
    steps = arguments["num_train_epochs"] * -(-lists // arguments["per_device_train_batch_size"])
    return arguments | {
        "save_strategy": "steps",
        "save_steps": max(1, int(steps / CHECKPOINTS)),
        "save_total_limit": 1,
        "disable_tqdm": False,
    }
