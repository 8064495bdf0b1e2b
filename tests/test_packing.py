"""Packed rows give what padded rows give, in every trunk that is packed; everything else is left to the padded way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ANSWERS, assert_same_gradients, collate, gradients
from torch import Tensor
from transformers import AutoConfig, AutoModel

from st_m3se import M3SELoss, encoding
from st_m3se.encoding import encode, sort_by_length
from st_m3se.packing import TRUNKS, pack, packable

TEXTS = ["a key", "blanks", *ANSWERS[:8], "; ".join(ANSWERS[:3])]


def features_of(model: Any, texts: list[str] = TEXTS, **options: Any) -> tuple[dict[str, Any], list[int]]:
    """Features sorted by length, and the lengths."""
    features = sort_by_length(model.preprocess(texts, **options))[0]
    return features, features["attention_mask"].sum(1).tolist()


def with_trunk(model: Any, kind: str) -> Any:
    """The model with an untrained trunk of another architecture."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = AutoConfig.for_model(
        kind, vocab_size=len(model.tokenizer), pad_token_id=model.tokenizer.pad_token_id, **sizes
    )
    model[0].model = AutoModel.from_config(config)
    return model.eval()


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_every_packed_trunk_keeps_its_embeddings_and_gradients(
    model: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Prevents tokens of one row from seeing another row's, and positions that do not start anew."""
    model = with_trunk(model, kind)
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 100)
    features, widths = features_of(model)
    assert packable(model, features, widths)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr(encoding, "packable", lambda *_: False)
        model.zero_grad()
        embeddings = torch.cat(encode(model, features))
        (embeddings * torch.arange(1.0, len(TEXTS) + 1)[:, None]).sum().backward()
        results.append((embeddings, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(results[0][1], results[1][1], 1e-4)
    assert model[0].model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_every_pooling_with_a_prompt_left_out(make_model: Any, mode: str) -> None:
    """The prompt's tokens are attended to and not pooled, packed or not."""
    model = make_model(include_prompt=False)
    model[1].pooling_mode = mode
    features, widths = features_of(model, prompt="query: ")
    assert packable(model, features, widths)
    expected = model(dict(features))["sentence_embedding"]
    torch.testing.assert_close(torch.cat(encode(model, features)), expected, rtol=1e-4, atol=1e-5)


def test_packed_rows_have_no_padding(model: Any) -> None:
    features, widths = features_of(model)
    packed = pack(model, features, widths, 2, 6)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, sum(widths[2:6]))
    assert packed["cu_seq_lens_q"].diff().tolist() == widths[2:6]


def test_dropout_is_replayed_by_the_cached_loss(make_model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents a second forward pass with other masks: its gradient would not be the loss's."""
    model = make_model(dropout=0.2).train()
    batch = collate(model, ragged_rows[:6])
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, args, out: seen.append(out["sentence_embedding"].detach()))
    M3SELoss(model, scale=3.0, mini_batch_num_tokens=10_000)(batch.fresh(), batch.labels).backward()
    handle.remove()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(any(torch.equal(one, other) for other in second) for one in first)


def test_a_checkpointed_trunk_is_not_packed_and_keeps_its_gradients(
    model: Any, ragged_rows: list[dict[str, Any]]
) -> None:
    """What is computed again in the backward pass would run under the trunk's usual attention."""
    batch = collate(model, ragged_rows[:6])
    loss = M3SELoss(model, scale=3.0)
    plain = gradients(loss, model, batch)
    model[0].model.gradient_checkpointing_enable()
    model.train()
    features, widths = features_of(model)
    assert not packable(model, features, widths)
    assert_same_gradients(plain[1], gradients(loss, model, batch)[1], 1e-4)


def test_what_else_is_not_packed(model: Any) -> None:
    """Left padding, empty rows, unknown features, eager attention, decoders and foreign modules."""
    features, widths = features_of(model)
    assert packable(model, features, widths)
    assert not packable(model, features | {"other": torch.zeros(len(widths))}, widths)
    assert not packable(model, features, [0, *widths[1:]])
    model.tokenizer.padding_side = "left"
    left = sort_by_length(model.preprocess(TEXTS))[0]
    assert not packable(model, left, [left["attention_mask"].shape[1]] * len(widths))
    model.tokenizer.padding_side = "right"
    model[0].model.config.is_decoder = True
    assert not packable(model, features, widths)
    model[0].model.config.is_decoder = False
    model[0].model.config._attn_implementation = "eager"
    assert not packable(model, features, widths)
    model[0].model.config._attn_implementation = "sdpa"
    model.append(torch.nn.Identity())
    assert not packable(model, features, widths)
