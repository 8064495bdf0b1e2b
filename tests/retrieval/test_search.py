"""Exact search against a stable sort of the whole matrix, and its memory against the size of that matrix.

Embeddings are small integers wherever results are compared bit by bit: their products are exact in float32, whatever
the order in which a matrix product adds them up, and there are many ties.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import util
from sentence_transformers.util.similarity import euclidean_sim, manhattan_sim, maxsim, mean_maxsim
from torch import Tensor

from st_m3se.retrieval.search import Search, SearchResult, search

SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "dot": util.dot_score,
    "cosine": util.cos_sim,
    "euclidean": euclidean_sim,
    "manhattan": manhattan_sim,
}


def integers(rows: int, dimension: int, seed: int, limit: int = 3) -> Tensor:
    return torch.randint(-limit, limit + 1, (rows, dimension), generator=torch.Generator().manual_seed(seed)).float()


def by_sorting(scores: Tensor, depth: int) -> SearchResult:
    """The whole matrix, sorted stably; minus infinity is not found."""
    rows = np.full((len(scores), depth), -1)
    best = np.zeros((len(scores), depth), np.float32)
    for query, each in enumerate(scores.numpy()):
        order = [row for row in sorted(range(len(each)), key=lambda row: (-each[row], row)) if each[row] > -np.inf]
        order = order[:depth]
        rows[query, : len(order)], best[query, : len(order)] = order, each[order]
    return SearchResult(rows, best)


def assert_equal(found: SearchResult, expected: SearchResult) -> None:
    assert found.rows.dtype == np.int32
    assert found.scores.dtype == np.float32
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.scores, expected.scores)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few queries and documents, and lists without room: every border is crossed often."""
    set_small_steps(monkeypatch)


def set_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["st_m3se.retrieval.search"]
    monkeypatch.setattr(module, "QUERIES", {"cpu": 3, "gpu": 3})
    monkeypatch.setattr(module, "SCORES", {"cpu": 15, "gpu": 15})
    monkeypatch.setattr(module, "DOCUMENTS", (5, 7))
    monkeypatch.setattr(module, "TOKENS", 5)
    monkeypatch.setattr(module, "ROOM", 1)
    monkeypatch.setattr(module, "TOGETHER", 2)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_the_result_is_that_of_sorting_everything(data: Any) -> None:
    """Whatever the sizes, ties, chunks and exclusions: the pruning must never lose a document or a tie's order."""
    queries = integers(data.draw(st.integers(1, 8)), 3, data.draw(st.integers(0, 99)), data.draw(st.integers(0, 3)))
    corpus = integers(data.draw(st.integers(1, 60)), 3, data.draw(st.integers(100, 199)), data.draw(st.integers(0, 3)))
    depth = data.draw(st.integers(1, 25))
    pair = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(corpus) - 1))
    pairs = np.array(data.draw(st.lists(pair, max_size=20)), dtype=np.int64).reshape(-1, 2).T
    nowhere = data.draw(st.lists(st.integers(0, len(corpus) - 1), max_size=10))
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    chunks, start = [], 0
    while start < len(corpus):
        chunks.append(corpus[start : start + sizes[len(chunks) % len(sizes)]])
        start += len(chunks[-1])
    scores = queries @ corpus.T
    scores[pairs[0], pairs[1]] = -torch.inf
    scores[:, nowhere] = -torch.inf
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            set_small_steps(patch)
        found = search(queries, iter(chunks), depth, excluded=(pairs[0], pairs[1]), excluded_documents=nowhere)
    assert_equal(found, by_sorting(scores, depth))


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "late"])
@pytest.mark.usefixtures("small_steps")
def test_orders_that_pruning_likes_least(order: str) -> None:
    """Each document better than all before it; or none after the first; or all alike; or the best come last."""
    scores = {
        "rising": torch.arange(200.0),
        "falling": -torch.arange(200.0),
        "equal": torch.ones(200),
        "late": torch.cat([torch.zeros(190), torch.arange(10.0)]),
    }[order]
    queries = torch.tensor([[1.0], [2.0], [0.0], [-1.0]])
    assert_equal(search(queries, scores[:, None], 17), by_sorting(queries @ scores[None], 17))


