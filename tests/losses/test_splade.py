"""SPLADE's pooled logits in pieces are those of all tokens at once, and no tensor holds the logits of all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import collate, gradients
from packed import TEXTS, assert_as_plain
from students import sparse_student, trunk_config, untrained
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM

from st_m3se import M3SELoss
from st_m3se.encoding import batch as encoding
from st_m3se.encoding import logits as splade
from st_m3se.encoding.batch import encode
from st_m3se.encoding.packing import Packed
from st_m3se.encoding.rows import in_order

HEADS = [
    "bert",
    "camembert",
    "data2vec-text",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
]


@pytest.mark.parametrize("block", [1, 100, 2**20])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_greatest_of_each_row_and_its_gradient(
    monkeypatch: pytest.MonkeyPatch, block: int, with_bias: bool
) -> None:
    """Against the logits of all tokens; where no logit is positive, SPLADE has no gradient."""
    monkeypatch.setattr(splade, "BLOCK", block)
    lengths = torch.tensor([1, 1, 3, 4, 4, 9])
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((22, 5), (30, 5), (30,))]
    mine, plain = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    found = splade.max_logits(mine[0], mine[1], mine[2] if with_bias else None, lengths)
    logits = plain[0] @ plain[1].T + (plain[2] if with_bias else 0.0)
    expected = torch.stack([of_row.max(0).values for of_row in logits.split(lengths.tolist())])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (found.relu().log1p() * weights).sum().backward()
    (expected.relu().log1p() * weights).sum().backward()
    for one, other in zip(mine[: 2 + with_bias], plain[: 2 + with_bias], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def student(checkpoint: Path, kind: str, **options: Any) -> Any:
    model = sparse_student(checkpoint, **options)
    model[0].model = untrained(AutoModelForMaskedLM, trunk_config(kind, model.tokenizer))
    return model.eval() if options else model.train()


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_has_the_gradients_of_the_plain_way(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 100)
    model = student(checkpoint, kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(model[0].model.config, name):
            setattr(model[0].model.config, name, 0.0)
    assert_as_plain(model.double(), model.preprocess(TEXTS), 1e-12)


@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_every_pooling(checkpoint: Path, pooling: str, activation: str) -> None:
    model = sparse_student(checkpoint, pooling_strategy=pooling, activation_function=activation)
    assert_as_plain(model, model.preprocess(TEXTS), 2e-6)
    assert_as_plain(model.double(), model.preprocess(TEXTS), 1e-12)
    assert "forward" not in vars(model[1])
    assert "forward" not in vars(model[0].model.get_output_embeddings())


def test_a_head_that_someone_listens_to_makes_all_its_logits(checkpoint: Path) -> None:
    """Prevents a hook on the logits from seeing something else."""
    model = sparse_student(checkpoint)
    seen: list[torch.Size] = []
    linear = model[0].model.get_output_embeddings()
    linear.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    assert_as_plain(model, model.preprocess(TEXTS), 1e-6)
    assert all(shape[-1] == len(model.tokenizer) and len(shape) == 3 for shape in seen)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_holds_the_logits_of_all_tokens(
    checkpoint: Path, ragged_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents memory that grows with tokens times words, in a step from texts to gradients."""
    monkeypatch.setattr(splade, "BLOCK", 2**12)
    model = sparse_student(checkpoint)
    batch = collate(model, ragged_rows)
    tokens = int(batch.features[1]["attention_mask"].sum())
    with Largest() as largest:
        gradients(M3SELoss(model, scale=0.1), model, batch)
    assert largest.numel < tokens * len(model.tokenizer) / 3
    features, _ = in_order(model, batch.fresh()[1])
    assert isinstance(features, Packed)
    with Largest() as largest, torch.no_grad():
        encode(model, features)
    assert largest.numel < tokens * len(model.tokenizer) / 3
