"""Rows are the same text, in order and cut: what the model then sees is what the batch holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ANSWERS, PAIRS

from st_m3se.encoding.batch import encode
from st_m3se.encoding.rows import in_order, is_sliceable, merge_columns, slice_rows

LONG = "; ".join(ANSWERS[:3])
TEXTS = [LONG, "blanks", *ANSWERS[3:8], "a key", LONG + " first"]
"""Lengths from 1 to 50 words, not in order."""


@pytest.fixture(params=["packed", "padded"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms that rows are put in order in."""
    if request.param == "padded":
        monkeypatch.setattr("st_m3se.encoding.rows.packable", lambda *_: False)
    return str(request.param)


def tokens_of(features: Any, row: int) -> list[int]:
    """The token ids of one row, without padding."""
    part = slice_rows(features, row, row + 1)
    ids = part["input_ids"][0]
    return list(ids.tolist() if "cu_seq_lens_q" in part else ids[part["attention_mask"][0].bool()].tolist())


@pytest.mark.parametrize("order", [TEXTS, TEXTS[::-1]])
def test_the_shortest_come_first_and_every_row_is_found_again(model: Any, form: str, order: list[str]) -> None:
    features = model.preprocess(order)
    ordered, place = in_order(model, features)
    assert ("cu_seq_lens_q" in ordered) == (form == "packed")
    assert sorted(place.tolist()) == list(range(len(order)))
    lengths = [len(tokens_of(ordered, row)) for row in range(len(order))]
    assert lengths == sorted(lengths)
    for row, at in enumerate(place.tolist()):
        assert tokens_of(ordered, at) == tokens_of(features, row)


@pytest.mark.parametrize("side", ["right", "left"])
def test_equal_texts_of_several_columns_are_found(model: Any, form: str, side: str) -> None:
    """Prevents a text from being taken for another one because its column is padded to another width."""
    model.tokenizer.padding_side = side
    columns = [["a key", ANSWERS[0], "blanks"], [LONG, "a key", ANSWERS[0]], ["blanks", "blanks", "copy"]]
    texts = [text for column in columns for text in column]
    merged = merge_columns([model.preprocess(column) for column in columns])
    assert merged is not None
    ordered, place = in_order(model, merged)
    assert len(torch.cat(encode(model, ordered))) == len(set(texts)) == 5
    assert place.shape == (9,)
    for one in range(9):
        for other in range(9):
            assert (place[one] == place[other]) == (texts[one] == texts[other]), (texts[one], texts[other])
    assert merge_columns([model.preprocess(columns[0])]) is not None


def test_a_text_that_begins_another_one_is_not_it(model: Any, form: str) -> None:
    """Prevents padding from being read as tokens: with equal width only the attention mask tells them apart."""
    ordered, place = in_order(model, model.preprocess(["a key", "a key function", "a key"]))
    assert place.tolist() == [0, 1, 0]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    features = {"input_ids": torch.tensor([[2, 5, 0], [2, 5, 0]]), "attention_mask": mask}
    ordered, place = in_order(model, features)
    assert place.tolist() == [0, 1]
    assert [tokens_of(ordered, row) for row in (0, 1)] == [[2, 5], [2, 5, 0]]


def test_repeated_texts_have_the_embeddings_of_all(model: Any, form: str) -> None:
    texts = [ANSWERS[2], "a key", ANSWERS[2], ANSWERS[1], "a key"]
    ordered, place = in_order(model, model.preprocess(texts))
    alone = torch.cat([model(model.preprocess([text]))["sentence_embedding"] for text in texts])
    torch.testing.assert_close(torch.cat(encode(model, ordered))[place], alone, rtol=1e-4, atol=1e-5)


def test_features_without_tokens_are_sorted_and_all_kept(model: Any) -> None:
    """Embeddings instead of token ids: nothing tells which rows are equal."""
    values = torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    ordered, place = in_order(model, {"inputs_embeds": values, "attention_mask": mask})
    assert place.tolist() == [2, 0, 1]
    assert torch.equal(ordered["inputs_embeds"][place], values)


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
