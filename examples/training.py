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
from transformers import TrainerCallback

from st_m3se import (
    CoupledRankDistilLoss,
    DistillationCollator,
    M3SELoss,
    MarginMSELoss,
    RankDistilLoss,
    ResampleCallback,
    ScoreMSELoss,
    SoftmaxCrossEntropyLoss,
)

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "m3se": (M3SELoss, {"in_batch_negatives": True}),
    "rank-distil": (RankDistilLoss, {"top_k": 3}),
    "coupled-rank-distil": (CoupledRankDistilLoss, {"top_k": 3}),
    "margin-mse": (MarginMSELoss, {}),
    "softmax-cross-entropy": (SoftmaxCrossEntropyLoss, {}),
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
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    }


def warm_up(
    student: SentenceTransformer,
    pairs: Sequence[tuple[str, str]],
    output: Path,
    epochs: float,
    learning_rate: float,
    seed: int,
) -> None:
    """Train in place on (query, document) pairs without a teacher: each document against all others of the batch.

    With lists of one document and in-batch negatives, softmax cross-entropy is the host's MultipleNegativesRankingLoss,
    the same value and gradient; documents sorted by length make it about twice as fast on a CPU.
    """
    lists = Dataset.from_list([{"query": query, "documents": [text], "scores": [0.0]} for query, text in pairs])
    loss = SoftmaxCrossEntropyLoss(student, scale=20.0, in_batch_negatives=True)
    # Every other document of the batch is a negative: more of them teach more.
    _train(student, lists, loss, common(output, epochs, 128, learning_rate, seed), [])


def train_student(student: SentenceTransformer, lists: Dataset, options: Mapping[str, Any], output: Path) -> None:
    """Train in place. ``options``: loss, scale, epochs, batch_size, learning_rate, seed."""
    loss_class, loss_options = LOSSES[options["loss"]]
    loss = loss_class(student, scale=options["scale"], **loss_options)
    arguments = common(output, *(options[name] for name in ("epochs", "batch_size", "learning_rate", "seed")))
    _train(student, lists, loss, arguments, [ResampleCallback()])


def _train(
    student: SentenceTransformer, lists: Dataset, loss: Any, arguments: dict[str, Any], callbacks: list[TrainerCallback]
) -> None:
    SentenceTransformerTrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=lists,
        loss=loss,
        data_collator=DistillationCollator(preprocess_fn=student.preprocess),
        callbacks=callbacks,
    ).train()
    student.eval()


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