@pytest.mark.filterwarnings("error")
def test_the_sizes_of_real_searches(tmp_path: Path) -> None:
    """A thousand of twenty thousand, by the limits that users get, with ties at every depth."""
    queries, corpus = integers(40, 16, 0), integers(20_000, 16, 1)
    expected = by_sorting(queries @ corpus.T, 1000)
    assert_equal(search(queries, corpus, 1000), expected)
    assert_equal(search(queries, corpus.split(777), 1000), expected)
    assert_equal(search(queries.numpy(), corpus.numpy(), 1000), expected)
    np.save(tmp_path / "corpus.npy", corpus.numpy())
    assert_equal(search(queries, np.load(tmp_path / "corpus.npy", mmap_mode="r"), 1000), expected)
    assert_equal(search(queries.half(), (chunk.half() for chunk in corpus.split(5000)), 1000), expected)


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.usefixtures("small_steps")
def test_every_similarity_of_the_host(name: str) -> None:
    """By name and as a function."""
    generator = torch.Generator().manual_seed(0)
    queries, corpus = torch.randn(7, 5, generator=generator), torch.randn(50, 5, generator=generator)
    scores = SIMILARITIES[name](queries, corpus)
    expected = by_sorting(scores, 9)
    for similarity in (name, SIMILARITIES[name]):
        found = search(queries, corpus, 9, similarity=similarity)
        assert np.array_equal(found.rows, expected.rows)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


def test_a_functions_own_scores_are_left_as_they_are() -> None:
    """Excluding must not write into a matrix that the function keeps."""
    matrix = integers(3, 6, 0)
    kept = matrix.clone()
    rows, _ = search(torch.zeros(3, 1), torch.zeros(6, 1), 6, similarity=lambda *_: matrix, excluded=([0, 1], [4, 5]))
    assert torch.equal(matrix, kept)
    assert 4 not in rows[0]
    assert rows[0][-1] == -1


@pytest.mark.parametrize("name", ["dot", "cosine", "euclidean"])
@pytest.mark.usefixtures("small_steps")
def test_sparse_embeddings(name: str) -> None:
    """As dense ones, documents without a term in common included."""
    queries, corpus = integers(7, 12, 0), integers(50, 12, 1)
    queries[torch.rand(queries.shape, generator=torch.Generator().manual_seed(2)) < 0.7] = 0
    corpus[torch.rand(corpus.shape, generator=torch.Generator().manual_seed(3)) < 0.7] = 0
    corpus[7] = 0  # an empty text
    expected = by_sorting(SIMILARITIES[name](queries, corpus), 40)
    assert (expected.scores == 0).any()
    whole = search(queries.to_sparse(), corpus.to_sparse(), 40, similarity=name)
    chunked = search(queries.to_sparse(), [chunk.to_sparse() for chunk in corpus.split(11)], 40, similarity=name)
    for found in (whole, chunked):
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
        if name == "dot":
            assert_equal(found, expected)


@pytest.mark.parametrize(("name", "function"), [("maxsim", maxsim), ("meanmaxsim", mean_maxsim)])
@pytest.mark.usefixtures("small_steps")
def test_multi_vector_embeddings(name: str, function: Callable[..., Tensor]) -> None:
    """Documents and queries of unlike lengths, in one piece and in chunks, against two loops."""
    queries = [integers(2 + place % 3, 4, place) for place in range(7)]
    corpus = [integers(1 + place % 5, 4, 100 + place) for place in range(40)]
    scores = torch.tensor([[(query @ text.T).amax(dim=1).sum() for text in corpus] for query in queries])
    if name == "meanmaxsim":
        scores /= torch.tensor([[len(query)] for query in queries])
    expected = by_sorting(scores, 9)
    for similarity in (name, function):
        assert_equal(search(queries, corpus, 9, similarity=similarity), expected)
        chunks = [corpus[start : start + 11] for start in range(0, 40, 11)]
        assert_equal(search(queries, chunks, 9, similarity=similarity), expected)
    assert_equal(search([query.numpy() for query in queries], (text for text in chunks), 9, similarity=name), expected)


def test_wanted_scores_come_whether_found_or_not() -> None:
    queries, corpus = integers(5, 3, 0), integers(30, 3, 1)
    under_way = Search(queries, 2, excluded=([1], [3]), excluded_documents=[7], wanted=([1, 4, 0, 1], [3, 7, 29, 0]))
    for chunk in corpus.split(8):
        under_way.add(chunk)
    expected = (queries @ corpus.T)[[1, 4, 0, 1], [3, 7, 29, 0]]
    assert under_way.wanted_scores.tolist() == expected.tolist()
    assert under_way.seen == 30
    assert 3 not in under_way.result().rows[1]
    assert 7 not in under_way.result().rows


def test_a_search_can_be_looked_at_on_its_way() -> None:
    """The result of the documents so far, and then of more."""
    queries, corpus = integers(5, 3, 0), integers(30, 3, 1)
    under_way = Search(queries, 4)
    for start in range(0, 30, 10):
        under_way.add(corpus[start : start + 10])
        assert_equal(under_way.result(), by_sorting(queries @ corpus[: start + 10].T, 4))


