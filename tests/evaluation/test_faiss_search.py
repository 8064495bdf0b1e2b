"""FAISS over the same embeddings as exact search."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.encoders import CORPUS, QUERIES, make_encoder
from st_m3se.evaluation.embeddings import CorpusEmbeddings, embed_corpus, embed_queries
from st_m3se.evaluation.faiss_search import FaissIndex
from st_m3se.evaluation.search import search
from st_m3se.texts import Texts

faiss = pytest.importorskip("faiss")


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return make_encoder("dense", checkpoint)


@pytest.fixture
def corpus(model: Any, tmp_path: Path) -> CorpusEmbeddings:
    return embed_corpus(model, Texts.open(CORPUS), tmp_path, show_progress_bar=False)


@pytest.fixture
def queries(model: Any) -> Any:
    return embed_queries(model, list(QUERIES.values()))


@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean"])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_all_clusters_and_links_find_what_exact_search_finds(
    factory: str, similarity: str, corpus: CorpusEmbeddings, queries: Any
) -> None:
    """On a corpus that small an index has no way to miss anything, once it looks everywhere."""
    index = FaissIndex(corpus, factory, similarity=similarity)
    parameters = {"IVF4,Flat": "nprobe=4", "HNSW8": "efSearch=64"}.get(factory, "")
    found = index.search(queries, 10, parameters=parameters)
    expected = search(queries, corpus, 10, similarity=similarity)
    assert found.rows.dtype == np.int32
    assert found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=2e-3)
    differing = found.rows != expected.rows
    assert differing.mean() < 0.2  # equal texts may change places by a rounding


def test_an_index_is_kept_beside_the_embeddings_that_it_is_of(
    corpus: CorpusEmbeddings, queries: Any, monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path
) -> None:
    first = FaissIndex(corpus, "IVF4,Flat")
    assert first.path.parent == corpus.path
    monkeypatch.setattr(FaissIndex, "_build", None)
    again = FaissIndex(corpus, "IVF4,Flat")
    assert np.array_equal(first.search(queries, 5).rows, again.search(queries, 5).rows)
    assert embed_corpus(model, Texts.open(CORPUS), tmp_path, show_progress_bar=False).path == corpus.path
    with pytest.raises(TypeError):  # there is none of these yet, and nothing to build it with
        FaissIndex(corpus, "Flat")


def test_excluded_documents_leave_room_for_others(corpus: CorpusEmbeddings, queries: Any) -> None:
    best = search(queries, corpus, 3, similarity="cosine").rows
    excluded = np.repeat([0, 2], 3), best[[0, 2]].ravel()
    found = FaissIndex(corpus, similarity="cosine").search(queries, 5, excluded=excluded)
    expected = search(queries, corpus, 5, similarity="cosine", excluded=excluded)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    assert not np.isin(found.rows[0], best[0]).any()
    assert (found.rows >= 0).all()


def test_more_than_there_is(corpus: CorpusEmbeddings, queries: Any) -> None:
    rows, scores = FaissIndex(corpus).search(queries, 50)
    assert rows.shape == (len(QUERIES), 50)
    assert (np.sort(rows[:, : len(CORPUS)], axis=1) == np.arange(len(CORPUS))).all()
    assert (rows[:, len(CORPUS) :] == -1).all()
    assert (scores[:, len(CORPUS) :] == 0).all()
    few, _ = FaissIndex(corpus, "IVF4,Flat").search(queries, 33)  # one cluster of four
    assert (few == -1).any()


def test_what_faiss_does_not_do_is_refused(
    corpus: CorpusEmbeddings, queries: Any, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="FAISS does not understand 'nonsense'"):
        FaissIndex(corpus, "nonsense")
    with pytest.raises(ValueError, match="'IVF64,Flat' cannot be trained on 33 documents"):
        FaissIndex(corpus, "IVF64,Flat")
    with pytest.raises(ValueError, match="FAISS compares by one of dot, cosine, euclidean, got 'manhattan'"):
        FaissIndex(corpus, similarity="manhattan")
    index = FaissIndex(corpus)
    with pytest.raises(ValueError, match=r"queries must be \[queries, 32\], got \(16, 8\)"):
        index.search(queries[:, :8], 5)
    with pytest.raises(ValueError, match="FAISS cannot set 'nprobes=3'"):
        index.search(queries, 5, parameters="nprobes=3")
    with pytest.raises(ValueError, match="depth must be at least 1"):
        index.search(queries, 0)
    sparse = embed_corpus(make_encoder("sparse", checkpoint), Texts.open(CORPUS), tmp_path, show_progress_bar=False)
    with pytest.raises(ValueError, match="FAISS indexes dense embeddings"):
        FaissIndex(sparse)
    faiss.write_index(faiss.IndexFlatIP(3), str(index.path))  # another index, or a damaged one
    assert FaissIndex(corpus).index.ntotal == 33


def test_a_missing_package_names_the_extra(corpus: CorpusEmbeddings) -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from st_m3se.evaluation import CorpusEmbeddings, FaissIndex\n"
        f"FaissIndex(CorpusEmbeddings({str(corpus.path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError" in done.stderr
    assert 'pip install "st-m3se[faiss]"' in done.stderr
