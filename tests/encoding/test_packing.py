"""Packed rows give what padded rows give, in every trunk that is packed; everything else is left to the padded way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import assert_same_gradients, collate, gradients
from packed import TEXTS, assert_as_plain
from students import trunk_config, untrained
from torch import Tensor
from transformers import AutoModel, T5EncoderModel

from st_m3se import M3SELoss
from st_m3se.encoding import batch as encoding
from st_m3se.encoding.batch import encode
from st_m3se.encoding.packing import BY_PLACE, TRUNKS, Packed
from st_m3se.encoding.rows import in_order


def ordered(model: Any, texts: list[str] = TEXTS, **options: Any) -> Any:
    """Features in the order of their length, packed if they may be."""
    return in_order(model, model.preprocess(texts, **options))[0]


def with_trunk(model: Any, kind: str, **more: Any) -> Any:
    """The model with an untrained trunk of another architecture."""
    auto = T5EncoderModel if kind in ("t5", "mt5") else AutoModel
    model[0].model = untrained(auto, trunk_config(kind, model.tokenizer, **more))
    return model.eval()


CASES = [(kind, {}) for kind in sorted(TRUNKS)] + [("gemma3_text", {"use_bidirectional_attention": True})]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_every_packed_trunk_has_the_gradients_of_the_plain_way(
    model: Any, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    """Prevents tokens of one row from seeing another row's, or a window, an order or a bias from being lost."""
    model = with_trunk(model, kind, **options)
    model[1].pooling_mode = "lasttoken" if kind in ("qwen3", "llama") else "mean"
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 100)
    before = model[0].model.config._attn_implementation
    assert_as_plain(model, model.preprocess(TEXTS), 1e-6)
    # Gemma's norms are computed in single precision.
    assert_as_plain(model.double(), model.preprocess(TEXTS), 1e-6 if "gemma" in kind else 1e-12)
    assert model[0].model.config._attn_implementation == before
    model.tokenizer.padding_side = "left"
    if kind in BY_PLACE:
        assert not isinstance(ordered(model), Packed)
    else:  # angles are computed in single precision, and a shifted one is another number
        assert_as_plain(model, model.preprocess(TEXTS), 1e-5)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "nomic_bert"])
