"""An interrupted and resumed run equals the unbroken one bit for bit: dropout and sampled rankings included."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor
from transformers import TrainerCallback

from st_m3se import CoupledRankDistilLoss, DistillationCollator, M3SELoss, RankDistilLoss

BREAK, STEPS = 3, 7  # of 4 steps an epoch: the break is inside an epoch, and the end in the next one


class StopAfter(TrainerCallback):
    """Ends a run as a shutdown does, after the checkpoint of that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.parametrize("tokens", [None, 60])
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda model, **options: M3SELoss(model, in_batch_negatives=True, **options), id="m3se"),
        pytest.param(lambda model, **options: RankDistilLoss(model, top_k=2, **options), id="rank-distil"),
        pytest.param(lambda model, **options: CoupledRankDistilLoss(model, num_samples=4, **options), id="coupled"),
    ],
)
def test_a_resumed_run_is_the_unbroken_one(
    make_model: Any,
    arguments: Callable[..., Any],
    ragged_rows: list[dict[str, Any]],
    tmp_path: Path,
    build: Callable[..., Any],
    tokens: int | None,
) -> None:
    """Prevents randomness that the checkpoint does not hold: the second half would train on other draws."""

    def run(folder: str, stop: int | None = None, resume: str | None = None) -> Tensor:
        model = make_model(dropout=0.2)
        args = arguments(
            output_dir=str(tmp_path / folder), max_steps=STEPS, save_strategy="steps", save_steps=BREAK, seed=5
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(ragged_rows),
            loss=build(model, scale=3.0, mini_batch_num_tokens=tokens),
            data_collator=DistillationCollator(preprocess_fn=model.preprocess),
            callbacks=[] if stop is None else [StopAfter(stop)],
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == (stop or STEPS)
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    unbroken = run("unbroken")
    interrupted = run("broken", stop=BREAK)
    assert not torch.equal(unbroken, interrupted)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)  # a new process starts from another state
    assert torch.equal(run("broken", resume=str(tmp_path / "broken" / f"checkpoint-{BREAK}")), unbroken)