def test_few_documents_and_few_queries() -> None:
    queries = integers(2, 3, 0)
    rows, scores = search(queries, integers(3, 3, 1), 5)
    assert rows.shape == scores.shape == (2, 5)
    assert (rows[:, 3:] == -1).all()
    assert (scores[:, 3:] == 0).all()
    rows, scores = search(queries, [], 5)
    assert (rows == -1).all()
    assert search(integers(0, 3, 0), integers(3, 3, 1), 5).rows.shape == (0, 5)
    assert (search(queries, integers(0, 3, 0), 5).rows == -1).all()


@pytest.mark.usefixtures("small_steps")
def test_one_chunk_is_held_at_a_time() -> None:
    """Prevents a search that keeps what it has seen: the corpus would end up in memory."""
    alive: list[weakref.ref[Tensor]] = []

    def chunks() -> Iterator[Tensor]:
        for seed in range(10):
            assert all(each() is None for each in alive)
            chunk = integers(20, 3, seed)
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk

    search(integers(4, 3, 99), chunks(), 5)
    assert len(alive) == 10


MEMORY = """
import resource, torch
from st_m3se.retrieval.search import search
torch.set_num_threads(1)
queries = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
def chunks(count):
    for seed in range(count):
        yield torch.randn(10_000, 16, generator=torch.Generator().manual_seed(seed + 1))
search(queries, chunks(1), 100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
search(queries, chunks(20), 100)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus() -> None:
    """All scores of 200,000 documents would be 760 MiB; twenty times the corpus must not cost more than one part."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40


def test_what_does_not_fit_is_refused() -> None:
    queries, corpus = integers(3, 4, 0), integers(6, 4, 1)
    for depth in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="depth must be an integer of at least 1"):
            search(queries, corpus, depth)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dimension 4, the documents dense ones of dimension 5.*same truncate_dim"):
        search(queries, integers(6, 5, 1), 2)
    with pytest.raises(ValueError, match=r"the queries are dense .*the documents sparse ones"):
        search(queries, corpus.to_sparse(), 2)
    with pytest.raises(ValueError, match="dense embeddings are compared by one of dot, cosine, euclidean, manhattan"):
        search(queries, corpus, 2, similarity="maxsim")
    with pytest.raises(ValueError, match="multi-vector embeddings are compared by one of maxsim, meanmaxsim"):
        search([queries], [corpus], 2)
    with pytest.raises(TypeError, match=r"got Tensor \(4,\)\. A single text's embedding needs a dimension in front"):
        search(queries[0], corpus, 2)
    with pytest.raises(TypeError, match="must be embeddings or an iterable of chunks of them, got int"):
        search(queries, 3, 2)
    with pytest.raises(ValueError, match=r"returned \(3, 1\) for 3 queries and 6 documents"):
        search(queries, corpus, 2, similarity=lambda a, b: a @ b[:1].T)
    with pytest.raises(ValueError, match="excluded must be two arrays of as many places"):
        search(queries, corpus, 2, excluded=(np.array([0, 1]), np.array([0])))
    with pytest.raises(ValueError, match="excluded names queries 0 to 3 of 3"):
        search(queries, corpus, 2, excluded=(np.array([0, 3]), np.array([0, 1])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["queries", "first document", "last document"])
def test_scores_without_an_order_are_refused(value: float, where: str) -> None:
    """Prevents a broken model whose documents would silently not be found."""
    queries, corpus = torch.ones(3, 2), torch.ones(5000, 2)
    if where == "queries":
        queries[1, 0] = value
    else:
        corpus[0 if where.startswith("first") else -1, 0] = value
    with pytest.raises(ValueError, match="similarities that are not finite, for documents"):
        search(queries, corpus, 10)


def test_inputs_that_require_gradients_are_left_alone() -> None:
    queries, corpus = integers(3, 4, 0).requires_grad_(), integers(6, 4, 1)
    before = queries.detach().clone()
    search(queries, corpus, 2, similarity="cosine", excluded=([0], [1]))
    assert queries.requires_grad
    assert torch.equal(queries.detach(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("small", [False, True])
def test_a_gpu_finds_the_same(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, corpus = integers(40, 16, 0), integers(20_000 if not small else 300, 16, 1)
    if small:
        set_small_steps(monkeypatch)
    expected = by_sorting(queries @ corpus.T, 100)
    assert_equal(search(queries.cuda(), corpus.split(777), 100), expected)
    assert_equal(search(queries, corpus, 100, device="cuda"), expected)
