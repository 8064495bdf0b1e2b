"""Texts become the model's own embeddings, whatever way they take: distinct, sorted, cut, or one piece."""

from __future__ import annotations

import itertools
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ANSWERS, PAIRS, assert_same_gradients, collate, collate_columns, gradients
from sentence_transformers.base.losses import column_merging_disabled
from torch import Tensor

from st_m3se import M3SELoss
from st_m3se.encoding import batch as encoding
from st_m3se.encoding.batch import check_caching, encode
from st_m3se.encoding.rows import in_order, is_sliceable

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
    def rows(self) -> int:
        """Texts, whether packed or padded."""
        packed = "cu_seq_lens_q"
        return sum(len(each[packed]) - 1 if packed in each else len(each["input_ids"]) for each in self.features)

    @property
    def tokens(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


@pytest.mark.parametrize("budget", [1, 30, 120, 10_000])
@pytest.mark.parametrize("side", ["right", "left"])
def test_chunks_give_the_models_own_embeddings(
    model: Any, monkeypatch: pytest.MonkeyPatch, budget: int, side: str
) -> None:
    """Prevents tokens that are cut off with the padding, and rows that come back in another order."""
    monkeypatch.setattr("st_m3se.encoding.rows.packable", lambda *_: False)
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", budget)
    model.tokenizer.padding_side = side
    features = model.preprocess(TEXTS)
    with Widths(model) as widths:
        sorted_features, place = in_order(model, features)
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
    monkeypatch.setattr("st_m3se.encoding.rows.packable", lambda *_: False)
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 40)
    with Widths(model) as widths:
        encode(model, in_order(model, model.preprocess(TEXTS))[0])
    assert len(widths.shapes) > 1
    assert all(rows == 1 or rows * width <= 40 for rows, width in widths.shapes)


