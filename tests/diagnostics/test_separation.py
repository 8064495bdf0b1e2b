"""Densities, margins, overlap and AUC against libraries and plain loops that share no code with them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import bootstrap, gaussian_kde, mannwhitneyu
from sklearn.metrics import roc_auc_score

from st_m3se.diagnostics import JudgedLists, measure_separation
from st_m3se.diagnostics.separation import _Scorer, auc_per_query, bandwidth, list_spread, margins, pooled_auc

from .conftest import random_lists, random_scores


def parts(lists: JudgedLists, scores: np.ndarray) -> list[tuple[list[float], list[float]]]:
    """Each query's scores of positives and of negatives, by a plain loop."""
    found: list[tuple[list[float], list[float]]] = []
    start = 0
    for length in lists.lengths.tolist():
        own = [(bool(lists.positives[place]), float(scores[place])) for place in range(start, start + length)]
        found.append(([score for flag, score in own if flag], [score for flag, score in own if not flag]))
        start += length
    return found


def look(lists: JudgedLists, scores: np.ndarray, **options: Any) -> Any:
    return measure_separation(lists, {"one": scores}, **{"n_resamples": 20, **options})["one"]


@pytest.mark.parametrize("rounded", [None, 0])
def test_the_margins_are_all_pairs_of_a_query(rounded: int | None) -> None:
    lists = random_lists()
    scores = random_scores(lists, rounded=rounded)
    values, owner = margins(scores, lists.positives, lists.lengths)
    expected = [(query, good - bad) for query, (p, n) in enumerate(parts(lists, scores)) for good, bad in product(p, n)]
    assert sorted(zip(owner.tolist(), values.tolist(), strict=True)) == sorted(expected)


