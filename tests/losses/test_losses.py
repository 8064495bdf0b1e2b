"""The loss modules on real models: the scores that reach the functions, the two label forms, caching, and refusals."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LOSSES,
    M3SE,
    MARGIN_LOSSES,
    UNSCORED_LOSSES,
    Batch,
    LossSpec,
    assert_same_gradients,
    collate,
    collate_columns,
    gradients,
)
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainer, util
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor

from st_m3se import (
    CombinedLoss,
    CoupledRankDistilLoss,
    M3SELoss,
    MarginMSELoss,
    RankDistilLoss,
    ScoreMSELoss,
    SoftmaxCrossEntropyLoss,
)
from st_m3se.functional import softmax_cross_entropy_loss

NAN, INF = math.nan, math.inf
SEED = 0


def embed(model: Any, texts: list[str]) -> Tensor:
    """Each text through the model alone: no padding, no batch, no code of this package."""
    return torch.cat([model(model.preprocess([text]))["sentence_embedding"] for text in texts])


def expected_loss(model: Any, spec: LossSpec, rows: list[dict[str, Any]], scale: float, in_batch: bool = False) -> Any:
    """The loss by hand: one row of scores per query, over all distinct documents with ``in_batch``."""
    texts = list(dict.fromkeys(text for row in rows for text in row["documents"]))
    cosines = util.cos_sim(embed(model, [row["query"] for row in rows]), embed(model, texts))
    values = []
    for row, cosine in zip(rows, cosines, strict=True):
        listed = [texts.index(text) for text in row["documents"]]
        others = [place for place in range(len(texts)) if place not in listed] if in_batch else []
        teacher = torch.tensor([[*row["scores"], *[NAN] * len(others)]])
        positives = torch.zeros(teacher.shape, dtype=torch.bool)
        positives[0, 0] = True
        values.append(spec.functional(scale * cosine[None, listed + others], teacher, positives))
    return torch.stack(values).mean()


# What reaches the functions


@pytest.mark.parametrize("spec", [spec for spec in LOSSES if "Coupled" not in spec.name], ids=str)
def test_a_ragged_batch_gives_the_mean_of_its_lists_done_by_hand(
    model: Any, ragged_rows: list[dict[str, Any]], spec: LossSpec
) -> None:
    """Prevents a score that lands in another query's list, a padded place that counts, or a lost scale."""
    rows = ragged_rows[:7]
    batch = collate(model, rows)
    actual = spec.build(model, scale=3.0)(batch.fresh(), batch.labels)
    assert actual.shape == ()
    torch.testing.assert_close(actual, expected_loss(model, spec, rows, 3.0), rtol=1e-4, atol=1e-5)


def test_softmax_cross_entropy_without_a_teacher_is_the_hosts_in_batch_loss(
    model: Any, even_rows: list[dict[str, Any]]
) -> None:
    """Lists of one document and in-batch negatives: MultipleNegativesRankingLoss, the same value and gradient."""
    rows = [
        {"query": row["query"], "documents": [f"{row['documents'][0]} {i}"], "scores": [0.0]}
        for i, row in enumerate(even_rows)
    ]
    value, found = gradients(
        SoftmaxCrossEntropyLoss(model, scale=20.0, in_batch_negatives=True), model, collate(model, rows)
    )
    columns = collate_columns(model, [{**row, "documents": row["documents"] * 2, "scores": [0.0, 0.0]} for row in rows])
    columns.features[2:] = []
    host, expected = gradients(MultipleNegativesRankingLoss(model, scale=20.0), model, columns)
    torch.testing.assert_close(value, host, rtol=1e-5, atol=1e-6)
    assert_same_gradients(found, expected)


def test_the_coupled_loss_is_its_function_on_the_batch(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """With one seed: the rankings are drawn from torch's global generator, and from nowhere else."""
    rows = even_rows[:5]
    spec = next(spec for spec in LOSSES if "Coupled" in spec.name)
    batch = collate_columns(model, rows)
    scores = torch.stack(
        [util.cos_sim(embed(model, [row["query"]]), embed(model, row["documents"]))[0] for row in rows]
    )
    loss = spec.build(model, scale=3.0)
    torch.manual_seed(SEED)
    actual = loss(batch.fresh(), batch.labels)
    torch.manual_seed(SEED)
    expected = spec.functional(3.0 * scores, torch.tensor([row["scores"] for row in rows]), torch.ones(5, 3).bool())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [spec for spec in UNSCORED_LOSSES if "Coupled" not in spec.name], ids=str)
@pytest.mark.parametrize("form", [collate, collate_columns])
def test_in_batch_negatives_join_once_and_never_the_own_list(
    model: Any, even_rows: list[dict[str, Any]], spec: LossSpec, form: Any
) -> None:
    """Prevents the quiet poison of in-batch negatives: a query's own positive, from a neighbour's list, pushed down.

    Each positive here is a negative of two other queries, in other places of their lists.
    """
    rows = even_rows[:6]
    batch = form(model, rows)
    with_others = spec.build(model, scale=3.0, in_batch_negatives=True)(batch.fresh(), batch.labels)
    torch.testing.assert_close(with_others, expected_loss(model, spec, rows, 3.0, True), rtol=1e-4, atol=1e-5)
    gathering = spec.build(model, scale=3.0, in_batch_negatives=True, gather_across_devices=True)
    torch.testing.assert_close(gathering(batch.fresh(), batch.labels), with_others)  # one process: nothing to gather
    alone = spec.build(model, scale=3.0)(batch.fresh(), batch.labels)
    assert (with_others - alone).abs() > 1e-4, "the other queries' documents changed nothing"


