"""Training lists and the training itself, with the unmodified SentenceTransformerTrainer."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from retrieval import DenseIndex, Run
from retrieval_data import Qrels, RetrievalData, UsageError
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
    CoupledRankDistilLoss,
    DistillationCollator,
    M3SELoss,
    MarginMSELoss,
    RankDistilLoss,
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

SENTENCE_WORDS = (4, 25)


def training_rows(
    data: RetrievalData, scores: Run, qrels: Qrels, extra: Run, list_size: int, keep_above: bool, seed: int
) -> list[dict[str, Any]]:
    """One row per query: its relevant documents, scored negatives, then unscored ones from ``extra``.

    An unscored negative (NaN) costs the teacher nothing; M3SE's hinge still pushes it below the teacher's best
    negative.

    Args:
        data: the texts.
        scores: the teacher's scores of the candidates.
        qrels: the known relevant documents; a query without a scored one is left out.
        extra: more candidates, whose scores are ignored.
        list_size: documents per row.
        keep_above: keep negatives that the teacher scores above every known positive (False: leave them out).
        seed: for the choice of unscored negatives.
    """
    chooser = random.Random(seed)
    rows = []
    for query, relevant in qrels.items():
        listed = scores.get(query, {})
        positives = [d for d in relevant if not math.isnan(listed.get(d, math.nan))]
        if not positives:
            continue
        ceiling = max(listed[d] for d in positives)
        negatives = [d for d in listed if d not in relevant and (keep_above or not listed[d] > ceiling)]
        negatives.sort(key=lambda d: -listed[d] if not math.isnan(listed[d]) else math.inf)
        if not negatives or math.isnan(listed[negatives[0]]):
            continue  # without a scored negative there is no margin to learn
        dropped = set(listed).union(relevant)  # a filtered negative must not come back unscored
        more = [d for d in extra.get(query, {}) if d not in dropped]
        chooser.shuffle(more)
        ordered = [*positives[: max(1, list_size // 2)], *negatives, *more]
        # A corpus may hold one text twice: beside the relevant copy, the other one is no negative.
        first: dict[str, str] = {}
        for document in ordered:
            first.setdefault(data.corpus[document], document)
        chosen = list(first.values())[:list_size]
        if not any(d not in relevant and not math.isnan(listed.get(d, math.nan)) for d in chosen):
            continue
        rows.append(
            {
                "query": data.queries[query],
                "documents": [data.corpus[d] for d in chosen],
                "scores": [listed.get(d, math.nan) for d in chosen],
                "positives": [d in relevant for d in chosen],
            }
        )
    return rows


def pseudo_rows(
    data: RetrievalData, guide: DenseIndex, count: int, list_size: int, spread: float, seed: int
) -> list[dict[str, Any]]:
    """Lists that need no query: a sentence is the query, the rest of its document the relevant document.

    The bi-encoder ``guide`` finds and scores the negatives; ``spread`` brings its cosines into the teacher's units.
    No query and no judgement is used, of any split.
    """
    chooser = random.Random(seed)
    picked: dict[str, tuple[str, str, str]] = {}
    for document in chooser.sample(list(data.corpus), len(data.corpus)):
        sentences = re.split(r"(?<=[.!?])\s+", data.corpus[document])
        fitting = [i for i, s in enumerate(sentences) if SENTENCE_WORDS[0] <= len(s.split()) <= SENTENCE_WORDS[1]]
        for i in chooser.sample(fitting, min(2, len(fitting))):
            rest = " ".join(sentences[:i] + sentences[i + 1 :])
            if len(rest.split()) >= 10 and len(picked) < count:
                picked[f"{document} {i}"] = (document, sentences[i], rest)
    found = guide.search({key: sentence for key, (_, sentence, _) in picked.items()}, 2 * list_size)
    own = guide.score({key: s for key, (_, s, _) in picked.items()}, {key: [d] for key, (d, _, _) in picked.items()})
    rows = []
    for key, (document, sentence, rest) in picked.items():
        negatives = [d for d in found[key] if d != document]
        chosen = chooser.sample(negatives, min(list_size - 1, len(negatives)))
        if chosen:
            rows.append(
                {
                    "query": sentence,
                    "documents": [rest, *(data.corpus[d] for d in chosen)],
                    "scores": [spread * s for s in (own[key][document], *(found[key][d] for d in chosen))],
                    "positives": [True] + [False] * len(chosen),
                }
            )
    return rows


def train_student(
    student: SentenceTransformer, rows: list[dict[str, Any]], options: Mapping[str, Any], output: Path
) -> None:
    """Train in place. ``options``: loss, scale, epochs, batch_size, learning_rate, seed."""
    if not rows:
        raise UsageError(
            "Expected at least one training query whose relevant document and one negative have teacher scores, got "
            "none. Check that the ids of --scores are those of --data, and that qrels name documents of the corpus."
        )
    loss_class, loss_options = LOSSES[options["loss"]]
    loss = loss_class(student, scale=options["scale"], **loss_options)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output / "checkpoints"),
        num_train_epochs=options["epochs"],
        per_device_train_batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        warmup_steps=0.1,
        seed=options["seed"],
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    )
    SentenceTransformerTrainer(
        model=student,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        loss=loss,
        data_collator=DistillationCollator(preprocess_fn=student.preprocess),
    ).train()
    student.eval()


def finetune_teacher(
    teacher: CrossEncoder, data: RetrievalData, pools: Run, qrels: Qrels, output: Path, seed: int
) -> int:
    """Fine-tune the cross-encoder shortly on training queries: the relevant document and three hard negatives each.

    Returns:
        The number of pairs it was trained on.
    """
    pairs: dict[str, list[Any]] = {"query": [], "document": [], "label": []}
    for query, relevant in qrels.items():
        negatives = [d for d in pools.get(query, {}) if d not in relevant][:3]
        for document in [*list(relevant)[:1], *negatives]:
            pairs["query"].append(data.queries[query])
            pairs["document"].append(data.corpus[document])
            pairs["label"].append(float(document in relevant))
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(output / "teacher-checkpoints"),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=2e-5,
        warmup_steps=0.1,
        seed=seed,
        save_strategy="no",
        logging_steps=20,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    CrossEncoderTrainer(
        model=teacher, args=arguments, train_dataset=Dataset.from_dict(pairs), loss=BinaryCrossEntropyLoss(teacher)
    ).train()
    teacher.eval()
    return len(pairs["label"])
