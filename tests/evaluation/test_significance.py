"""Tests and intervals against scipy's, against all cases counted, and against what they promise."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_m3se.evaluation import Comparison, compare, confidence_intervals

stats = pytest.importorskip("scipy.stats", reason='the oracle comes with pip install -e ".[test]"')


def confidence_interval(values: np.ndarray, **options: float) -> tuple[float, float]:
    return confidence_intervals({"values": values}, **options)["values"]  # type: ignore[arg-type]


def pair(differences: list[float] | np.ndarray, **options: object) -> Comparison:
    second = np.asarray(differences, dtype=np.float64)
    (found,) = compare({"first": np.zeros(len(second)), "second": second}, "AP", **options)  # type: ignore[arg-type]
    return found


def test_few_queries_are_counted_exactly() -> None:
    """Prevents a p below 2 / 2^n, which no randomisation of n queries can give."""
    found = pair([0.3, 0.1, 0.2, 0.05])
    assert found.randomisation_p == 2 / 2**4  # all signs plus, and all minus
    assert found.difference == pytest.approx((0.3 + 0.1 + 0.2 + 0.05) / 4)
    assert pair([0.3, -0.1, 0.2]).randomisation_p == 4 / 2**3  # and the two with the smallest flipped


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=2, max_size=9))
def test_exact_p_values_are_scipys(tenths: list[int]) -> None:
    """Tenths make sums that are equal on paper and differ in the last digit: both must count them as equal."""
    differences = np.array(tenths) / 10
    total = [
        sum(sign * value for sign, value in zip(signs, tenths, strict=True))
        for signs in itertools.product((1, -1), repeat=len(tenths))
    ]
    expected = sum(abs(value) >= abs(sum(tenths)) for value in total) / len(total)
    found = pair(differences)
    assert found.randomisation_p == pytest.approx(expected)
    whole = np.array(tenths, dtype=float)  # scipy itself goes wrong where sums of tenths cancel but for the last digit
    theirs = stats.permutation_test(
        (whole,), lambda x, axis: np.sum(x, axis=axis), permutation_type="samples", vectorized=True
    )
    assert found.randomisation_p == pytest.approx(min(1.0, theirs.pvalue))


def test_drawn_p_values_and_t_tests_are_scipys() -> None:
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.02, 0.05):
        first, second = rng.random(80), None
        second = np.clip(first + rng.normal(shift, 0.15, size=80), 0, 1)
        (found,) = compare({"a": first, "b": second}, "nDCG@10")
        theirs = stats.permutation_test(
            (second - first,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=1,
        )
        error = 4 * math.sqrt(2 * theirs.pvalue * (1 - theirs.pvalue) / 9999) + 2 / 9999
        assert found.randomisation_p == pytest.approx(theirs.pvalue, abs=error)
        assert found.t_p == pytest.approx(stats.ttest_rel(second, first).pvalue)


def test_intervals_are_scipys() -> None:
    rng = np.random.default_rng(2)
    values = rng.beta(0.5, 0.7, size=120)
    low, high = confidence_interval(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", vectorized=True, rng=3).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert low < values.mean() < high
    wide = confidence_interval(values, level=0.99)
    assert wide[0] < low
    assert high < wide[1]
    (found,) = compare({"a": np.zeros(120), "b": values}, "AP")
    assert found.interval == pytest.approx((low, high))


def test_systems_that_are_equal_do_not_differ() -> None:
    """Prevents NaN, and warnings, from a t-test without variance."""
    values = np.array([0.1, 0.7, 0.3] * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (same,) = compare({"a": values, "b": values.copy()}, "AP")
        constant = pair(np.full(30, 0.1) + values[:30] - values[:30])
        single = pair([0.4])
        shifted = compare({"a": values, "b": values + 0.1}, "AP")[0]  # equal but for the last digit
    assert (same.difference, same.interval) == (0, (0, 0))
    assert same.randomisation_p == same.t_p == same.holm_p == 1
    assert not same.significant
    assert constant.interval == pytest.approx((0.1, 0.1))
    assert constant.t_p == shifted.t_p == 0
    assert constant.significant
    assert single.randomisation_p == single.t_p == 1
    assert not single.significant


def test_the_seed_decides() -> None:
    rng = np.random.default_rng(0)
    values = {"a": rng.random(50), "b": rng.random(50)}
    assert compare(values, "AP", seed=4) == compare(values, "AP", seed=4)
    assert compare(values, "AP", seed=4) != compare(values, "AP", seed=5)
    assert confidence_interval(values["a"], seed=1) == confidence_interval(values["a"], seed=1)


def test_pairs_and_baseline() -> None:
    rng = np.random.default_rng(1)
    values = {name: rng.random(40) for name in ("x", "y", "z")}
    assert [(found.first, found.second) for found in compare(values, "AP")] == [("x", "y"), ("x", "z"), ("y", "z")]
    against = compare(values, "AP", baseline="y")
    assert [(found.first, found.second) for found in against] == [("y", "x"), ("y", "z")]
    assert against[0].difference == pytest.approx(values["x"].mean() - values["y"].mean())
    assert against[0].measure == "AP"
    assert compare({"x": values["x"]}, "AP") == []


def test_order_and_sign_do_not_matter_to_p() -> None:
    rng = np.random.default_rng(8)
    first, second = rng.random(11), rng.random(11)
    there, back = compare({"a": first, "b": second}, "AP")[0], compare({"b": second, "a": first}, "AP")[0]
    assert there.randomisation_p == back.randomisation_p
    assert there.difference == -back.difference
    assert there.t_p == pytest.approx(back.t_p)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_holm_corrects_in_order(seed: int, systems: int) -> None:
    """Prevents a correction that falls behind a smaller p, or lets the last one pass uncorrected: as statsmodels."""
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="it is the oracle")
    rng = np.random.default_rng(seed)
    values = {f"s{number}": rng.random(12) + rng.choice([0, 0.4]) for number in range(systems)}
    found = sorted(compare(values, "AP", n_resamples=199), key=lambda one: one.randomisation_p)
    raw = [one.randomisation_p for one in found]
    rejected, expected, _, _ = multitest.multipletests(raw, alpha=0.05, method="holm")
    assert [one.holm_p for one in found] == pytest.approx(expected)
    assert [one.significant for one in found] == rejected.tolist()
    assert found[0].holm_p == pytest.approx(min(1, raw[0] * len(raw)))


def test_p_is_uniform_where_there_is_no_difference() -> None:
    """Prevents a test that finds too much: of 400 null comparisons about 5 % may fall below 0.05."""
    rng = np.random.default_rng(11)
    found = [pair(rng.normal(size=40), n_resamples=499).randomisation_p for _ in range(400)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(12)
    mean = 0.5 / 1.2
    held = 0
    for _ in range(300):
        low, high = confidence_interval(rng.beta(0.5, 0.7, size=100), n_resamples=499)
        held += low <= mean <= high
    assert 0.91 < held / 300 < 0.985


def test_a_real_difference_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(13)
    base = rng.random(300)
    values = {"base": base, "noise": base + rng.normal(0, 0.1, 300), "better": base + 0.05 + rng.normal(0, 0.1, 300)}
    found = {one.second: one for one in compare(values, "AP", baseline="base")}
    assert found["better"].significant
    assert found["better"].interval[0] > 0
    assert not found["noise"].significant


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"a": np.zeros(3), "b": np.zeros(4)}, {}, r"the systems have \[3, 4\] queries"),
        ({"a": np.zeros(3), "b": np.array([0, math.nan, 1])}, {}, "b has a value that is not finite, first at place 1"),
        ({"a": np.zeros(0), "b": np.zeros(0)}, {}, "a must have one value for each query"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((2, 2))}, {}, r"shape \(2, 2\)"),
        ({"a": np.zeros(3)}, {"baseline": "c"}, "there is no system 'c'; there are a"),
        ({"a": np.zeros(3)}, {"alpha": 5}, "alpha must lie between 0 and 1"),
        ({"a": np.zeros(3)}, {"n_resamples": 0}, "n_resamples must be at least 1"),
    ],
)
def test_bad_values_are_refused(values: dict[str, np.ndarray], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(values, "AP", **options)  # type: ignore[arg-type]


def test_a_level_is_a_level() -> None:
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        confidence_interval(np.zeros(3), level=95)


def test_a_pair_has_the_same_p_and_interval_in_any_company() -> None:
    """All pairs share the draws; only Holm's correction looks at the others. 7,000 queries need several blocks."""
    rng = np.random.default_rng(14)
    values = {f"s{number}": rng.random(7_000) for number in range(10)}
    family = compare(values, "AP", n_resamples=999)
    assert len(family) == 45
    (alone,) = compare({name: values[name] for name in ("s3", "s8")}, "AP", n_resamples=999)
    (same,) = [found for found in family if (found.first, found.second) == ("s3", "s8")]
    assert same.randomisation_p == alone.randomisation_p == alone.holm_p
    assert same.interval == pytest.approx(alone.interval)


def test_intervals_of_several_systems_are_those_of_each() -> None:
    """Shared draws must not change a figure that was published before."""
    rng = np.random.default_rng(3)
    values = {name: rng.random(40) for name in ("a", "b", "c")}
    together = confidence_intervals(values, level=0.9, n_resamples=500, seed=5)
    for name, column in values.items():
        assert together[name] == pytest.approx(confidence_interval(column, level=0.9, n_resamples=500, seed=5))
    with pytest.raises(ValueError, match=r"\[3, 40\] queries"):
        confidence_intervals({"a": values["a"], "b": np.zeros(3)})
