"""Texts become the model's own embeddings, whatever way they take: distinct, sorted, cut, or one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ANSWERS, PAIRS, assert_same_gradients, collate, collate_columns
from sentence_transformers.base.losses import column_merging_disabled
from torch import Tensor

from st_m3se import M3SELoss, encoding
from st_m3se.encoding import check_caching, distinct_rows, encode, is_sliceable, merge_columns, sort_by_length

LONG = "; ".join(ANSWERS[:3])
TEXTS = [LONG, "blanks", *ANSWERS[3:8], "a key", LONG + " first"]
"""Lengths from 1 to 50 words, not in order."""


def alone(model: Any, texts: list[str]) -> Tensor:
    """Each text through the model by itself."""
    return torch.cat([model(model.preprocess([text]))["sentence_embedding"] for text in texts])


def back_in_order(chunks: list[Tensor], place: Tensor) -> Tensor:
    return torch.cat(chunks)[place]


class Widths:
    """What shapes of input the model was given."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.features: list[Any] = []
        self.handle = model.register_forward_pre_hook(self._look)

    def _look(self, module: Any, args: tuple[Any, ...]) -> None:
        self.shapes.append(tuple(args[0]["input_ids"].shape))
        self.features.append(args[0])

    def __enter__(self) -> Widths:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


@pytest.mark.parametrize("budget", [1, 30, 120, 10_000])
@pytest.mark.parametrize("side", ["right", "left"])
def test_chunks_give_the_models_own_embeddings(
    model: Any, monkeypatch: pytest.MonkeyPatch, budget: int, side: str
) -> None:
    """Prevents tokens that are cut off with the padding, and rows that come back in another order."""
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", budget)
    model.tokenizer.padding_side = side
    features = model.preprocess(TEXTS)
    with Widths(model) as widths:
        sorted_features, place = sort_by_length(features)
        chunks = encode(model, sorted_features)
    model.tokenizer.padding_side = "right"
    assert sum(rows for rows, _ in widths.shapes) == len(TEXTS)
    if side == "right":
        torch.testing.assert_close(back_in_order(chunks, place), alone(model, TEXTS), rtol=1e-4, atol=1e-5)
    else:  # positions count from the first column, so the reference is the whole batch in one piece
        whole = model(features)["sentence_embedding"]
        torch.testing.assert_close(back_in_order(chunks, place), whole, rtol=1e-4, atol=1e-5)


def test_chunks_keep_within_the_budget_or_hold_one_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding counts: it is what the model computes."""
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 40)
    with Widths(model) as widths:
        encode(model, sort_by_length(model.preprocess(TEXTS))[0])
    assert len(widths.shapes) > 1
    assert all(rows == 1 or rows * width <= 40 for rows, width in widths.shapes)


def test_one_long_text_does_not_widen_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the work that this module is there to save from coming back unnoticed."""
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 64)
    features = model.preprocess(["a key", "blanks", "the copy", "a file", LONG])
    rows, width = features["input_ids"].shape
    with Widths(model) as widths:
        encode(model, sort_by_length(features)[0])
    assert widths.tokens < rows * width / 2


