"""What test_evolution.py launches twice at once: a training with and without the callback, by two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from st_m3se import DistillationCollator, M3SELoss
from st_m3se.diagnostics import ScoreEvolutionCallback, TrackedList

torch.set_num_threads(1)
student, output = sys.argv[1], Path(sys.argv[2])
tracked = [TrackedList("q", "where is the red cat", ("a", "b"), ("the red cat", "the dog"), (True, False))]
rows = [
    {
        "query": f"where is the {one} cat",
        "documents": [f"the {one} cat sleeps", f"the {other} dog eats", "a horse runs"],
        "scores": [3.0, 1.0, -2.0],
    }
    for one in ("red", "green", "blue", "white")
    for other in ("pink", "grey", "old", "brown")
]
weights = []
for callbacks in ([], [ScoreEvolutionCallback(tracked, every_steps=2, output=output / "record.csv")]):
    model = SentenceTransformer(student, device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    options = {
        "output_dir": str(output / "run"),
        "use_cpu": True,
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_drop_last": True,
        "seed": 5,
    }
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**options),
        train_dataset=Dataset.from_list(rows),
        loss=M3SELoss(model, scale=3.0),
        data_collator=DistillationCollator(preprocess_fn=model.preprocess),
        callbacks=callbacks,
    ).train()
    weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
same = torch.equal(*weights)
(output / f"rank{os.environ['RANK']}.txt").write_text(f"{os.environ['WORLD_SIZE']} {same}")
