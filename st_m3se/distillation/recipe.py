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
from st_m3se.core.files import whole_folder, write_checked_json
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
        values = self.evaluator.evaluate_queries(self.student)[self.evaluator.measures[0]]
        point = {"step": step, "share": step / steps, "value": float(values.mean()), "values": values.tolist()}
        self.points.append(point)
        if 0 < step < steps:
            save_model(self.student, self.folder / f"state-{step}")
        write_checked_json(self.folder / CURVE, {"points": self.points})


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
    """Train a student, and save a state of it as ``folder/model``, see :func:`chosen`; after a kill it goes on.

    Args:
        student: Dense, sparse or multi-vector; trained in place.
        lists: The training lists.
        loss: The name of the loss.
        folder: For checkpoints, ``curve.json`` and the model.
        config: Options of the training.
        seed: Of order and dropout.
        evaluator: Measures the student on dev. None: the last state is the model.
        keep_start: Whether a student that is worse on dev than it was before is put back to that.
        show: Show progress.

    Returns:
        "curve": step, share of the training and dev measure at each evaluation; "kept": the step whose state is the
        model, 0 for the start; "steps"; "lists".
    """
    torch.manual_seed(seed)
    start = {name: value.detach().cpu().clone() for name, value in student.state_dict().items()} if keep_start else {}
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
    points = progress.points
    kept = chosen(points, keep_start) if points else steps
    if kept == 0:
        student.load_state_dict(start)
    if points and 0 < kept < steps:
        whole_folder(folder / "model", lambda path: shutil.copytree(folder / f"state-{kept}", path))
    else:
        save_model(student, folder / "model")
    curve = [{key: value for key, value in point.items() if key != "values"} for point in points]
    return {"curve": curve, "kept": kept, "steps": steps, "lists": len(lists)}


def chosen(points: Sequence[Mapping[str, Any]], keep_start: bool) -> int:
    """The step whose state becomes the model, by its measures on dev.

    The best, up to one standard error of the paired difference: of states that dev cannot tell apart, the one that was
    trained longest, since a maximum over noisy measures is a matter of luck. But never one that is worse than the
    start: then the best, and if that is worse as well, the start.
    """
    start, *trained = points
    best = max(trained, key=lambda point: (point["value"], point["step"]))
    kept = best
    for point in trained:
        lost = np.subtract(best["values"], point["values"])
        error = lost.std(ddof=1) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
        if point["step"] > kept["step"] and lost.mean() <= error:
            kept = point
    if keep_start and kept["value"] < start["value"]:
        kept = best if best["value"] >= start["value"] else start
    return int(kept["step"])


def clean(folder: Path) -> None:
    """Remove what a finished training needed only to go on."""
    for done in [*folder.glob("state-*"), folder / "checkpoints"]:
        shutil.rmtree(done, ignore_errors=True)