def test_padded_places_do_not_let_a_listed_document_in(model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents the arbitrary index of a padded place, document 0, from undoing that document 0 is in the list.

    The first list is the shortest one, and document 0 is its positive.
    """
    rows = ragged_rows[:4]
    batch = collate(model, rows)
    assert batch.labels["index"][0].tolist() == [0, 1, 0, 0, 0]
    spec = next(spec for spec in LOSSES if "Softmax" in spec.name)  # every document is in its denominator
    actual = spec.build(model, scale=3.0, in_batch_negatives=True)(batch.fresh(), batch.labels)
    torch.testing.assert_close(actual, expected_loss(model, spec, rows, 3.0, True), rtol=1e-4, atol=1e-5)


def test_in_batch_negatives_keep_every_positive_of_the_query_out(model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents a second positive, or a masked entry that points to document 0, from hiding or adding a negative."""
    rows = ragged_rows[:5]
    for row in rows:
        row["positives"] = [place < 2 for place in range(len(row["documents"]))]
    rows = [row for row in rows if not all(row["positives"])]
    batch = collate(model, rows)
    actual = M3SELoss(model, scale=3.0, in_batch_negatives=True)(batch.fresh(), batch.labels)

    texts = list(dict.fromkeys(text for row in rows for text in row["documents"]))
    student = 3.0 * util.cos_sim(embed(model, [row["query"] for row in rows]), embed(model, texts))
    total = 0.0
    for row, scores in zip(rows, student.tolist(), strict=True):
        own = dict(zip(row["documents"], row["scores"], strict=True))
        positives = set(row["documents"][:2])
        top = max((text for text in own if text not in positives), key=own.__getitem__)
        by_text = dict(zip(texts, scores, strict=True))
        total += sum(((own[p] - own[top]) - (by_text[p] - by_text[top])) ** 2 for p in positives)
        total += sum(max(0.0, by_text[n] - by_text[top]) ** 2 for n in texts if n not in positives)
    assert actual.item() == pytest.approx(total / len(rows), rel=1e-4)


@pytest.mark.parametrize("tokens", [None, 40])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("how", ["lists", "columns", "ids"])
def test_what_is_known_to_be_relevant_is_no_in_batch_negative(
    model: Any, even_rows: list[dict[str, Any]], how: str, gather: bool, tokens: int | None
) -> None:
    """Prevents training against the judgements: a positive that another row holds, pushed down as its negative.

    Rows 0 and 3 share no text; by what is known, the positive of row 3 is relevant to the query of row 0.
    """
    rows = [dict(even_rows[place]) for place in (0, 3)]
    if how == "ids":
        rows[0] |= {"document_ids": [1, 2, 3], "relevant_ids": [1, 77]}
        rows[1] |= {"document_ids": [77, 5, 6]}
    else:
        rows[1]["query"] = rows[0]["query"]
    batch = collate_columns(model, rows) if how == "columns" else collate(model, rows)
    loss = SoftmaxCrossEntropyLoss(
        model, scale=3.0, in_batch_negatives=True, gather_across_devices=gather, mini_batch_num_tokens=tokens
    )

    expected = []
    for row, other in (rows, rows[::-1]):
        relevant = other["documents"][:1] if how != "ids" or row is rows[0] else []
        texts = row["documents"] + [text for text in other["documents"] if text not in relevant]
        student = 3.0 * util.cos_sim(embed(model, [row["query"]]), embed(model, texts))
        teacher = torch.tensor([row["scores"] + [NAN] * (len(texts) - 3)])
        expected.append(softmax_cross_entropy_loss(student, teacher))
    torch.testing.assert_close(loss(batch.fresh(), batch.labels), torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_what_is_relevant_is_known_where_rows_must_not_be_cut(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """AdaptiveLayerLoss forbids new feature dicts; that must not change the negatives."""
    rows = [even_rows[0], even_rows[3] | {"query": even_rows[0]["query"]}]
    batch = collate(model, rows)
    loss = SoftmaxCrossEntropyLoss(model, scale=3.0, in_batch_negatives=True)
    with column_merging_disabled():
        uncut = loss(batch.fresh(), batch.labels)
    torch.testing.assert_close(uncut, loss(batch.fresh(), batch.labels), rtol=1e-5, atol=1e-5)


def test_a_static_embedding_knows_what_is_relevant(static_model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Its features have no rows of tokens in which the loss could see that two queries are one."""
    rows = [even_rows[0], even_rows[3] | {"query": even_rows[0]["query"]}]
    batch = collate(static_model, rows)
    loss = SoftmaxCrossEntropyLoss(static_model, scale=3.0, in_batch_negatives=True)
    value = loss(batch.fresh(), batch.labels)
    batch.labels["known"]["queries"] = torch.tensor([0, 1])  # as if they were two
    assert loss(batch.fresh(), batch.labels) > value + 1e-3


@pytest.mark.parametrize("cached", [False, True])
def test_in_batch_negatives_know_equal_texts_under_left_padding(
    model: Any, even_rows: list[dict[str, Any]], cached: bool
) -> None:
    """Prevents a text from looking like another one because its column is wider: decoder students pad on the left."""
    model.tokenizer.padding_side = "left"
    rows = even_rows[:6]
    options = {"scale": 3.0, "in_batch_negatives": True, "mini_batch_num_tokens": 40 if cached else None}
    lists, columns = collate(model, rows), collate_columns(model, rows)
    assert not columns.features[1]["attention_mask"][:, 0].all(), "the tokenizer did not pad on the left"

    def distinct(batch: Batch) -> int:
        seen = []
        handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["input_ids"])))
        with torch.no_grad():
            M3SELoss(model, **options)(batch.fresh(), batch.labels)
        handle.remove()
        return sum(seen)

    assert distinct(columns) == distinct(lists)


def test_a_dot_product_and_the_models_own_similarity(make_model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents a student that is trained for cosine and searched with dot products."""
    rows = even_rows[:4]
    for options, model in (
        ({"similarity_fct": util.dot_score}, make_model()),
        ({}, make_model(similarity_fn_name="dot")),
    ):
        batch = collate(model, rows)
        actual = M3SELoss(model, scale=0.1, **options)(batch.fresh(), batch.labels)
        student = torch.stack(
            [0.1 * embed(model, [row["query"]])[0] @ embed(model, row["documents"]).T for row in rows]
        )
        positives = torch.tensor([[True, False, False]] * 4)
        expected = M3SE.functional(student, torch.tensor([row["scores"] for row in rows]), positives)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_pairwise_similarity_is_refused(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents a vector of pair similarities from being broadcast over the lists."""
    batch = collate(model, [{**row, "documents": row["documents"][:1], "scores": [1.0]} for row in even_rows[:4]])
    loss = SoftmaxCrossEntropyLoss(model, similarity_fct=util.pairwise_cos_sim)
    with pytest.raises(ValueError, match=r"matrix \[Q, U\].*pairwise"):
        loss(batch.fresh(), batch.labels)


# Two forms, one gradient


@pytest.mark.parametrize("in_batch", [False, True])
def test_both_label_forms_give_one_gradient(
    model: Any, even_rows: list[dict[str, Any]], spec: LossSpec, in_batch: bool
) -> None:
    """Prevents a de-duplicated document from losing the gradient of all lists but one."""
    if in_batch and spec not in UNSCORED_LOSSES:
        pytest.skip("an unscored document has no part in this loss")
    loss = spec.build(model, scale=3.0, in_batch_negatives=in_batch)
    lists, columns = collate(model, even_rows[:8]), collate_columns(model, even_rows[:8])
    if spec.name == "CoupledRankDistilLoss":  # rankings of a sure teacher do not depend on the order of the columns
        lists = Batch(lists.features, lists.labels | {"scores": 100 * lists.labels["scores"]})
        columns = Batch(columns.features, 100 * columns.labels)
    value, grads = gradients(loss, model, lists)
    other_value, other_grads = gradients(loss, model, columns)
    torch.testing.assert_close(value, other_value, rtol=1e-5, atol=1e-5)
    assert_same_gradients(grads, other_grads)


def test_a_batch_of_lists_has_the_mean_gradient_of_its_lists(model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents padding, or a neighbour's longer list, from changing what a list teaches."""
    rows = ragged_rows[:4]
    loss = M3SELoss(model, scale=3.0)
    _, together = gradients(loss, model, collate(model, rows))
    singles = [gradients(loss, model, collate(model, [row]))[1] for row in rows]
    mean = {name: torch.stack([grads[name] for grads in singles]).mean(0) for name in together}
    assert_same_gradients(together, mean)


@pytest.mark.parametrize("tokens", [None, 40])
def test_a_run_that_trains_nothing_stops_and_a_batch_without_anything_gives_zero(
    model: Any, ragged_rows: list[dict[str, Any]], spec: LossSpec, tokens: int | None
) -> None:
    """Prevents a happy end of a run with unchanged weights, and one empty batch from turning the weights into NaN."""
    rows = [{"query": "sort objects", "documents": ["a key function"], "scores": [None]}]
    loss, empty = spec.build(model, mini_batch_num_tokens=tokens), collate(model, rows)
    message = r"nothing to learn from the first training batch.*1 lists 1 lack a second document, 1 lack .*Score more"
    with pytest.raises(ValueError, match=rf"{spec.name} has {message}"):
        gradients(loss, model, empty)
    with torch.no_grad():
        assert loss(empty.fresh(), empty.labels) == 0.0
    gradients(loss, model, collate(model, ragged_rows[:4]))
    value, grads = gradients(loss, model, empty)
    assert value == 0.0
    assert all((grad == 0.0).all() for grad in grads.values())


def test_several_positives_change_the_loss(model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents the flags from being dropped on the way, with document 0 as the only positive."""
    rows = [row for row in ragged_rows if len(row["documents"]) == 4]
    flagged = [row | {"positives": [True, True, False, False]} for row in rows]
    one, two = collate(model, rows), collate(model, flagged)
    loss = M3SELoss(model, scale=3.0)
    assert (loss(one.fresh(), one.labels) - loss(two.fresh(), two.labels)).abs() > 1e-3


# Gradient caching


@pytest.mark.parametrize("tokens", [8, 60])
@pytest.mark.parametrize("form", [collate, collate_columns])
def test_caching_does_not_change_the_gradient(
    model: Any, even_rows: list[dict[str, Any]], spec: LossSpec, form: Any, tokens: int
) -> None:
    """Prevents mini-batches that are put together in another order than they were cut; 8 tokens is less than a row."""
    batch = form(model, even_rows[:6])
    in_batch = spec in UNSCORED_LOSSES
    plain = spec.build(model, scale=3.0, in_batch_negatives=in_batch)
    cached = spec.build(model, scale=3.0, in_batch_negatives=in_batch, mini_batch_num_tokens=tokens)
    assert cached.uses_gradient_cache
    assert not plain.uses_gradient_cache
    value, grads = gradients(plain, model, batch)
    cached_value, cached_grads = gradients(cached, model, batch)
    torch.testing.assert_close(cached_value, value, rtol=1e-5, atol=1e-5)
    assert_same_gradients(grads, cached_grads)


def test_caching_does_not_change_the_gradient_of_ragged_lists(
    model: Any, ragged_rows: list[dict[str, Any]], spec: LossSpec
) -> None:
    batch = collate(model, ragged_rows[:6])
    _, grads = gradients(spec.build(model, scale=3.0), model, batch)
    _, cached = gradients(spec.build(model, scale=3.0, mini_batch_num_tokens=30), model, batch)
    assert_same_gradients(grads, cached)


def test_caching_replays_dropout(make_model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents gradients cached under one dropout mask from being applied under another.

    A directional derivative settles it: with the generator reset, the loss is a fixed function of the weights.
    """
    model = make_model(dropout=0.3).train().double()
    batch = collate(model, ragged_rows[:4])
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=30)
    value, grads = gradients(loss, model, batch, seed=3)
    again, grads_again = gradients(loss, model, batch, seed=3)
    other, _ = gradients(loss, model, batch, seed=4)
    assert value == again
    assert value != other, "no dropout was drawn"
    assert_same_gradients(grads, grads_again, tolerance=1e-12)

    step = 1e-6
    torch.manual_seed(1)
    directions = {name: torch.randn_like(grad) for name, grad in grads.items()}
    expected = sum(float((grad * directions[name]).sum()) for name, grad in grads.items())
    values = []
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in directions:
                    parameter.add_(directions[name], alpha=sign * step)
            torch.manual_seed(3)
            values.append(float(loss(batch.fresh(), batch.labels)))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_caching_keeps_each_forward_pass_within_its_tokens(model: Any, ragged_rows: list[dict[str, Any]]) -> None:
    """Prevents a budget that is accepted and not kept: memory is what it is for."""
    batch = collate(model, ragged_rows)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]["input_ids"].numel()))
    loss = M3SELoss(model, mini_batch_num_tokens=50)(batch.fresh(), batch.labels)
    loss.backward()
    handle.remove()
    assert max(seen) <= 50
    assert len(seen) > 8


@pytest.mark.parametrize("tokens", [None, 40])
def test_evaluation_without_gradients(model: Any, ragged_rows: list[dict[str, Any]], tokens: int | None) -> None:
    """Prevents a cached loss from asking for a backward pass where there is none."""
    model.eval()
    batch = collate(model, ragged_rows[:5])
    loss = M3SELoss(model, scale=3.0, mini_batch_num_tokens=tokens)
    with torch.no_grad():
        value = loss(batch.fresh(), batch.labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected_loss(model, M3SE, ragged_rows[:5], 3.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [collate, collate_columns])
def test_a_static_embedding_trains_without_caching(
    static_model: Any, even_rows: list[dict[str, Any]], form: Any
) -> None:
    """Prevents a token stream from being cut as if it had rows: the loss would be that of other texts."""
    batch = form(static_model, even_rows[:6])
    loss = M3SELoss(static_model, scale=3.0)
    value, grads = gradients(loss, static_model, batch)
    torch.testing.assert_close(value, expected_loss(static_model, M3SE, even_rows[:6], 3.0).detach())
    assert any(float(grad.abs().max()) > 0.0 for grad in grads.values())
    with pytest.raises(ValueError, match="StaticEmbedding"):
        M3SELoss(static_model, mini_batch_num_tokens=64)


def test_a_bfloat16_model_is_scored_in_single_precision(static_model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents margins of a tenth from drowning: a bfloat16 score near 20 has steps of 0.125.

    The host's similarities see to it themselves; a user's own matrix product does not.
    """
    model = static_model.bfloat16()
    batch = collate(model, even_rows[:4])
    queries, documents = (model(features)["sentence_embedding"] for features in batch.fresh())
    assert queries.dtype == torch.bfloat16
    student = 0.5 * (queries.float() @ documents.float().T).gather(1, batch.labels["index"])
    expected = M3SE.functional(student, batch.labels["scores"], batch.labels["positives"])
    actual = M3SELoss(model, scale=0.5, similarity_fct=lambda a, b: a @ b.T)(batch.fresh(), batch.labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("in_batch", [False, True])
def test_autocast_does_not_reach_the_scores(static_model: Any, even_rows: list[dict[str, Any]], in_batch: bool) -> None:
    """Prevents mixed precision from rounding the matrix product of the similarity, which it would do by default.

    A StaticEmbedding has no matrix product of its own, so the loss must be the very same.
    """
    batch = collate(static_model, even_rows[:6])
    loss = M3SELoss(static_model, scale=20.0, in_batch_negatives=in_batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(batch.fresh(), batch.labels)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss(batch.fresh(), batch.labels), rtol=1e-6, atol=0.0)


def test_double_precision_is_kept(make_model: Any, even_rows: list[dict[str, Any]]) -> None:
    model = make_model().train().double()
    batch = collate(model, even_rows[:4])
    assert M3SELoss(model, scale=20.0)(batch.fresh(), batch.labels).dtype == torch.float64


# Refusals: never a silent different loss


def _scores(*shape: int) -> Tensor:
    return torch.linspace(1.0, -1.0, math.prod(shape)).reshape(shape)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"float tensor \[Q, D\].*NoneType.*`label`"),
        (_scores(4), r"\[Q, D\] with D = 3.*got \[4\].*MarginMSELoss"),
        (_scores(4, 2), r"D = 3.*got \[4, 2\].*column needs its score"),
        (_scores(4, 4), r"D = 3.*got \[4, 4\]"),
        (_scores(4, 3, 1), r"D = 3.*got \[4, 3, 1\]"),
        (_scores(4, 3).round().long(), r"floating point.*int64.*floats"),
        (_scores(4, 3) > 0, r"floating point.*bool"),
        (torch.tensor([[1.0, 0.0, -1.0]] * 3 + [[NAN, 0.0, 1.0]]), r"row\(s\) \[3\].*NaN for document_1"),
        (torch.tensor([[1.0, 0.0, -1.0]] * 3 + [[1.0, INF, 1.0]]), r"row\(s\) \[3\].*infinite"),
        (torch.tensor([[1.0, 0.0, -INF]] + [[1.0, 0.0, 1.0]] * 3), r"row\(s\) \[0\].*infinite"),
    ],
    ids=["none", "1-d", "too few", "too many", "3-d", "integers", "flags", "NaN positive", "infinite", "-infinite"],
)
def test_labels_that_do_not_fit_are_refused(
    model: Any, even_rows: list[dict[str, Any]], labels: Tensor | None, message: str
) -> None:
    batch = collate_columns(model, even_rows[:4])
    for spec in LOSSES:
        with pytest.raises(ValueError, match=message):
            spec.build(model)(batch.fresh(), labels)


def test_a_label_with_fewer_rows_than_queries_is_refused(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents an IndexError without a hint, or scores of other queries."""
    batch = collate_columns(model, even_rows[:4])
    with pytest.raises(ValueError, match=r"\[3, 3\]|Q = 4|4 queries"):
        M3SELoss(model)(batch.fresh(), _scores(3, 3))


def test_an_unscored_negative_is_allowed(model: Any, even_rows: list[dict[str, Any]], spec: LossSpec) -> None:
    """NaN among the negatives means 'not scored', in both forms, and no NaN comes out."""
    batch = collate_columns(model, even_rows[:4])
    batch.labels[:, 2] = NAN
    value, grads = gradients(spec.build(model, scale=3.0), model, batch)
    rows = [row | {"scores": [*row["scores"][:2], None]} for row in even_rows[:4]]
    other, _ = gradients(spec.build(model, scale=3.0), model, collate(model, rows))
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())
    if spec.name != "CoupledRankDistilLoss":
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_columns_are_refused(model: Any, even_rows: list[dict[str, Any]], count: int) -> None:
    """Prevents a loss over one document, which is constant or empty, from running to the end of training."""
    batch = collate_columns(model, even_rows[:4])
    for spec in LOSSES:
        with pytest.raises(ValueError, match=rf"at least 3 columns.*got {count}.*DistillationCollator"):
            spec.build(model)(batch.fresh()[:count], batch.labels[:, : count - 1])


@pytest.mark.parametrize("inside", ["", "matryoshka", "combined"])
@pytest.mark.parametrize("documents", [2, 3, None])
def test_the_forgotten_collator_is_named_before_a_row_is_collated(
    model: Any, arguments: Any, ragged_rows: list[dict[str, Any]], documents: int | None, inside: str
) -> None:
    """The host's own collator reads two documents as one pair of texts, and stops at lists of other lengths."""
    loss: Any = M3SELoss(model)
    if inside:
        loss = MatryoshkaLoss(model, loss, [8]) if inside == "matryoshka" else CombinedLoss([loss, M3SELoss(model)])
    rows = [{key: row[key] if key == "query" else row[key][:documents] for key in row} for row in ragged_rows[1:4]]
    with pytest.raises(ValueError, match=r"data_collator=DistillationCollator\(preprocess_fn=model.preprocess\)"):
        SentenceTransformerTrainer(model=model, args=arguments(), train_dataset=Dataset.from_list(rows), loss=loss)


def test_list_labels_beside_document_columns_are_refused(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents an index into the distinct documents from being read against a column."""
    columns, lists = collate_columns(model, even_rows[:4]), collate(model, even_rows[:4])
    with pytest.raises(ValueError, match=r"two columns.*got 4.*DistillationCollator"):
        M3SELoss(model)(columns.fresh(), lists.labels)
    with pytest.raises(ValueError, match=r"labels \['scores', 'positives', 'mask', 'index'\].*DistillationCollator"):
        M3SELoss(model)(lists.fresh(), {"scores": lists.labels["scores"]})
    short = lists.labels | {"mask": lists.labels["mask"][:, :2]}
    with pytest.raises(ValueError, match=r"one shape \[Q, D\]"):
        M3SELoss(model)(lists.fresh(), short)


@pytest.mark.parametrize("kind", ["cross-encoder", "trunk", "name", "no pooling", "none"])
def test_a_student_without_embeddings_is_refused_when_the_loss_is_made(checkpoint: Path, model: Any, kind: str) -> None:
    """Prevents an AttributeError or KeyError deep in the first step, and says what to do."""
    wrong, message = {
        "cross-encoder": (lambda: CrossEncoder(str(checkpoint), device="cpu"), r"CrossEncoder reads both together"),
        "trunk": (lambda: model[0].model, r"got BertModel\. Wrap the trunk"),
        "name": (lambda: str(checkpoint), r"got str\. Wrap the trunk"),
        "no pooling": (lambda: SentenceTransformer(modules=[model[0]]), r"\['token_embeddings'\] only: append a Pool"),
        "none": (lambda: None, r"as the student, .* got NoneType\.$"),
    }[kind]
    with pytest.raises(ValueError, match=rf"^M3SELoss .*{message}"):
        M3SELoss(wrong())


def test_lists_of_other_queries_are_refused(model: Any, even_rows: list[dict[str, Any]]) -> None:
    """Prevents labels of a larger or smaller batch from pairing lists with the wrong queries."""
    lists = collate(model, even_rows[:4])
    short = {key: value[:3] for key, value in lists.labels.items() if key != "known"}
    with pytest.raises(ValueError, match=r"3|4"):
        M3SELoss(model)(lists.fresh(), short)


@pytest.mark.parametrize("name", ["M3SELoss", "MarginMSELoss"])
def test_a_list_without_a_positive_is_refused_where_one_is_needed(
    model: Any, even_rows: list[dict[str, Any]], name: str
) -> None:
    """Prevents lists that silently teach nothing."""
    rows = [row | {"positives": [place != 2, False, False]} for place, row in enumerate(even_rows[:4])]
    batch = collate(model, rows)
    with pytest.raises(ValueError, match=rf"{name}.*row\(s\) \[2\].*no positive.*`positives`"):
        LossSpec(name).build(model)(batch.fresh(), batch.labels)


@pytest.mark.parametrize("name", ["ScoreMSELoss", "SoftmaxCrossEntropyLoss", "RankDistilLoss"])
def test_a_list_without_a_positive_is_fine_where_none_is_needed(
    model: Any, even_rows: list[dict[str, Any]], name: str
) -> None:
    batch = collate(model, [row | {"positives": [False] * 3} for row in even_rows[:4]])
    assert LossSpec(name).build(model)(batch.fresh(), batch.labels) > 0.0


def test_a_bad_scale_or_token_budget_is_refused(model: Any, spec: LossSpec) -> None:
    """Prevents a sign or a NaN that turns the ranking round, or every weight to NaN."""
    for scale in (0, 0.0, -1.0, NAN, INF, "20", True):
        with pytest.raises(ValueError, match=r"scale must be a positive finite number, got"):
            spec.build(model, scale=scale)
    for tokens in (0, -5, 1.5, True, "64"):
        with pytest.raises(ValueError, match="mini_batch_num_tokens"):
            spec.build(model, mini_batch_num_tokens=tokens)


def test_a_student_whose_lengths_are_beyond_its_positions_is_refused(make_model: Any) -> None:
    """Prevents an index error in the middle of a run, at the first text that is long enough."""
    model = make_model()
    M3SELoss(model)
    model.max_seq_length = 65
    with pytest.raises(ValueError, match=r"max_seq_length=65 is beyond the model's 64 positions.*to 64 at most"):
        M3SELoss(model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: RankDistilLoss(model, top_k=0), "top_k"),
        (lambda model: RankDistilLoss(model, top_k=2, match="rank"), "match"),
        (lambda model: RankDistilLoss(model, top_k=2, penalty_weight=-1.0), "penalty_weight"),
        (lambda model: CoupledRankDistilLoss(model, top_k=0), "top_k"),
        (lambda model: CoupledRankDistilLoss(model, num_samples=0), "num_samples"),
        (lambda model: SoftmaxCrossEntropyLoss(model, student_temperature=0.0), "student_temperature"),
        (lambda model: SoftmaxCrossEntropyLoss(model, teacher_temperature=-1.0), "teacher_temperature"),
        (lambda model: SoftmaxCrossEntropyLoss(model, teacher_temperature="2"), "teacher_temperature"),
        (lambda model: RankDistilLoss(model, penalty_weight="1"), "penalty_weight"),
        (lambda model: M3SELoss(model, similarity_fct="cosine"), "similarity_fct.*got 'cosine'.*similarity_fn_name"),
    ],
)
def test_bad_options_are_refused_before_training(model: Any, build: Any, message: str) -> None:
    """At construction: hours of data preparation may lie between that and the first batch."""
    with pytest.raises(ValueError, match=message):
        build(model)


@pytest.mark.parametrize("spec", [spec for spec in LOSSES if spec not in UNSCORED_LOSSES], ids=str)
def test_no_loss_takes_in_batch_negatives_that_would_do_nothing(model: Any, spec: LossSpec) -> None:
    """Prevents an option that is accepted and ignored."""
    with pytest.raises(TypeError, match="in_batch_negatives"):
        spec.build(model, in_batch_negatives=True)


def test_in_batch_negatives_are_refused_where_equal_texts_cannot_be_seen(
    static_model: Any, even_rows: list[dict[str, Any]]
) -> None:
    """A token stream does not show which columns hold the same text; the collator knows."""
    loss = M3SELoss(static_model, scale=3.0, in_batch_negatives=True)
    columns, lists = collate_columns(static_model, even_rows[:6]), collate(static_model, even_rows[:6])
    with pytest.raises(ValueError, match="DistillationCollator"):
        loss(columns.fresh(), columns.labels)
    expected = expected_loss(static_model, M3SE, even_rows[:6], 3.0, in_batch=True)
    torch.testing.assert_close(loss(lists.fresh(), lists.labels), expected)


# Scale guidance


def _stretched(model: Any, rows: list[dict[str, Any]], by: float) -> Batch:
    return collate(model, [row | {"scores": [by * score for score in row["scores"]]} for row in rows])


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """This package's warnings, which come from the loss and nothing below it."""
    records = [record for record in caplog.records if record.name.startswith("st_m3se.losses")]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("spec", MARGIN_LOSSES, ids=str)
@pytest.mark.parametrize("by", [8.0, 1e-3], ids=["raw logits", "hardly any margin"])
def test_a_scale_that_cannot_fit_is_named_once_with_one_that_does(
    model: Any, ragged_rows: list[dict[str, Any]], spec: LossSpec, by: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents a long run that cannot work: margins of 10 to 20 are out of reach of a cosine in [-1, 1]."""
    batch = _stretched(model, ragged_rows[4:8], by)
    loss = spec.build(model, scale=1.0)
    for _ in range(6):
        loss(batch.fresh(), batch.labels)
    messages = _warnings(caplog)
    assert len(messages) == 1
    assert spec.name in messages[0]
    named = re.search(r"scale=([0-9.e+-]*[0-9])", messages[0])
    assert named, messages[0]

    caplog.clear()
    fitting = spec.build(model, scale=float(named[1]))
    for _ in range(6):
        fitting(batch.fresh(), batch.labels)
    assert _warnings(caplog) == []


@pytest.mark.parametrize("form", [collate, collate_columns])
def test_each_loss_warns_for_itself_in_both_forms(
    model: Any, even_rows: list[dict[str, Any]], form: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents the second loss of a dict of losses from being silent because the first one spoke."""
    batch = form(model, [row | {"scores": [12.0, 1.0, -3.0]} for row in even_rows[:4]])
    for loss in (M3SELoss(model, 1.0), M3SELoss(model, 1.0), M3SELoss(model, 1.0, mini_batch_num_tokens=40)):
        loss(batch.fresh(), batch.labels)
        loss(batch.fresh(), batch.labels)
    assert len(_warnings(caplog)) == 3


@pytest.mark.parametrize("spec", [spec for spec in LOSSES if spec not in MARGIN_LOSSES], ids=str)
def test_losses_on_distributions_do_not_warn(
    model: Any, ragged_rows: list[dict[str, Any]], spec: LossSpec, caplog: pytest.LogCaptureFixture
) -> None:
    batch = _stretched(model, ragged_rows[:8], 8.0)
    spec.build(model, scale=1.0)(batch.fresh(), batch.labels)
    assert _warnings(caplog) == []


@pytest.mark.parametrize(
    "options",
    [{"scale": 3.0}, {"scale": 2.0}, {"similarity_fct": util.dot_score}],
    ids=["scale 3", "scale 2", "dot product"],
)
def test_no_warning_where_the_scale_fits_or_is_unbounded(
    model: Any, ragged_rows: list[dict[str, Any]], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents false alarms, after which the true one is not read."""
    batch = collate(model, ragged_rows)
    loss = M3SELoss(model, **options)
    for _ in range(6):
        loss(batch.fresh(), batch.labels)
    assert _warnings(caplog) == []


def test_an_unscored_batch_does_not_end_the_check(
    model: Any, ragged_rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Lists of which at most one document is scored have no margin, and say nothing about the scale."""
    empty = collate(model, [row | {"scores": [5.0] + [None] * (len(row["scores"]) - 1)} for row in ragged_rows[:4]])
    loss = ScoreMSELoss(model, scale=1.0)
    for _ in range(8):
        loss(empty.fresh(), empty.labels)
    assert _warnings(caplog) == []
    batch = _stretched(model, ragged_rows[4:8], 8.0)
    loss(batch.fresh(), batch.labels)
    assert len(_warnings(caplog)) == 1


def test_evaluation_does_not_use_up_the_check(
    model: Any, ragged_rows: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """The trainer puts the model into evaluation mode, and not the loss."""
    model.eval()
    fitting, batch = collate(model, ragged_rows[4:8]), _stretched(model, ragged_rows[4:8], 8.0)
    loss = M3SELoss(model, scale=1.5)
    with torch.no_grad():
        for _ in range(6):
            loss(fitting.fresh(), fitting.labels)
    model.train()
    loss(batch.fresh(), batch.labels)
    assert len(_warnings(caplog)) == 1


def _scaled_to_unit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"scores": [1 / (1 + math.exp(-3 * score)) for score in row["scores"]]} for row in rows]


@pytest.mark.parametrize(
    "build",
    [
        lambda model: M3SELoss(model),
        lambda model: M3SELoss(model, scale=15.0),
        lambda model: M3SELoss(model, 15.0, similarity_fct=lambda one, two: util.cos_sim(one, two)),
        lambda model: MarginMSELoss(model, similarity_fct=lambda one, two: util.cos_sim(one, two)),
        lambda model: M3SELoss(model, similarity_fct=util.dot_score),
        lambda model: SoftmaxCrossEntropyLoss(model),
        lambda model: CoupledRankDistilLoss(model),
        lambda model: RankDistilLoss(model),
    ],
    ids=[
        "default",
        "scale 15",
        "a cosine by another name",
        "a cosine times 1",
        "dot",
        "softmax",
        "rankings",
        "log-odds",
    ],
)
def test_sigmoid_scores_are_noticed(
    model: Any, ragged_rows: list[dict[str, Any]], build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents the commonest mistake: probabilities, as CrossEncoder.predict gives them, for logits."""
    loss = build(model)
    batch = collate(model, _scaled_to_unit(ragged_rows[4:8]))
    for _ in range(6):
        loss(batch.fresh(), batch.labels)
    messages = _warnings(caplog)
    assert len(messages) == 1
    assert "sigmoid" in messages[0]
    assert "Identity" in messages[0]


@pytest.mark.parametrize(
    ("by", "temperature", "word"),
    [(1e-3, 1.0, "equally likely"), (1e3, 1.0, "exactly 0"), (1.0, 1.0, None), (1e3, 1e3, None)],
)
def test_targets_of_a_softmax_that_teach_nothing_are_noticed(
    model: Any,
    ragged_rows: list[dict[str, Any]],
    by: float,
    temperature: float,
    word: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Prevents hours of training towards a flat target, or towards one document alone."""
    loss = SoftmaxCrossEntropyLoss(model, teacher_temperature=temperature)
    batch = _stretched(model, [row | {"scores": [2 * s for s in row["scores"]]} for row in ragged_rows[4:8]], by)
    for _ in range(3):
        loss(batch.fresh(), batch.labels)
    messages = _warnings(caplog)
    if word is None:
        assert messages == []
        return
    assert len(messages) == 1
    assert word in messages[0]
    named = re.search(r"teacher_temperature=([0-9.e+-]*[0-9])", messages[0])
    assert named, messages[0]
    caplog.clear()
    SoftmaxCrossEntropyLoss(model, teacher_temperature=float(named[1]))(batch.fresh(), batch.labels)
    assert _warnings(caplog) == []


def test_the_default_scale_suits_the_similarity(model: Any, make_model: Any) -> None:
    """20 wherever similarities are cosines, by whatever name; 1 for a dot product, which has no bound."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    assert M3SELoss(model).scale == 20.0
    assert M3SELoss(model, similarity_fct=util.dot_score).scale == 1.0
    dot = make_model(similarity_fn_name="dot")
    assert SoftmaxCrossEntropyLoss(dot).scale == 1.0
    dot.append(Normalize())
    assert SoftmaxCrossEntropyLoss(dot).scale == 20.0
    assert M3SELoss(dot, 7).scale == 7.0


# What the loss says of itself


def test_the_config_holds_every_option(model: Any, spec: LossSpec) -> None:
    """Prevents a model card that leaves out what a reader needs to train the same model."""
    in_batch = spec in UNSCORED_LOSSES
    loss = spec.build(model, scale=7.0, in_batch_negatives=in_batch, mini_batch_num_tokens=64)
    config = loss.get_config_dict()
    common = {"similarity_fct": "cos_sim", "scale": 7.0, "mini_batch_num_tokens": 64}
    joining = {"in_batch_negatives": True, "gather_across_devices": False} if in_batch else {}
    assert (common | joining).items() <= config.items()
    assert dict(spec.options).items() <= config.items()


def test_the_citation_is_bibtex(model: Any, spec: LossSpec) -> None:
    citation = spec.build(model).citation
    assert re.match(r"\s*@(inproceedings|misc|article)\{\w+,", citation)
    assert citation.count("{") == citation.count("}")
    assert "title={" in citation


def test_own_options_are_keyword_only(model: Any) -> None:
    """Prevents ``RankDistilLoss(model, 8)`` from taking 8 for a similarity, or a budget for top_k."""
    for build in (RankDistilLoss, CoupledRankDistilLoss, SoftmaxCrossEntropyLoss):
        with pytest.raises(TypeError, match="positional"):
            build(model, None, 1.0, False, None, 8, 8)


def test_a_loss_owns_no_weights_but_the_models(model: Any, spec: LossSpec) -> None:
    """Weights of a loss would be neither saved nor kept equal between processes."""
    assert spec.build(model).model is model
    assert {id(p) for p in spec.build(model).parameters()} == {id(p) for p in model.parameters()}