@pytest.mark.parametrize("rounded", [None, 0])
def test_auc_per_query_is_sklearns(rounded: int | None) -> None:
    """Rounded scores tie: prevents an AUC that counts ties as right or as wrong."""
    lists = random_lists()
    scores = random_scores(lists, rounded=rounded)
    expected = []
    for good, bad in parts(lists, scores):
        expected.append(roc_auc_score([1] * len(good) + [0] * len(bad), good + bad))
    found = auc_per_query(scores, lists.positives, lists.lengths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert look(lists, scores).numbers["auc_per_query"].value == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("rounded", [None, 0])
def test_pooled_auc_is_mann_whitneys_and_sklearns_with_weights(rounded: int | None) -> None:
    lists = random_lists()
    scores = random_scores(lists, rounded=rounded)
    counts = np.random.default_rng(3).integers(0, 4, size=(5, len(lists)))
    found = pooled_auc(scores, lists.positives, lists.owner, counts.astype(float))
    for row, value in zip(counts[:, lists.owner], found, strict=True):
        assert value == pytest.approx(roc_auc_score(lists.positives, scores, sample_weight=row), abs=1e-12)
    statistic = mannwhitneyu(scores[lists.positives], scores[~lists.positives]).statistic
    expected = statistic / (lists.positives.sum() * (~lists.positives).sum())
    assert look(lists, scores).numbers["auc_pooled"].value == pytest.approx(expected, abs=1e-12)


def test_the_bandwidth_is_silvermans() -> None:
    values = np.random.default_rng(0).normal(size=400)
    quartiles = np.quantile(values, (0.25, 0.75))
    expected = 0.9 * min(values.std(), (quartiles[1] - quartiles[0]) / 1.349) * 400**-0.2
    assert bandwidth(values) == pytest.approx(expected, rel=0.02)  # quantiles are interpolated in more than one way
    assert bandwidth(np.repeat(values, 3), np.full(1200, 2.0)) == pytest.approx(bandwidth(values) * 3**-0.2, rel=0.02)
    assert bandwidth(np.append(np.zeros(90), np.arange(10.0))) > 0  # no interquartile range
    assert bandwidth(np.full(7, 2.5)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_densities_and_overlap_are_those_of_gaussian_kde(seed: int) -> None:
    """The curves on the grid against SciPy's, and the overlap against their numerical integration."""
    lists = random_lists(seed, queries=60)
    scores = random_scores(lists, seed + 10)
    found = look(lists, scores)
    curves = []
    for flags, curve in ((lists.positives, found.positives), (~lists.positives, found.negatives)):
        own = scores[flags]
        kde = gaussian_kde(own, bw_method=bandwidth(own) / own.std(ddof=1))
        np.testing.assert_allclose(curve, kde(found.x), rtol=0, atol=0.012 * curve.max())
        assert curve.sum() * (found.x[1] - found.x[0]) == pytest.approx(1, abs=1e-3)
        curves.append(kde)
    low, high = scores.min() - 3, scores.max() + 3
    expected, _ = quad(lambda x: min(curves[0](x)[0], curves[1](x)[0]), low, high, limit=400)
    assert 0.1 < expected < 0.9
    assert found.numbers["overlap"].value == pytest.approx(expected, abs=0.005)


def test_scores_that_cannot_be_negative_have_no_density_below_0() -> None:
    """As BM25's, which are 0 where no word matches: what a kernel would have below 0 is reflected, none is lost."""
    lists = random_lists(3, queries=60)
    scores = np.maximum(random_scores(lists, 4), 0)
    assert (scores == 0).mean() > 0.1
    found = look(lists, scores)
    assert found.x.min() > 0
    for flags, curve in ((lists.positives, found.positives), (~lists.positives, found.negatives)):
        own = scores[flags]
        kde = gaussian_kde(own, bw_method=bandwidth(own) / own.std(ddof=1))
        np.testing.assert_allclose(curve, kde(found.x) + kde(-found.x), rtol=0, atol=0.012 * curve.max())
        assert curve.sum() * (found.x[1] - found.x[0]) == pytest.approx(1, abs=1e-3)


def test_the_margins_density_weighs_queries_alike() -> None:
    """Prevents a query with a hundred pairs from outvoting those with one."""
    lists = random_lists(4, queries=60)
    scores = random_scores(lists, 5)
    found = look(lists, scores)
    spread = np.mean([max(p + n) - min(p + n) for p, n in parts(lists, scores)])
    assert found.spread == pytest.approx(spread)
    values, weights = [], []
    for good, bad in parts(lists, scores):
        own = [(g - b) / spread for g, b in product(good, bad)]
        values += own
        weights += [1 / len(own)] * len(own)
    mean = np.average(values, weights=weights)
    assert found.numbers["margin_mean"].value == pytest.approx(mean)
    width = bandwidth(np.array(values), np.array(weights))
    deviation = np.sqrt(np.cov(values, aweights=weights))
    kde = gaussian_kde(values, weights=weights, bw_method=width / deviation)
    np.testing.assert_allclose(
        found.margin_density, kde(found.margin_x), rtol=0, atol=0.012 * kde(found.margin_x).max()
    )
    fine = np.linspace(min(values), max(values), 20001)
    assert found.numbers["margin_peak"].value == pytest.approx(fine[kde(fine).argmax()], abs=2 * width / 4)
    plain = gaussian_kde(values, bw_method=width / deviation)(found.margin_x)
    assert np.abs(plain - found.margin_density).max() > 0.05 * plain.max(), "the weights make no difference here"


def test_nothing_changes_when_scores_are_shifted_and_scaled() -> None:
    """The point of the normalisation: logits, cosines and BM25 scores in one plot."""
    lists = random_lists(6)
    scores = random_scores(lists, 7)
    one, other = look(lists, scores), look(lists, 40 * scores - 7)
    assert other.spread == pytest.approx(40 * one.spread)
    for number, (value, low, high) in one.numbers.items():
        assert other.numbers[number] == pytest.approx((value, low, high), abs=1e-6), number
    np.testing.assert_allclose(other.margin_density, one.margin_density, atol=1e-6)
    np.testing.assert_allclose(other.x, 40 * one.x - 7, atol=1e-6)


def test_separated_and_equal_distributions_have_the_overlaps_0_and_1() -> None:
    candidates = {f"q{query}": [f"{query}a", f"{query}b"] for query in range(400)}
    lists = JudgedLists.of(candidates, {f"q{query}": {f"{query}a": 1} for query in range(400)})
    random = np.random.default_rng(0).normal(size=800)
    apart = look(lists, random + 100 * lists.positives)
    assert apart.numbers["overlap"].value == pytest.approx(0, abs=1e-9)
    assert apart.numbers["auc_pooled"] == (1, 1, 1)
    assert apart.numbers["auc_per_query"] == (1, 1, 1)
    alike = look(lists, np.repeat(random[:400], 2) + np.tile([0, 1e-9], 400))
    assert alike.numbers["overlap"].value == pytest.approx(1, abs=1e-3)


def test_an_offset_per_query_hurts_the_pooled_numbers_alone() -> None:
    lists = random_lists(8, queries=80)
    scores = np.random.default_rng(1).normal(size=len(lists.positives)) + 2 * lists.positives
    offsets = 20 * np.random.default_rng(2).normal(size=len(lists))[lists.owner]
    plain, moved = look(lists, scores).numbers, look(lists, scores + offsets).numbers
    assert moved["auc_per_query"].value == pytest.approx(plain["auc_per_query"].value)
    assert moved["auc_pooled"].value < plain["auc_pooled"].value - 0.2
    assert moved["overlap"].value > plain["overlap"].value + 0.2


def test_intervals_are_percentiles_over_queries() -> None:
    """The AUC per query is a mean over queries, for which SciPy's bootstrap gives the interval."""
    lists = random_lists(9, queries=100)
    scores = random_scores(lists, 10)
    found = look(lists, scores, n_resamples=4000, confidence=0.9)
    values = auc_per_query(scores, lists.positives, lists.lengths)
    expected = bootstrap(
        (values,), np.mean, confidence_level=0.9, n_resamples=4000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    width = expected.high - expected.low
    assert found.numbers["auc_per_query"].low == pytest.approx(expected.low, abs=0.1 * width)
    assert found.numbers["auc_per_query"].high == pytest.approx(expected.high, abs=0.1 * width)
    for value, low, high in found.numbers.values():
        assert low < value < high


def test_a_resample_is_the_lists_written_several_times() -> None:
    """Counting a query twice must be what having it twice is."""
    lists = random_lists(11, queries=12)
    scores = random_scores(lists, 12)
    found = look(lists, scores, n_resamples=1, seed=3)
    drawn = np.random.default_rng(3).integers(12, size=(1, 12))[0]
    counted = _Scorer(lists, scores, "one").statistics(np.bincount(drawn, minlength=12)[None].astype(float))
    good = [score for query in drawn for score in parts(lists, scores)[query][0]]
    bad = [score for query in drawn for score in parts(lists, scores)[query][1]]
    auc = roc_auc_score([1] * len(good) + [0] * len(bad), good + bad)
    assert counted["auc_pooled"] == pytest.approx(auc)
    widths = [bandwidth(scores[flags]) for flags in (lists.positives, ~lists.positives)]
    densities = [
        gaussian_kde(own, bw_method=width / np.std(own, ddof=1))(found.x)
        for own, width in zip((good, bad), widths, strict=True)
    ]
    overlap = np.minimum(*densities).sum() * (found.x[1] - found.x[0])
    assert counted["overlap"] == pytest.approx(overlap, abs=0.005)


@pytest.mark.parametrize("queries", [8, 60, 300])
@pytest.mark.parametrize("shift", [0.0, 0.5, 4.0])
def test_an_interval_holds_its_estimate(queries: int, shift: float) -> None:
    """Draws repeat documents, which pulls two like curves apart: nearly all of them lie below the estimate."""
    candidates = {f"q{query}": [f"d{query}-{place}" for place in range(20)] for query in range(queries)}
    lists = JudgedLists.of(candidates, {query: dict.fromkeys(found[:10], 1) for query, found in candidates.items()})
    for seed in (5, 6):
        scores = np.random.default_rng(seed).normal(size=len(lists.positives)) + shift * lists.positives
        found = look(lists, scores, n_resamples=200)
        for value, low, high in found.numbers.values():
            assert low <= value <= high
        value, low, high = found.numbers["overlap"]
        assert 0 <= low < high <= 1
        assert high - low < 1 / np.sqrt(queries), "the interval says nothing"


def test_blocks_of_resamples_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = random_lists(13)
    scores = random_scores(lists)
    whole = look(lists, scores, n_resamples=50).numbers
    monkeypatch.setattr("st_m3se.evaluation.significance.BLOCK_NUMBERS", 1)
    parted = look(lists, scores, n_resamples=50).numbers
    for number, estimate in whole.items():
        assert parted[number] == pytest.approx(estimate, abs=1e-12)


def test_all_scorers_get_the_same_draws() -> None:
    """Intervals of two equal scorers must be equal, whatever stands beside them."""
    lists = random_lists(14)
    scores = random_scores(lists)
    found = measure_separation(lists, {"a": scores, "b": random_scores(lists, 2), "c": scores}, n_resamples=30)
    assert found["a"].numbers == found["c"].numbers != found["b"].numbers


def test_equal_scores_are_a_narrow_peak_and_a_constant_scorer_is_refused() -> None:
    lists = random_lists(15)
    scores = np.where(lists.positives, 1.0, 0.0)
    found = look(lists, scores).numbers
    assert found["overlap"].value == pytest.approx(0, abs=1e-9)
    assert found["margin_peak"].value == pytest.approx(1, abs=1e-3)
    assert list_spread(scores, lists.lengths) == 1
    with pytest.raises(ValueError, match=r"flat gives all documents of a list the same score"):
        measure_separation(lists, {"flat": random_scores(lists)[lists.owner]})
    with pytest.raises(ValueError, match="one has"):
        look(lists, scores[1:])
    with pytest.raises(ValueError, match="n_resamples"):
        look(lists, scores, n_resamples=0)