def test_dropped_attention_under_autocast_is_that_of_full_precision(model: Any, kind: str) -> None:
    """Prevents the backward pass from meeting two dtypes: rotary positions leave queries and keys in float32."""
    model = with_trunk(model, kind, attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
    features = ordered(model)
    assert isinstance(features, Packed)
    weights = torch.randn(len(TEXTS), 32, generator=torch.Generator().manual_seed(0))
    results = []
    for enabled, seed in ((False, 0), (True, 0), (False, 1)):
        model.zero_grad()
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            embeddings = torch.cat(encode(model, features)).float()
        (embeddings * weights).sum().backward()
        of_attention = {n: p for n, p in model.named_parameters() if p.ndim == 2 and ("attn" in n or "attention" in n)}
        results.append(torch.cat([p.grad.flatten() for p in of_attention.values()]))
    full, half, other = results
    assert torch.cosine_similarity(full, half, dim=0) > 0.99
    assert torch.cosine_similarity(full, other, dim=0) < 0.99


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
def test_every_pooling_with_a_prompt_left_out(make_model: Any, mode: str) -> None:
    """The prompt's tokens are attended to and not pooled, packed or not."""
    model = make_model(include_prompt=False)
    model[1].pooling_mode = mode
    padded = model.preprocess(TEXTS, prompt="query: ")
    features, place = in_order(model, padded)
    assert isinstance(features, Packed)
    expected = model(dict(padded))["sentence_embedding"]
    torch.testing.assert_close(torch.cat(encode(model, features))[place], expected, rtol=1e-4, atol=1e-5)


def test_packed_rows_have_no_padding_and_can_be_cut(model: Any) -> None:
    padded = model.preprocess(TEXTS)
    lengths = padded["attention_mask"].sum(1).sort().values
    packed = ordered(model)
    assert packed["input_ids"].shape == packed["position_ids"].shape == (1, int(lengths.sum()))
    assert packed["cu_seq_lens_q"].diff().tolist() == lengths.tolist()
    cut = packed.rows(2, 6)
    first, last = int(lengths[:2].sum()), int(lengths[:6].sum())
    assert torch.equal(cut["input_ids"], packed["input_ids"][:, first:last])
    assert cut["position_ids"][0].tolist() == [at for length in lengths[2:6].tolist() for at in range(length)]
    assert cut["cu_seq_lens_q"].diff().tolist() == lengths[2:6].tolist()
    assert cut["max_length_q"] == lengths[5]


def most_kept(run: Any) -> int:
    """The most bytes that are kept for a backward pass at any time of a run."""
    now = most = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor = tensor
            now += tensor.nbytes
            most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    assert now == 0
    return most


def test_memory_of_long_documents_is_that_of_the_token_budget(model: Any) -> None:
    """Prevents memory from growing with the number of documents, or with the square of their length."""
    model = with_trunk(model, "modernbert").train()
    model.max_seq_length = 512

    def kept(documents: int, length: int, budget: int | None = 512) -> int:
        texts = [" ".join([letter] * (length - 2)) for letter in "abcdefghijkl"[:documents]]
        rows = [{"query": "a key", "documents": texts, "scores": [3.0 * place for place in range(documents)]}]
        batch, loss = collate(model, rows), M3SELoss(model, scale=3.0, mini_batch_num_tokens=budget)
        return most_kept(lambda: loss(batch.fresh(), batch.labels).backward())

    expected = kept(4, 128)
    assert kept(12, 128) == pytest.approx(expected, rel=0.1)
    assert kept(4, 512) == pytest.approx(expected, rel=0.1)
    assert kept(12, 128, None) > 2 * expected


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
    assert not isinstance(ordered(model), Packed)
    assert_same_gradients(plain[1], gradients(loss, model, batch)[1], 1e-4)


def packs(model: Any, **others: Any) -> bool:
    return isinstance(in_order(model, model.preprocess(TEXTS) | others)[0], Packed)


def test_what_else_is_not_packed(model: Any) -> None:
    """Left padding, empty rows, unknown features, eager attention, decoders, compiled and foreign modules."""
    assert packs(model)
    assert not packs(model, other=torch.zeros(len(TEXTS)))
    mask = model.preprocess(TEXTS)["attention_mask"]
    mask[0] = 0
    assert not packs(model, attention_mask=mask)
    assert not packs(model, attention_mask=torch.zeros_like(mask))
    assert not packs(torch.compile(model, backend="eager"))
    model.tokenizer.padding_side = "left"
    assert not packs(model)
    model.tokenizer.padding_side = "right"
    model[0].model.config.is_decoder = True
    assert not packs(model)
    model[0].model.config.is_decoder = False
    model[0].model.config._attn_implementation = "eager"
    assert not packs(model)
    model[0].model.config._attn_implementation = "sdpa"
    assert packs(model)
    model.append(torch.nn.Identity())
    assert not packs(model)


def test_a_text_that_spells_out_roberta_s_padding_is_not_packed(model: Any) -> None:
    """RoBERTa counts positions past the padding token, which a text may hold."""
    model = with_trunk(model, "roberta")
    features = model.preprocess(TEXTS)
    assert isinstance(in_order(model, dict(features))[0], Packed)
    features["input_ids"][0, 1] = model.tokenizer.pad_token_id
    padded, place = in_order(model, dict(features))
    assert not isinstance(padded, Packed)
    expected = model(dict(features))["sentence_embedding"]
    torch.testing.assert_close(torch.cat(encode(model, padded))[place], expected, rtol=1e-4, atol=1e-5)
