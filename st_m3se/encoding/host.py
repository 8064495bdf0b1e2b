"""The private parts of sentence-transformers that the losses build on, imported here and nowhere else.

Beside them :func:`st_m3se.encoding.packing.pack` asks the host's Transformer where its positions begin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import nn

try:
    from sentence_transformers.base.losses.gradcache import (
        CachedLossMixin,
        RandContext,
        _validate_mini_batch_num_tokens,
        has_static_embedding_input,
    )
    from sentence_transformers.base.losses.merged_forward import _MERGING_DISABLED, merge_feature_batches
    from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator, ForwardDecorator
except ImportError as error:
    raise ImportError(
        "st-m3se builds on the gradient caching and column merging of sentence-transformers 6.x, which this version "
        "of sentence-transformers lacks. Install one that has them: pip install 'sentence-transformers>=6.2,<7'."
    ) from error

__all__ = [
    "CachedLossMixin",
    "RandContext",
    "base_model",
    "calling_trainer",
    "has_static_embedding_input",
    "has_waiting_trainer",
    "in_matryoshka",
    "merge_feature_batches",
    "merging_disabled",
    "model_of",
    "own_prompt",
    "reads_task",
    "routes_by_default",
    "stock_collator",
    "training_arguments",
    "validate_mini_batch_num_tokens",
]

merging_disabled = _MERGING_DISABLED.get
validate_mini_batch_num_tokens = _validate_mini_batch_num_tokens

PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}


def base_model(model: nn.Module) -> BaseModel | None:
    """The host's model in whatever wrapper a trainer has put around it; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, BaseModel)), None)


def calling_trainer() -> BaseTrainer | None:
    """The trainer that stands on the stack; None if no trainer called.

    A trainer shows itself in no other way to a collator or loss that it is given. It makes a loss its own by moving it
    to the model's device, and calls both for each batch, of a worker that was forked too.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and isinstance(frame.f_locals.get("self"), BaseTrainer):
            trainer: BaseTrainer = frame.f_locals["self"]
            return trainer
        frame = frame.f_back
    return None


def in_matryoshka(loss: nn.Module) -> bool:
    """Whether a ``MatryoshkaLoss`` holds this loss and calls it."""
    return isinstance(getattr(loss.model, "forward", None), ForwardDecorator) or isinstance(
        loss.calculate_loss, CachedLossDecorator
    )


def model_of(preprocess_fn: Callable[..., Any]) -> BaseModel | None:
    """The model whose ``preprocess`` this is; None for any other function."""
    while isinstance(preprocess_fn, partial):
        preprocess_fn = preprocess_fn.func
    owner = getattr(preprocess_fn, "__self__", None)
    return owner if isinstance(owner, BaseModel) else None


def training_arguments(model: BaseModel | None, told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The training arguments, by name: those of the trainer that is calling; empty where no trainer is known.

    Who is called by no trainer goes by what it was ``told``, and else by the model's card, in which a trainer leaves
    its arguments when it begins to train.
    """
    if (trainer := calling_trainer()) is not None:
        return {name: getattr(trainer.args, name, None) for name in ("prompts", "router_mapping", "max_length")}
    return dict(told or getattr(getattr(model, "model_card_data", None), "all_hyperparameters", {}))


def has_waiting_trainer(model: BaseModel | None) -> bool:
    """Whether a trainer was made for the model and none calls or has begun to train it: its arguments are not known."""
    tags = [] if model is None else getattr(model.model_card_data, "tags", None) or []
    return "generated_from_trainer" in tags and not training_arguments(model)


def own_prompt(model: BaseModel, task: str) -> str:
    """What ``encode_query`` or ``encode_document`` puts in front of a text, "" if nothing."""
    names = PROMPT_NAMES.get(task, ())
    name = next((name for name in names if name in model.prompts), model.default_prompt_name)
    return "" if name is None else model.prompts.get(name) or ""


def reads_task(model: nn.Module) -> bool:
    """Whether a module of the model, such as a Router, reads the task from the features, after preprocessing."""
    return any(
        "task" in (module._declared_forward_params if isinstance(module, Transformer) else kwargs)
        for module in model.modules()
        if isinstance(kwargs := getattr(module, "forward_kwargs", ()), (set, frozenset, tuple, list))
    )


def stock_collator(
    preprocess_fn: Callable[..., Any], *, prompts: Any, router_mapping: Any, max_length: Any
) -> BaseDataCollator:
    """The collator that the host's trainer would make for the model."""
    kind = (
        MultiVectorEncoderDataCollator
        if isinstance(model_of(preprocess_fn), MultiVectorEncoder)
        else SentenceTransformerDataCollator
    )
    return kind(preprocess_fn, router_mapping=router_mapping, prompts=prompts, max_length=max_length)


def routes_by_default(model: nn.Module, modality: str | None) -> bool:
    """Whether a Router in the model sends what has no task to its default route, whatever it is."""
    return any(
        not ({(None, modality), (None, None)} & set(module.route_mappings) or modality in set(module.sub_modules))
        for module in model.modules()
        if isinstance(module, Router) and len(module.sub_modules) > 1
    )
