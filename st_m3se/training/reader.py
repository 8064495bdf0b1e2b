"""Reading training lists: drawn and joined with their texts row by row, and told the epoch by a callback."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_m3se.core.ids import Id
from st_m3se.data.texts import Texts
from st_m3se.training.sampling import Sampling, random_keys, sample_list

__all__ = ["Layout", "ListReader", "ResampleCallback", "list_readers"]

logger = logging.getLogger(__name__)

Layout = Literal["lists", "columns", "reranker"]

READS_BEFORE_TRAINING = 5_000
"""Rows that a trainer may read for its model card before it starts to train."""
COLUMNS = {"qid", "candidate_ids", "scores", "num_positives", "relevant_ids"}
LABELS = {"scores", "relevant_ids"}
"""What a batch sampler may remove, as it does with labels, before it compares rows; a list is drawn without them."""
EPOCH, TOLD, READS = range(3)  # the places of a reader's shared state


class ResampleCallback(TrainerCallback):
    """Tells the training dataset which epoch it is, so that it draws other lists.

    Pass ``callbacks=[ResampleCallback()]`` to the trainer. The epoch reaches all workers, persistent ones too, through
    shared memory before they read the epoch's first row; after resuming from a checkpoint it is the one that the
    trainer counts. Each rank tells its own dataset. Works for a dataset, a part of one, and a dictionary of
    several. Parts of one dataset share its epoch: build an evaluation set on its own, e.g. of ``scores.select``, rather
    than splitting it off.

    Raises:
        ValueError: When training starts, if no training dataset comes from :func:`~st_m3se.build_distillation_dataset`.
    """

    # A set_epoch on the dataset would not do: accelerate 1.x calls it for a single process alone, and neither after
    # resuming nor for a dictionary of datasets. TrainerState.epoch falls short when a sampler yields fewer batches than
    # announced, as the one without duplicates may.

    def __init__(self) -> None:
        self._readers: list[ListReader] = []
        self._epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the datasets, and the epoch in which training starts."""
        loader = kwargs["train_dataloader"]
        self._readers = list_readers(loader.dataset)
        if not self._readers:
            raise ValueError(
                "ResampleCallback found no training dataset of build_distillation_dataset that still draws its lists: "
                "one that was mapped, saved or given another format has fixed rows. Remove the callback, or train on "
                "the dataset as it was built (select, shuffle and filter are fine)."
            )
        # How the trainer counts the epochs that a checkpoint has behind it.
        updates = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
        self._epoch = state.global_step // updates

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the datasets; the trainer starts to read them only after this."""
        for reader in self._readers:
            reader.set_epoch(self._epoch)
        self._epoch += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation dataset is read over and over and keeps its lists: no reason to warn."""
        if (loader := kwargs.get("eval_dataloader")) is not None:
            for reader in list_readers(loader.dataset):
                reader.state[TOLD] = 1


@dataclass(eq=False)
class ListReader:
    """The dataset's transform: from candidate ids to a list's texts.

    It must survive what the host does with it: be copied by ``with_format`` (all views of one dataset share an epoch),
    wrapped by a trainer that names datasets, and pickled to workers (which share the epoch's memory). The samplers that
    keep duplicates apart remove the columns that the collator calls labels and compare all others as text, equal flags
    of two queries as well as equal texts: rows without their scores are read as texts alone.
    """

    queries: Texts
    corpus: Texts
    list_size: int | None
    max_positives: int | None
    sampling: Sampling
    seed: int
    layout: Layout
    resample: bool
    rows: int
    state: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64).share_memory_())  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the lists of this epoch from now on, in every process that reads them."""
        self.state[EPOCH] = epoch
        self.state[TOLD] = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> ListReader:
        return self

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Turn rows of ids into rows of texts."""
        if not COLUMNS - LABELS <= set(batch) <= COLUMNS or ("scores" in batch and "relevant_ids" not in batch):
            raise ValueError(
                f"training lists are drawn from whole rows of {sorted(COLUMNS)}, got {sorted(batch)}. After a change "
                "of columns there is no such row, and what was added would be lost. To fix the lists as they are now: "
                "dataset.map(function, remove_columns=dataset.column_names).with_format(None)."
            )
        epoch = int(self.state[EPOCH]) if self.resample else 0
        ids: list[Id] = []
        drawn: list[list[int]] = []
        positives: list[int] = []
        columns = (batch[name] for name in ("qid", "candidate_ids", "num_positives"))
        for query_id, candidates, num_positives in zip(*columns, strict=True):
            places, count = sample_list(
                num_positives,
                len(candidates) - num_positives,
                random_keys(self.seed, epoch, query_id, len(candidates)),
                list_size=self.list_size,
                max_positives=self.max_positives,
                sampling=self.sampling,
            )
            drawn.append(places.tolist())
            ids += [candidates[place] for place in drawn[-1]]
            positives.append(count)
        texts, documents = self.queries.take(batch["qid"]), self.corpus.take(ids)
        scores: list[list[float]] = []
        if labelled := "scores" in batch:
            self._watch(len(drawn))
            scores = [[row[place] for place in chosen] for row, chosen in zip(batch["scores"], drawn, strict=True)]
        if self.layout == "columns":
            width = self.list_size or 0  # checked: columns have one
            columns_ = {f"document_{place + 1}": documents[place::width] for place in range(width)}
            return {"query": texts, **columns_} | ({"label": scores} if labelled else {})
        ends = np.cumsum([0, *map(len, drawn)]).tolist()
        rows: dict[str, list[Any]] = {"query": texts, "documents": [documents[i:j] for i, j in pairwise(ends)]}
        if not labelled:
            return rows
        if self.layout == "reranker":
            return rows | {"label": scores}
        return rows | {
            "scores": scores,
            "positives": [
                [place < count for place in range(len(row))] for row, count in zip(drawn, positives, strict=True)
            ],
            "document_ids": [ids[start:end] for start, end in pairwise(ends)],
            "relevant_ids": batch["relevant_ids"],
        }

    def _watch(self, count: int) -> None:
        """Say once that the rows come round again with the same lists, for want of the callback."""
        if not self.resample or self.list_size is None or self.sampling == "top" or self.state[TOLD]:
            return
        self.state[READS] += count
        if self.state[READS] > 2 * self.rows + READS_BEFORE_TRAINING:
            self.state[TOLD] = 1
            logger.warning(
                "build_distillation_dataset: all rows were read more than twice, and every time with the same lists, "
                "because nobody says which epoch it is. Pass callbacks=[ResampleCallback()] to the trainer; for an "
                "evaluation set, or to keep the lists, build the dataset with resample=False."
            )


def list_readers(dataset: Any) -> list[ListReader]:
    """The readers of a dataset, or of each that a trainer has concatenated."""
    found = []
    for part in getattr(dataset, "datasets", [dataset]):
        transform = part.format["format_kwargs"].get("transform") if isinstance(part, Dataset) else None
        while isinstance(transform, partial):  # the trainer's, which adds the dataset's name
            transform = transform.keywords.get("transform")
        if isinstance(transform, ListReader):
            found.append(transform)
    return found
