"""The training itself, with the unmodified trainers of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from retrieval_data import RetrievalData
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments

from st_m3se import (
    AllMarginsMSELoss,
    CombinedLoss,
    ContrastiveLoss,
    CoupledRankDistilLoss,
    DistillationCollator,
    DistillationLoss,
    M3SELoss,
    MarginMSELoss,
    RankDistilLoss,
    ResampleCallback,
    RetrievalEvaluator,
    ScoreMSELoss,
    SoftmaxCrossEntropyLoss,
)

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "m3se": (M3SELoss, {"in_batch_negatives": True}),
    "rank-distil": (RankDistilLoss, {"top_k": 3}),
    "coupled-rank-distil": (CoupledRankDistilLoss, {"top_k": 3}),
    "margin-mse": (MarginMSELoss, {}),
    "all-margins-mse": (AllMarginsMSELoss, {}),
    "softmax-cross-entropy": (SoftmaxCrossEntropyLoss, {"in_batch_negatives": True}),
    "score-mse": (ScoreMSELoss, {}),
}


def common(output: Path, epochs: float, batch_size: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """Training arguments that all three trainings share."""
    return {
        "output_dir": str(output / "checkpoints"),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": 0.1,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": has_bfloat16(),
    }


def has_bfloat16() -> bool:
    """Whether the GPU, or the CPU where there is none, multiplies in bfloat16: about twice as fast as in float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def build_loss(name: str, student: SentenceTransformer, scale: float | None) -> DistillationLoss:
    """A loss by its name on the command line; "combined" is the recipe, "contrastive" the control without a teacher."""
    if name == "combined":
        parts = [build_loss(part, student, scale) for part in ("softmax-cross-entropy", "contrastive")]
        return CombinedLoss(parts)
    if name == "contrastive":
        return ContrastiveLoss(student, scale, in_batch_negatives=True)
    loss_class, options = LOSSES[name]
    loss: DistillationLoss = loss_class(student, scale, **options)
    return loss


def train_student(
    student: SentenceTransformer,
    lists: Dataset,
    options: Mapping[str, Any],
    output: Path,
    evaluator: RetrievalEvaluator | None = None,
) -> list[tuple[float, float]]:
    """Train in place.

    Args:
        student: The student.
        lists: The training lists.
        options: loss, scale, epochs, batch_size, learning_rate, seed.
        output: Where the trainer keeps its files.
        evaluator: Measures the student before, three times during and after training. None: not at all.

    Returns:
        How much of the training was done, from 0 to 1, and the evaluator's first measure then.
    """
    arguments = common(output, *(options[name] for name in ("epochs", "batch_size", "learning_rate", "seed")))
    if evaluator is not None:
        arguments |= {"eval_strategy": "steps", "eval_steps": 0.25, "eval_on_start": True}
    trainer = SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=lists,
        loss=build_loss(options["loss"], student, options["scale"]),
        data_collator=DistillationCollator(preprocess_fn=student.preprocess),
        callbacks=[ResampleCallback()],
        evaluator=evaluator,
    )
    trainer.train()
    student.eval()
    if evaluator is None:
        return []
    measure = str(evaluator.primary_metric)
    key = f"eval_{measure}"
    measured = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
    last = trainer.state.global_step
    if last not in measured:  # a number of steps that four does not divide
        measured[last] = evaluator(student)[measure]
    return [(step / last, value) for step, value in measured.items()]


def finetune_teacher(
    teacher: CrossEncoder, data: RetrievalData, pools: Mapping[str, Sequence[str]], output: Path, seed: int
) -> int:
    """Fine-tune the cross-encoder shortly on training queries: the relevant document and three hard negatives each.

    Returns:
        The number of pairs it was trained on.
    """
    pairs: dict[str, list[Any]] = {"query": [], "document": [], "label": []}
    for query, relevant in data.qrels["train"].items():
        negatives = [d for d in pools.get(query, ()) if d not in relevant][:3]
        for document in [*list(relevant)[:1], *negatives]:
            pairs["query"].append(data.queries[query])
            pairs["document"].append(data.corpus[document])
            pairs["label"].append(float(document in relevant))
    CrossEncoderTrainer(
        model=teacher,
        args=CrossEncoderTrainingArguments(**common(output, 1, 16, 2e-5, seed)),
        train_dataset=Dataset.from_dict(pairs),
        loss=BinaryCrossEntropyLoss(teacher),
    ).train()
    teacher.eval()
    return len(pairs["label"])
