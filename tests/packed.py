"""Whether packed rows have the embeddings and gradients of padded ones."""

from __future__ import annotations

from typing import Any

import torch
from conftest import ANSWERS
from torch import Tensor

from st_m3se.encoding.batch import encode
from st_m3se.encoding.packing import Packed
from st_m3se.encoding.rows import in_order

TEXTS = ["a key", "blanks", *ANSWERS[:8], "; ".join(ANSWERS[:3])]


def embeddings_and_gradients(model: Any, encode_all: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """With a weight per text: a row that came back in another place gets another text's gradient."""
    model.zero_grad()
    embeddings = encode_all()
    (embeddings * torch.arange(1.0, len(embeddings) + 1)[:, None].to(embeddings)).sum().backward()
    return embeddings.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(one: Tensor, other: Tensor) -> float:
    """How far apart two tensors are, relative to their length."""
    assert one.norm() > 1e-2
    return float((one - other).norm() / one.norm())


def assert_as_plain(model: Any, padded: Any, tolerance: float) -> None:
    """Packed rows have the embeddings and gradients of the padded batch in one piece."""
    expected = embeddings_and_gradients(model, lambda: model(dict(padded))["sentence_embedding"])
    features, place = in_order(model, dict(padded))
    assert isinstance(features, Packed)
    found = embeddings_and_gradients(model, lambda: torch.cat(encode(model, features))[place])
    assert expected[1].keys() == found[1].keys()
    assert distance(expected[0], found[0]) <= tolerance
    both = (torch.cat([grads[name].flatten() for name in expected[1]]) for grads in (expected[1], found[1]))
    assert distance(*both) <= tolerance
