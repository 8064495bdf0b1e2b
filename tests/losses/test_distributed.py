"""`accelerate launch` over two processes ends at the parameters of one process with the doubled batch.

Run as a script, this file is the training that is launched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor

import st_m3se
from st_m3se import DistillationCollator
from st_m3se.encoding import batch
from st_m3se.encoding.packing import is_sharded

ROWS_AT_ONCE = 8
STEPS = 2
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}


@dataclass(frozen=True)
class Case:
    """A loss, its gradient cache, and whether documents are gathered from all processes."""

    loss: str
    tokens: int | None = None
    in_batch: bool = False
    gather: bool = False
    student: str = "dense"
    sharded: bool = False

    def __str__(self) -> str:
        flags = (f"tokens={self.tokens}", f"in_batch={self.in_batch}", f"gather={self.gather}", f"fsdp={self.sharded}")
        return "-".join([self.student, self.loss, *flags])


EQUAL = [
    Case("M3SELoss"),
    Case("M3SELoss", tokens=40),
    Case("MarginMSELoss", tokens=40),
    Case("SoftmaxCrossEntropyLoss"),
    Case("M3SELoss", in_batch=True, gather=True),
    Case("M3SELoss", tokens=40, in_batch=True, gather=True),
    Case("SoftmaxCrossEntropyLoss", in_batch=True, gather=True),
    Case("RankDistilLoss", tokens=40, in_batch=True, gather=True),
    Case("M3SELoss", in_batch=True, gather=True, student="multi-vector"),
    Case("SoftmaxCrossEntropyLoss", tokens=40, in_batch=True, gather=True, student="multi-vector"),
]
SHARDED = [
    Case("M3SELoss", sharded=True),
    Case("SoftmaxCrossEntropyLoss", in_batch=True, gather=True, sharded=True),
    Case("M3SELoss", in_batch=True, gather=True, student="multi-vector", sharded=True),
]
"""By FSDP2, where one process would run more forward passes than the other."""
UNEQUAL = Case("SoftmaxCrossEntropyLoss", in_batch=True)
"""Each process has its own negatives only: another training, and the guard that the comparison sees a difference."""


def load(case: Case, folder: Path) -> Any:
    kind = SentenceTransformer if case.student == "dense" else MultiVectorEncoder
    model = kind(str(folder / case.student), device="cpu")
    if case.sharded and case.student == "multi-vector":
        del model[-1]  # accelerate would shard Normalize on its own, and torch cannot: TypeError
    return model


def train(case: Case, folder: Path, processes: int) -> Tensor:
    """Train from the saved model with the real trainer; returns all parameters, flattened."""
    model = load(case, folder)
    rows = torch.load(folder / "rows.pt")
    loss = getattr(st_m3se, case.loss)(
        model,
        scale=3.0 if case.student == "dense" else 0.3,  # a query has ten tokens or so, and as many cosines
        mini_batch_num_tokens=case.tokens,
        **(
            {"in_batch_negatives": True, "gather_across_devices": case.gather and processes > 1}
            if case.in_batch
            else {}
        ),
    )
    dense = case.student == "dense"
    args = (SentenceTransformerTrainingArguments if dense else MultiVectorEncoderTrainingArguments)(
        output_dir=str(folder / "run"),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS_AT_ONCE // processes,
        # Adam makes whole steps of the rounding errors of gradients that are zero, such as a key's bias.
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        seed=3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        ddp_timeout=90,  # processes that wait for each other fail
        **({"fsdp": True, "fsdp_config": FSDP} if case.sharded and processes > 1 else {}),
    )
    if case.sharded and processes > 1:
        AcceleratorState._reset_state()
        assert args.world_size == processes
        # accelerate shards on accelerators alone, though FSDP2 itself works on a CPU.
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = (SentenceTransformerTrainer if dense else MultiVectorEncoderTrainer)(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        loss=loss,
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
    )
    assert args.world_size == processes
    trainer.train()
    assert is_sharded(model) == (case.sharded and processes > 1)
    whole = (
        getattr(parameter, "full_tensor", lambda parameter=parameter: parameter)() for parameter in model.parameters()
    )
    return torch.cat([parameter.detach().flatten() for parameter in whole])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A model without dropout, the rows, and what two launched processes made of them."""
    from conftest import DIMENSION, _row
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from students import multi_vector_student

    folder = tmp_path_factory.mktemp("distributed")
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformer = Transformer(str(checkpoint), config_kwargs=no_dropout)
    SentenceTransformer(modules=[transformer, Pooling(DIMENSION, "mean")], device="cpu").save_pretrained(
        str(folder / "dense")
    )
    multi_vector_student(checkpoint, {"strategy": "fixed", "attend": False, "length": 14}).save_pretrained(
        str(folder / "multi-vector")
    )
    # Of unlike lengths, so that the processes' batches differ in width, and with documents shared between them.
    torch.save(
        [_row(row, [row, *((row + step) % 16 for step in range(1, 2 + row % 4))]) for row in range(16)],
        folder / "rows.pt",
    )
    # Under --cpu accelerate starts processes by MPI alone. --multi_gpu is its name for torch's own launcher; the
    # training arguments say that the processes work on the CPU.
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    command += [__file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "no token that is scored" not in done.stderr, "padding between processes is no document"
    return folder


def result(folder: Path, case: Case) -> Tensor:
    """What the launched run ended at, equal on both processes."""
    first, second = (torch.load(folder / f"{case}.{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("case", EQUAL + SHARDED, ids=str)
def test_two_processes_end_where_one_does(folder: Path, case: Case) -> None:
    """Prevents gradients that are lost, doubled or averaged wrongly between processes: training would still run."""
    expected = train(case, folder, processes=1)
    start = load(case, folder)
    moved = (expected - torch.cat([parameter.flatten() for parameter in start.parameters()])).abs().max()
    assert moved > 1e-3, "nothing was trained: the comparison would say nothing"
    assert (result(folder, case) - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_negatives_of_the_own_process_are_another_training(folder: Path) -> None:
    """What gather_across_devices is for."""
    assert (result(folder, UNEQUAL) - train(UNEQUAL, folder, processes=1)).abs().max() > 1e-4


def launched(folder: Path) -> None:
    """Train every case on this process's share, and save where it ended."""
    torch.set_num_threads(1)
    for case in [*EQUAL, UNEQUAL]:
        parameters = train(case, folder, processes=2)
        torch.save(parameters, folder / f"{case}.{os.environ['RANK']}.pt")
    batch.CHUNK_TOKENS = (20, 4000)[int(os.environ["RANK"])]  # many pieces in one process and few in the other
    for case in SHARDED:
        torch.save(train(case, folder, processes=2), folder / f"{case}.{os.environ['RANK']}.pt")
    with pytest.raises(ValueError, match="equally many on every process"):
        train(replace(SHARDED[0], tokens=40), folder, processes=2)
    # All is saved. The interpreter's own exit meets the threads of the process group and was seen to abort; leaving the
    # group first was seen to hang.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    launched(Path(sys.argv[1]))
