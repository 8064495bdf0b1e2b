"""How a student is trained: the losses by name, the arguments, and a training that survives a kill."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from st_m3se import losses
from st_m3se.core.files import write_checked_json
from st_m3se.distillation.config import LOSSES, DistillationConfig
from st_m3se.distillation.stages import last_checkpoint, read_result, save_model
from st_m3se.evaluation.evaluators import RetrievalEvaluator
from st_m3se.losses import CombinedLoss, ContrastiveLoss, DistillationLoss, SpladeLoss
from st_m3se.retrieval.models import load_encoder, model_kind
from st_m3se.training.collator import DistillationCollator
from st_m3se.training.reader import ResampleCallback, list_readers

__all__ = ["arguments", "build_loss", "chosen", "clean", "load_student", "train_student"]

HOSTS = {"dense": "SentenceTransformer", "sparse": "SparseEncoder", "multi-vector": "MultiVectorEncoder"}
SPARSITY = {"document_regularizer_weight": 3e-5, "query_regularizer_weight": 5e-5}  # as in SPLADE v3's recipes
CURVE = "curve.json"


def load_student(name: str, config: DistillationConfig) -> Any:
    """The student as it comes, in 32 bits: most updates of 16 would round to nothing."""
    model = load_encoder(name, device=config.device, trust_remote_code=config.trust_remote_code)
    if next((p.dtype for p in model.parameters()), torch.float32) != torch.float32:
        model = model.float()
    if config.max_length is not None:
        model.max_seq_length = config.max_length
    return model


def has_bfloat16() -> bool:
    """Whether the GPU, or the CPU where there is none, multiplies in bfloat16: about twice as fast as in float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available():
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def arguments(output: Path, epochs: float, batch_size: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """Training arguments, as all trainers of sentence-transformers take them; ``batch_size`` is over all processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}.")
    return {
        "output_dir": str(output),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size // processes,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,
        "seed": seed,
        "save_strategy": "no",
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": has_bfloat16(),
        # bf16 on a CPU wants it said
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    }


def build_loss(name: str, student: Any, scale: float | None, tokens: int | None = None) -> Any:
    """A loss by its name: "combined" is the recipe with labels, "contrastive" the control without a teacher.

    Args:
        name: One of ``config.LOSS_NAMES``.
        student: The model.
        scale: Of its similarity; None is what suits it.
        tokens: Of a mini-batch, where gradients are cached.
    """
    sparse = model_kind(student) == "sparse"
    cached: dict[str, Any] = {} if sparse else {"mini_batch_num_tokens": tokens}
    shared = {"gather_across_devices": int(os.environ.get("WORLD_SIZE", "1")) > 1}
    loss: DistillationLoss
    if name == "combined":
        parts = [build_part(part, student, scale, shared) for part in ("softmax-cross-entropy", "contrastive")]
        loss = CombinedLoss(parts, **cached)
    else:
        loss = build_part(name, student, scale, {**shared, **cached})
    return SpladeLoss(student, loss, **SPARSITY, mini_batch_num_tokens=tokens) if sparse else loss


def build_part(name: str, student: Any, scale: float | None, options: dict[str, Any]) -> DistillationLoss:
    """A loss that is no sum of others."""
    if name == "contrastive":
        return ContrastiveLoss(student, scale, in_batch_negatives=True, **options)
    class_name, own = LOSSES[name]
    if name == "softmax-cross-entropy":  # the paper has none; a student that searches a whole corpus wants them
        own = {"in_batch_negatives": True}
    if "in_batch_negatives" not in own:
        options = {option: value for option, value in options.items() if option != "gather_across_devices"}
    loss: DistillationLoss = getattr(losses, class_name)(student, scale, **own, **options)
    return loss


class Progress(TrainerCallback):
    """Measures the student on dev before, during and after training, keeps these states, and saves checkpoints by time.

    The first process alone measures, outside of the trainer: nothing of the training depends on it.
    """

    def __init__(
        self, student: Any, evaluator: RetrievalEvaluator | None, folder: Path, config: DistillationConfig
    ) -> None:
        self.student, self.evaluator, self.folder = student, evaluator, folder
        self.evaluations, self.seconds = config.evaluations, 60 * config.checkpoint_minutes
        self.points: list[dict[str, Any]] = []
        self.places: set[int] = set()
        self.saved = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what an earlier process has measured up to its checkpoint."""
        known = (read_result(self.folder / CURVE) or {}).get("points", [])
        self.points = [point for point in known if point["step"] <= state.global_step] if state.global_step else []
        steps = state.max_steps
        self.places = {max(1, round(steps * turn / self.evaluations)) for turn in range(1, self.evaluations + 1)}
        if not state.global_step:
            self._measure(0, steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Measure at the places, and save where it is time: in all processes or in none."""
        if state.global_step in self.places:
            self._measure(state.global_step, state.max_steps)
        due = [time.monotonic() - self.saved >= self.seconds]
        if args.world_size > 1:
            broadcast_object_list(due)
        if due[0] and state.global_step < state.max_steps:
            control.should_save, self.saved = True, time.monotonic()
        return control

    def _measure(self, step: int, steps: int) -> None:
        if self.evaluator is None or int(os.environ.get("RANK", "0")):
            return
        self.points.append({"step": step, "share": step / steps, **self.measured()})
        if 0 < step < steps:
            save_model(self.student, self.folder / f"state-{step}")
        write_checked_json(self.folder / CURVE, {"points": self.points})

    def measured(self) -> dict[str, Any]:
        """The student's dev measure: its mean, and each query's."""
        assert self.evaluator is not None
        values = self.evaluator.evaluate_queries(self.student)[self.evaluator.measures[0]]
        return {"value": float(values.mean()), "values": values.tolist()}


def train_student(
    student: Any,
    lists: Dataset,
    loss: str,
    folder: Path,
    config: DistillationConfig,
    *,
    seed: int,
    evaluator: RetrievalEvaluator | None = None,
    keep_start: bool = True,
    show: bool = True,
) -> dict[str, Any]:
    """Train a student, and save as ``folder/model`` what :func:`settle` makes of it; after a kill it goes on.

    Args:
        student: Dense, sparse or multi-vector; trained in place.
        lists: The training lists.
        loss: The name of the loss.
        folder: For checkpoints, ``curve.json`` and the model.
        config: Options of the training.
        seed: Of order and dropout.
        evaluator: Measures the student on dev. None: the model is the last state, averaged with the start.
        keep_start: Whether a student that is worse on dev than it was before is put back to that.
        show: Show progress.

    Returns:
        "curve": step, share of the training and dev measure at each evaluation; "kept": the step whose state is the
        model, 0 for the start; "start_weight": the start's share in the model's weights; "value": the model's dev
        measure, None without ``evaluator``; "steps"; "lists".
    """
    torch.manual_seed(seed)
    start = state_of(student)
    host = HOSTS[model_kind(student)]
    progress = Progress(student, evaluator, folder, config)
    # A logger that is quiet about loading would turn the bar off; without the bar the log is printed.
    options = {
        "disable_tqdm": not show,
        **arguments(folder / "checkpoints", config.epochs, config.batch_size, config.learning_rate, seed),
    }
    trainer = getattr(sentence_transformers, f"{host}Trainer")(
        model=student,
        args=getattr(sentence_transformers, f"{host}TrainingArguments")(**options),
        train_dataset=lists,
        loss=build_loss(loss, student, config.scale, config.mini_batch_num_tokens),
        data_collator=DistillationCollator(preprocess_fn=student.preprocess),
        callbacks=[*([ResampleCallback()] if list_readers(lists) else []), progress],
    )
    if not show:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
    student.eval()
    steps = int(trainer.state.global_step)
    if int(os.environ.get("RANK", "0")):
        return {}
    made = settle(student, start, progress, config, steps, keep_start=keep_start)
    save_model(student, folder / "model")
    curve = [{key: value for key, value in point.items() if key != "values"} for point in progress.points]
    return {"curve": curve, **made, "steps": steps, "lists": len(lists)}


def settle(
    student: Any,
    start: Mapping[str, torch.Tensor],
    progress: Progress,
    config: DistillationConfig,
    steps: int,
    *,
    keep_start: bool,
) -> dict[str, Any]:
    """Put a trained student into the state that becomes the model.

    That is the one that :func:`chosen` says, its weights averaged with those of the start by ``config.start_weight``:
    what a few hundred lists overfit is damped, and less of what the student knew is lost (Wortsman et al., "Robust
    fine-tuning of zero-shot models", arXiv 2109.01903). Not so where dev says for certain that the average is worse,
    as of a trunk that had all to learn. And with ``keep_start`` never a state that is worse on dev than the start:
    then the best of those that are not averaged, and if that is worse as well, the start.

    Returns:
        "kept", "start_weight" and "value", as :func:`train_student` returns them.
    """
    weight = config.start_weight
    if not progress.points:
        average(student, start, weight)
        return {"kept": steps, "start_weight": weight, "value": None}
    at_hand = {0: start, steps: state_of(student)}

    def take(step: int) -> None:
        state = at_hand.get(step) or load_student(str(progress.folder / f"state-{step}"), config).state_dict()
        student.load_state_dict(state)

    before, *trained = progress.points
    model = chosen(trained)
    take(model["step"])
    if weight:
        average(student, start, weight)
        averaged = {**model, **progress.measured()}
        if worse(averaged, model):
            weight = 0.0
            take(model["step"])
        else:
            model = averaged
    if keep_start and model["value"] < before["value"]:
        weight = 0.0
        model = max([before, *trained], key=lambda point: (point["value"], point["step"]))
        take(model["step"])
    return {"kept": int(model["step"]), "start_weight": weight, "value": model["value"]}


def chosen(trained: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation whose state is taken: the best on dev, up to what :func:`worse` can tell.

    Of states that dev cannot tell from the best, it is the one that was trained longest, since a maximum over noisy
    measures is a matter of luck.
    """
    best = max(trained, key=lambda point: (point["value"], point["step"]))
    return next(point for point in reversed(trained) if not worse(point, best))


def worse(point: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a state is worse on dev than another one by more than a standard error of the paired difference."""
    lost = np.subtract(other["values"], point["values"])
    return bool(lost.mean() > (lost.std(ddof=1) / len(lost) ** 0.5 if len(lost) > 1 else 0.0))


def state_of(student: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights, beside the GPU."""
    return {name: value.detach().cpu().clone() for name, value in student.state_dict().items()}


def average(student: Any, start: Mapping[str, torch.Tensor], weight: float) -> None:
    """Give the student's weights the share ``weight`` of those that it had at the start."""
    state = student.state_dict()
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    mixed = {name: value.lerp(start[name].to(value), weight) for name, value in floats.items()}
    student.load_state_dict({**state, **mixed})


def clean(folder: Path) -> None:
    """Remove what a finished training needed only to go on."""
    for done in [*folder.glob("state-*"), folder / "checkpoints"]:
        shutil.rmtree(done, ignore_errors=True)