def test_gradients_pass_through_the_order(model: Any) -> None:
    """A weight per text: a row that came back in another place gets another text's gradient."""
    weights = torch.arange(1.0, len(TEXTS) + 1)[:, None]

    def grads(embeddings: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (embeddings * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    features, place = sort_by_length(model.preprocess(TEXTS))
    assert_same_gradients(grads(alone(model, TEXTS)), grads(back_in_order(encode(model, features), place)), 1e-4)


@pytest.mark.parametrize("order", [TEXTS, TEXTS[::-1]])
def test_sorting_puts_the_shortest_first_and_says_where_rows_went(model: Any, order: list[str]) -> None:
    features = model.preprocess(order)
    sorted_features, place = sort_by_length(features)
    lengths = sorted_features["attention_mask"].sum(1)
    assert (lengths.diff() >= 0).all()
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(sorted_features[key][place], features[key])


# Distinct rows


@pytest.mark.parametrize("side", ["right", "left"])
def test_equal_texts_of_several_columns_are_found(model: Any, side: str) -> None:
    """Prevents a text from being taken for another one because its column is padded to another width."""
    model.tokenizer.padding_side = side
    columns = [["a key", ANSWERS[0], "blanks"], [LONG, "a key", ANSWERS[0]], ["blanks", "blanks", "copy"]]
    texts = [text for column in columns for text in column]
    merged = merge_columns([model.preprocess(column) for column in columns])
    assert merged is not None
    features, index = distinct_rows(merged)
    assert len(features["input_ids"]) == len(set(texts)) == 5
    assert index.shape == (9,)
    for one in range(9):
        for other in range(9):
            assert (index[one] == index[other]) == (texts[one] == texts[other]), (texts[one], texts[other])
    assert merge_columns([model.preprocess(columns[0])]) is not None


def test_a_text_that_begins_another_one_is_not_it(model: Any) -> None:
    """Prevents padding from being read as tokens: with equal width only the attention mask tells them apart."""
    features, index = distinct_rows(model.preprocess(["a key", "a key function", "a key"]))
    assert len(features["input_ids"]) == 2
    assert index[0] == index[2] != index[1]
    features = {"input_ids": torch.tensor([[2, 5, 0], [2, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0], [1] * 3])}
    assert len(distinct_rows(features)[0]["input_ids"]) == 2


def test_distinct_rows_find_the_embeddings_of_all(model: Any) -> None:
    texts = [ANSWERS[2], "a key", ANSWERS[2], ANSWERS[1], "a key"]
    features, index = distinct_rows(model.preprocess(texts))
    features, place = sort_by_length(features)
    embeddings = back_in_order(encode(model, features), place)[index]
    torch.testing.assert_close(embeddings, alone(model, texts), rtol=1e-4, atol=1e-5)


def test_a_batch_encodes_each_distinct_text_once(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents the lists' shared documents from costing a forward pass per list, in either form."""
    rows = even_rows[:8]
    distinct = len({text for row in rows for text in row["documents"]})
    assert distinct < 8 * 3
    for form in (collate, collate_columns):
        batch = form(model, rows)
        with Widths(model) as widths:
            M3SELoss(model)(batch.fresh(), batch.labels)
        assert sum(count for count, _ in widths.shapes) == 8 + distinct


# What cannot be cut


def test_unlike_columns_are_not_merged(model: Any) -> None:
    """Columns under two prompts have two prompt lengths, and pooling reads one of them."""
    short, long = model.preprocess(["a key"], prompt="copy: "), model.preprocess(["a key"], prompt="copy the file: ")
    short["prompt_length"], long["prompt_length"] = 3, 5
    assert merge_columns([short, long]) is None


def test_a_token_stream_has_no_rows(static_model: Any) -> None:
    features = static_model.preprocess([question for question, _ in PAIRS])
    assert not is_sliceable(features)
    assert merge_columns([features, features]) is None
    chunks = encode(static_model, features)
    assert [len(chunk) for chunk in chunks] == [len(PAIRS)]


def test_flattened_and_image_features_are_not_cut(model: Any) -> None:
    """Unpadded attention packs all texts into one sequence; an image's tensor is not indexed by text."""
    features = model.preprocess(["a key", "blanks"])
    assert is_sliceable(features)
    assert not is_sliceable(features | {"cu_seq_lens_q": torch.tensor([0, 4, 7])})
    assert not is_sliceable(features | {"pixel_values": torch.zeros(5, 3)})
    assert not is_sliceable({"input_ids": features["input_ids"]})


def test_wrapper_losses_get_their_own_feature_dicts(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """A wrapper that hands state on through the features must see the model called with those very dicts.

    The loss is the same, and afterwards the batch is merged again.
    """
    loss = M3SELoss(model, scale=3.0)
    for form in (collate, collate_columns):
        batch = form(model, even_rows[:6])
        expected = loss(batch.fresh(), batch.labels)
        given = batch.fresh()
        with Widths(model) as widths, column_merging_disabled():
            actual = loss(given, batch.labels)
        assert [id(features) for features in widths.features] == [id(features) for features in given]
        assert all("sentence_embedding" in features for features in given)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert is_sliceable(batch.features[1])


def test_a_cached_loss_refuses_what_it_cannot_cut(model: Any, even_rows: list[dict[str, Any]]) -> None:
    batch = collate(model, even_rows[:4])
    loss = M3SELoss(model, mini_batch_num_tokens=64)
    with column_merging_disabled(), pytest.raises(ValueError, match=r"mini_batch_num_tokens=None"):
        loss(batch.fresh(), batch.labels)


def test_a_static_embedding_is_refused_with_caching_only(model: Any, static_model: Any) -> None:
    check_caching(static_model, None)
    check_caching(model, 64)
    with pytest.raises(ValueError, match=r"StaticEmbedding.*mini_batch_num_tokens=None"):
        check_caching(static_model, 64)
    with pytest.raises(ValueError, match="positive integer"):
        check_caching(model, 0)