def test_one_long_text_does_not_widen_all(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the work that this module is there to save from coming back unnoticed."""
    monkeypatch.setattr("st_m3se.encoding.rows.packable", lambda *_: False)
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 64)
    features = model.preprocess(["a key", "blanks", "the copy", "a file", LONG])
    rows, width = features["input_ids"].shape
    with Widths(model) as widths:
        encode(model, in_order(model, features)[0])
    assert widths.tokens < rows * width / 2


def test_gradients_pass_through_the_order(model: Any) -> None:
    """A weight per text: a row that came back in another place gets another text's gradient."""
    weights = torch.arange(1.0, len(TEXTS) + 1)[:, None]

    def grads(embeddings: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (embeddings * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    features, place = in_order(model, model.preprocess(TEXTS))
    assert_same_gradients(grads(alone(model, TEXTS)), grads(back_in_order(encode(model, features), place)), 1e-4)


def work(widths: list[int], ranges: list[tuple[int, int]], cost: int) -> int:
    """Padded tokens and a cost for each range."""
    return sum((end - begin) * max(widths[begin:end]) + cost for begin, end in ranges)


def all_cuts(rows: int) -> Iterator[list[tuple[int, int]]]:
    """Every way to cut rows into ranges."""
    for cuts in itertools.product([False, True], repeat=rows - 1):
        at = [0, *(place for place, cut in enumerate(cuts, start=1) if cut), rows]
        yield list(itertools.pairwise(at))


@pytest.mark.parametrize("widths", [[3], [0, 0, 2], [2, 3, 3, 9, 10, 30], [5] * 7, [1, 2, 4, 8, 16, 32, 64]])
@pytest.mark.parametrize("budget", [4, 25, 1000])
@pytest.mark.parametrize("cost", [0, 3, 50])
def test_the_cuts_are_the_cheapest_of_all(widths: list[int], budget: int, cost: int) -> None:
    """Against every way to cut: a chunk that is one row too wide costs time and no test would see it."""
    ranges = encoding._chunks(widths, budget, cost)
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == len(widths)
    allowed = [
        cut
        for cut in all_cuts(len(widths))
        if all(end - begin == 1 or (end - begin) * widths[end - 1] <= budget for begin, end in cut)
    ]
    assert ranges in allowed
    assert work(widths, ranges, cost) == min(work(widths, cut, cost) for cut in allowed)


def test_rows_without_a_token_survive(model: Any) -> None:
    """A row that is all padding has no width; its chunk still has a column."""
    features = model.preprocess(["a key", "blanks"])
    features["attention_mask"] = features["attention_mask"] * 0
    assert torch.cat(encode(model, features)).shape == (2, 32)


# One lookup of the words for all chunks


def lookups(embeddings: Tensor, table: Tensor) -> int:
    """How often the graph behind embeddings looks tokens up in the table: each makes a gradient of the table's size."""
    seen, waiting, count = set(), [embeddings.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [function for function, _ in node.next_functions]
        if "Embedding" in type(node).__name__:
            count += any(getattr(function, "variable", None) is table for function in following)
        waiting += following
    return count


def test_all_chunks_share_one_lookup(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where that changes nothing: not without gradients, nor for a model that is compiled."""
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 40)
    features, _ = in_order(model, model.preprocess(TEXTS))
    table = model[0].auto_model.get_input_embeddings()
    chunks = encode(model, features)
    assert len(chunks) > 2
    assert lookups(torch.cat(chunks), table.weight) == 1
    assert not table._forward_hooks
    compiled = torch.compile(model, backend="eager")
    padded, _ = in_order(compiled, model.preprocess(TEXTS))
    apart = encode(compiled, padded)
    assert len(apart) > 2
    assert lookups(torch.cat(apart), table.weight) == len(apart)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(encode(model, features)), torch.cat(chunks))
    table.weight.requires_grad_(False)
    frozen = torch.cat(encode(model, features))
    assert frozen.requires_grad
    torch.testing.assert_close(frozen, torch.cat(chunks))


def test_a_model_that_changes_the_ids_is_left_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the chunk's own words from standing in for others that the model looks up."""
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 40)
    features, place = in_order(model, model.preprocess(TEXTS))
    table = model[0].auto_model.get_input_embeddings()
    handle = table.register_forward_pre_hook(lambda module, args: (args[0] * 0 + 7,))
    changed = torch.cat(encode(model, features))
    expected = model(model.preprocess(TEXTS))["sentence_embedding"]
    handle.remove()
    torch.testing.assert_close(changed[place], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, torch.cat(encode(model, features)), atol=1e-3)


def test_what_others_hook_to_the_words_still_happens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the shared lookup from undoing a hook that adds noise to the words' embeddings."""
    monkeypatch.setattr(encoding, "CHUNK_TOKENS", 40)
    features, place = in_order(model, model.preprocess(TEXTS))
    plain = torch.cat(encode(model, features))
    table = model[0].auto_model.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, args, output: output.roll(1, dims=-1))
    changed = torch.cat(encode(model, features))
    expected = model(model.preprocess(TEXTS))["sentence_embedding"]
    handle.remove()
    torch.testing.assert_close(changed[place], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)


# Precision and compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [None, 60])
def test_autocast_keeps_the_gradient(
    model: Any, even_rows: list[dict[str, Any]], tokens: int | None, dtype: torch.dtype
) -> None:
    """Prevents a lookup, a score or a cached gradient in half precision from turning the step aside."""
    batch = collate_columns(model, even_rows)
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
    value, expected = gradients(loss, model, batch)
    with torch.autocast("cpu", dtype):
        half_value, actual = gradients(loss, model, batch)
    assert half_value.dtype == torch.float32
    torch.testing.assert_close(half_value, value, rtol=0.05, atol=0.0)
    assert all(grad.dtype == torch.float32 for grad in actual.values())
    one, other = (torch.cat([grads[name].flatten() for name in expected]) for grads in (expected, actual))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "backend"), [(None, "inductor"), (60, "aot_eager")])
def test_a_compiled_model_has_the_same_gradient(
    model: Any,
    even_rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int | None,
    backend: str,
) -> None:
    """Over chunks of many shapes; with the C++ compiler once, because it takes a minute."""
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    # A cache of its own: a compilation that was killed elsewhere leaves half a library in the shared one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    trunk = model[0].auto_model
    trunk.encoder.layer = trunk.encoder.layer[:1]  # a second one is compiled as the first
    batch = collate_columns(model, even_rows[:6])
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
    value, expected = gradients(loss, model, batch)
    loss.model = torch.compile(model, backend=backend, dynamic=True)
    compiled_value, actual = gradients(loss, model, batch)
    torch.testing.assert_close(compiled_value, value, rtol=1e-4, atol=1e-5)
    assert_same_gradients(expected, actual, tolerance=1e-4)


# A batch's texts


def test_a_batch_encodes_each_distinct_text_once(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents the lists' shared documents from costing a forward pass per list, in either form."""
    rows = even_rows[:8]
    distinct = len({text for row in rows for text in row["documents"]})
    assert distinct < 8 * 3
    for form in (collate, collate_columns):
        batch = form(model, rows)
        with Widths(model) as widths:
            M3SELoss(model)(batch.fresh(), batch.labels)
        assert widths.rows == 8 + distinct


def test_texts_of_the_same_tokens_are_one_document(model: Any) -> None:
    """Two texts that tokenise alike are one document in either form: as an in-batch negative it would be false."""
    documents = [["a key", "blanks"], ["A  KEY", "the copy"]]
    rows = [
        {"query": query, "documents": texts, "scores": [2.0, 1.0]}
        for query, texts in zip(["copy", "key"], documents, strict=True)
    ]
    values = []
    for form in (collate, collate_columns):
        batch = form(model, rows)
        with Widths(model) as widths:
            values.append(M3SELoss(model, in_batch_negatives=True)(batch.fresh(), batch.labels))
        assert widths.rows == 2 + 3
    torch.testing.assert_close(values[0], values[1])


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of other systems is not asked to give memory back")
def test_gaps_between_blocks_go_back_to_the_system() -> None:
    """Prevents memory that only grows over mini-batches of uneven sizes."""
    if encoding._malloc_trim() is None:
        pytest.skip("this C library is not glibc")
    blocks = [bytearray(100_000) for _ in range(1000)]
    del blocks[::2]
    before = psutil.Process().memory_info().rss
    encoding.give_memory_back()
    assert psutil.Process().memory_info().rss < before - 40_000_000
    assert len(blocks) == 500


# What cannot be cut


def test_the_reason_for_the_plain_way_is_said_once(static_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    encoding._say_once.cache_clear()
    features = static_model.preprocess([question for question, _ in PAIRS])
    with caplog.at_level(logging.WARNING, logger="st_m3se.encoding"):
        encode(static_model, dict(features))
        encode(static_model, dict(features))
    assert [record for record in caplog.records if "StaticEmbedding" in record.getMessage()] == caplog.records
    assert len(caplog.records) == 1


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
