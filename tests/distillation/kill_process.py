"""Run a distillation whole, and another one in children that are killed in front of every so many renames.

What is on disk changes by renames: between two of them a kill leaves the same behind wherever it comes.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from example_fixtures import shared_words
from sentence_transformers import SentenceTransformer  # noqa: F401 # once, before the children

import st_m3se.distillation.pipeline as pipeline

RENAMES = 7
CHILDREN = 30


def distil(data: str, student: str, output: Path, renames: int | None) -> None:
    torch.set_num_threads(1)
    left = [renames]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] is not None:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "link"):
        setattr(os, name, counted(getattr(os, name)))
    options = {"epochs": 3, "learning_rate": 5e-3, "batch_size": 4, "scored": 4, "pool": 8, "show": False}
    pipeline.distill(
        data, {"shared words": shared_words}, student, output, control=True, checkpoint_minutes=0, **options
    )


def child(*args: Any) -> int:
    """The exit status of a distillation in a process of its own."""
    pid = os.fork()
    if not pid:
        try:
            distil(*args)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main(data: str, student: str, folder: str) -> None:
    assert child(data, student, Path(folder) / "whole", None) == 0
    kills = 0
    while (status := child(data, student, Path(folder) / "broken", RENAMES)) != 0:
        assert status == signal.SIGKILL, status
        kills += 1
        assert kills < CHILDREN, "no progress"
    print(kills)


if __name__ == "__main__":
    main(*sys.argv[1:])
