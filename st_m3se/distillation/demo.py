"""``st-m3se distill --demo``: a real distillation with data and weights that come with Python packages, no hub."""

from __future__ import annotations

from typing import Any

import torch

from st_m3se.data.texts import Texts
from st_m3se.distillation.config import DistillationConfig
from st_m3se.distillation.data import DistillationData, in_hash_order
from st_m3se.distillation.demo_models import (
    MINILM,
    MINILM_TOKENS,
    TEACHER_TOKENS,
    demo_teacher_folder,
    onnx_scorer,
    weights_folder,
)
from st_m3se.distillation.python_docs import load_python_docs

__all__ = ["demo_options", "load_demo_data", "load_demo_teacher"]

TEACHER = "ms-marco-MiniLM-L12-v2"
FULL = {"train_queries": 900, "dev_queries": 50, "test_queries": 450, "scored": 5, "pool": 12}
# So few dev queries decide nothing: the small run goes on whatever they say of the teacher.
QUICK = {"train_queries": 200, "dev_queries": 20, "test_queries": 60, "scored": 3, "pool": 10, "anyway": True}
QUICK_DOCUMENTS = 1000


def demo_options(quick: bool = False) -> dict[str, Any]:
    """The options of the demo. Its training queries stand for those that nobody has judged."""
    return {
        "data": "python",
        "teacher": (TEACHER,),
        "student": str(weights_folder(*MINILM)),
        "max_length": MINILM_TOKENS,
        "judgements": False,
        "ensemble": True,
        "control": True,
        "epochs": 1.0,  # a second one would take more than the ten minutes that were promised
        **(QUICK if quick else FULL),
    }


def load_demo_data(quick: bool = False) -> DistillationData:
    """The documentation of the running Python: a docstring's summary asks for its body."""
    data = load_python_docs()
    if quick:
        data.cut({split: QUICK[f"{split}_queries"] for split in data.qrels})
        needed = {document for split in data.qrels.values() for relevant in split.values() for document in relevant}
        others = in_hash_order(str(document) for document in data.corpus if document not in needed)
        kept = needed.union(others[: max(0, QUICK_DOCUMENTS - len(needed))])
        ids = [document for document in data.corpus if document in kept]
        data.corpus = Texts.open(dict(zip(ids, data.corpus.take(ids), strict=True)))
        data.notes.append(f"a corpus of {len(ids):,} documents, so the figures are not those of the full run")
    return data


def load_demo_teacher(config: DistillationConfig) -> Any:
    """The demo's cross-encoder, on a CPU in ONNX, which is twice as fast there; None where another is asked for."""
    if config.teacher != (TEACHER,):
        return None
    if torch.cuda.is_available():
        return {TEACHER: str(demo_teacher_folder())}
    return {f"{TEACHER} (int8 ONNX, {TEACHER_TOKENS} tokens)": onnx_scorer(TEACHER_TOKENS)}
