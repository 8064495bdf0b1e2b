"""Following the scores of chosen documents while a student, or a cross-encoder, trains."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_m3se.core.files import atomic_file
from st_m3se.diagnostics.tracking import HEADER, TrackedList, read_records

__all__ = ["ScoreEvolutionCallback"]

logger = logging.getLogger(__name__)

RECORDS = 200  # of a training, about, where nobody says
TEXTS_PER_ROW = 50
"""By default a record of ``n`` pairs comes every ``50 n / rows`` steps. A step takes its rows forward and backward,
some three times the forward pass alone, so that records take 2/3 % of the training even if a row is as cheap as a pair.
It never is for a student, whose rows are lists."""


class ScoreEvolutionCallback(TrainerCallback):
    """Writes the scores of a few documents every so many steps of a training, to be drawn over the steps.

    For the unmodified ``SentenceTransformerTrainer`` (the model's own similarity) and ``CrossEncoderTrainer`` (raw
    logits). It takes the scores before the first step, every ``every_steps`` steps, and after the last one, without
    dropout. The
    training is the same, bit for bit, with and without it: every module's mode and all random states are put back. With
    several processes the first one does it alone.

    The record is a CSV (step, epoch, query_id, document_id, positive, score) that grows while the training runs, and a
    JSON of the same name with the texts, the settings and ``share``, the share of the training time that this took. A
    training that goes on from a checkpoint goes on with its record.

    Args:
        tracked: What to follow, from :func:`~st_m3se.diagnostics.track`.
        every_steps: Steps between two records. None chooses them so that records cost less than a hundredth of the
            training, and that there are not many more than 200.
        output: The CSV. None is ``score_evolution.csv`` in the trainer's ``output_dir``.
        name: The model's name in figures. None is "cross-encoder" or "bi-encoder", whichever it is.
        batch_size: Pairs or texts that are encoded together.

    Raises:
        ValueError: When training starts: if the model is sharded over processes (FSDP, DeepSpeed ZeRO-3), so that the
            first one cannot encode alone; if the record in ``output`` follows other documents; or if a cross-encoder
            has more than one label.

    Example:
        ::

            tracked = track("run", "my-data", "my-data", "my-data/qrels/train.tsv")
            trainer = SentenceTransformerTrainer(..., callbacks=[ScoreEvolutionCallback(tracked)])
            trainer.train()
            save_figure(plot_evolution([Evolution.read("output/score_evolution.csv")]), "evolution")
    """

    def __init__(
        self,
        tracked: Sequence[TrackedList],
        *,
        every_steps: int | None = None,
        output: str | Path | None = None,
        name: str | None = None,
        batch_size: int = 32,
    ) -> None:
        if isinstance(tracked, TrackedList):
            tracked = [tracked]
        if not tracked or not all(isinstance(each, TrackedList) for each in tracked):
            raise ValueError("tracked must be a list of TrackedList, as track(...) gives it, with one at least.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps must be at least 1 or None, got {every_steps}.")
        self.tracked, self.every_steps, self.batch_size = list(tracked), every_steps, batch_size
        self.output, self.name = None if output is None else Path(output), name
        self._query_rows = [row for row, each in enumerate(self.tracked) for _ in each.documents]
        self._documents = [text for each in self.tracked for text in each.documents]
        self._path = Path("score_evolution.csv")
        self._every = 1
        self._seconds = self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the record, and take the scores before the first step."""
        self._check(args, kwargs["model"])
        if not state.is_world_process_zero:
            return
        rows = args.train_batch_size * args.gradient_accumulation_steps
        fitting = math.ceil(TEXTS_PER_ROW * len(self._documents) / rows)
        self._every = self.every_steps or max(fitting, math.ceil(state.max_steps / RECORDS))
        self._path = self.output or Path(args.output_dir or ".") / "score_evolution.csv"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._seconds, self._began = 0.0, time.perf_counter()
        last = self._open(self._path, state.global_step)
        self._describe(kwargs["model"])
        if last < 0:
            self._record(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the scores, where it is their turn."""
        # The end is seen here, since on_train_end gets the best model instead of the last where that was asked for.
        turn = state.global_step % self._every == 0 or state.global_step >= state.max_steps
        if state.is_world_process_zero and (turn or control.should_training_stop):
            self._record(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what it cost."""
        if state.is_world_process_zero:
            self._describe(kwargs["model"])

    def _check(self, args: TrainingArguments, model: Any) -> None:
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" or (deepspeed and deepspeed.is_zero3()):
            raise ValueError(
                "ScoreEvolutionCallback encodes in the first process alone, and with FSDP or DeepSpeed ZeRO-3 no "
                "process holds the whole model. Remove the callback, or train with DDP."
            )
        if not isinstance(model, (CrossEncoder, SentenceTransformer)):
            raise ValueError(
                f"ScoreEvolutionCallback follows a CrossEncoder or a SentenceTransformer, got {type(model).__name__}."
            )
        if isinstance(model, CrossEncoder) and model.num_labels != 1:
            raise ValueError(
                f"ScoreEvolutionCallback follows one score for each document, and this cross-encoder has "
                f"{model.num_labels} labels."
            )

    def _open(self, path: Path, step: int) -> int:
        """Keep the records up to ``step``, and return the last step that has one, or -1."""
        pairs = [(str(each.query_id), str(document)) for each in self.tracked for document in each.document_ids]
        kept = pd.DataFrame(columns=HEADER)
        if step > 0 and path.is_file():
            records, count = read_records(path)
            known = list(zip(records["query_id"][:count], records["document_id"][:count], strict=True))
            if known and known != pairs:
                raise ValueError(
                    f"{path} is the record of other documents than those to follow now. Give the same ones (the same "
                    "seed and candidates), or another output."
                )
            kept = records[records["step"].astype(int) <= step]
        with atomic_file(path, overwrite=True) as temporary:
            kept.to_csv(temporary, index=False, lineterminator="\n")
        return int(kept["step"].iloc[-1]) if len(kept) else -1

    def _record(self, model: Any, state: TrainerState) -> None:
        start = time.perf_counter()
        with _untouched(model):
            scores = self._scores(model)
        followed = (
            (each.query_id, document, int(positive))
            for each in self.tracked
            for document, positive in zip(each.document_ids, each.positives, strict=True)
        )
        epoch = round(state.epoch or 0.0, 4)
        rows = [(state.global_step, epoch, *each, f"{score:.7g}") for each, score in zip(followed, scores, strict=True)]
        text = pd.DataFrame(rows).to_csv(header=False, index=False, lineterminator="\n")
        with self._path.open("a", encoding="utf-8", newline="") as stream:
            stream.write(text)  # at once, so that a kill leaves no half of it
        self._seconds += time.perf_counter() - start

    def _scores(self, model: Any) -> np.ndarray:
        options: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": False, "convert_to_tensor": True}
        if isinstance(model, CrossEncoder):
            pairs = [
                (self.tracked[row].query, text) for row, text in zip(self._query_rows, self._documents, strict=True)
            ]
            scores = model.predict(pairs, activation_fn=torch.nn.Identity(), **options)
        else:
            queries = model.encode_query([each.query for each in self.tracked], **options)
            documents = model.encode_document(self._documents, **options)
            scores = model.similarity_pairwise(queries[self._query_rows], documents)
        values: np.ndarray = scores.float().cpu().numpy()
        return values

    def _describe(self, model: Any) -> None:
        elapsed = time.perf_counter() - self._began
        kind = "cross-encoder" if isinstance(model, CrossEncoder) else "bi-encoder"
        content = {
            "name": self.name or kind,
            "kind": kind,
            "score": "raw logit" if kind == "cross-encoder" else f"{model.similarity_fn_name} similarity",
            "every_steps": self._every,
            "seconds": round(self._seconds, 3),
            "share": round(self._seconds / elapsed, 5) if self._seconds else None,
            "tracked": [each._asdict() for each in self.tracked],
        }
        with atomic_file(self._path.with_suffix(".json"), overwrite=True) as temporary:
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _untouched(model: torch.nn.Module) -> Iterator[None]:
    """Put back every module's mode and all random states, whatever happens within."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    python, legacy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device.index or 0]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for module, mode in modes:
            module.training = mode
