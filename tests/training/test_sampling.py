"""Drawing lists: against plain loops, and the promises that a reproducible run rests on."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_m3se.training.sampling import (
    SAMPLINGS,
    likely_false_negatives,
    random_keys,
    repeated_texts,
    sample_list,
    teacher_top,
)


def reference(
    positives: int, negatives: int, keys: list[int], list_size: int | None, max_positives: int | None, sampling: str
) -> tuple[list[int], int]:
    """What sample_list says, in loops."""
    room = list_size if list_size is not None else positives + negatives
    limit = min(room - 1, positives, *([] if max_positives is None else [max_positives]))
    chosen = sorted(sorted(range(positives), key=lambda place: keys[place])[:limit])
    places = list(range(positives, positives + negatives))
    wanted = room - limit
    if wanted >= negatives:
        drawn = places
    elif sampling == "top":
        drawn = places[:wanted]
    elif sampling == "random":
        drawn = sorted(sorted(places, key=lambda place: keys[place])[:wanted])
    else:
        drawn = []
        for stratum in range(wanted):
            low, high = stratum * negatives // wanted, (stratum + 1) * negatives // wanted
            drawn.append(min(places[low:high], key=lambda place: keys[place]))
    return chosen + drawn, limit


SIZES = st.tuples(
    st.integers(1, 6),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(2, 24)),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sampled_from(SAMPLINGS),
    st.integers(0, 2**32),
)


@given(SIZES)
def test_a_list_is_what_the_loops_draw(case: Any) -> None:
    positives, negatives, list_size, max_positives, sampling, seed = case
    keys = random_keys(seed, 0, "q", positives + negatives)
    options = {"list_size": list_size, "max_positives": max_positives, "sampling": sampling}
    places, count = sample_list(positives, negatives, keys, **options)
    expected, expected_count = reference(positives, negatives, keys.tolist(), list_size, max_positives, sampling)
    assert (places.tolist(), count) == (expected, expected_count)
    assert len(set(expected)) == len(expected) == min(list_size or 99, count + negatives)
    assert 1 <= count < len(expected)
    assert (places[:count] < positives).all()
    assert (places[count:] >= positives).all()


def test_strata_span_the_range_and_random_lists_need_not() -> None:
    """100 negatives, 10 to draw: one from each tenth, in every epoch; a random list misses tenths nearly always."""
    tenths: dict[str, list[set[int]]] = {"stratified": [], "random": []}
    for sampling, seen in tenths.items():
        for epoch in range(50):
            keys = random_keys(3, epoch, "q", 101)
            places, _ = sample_list(1, 100, keys, list_size=11, max_positives=1, sampling=sampling)  # type: ignore[arg-type]
            seen.append({(place - 1) // 10 for place in places[1:].tolist()})
    assert all(seen == set(range(10)) for seen in tenths["stratified"])
    assert sum(seen == set(range(10)) for seen in tenths["random"]) < 5


@pytest.mark.parametrize(("sampling", "negatives", "size"), [("random", 20, 6), ("stratified", 20, 6)])
def test_each_candidate_is_as_likely_as_it_should_be(sampling: Any, negatives: int, size: int) -> None:
    """20 negatives, 5 drawn, in strata of 4: each a quarter of the time, within five standard deviations."""
    draws = 4_000
    counts = np.zeros(negatives + 1)
    for epoch in range(draws):
        keys = random_keys(0, epoch, 17, negatives + 1)
        counts[sample_list(1, negatives, keys, list_size=size, max_positives=1, sampling=sampling)[0]] += 1
    assert counts[0] == draws
    expected = draws * 5 / 20
    assert np.abs(counts[1:] - expected).max() < 5 * math.sqrt(draws * 0.25 * 0.75)


def test_keys_depend_on_seed_epoch_and_query_and_on_nothing_else() -> None:
    """Prevents the string "7" and the number 7 from sharing their draws, and state from creeping in."""
    np.random.seed(1)
    cases = [(0, 0, "7"), (0, 0, 7), (1, 0, "7"), (0, 1, "7"), (0, 0, "8"), (0, 10, "7"), (0, 0, "é\n")]
    first = {case: random_keys(*case, 5).tolist() for case in cases}
    assert len({tuple(keys) for keys in first.values()}) == len(cases)
    np.random.seed(2)
    assert {case: random_keys(*case, 5).tolist() for case in reversed(cases)} == first
    assert random_keys(0, 0, "7", 3).tolist() == first[0, 0, "7"][:3]


def test_keys_are_the_same_in_another_process() -> None:
    """Python salts the hashes of strings per process; drawing by them would give every worker lists of its own."""
    code = "from st_m3se.training.sampling import random_keys; print(random_keys(5, 2, 'query-17', 4).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(random_keys(5, 2, "query-17", 4).tolist())


CANDIDATES = st.lists(
    st.lists(st.tuples(st.integers(-4, 4), st.booleans(), st.integers(0, 4)), max_size=8), min_size=1, max_size=6
)
"""For each query, candidates of (score, whether positive, text)."""


def flat(queries: list[list[tuple[int, bool, int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(len(queries)), [len(query) for query in queries])
    columns = [[candidate[place] for query in queries for candidate in query] for place in range(3)]
    scores, positives, texts = columns
    return rows, np.array(scores, dtype=float), np.array(positives, dtype=bool), np.array(texts, dtype=int)


@given(CANDIDATES, st.integers(0, 4))
def test_the_teachers_top_is_what_a_sort_puts_first(queries: Any, top_k: int) -> None:
    rows, scores, _, _ = flat(queries)
    expected = []
    for query in queries:
        first = sorted(range(len(query)), key=lambda place: -query[place][0])[:top_k]
        expected += [place in first for place in range(len(query))]
    assert teacher_top(rows, scores, top_k).tolist() == expected


@given(
    CANDIDATES,
    st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.5])),
    st.one_of(st.none(), st.sampled_from([0.0, 0.5])),
)
def test_the_margin_is_the_hosts(queries: Any, absolute: float | None, relative: float | None) -> None:
    """As mine_hard_negatives defines it: from the lowest positive, and a share of its magnitude whatever its sign."""
    rows, scores, positives, _ = flat(queries)
    expected = []
    for query in queries:
        lowest = min((score for score, positive, _ in query if positive), default=None)
        for score, positive, _ in query:
            near = lowest is not None and not positive
            too_high = (absolute is not None and near and score + absolute > lowest) or (
                relative is not None and near and score > lowest - abs(lowest) * relative
            )
            expected.append(bool(too_high))
    assert likely_false_negatives(rows, scores, positives, absolute, relative).tolist() == expected


@given(CANDIDATES)
def test_one_of_each_text_stays(queries: Any) -> None:
    """The positive before the negative, the higher score before the lower, the first before the later."""
    rows, scores, positives, texts = flat(queries)
    expected = []
    for query in queries:
        kept: dict[int, int] = {}
        for place in sorted(range(len(query)), key=lambda place: (not query[place][1], -query[place][0], place)):
            kept.setdefault(query[place][2], place)
        expected += [place not in kept.values() for place in range(len(query))]
    assert repeated_texts(rows, texts, scores, positives).tolist() == expected
