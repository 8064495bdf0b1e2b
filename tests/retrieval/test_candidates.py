"""Candidate runs against independent oracles: BM25 by its formula in plain Python, dense search by the full matrix."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from bm25s.stopwords import STOPWORDS_EN
from command_help import help_of
from conftest import ANSWERS, PAIRS
from evaluation.beir_folder import save_encoder
from evaluation.encoders import KINDS, make_encoder
from sentence_transformers import CrossEncoder
from typer.testing import CliRunner

from retrieval.test_scoring import make_cross_encoder
from st_m3se import BM25, build_distillation_dataset, find_candidates, score_candidates
from st_m3se.cli import app
from st_m3se.cli.candidates import candidates
from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.data.texts import Texts
from st_m3se.retrieval.bm25 import _best, bigrams
from st_m3se.retrieval.candidates import _merged
from st_m3se.retrieval.search import search
from st_m3se.retrieval.sources import Found, Job, Pairs
from st_m3se.scores import TeacherScores
from st_m3se.scores.formats.runs import read_run

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

QUERIES = {f"q{place}": query for place, (query, _) in enumerate(PAIRS)}
# Twice the same texts: equal scores; an empty one; and ids whose order is not that of the corpus.
CORPUS = (
    {f"d{97 * place % 100}": text for place, text in enumerate(ANSWERS)}
    | {"empty": ""}
    | {f"again{place}": text for place, text in enumerate(reversed(ANSWERS))}
)
PLAIN = BM25(stopwords=None, stemmer=None)

Lists = dict[Any, list[tuple[Any, float]]]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Lists]:
    """Find candidates and give the lists as pairs of document and score."""

    def call(*sources: Any, queries: Any = QUERIES, corpus: Any = CORPUS, **options: Any) -> Lists:
        options = {"show_progress_bar": False, "overwrite": True} | options
        store = find_candidates(queries, corpus, list(sources), tmp_path / "run", **options)
        return {row.query_id: list(zip(row.document_ids, row.scores, strict=True)) for row in store}

    return call


def words(text: str, settings: BM25) -> list[str]:
    found = [word for word in re.findall(r"\w+", text.lower()) if len(word) > 1]
    if settings.stopwords:
        found = [word for word in found if word not in STOPWORDS_EN]
    if settings.stemmer:
        import Stemmer

        found = [Stemmer.Stemmer(settings.stemmer).stemWord(word) for word in found]
    return found


def bm25_oracle(queries: Mapping[Any, str], corpus: Mapping[Any, str], settings: BM25) -> Lists:
    """Every matching document of each query by the formula, best first, equal ones in the order of the corpus."""
    documents = {key: words(text, settings) for key, text in corpus.items()}
    mean = sum(map(len, documents.values())) / len(documents)
    lists: Lists = {}
    for query, text in queries.items():
        lists[query] = []
        for key, document in documents.items():
            score = 0.0
            for word in words(text, settings):
                holding = sum(word in other for other in documents.values())
                count = document.count(word)
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                score += idf * count / (count + settings.k1 * (1 - settings.b + settings.b * len(document) / mean))
            if score > 0:
                lists[query].append((key, score))
        lists[query].sort(key=lambda pair: -round(pair[1], 5))
    return lists


def assert_same_lists(found: Lists, expected: Lists, tolerance: float = 1e-4) -> None:
    assert list(found) == list(expected)
    for query in expected:
        assert [key for key, _ in found[query]] == [key for key, _ in expected[query]]
        assert [score for _, score in found[query]] == pytest.approx(
            [score for _, score in expected[query]], abs=tolerance
        )


def cut(lists: Lists, depth: int) -> Lists:
    return {query: pairs[:depth] for query, pairs in lists.items()}


@pytest.mark.parametrize(
    "settings",
    [PLAIN, BM25(), BM25(k1=0.9, b=0.4, stemmer=None), BM25(k1=0.9, b=0.0, stopwords=None)],
    ids=["plain", "default", "anserini", "no length"],
)
@pytest.mark.parametrize("depth", [1, 3, 5, 100])
def test_bm25_is_its_formula(find: Callable[..., Lists], settings: BM25, depth: int) -> None:
    """Ties at the border of the list too: every text stands in the corpus twice, and the earlier one is first."""
    oracle = bm25_oracle(QUERIES, CORPUS, settings)
    assert max(map(len, oracle.values())) > 5
    assert_same_lists(find(settings, depth=depth), cut(oracle, depth))


def test_bm25_counts_a_word_of_the_query_as_often_as_it_stands_there(find: Callable[..., Lists]) -> None:
    queries = {"once": "file list", "twice": "file list file", "none": "zzz ! a"}
    oracle = bm25_oracle(queries, CORPUS, PLAIN)
    found = find(PLAIN, queries=queries)
    assert_same_lists(found, oracle)
    assert found["none"] == []
    assert found["once"] != found["twice"]


CHINESE = {
    "a": "东京是日本的首都。人口约一千四百万。",
    "b": "京都是日本的古都。 BM25 也能搜索英文 words",
    "c": "長崎は坂の多い町です",
    "d": "서울은 대한민국의 수도이다",
    "e": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "f": "An English text about Tokyo, the capital",
}


def test_scripts_without_blanks_are_searched_by_bigrams(
    find: Callable[..., Lists], caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents no hit and no word for a whole language: each sentence would be a word of its own."""
    queries = {"1": "日本首都", "2": "坂の町", "3": "대한민국 수도", "4": "เมืองหลวง", "5": "capital words"}
    found = find("bm25", queries=queries, corpus=CHINESE)
    assert {query: pairs for query, pairs in found.items() if pairs} == {"5": found["5"]}
    assert "Chinese, Japanese, Korean" in caplog.text
    assert "--tokens bigrams" in caplog.text
    caplog.clear()
    found = find(BM25(tokens="bigrams"), queries=queries, corpus=CHINESE)
    assert [pairs[0][0] for pairs in found.values()] == ["a", "c", "d", "e", found["5"][0][0]]
    assert {key for key, _ in found["1"]} == {"a", "b"}
    assert {key for key, _ in found["5"]} == {"b", "f"}
    assert "bigrams" not in caplog.text
    assert bigrams("東京都 is 京").split() == ["東京", "京都", "is", "京"]
    with pytest.raises(ValueError, match='tokens must be "words" or "bigrams"'):
        BM25(tokens="letters")


def test_english_is_not_warned_of(find: Callable[..., Lists], caplog: pytest.LogCaptureFixture) -> None:
    find(BM25(tokens="bigrams"))
    assert find("bm25") == find(BM25(tokens="bigrams"))
    assert "Chinese" not in caplog.text


def test_bm25_in_many_blocks(find: Callable[..., Lists], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents queries that are lost or exchanged where the work is divided among threads."""
    whole = find("bm25")
    for postings in (1, 50):
        monkeypatch.setattr("st_m3se.retrieval.bm25.POSTINGS", postings)
        assert find("bm25") == whole
    monkeypatch.setattr("st_m3se.retrieval.bm25.BLOCK_QUERIES", 3)
    assert find("bm25") == whole


def test_bm25_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Prevents scores that depend on Python's hash seed: the stemmer's vocabulary is a set."""
    code = (
        "import sys, json; from st_m3se import find_candidates\n"
        f"store = find_candidates({QUERIES!r}, {CORPUS!r}, ['bm25'], sys.argv[1], show_progress_bar=False)\n"
        "print(json.dumps([[row.query_id, row.document_ids, row.scores] for row in store]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(json.loads(outputs[0])) == len(QUERIES)
    assert outputs[0] == outputs[1]


def dense_oracle(model: SentenceTransformer, queries: Mapping[Any, str], corpus: Mapping[Any, str]) -> Lists:
    """The full matrix of similarities, sorted."""
    matrix = model.similarity(
        model.encode_query(list(queries.values()), convert_to_tensor=True),
        model.encode_document(list(corpus.values()), convert_to_tensor=True),
    ).numpy()
    keys = list(corpus)
    return {
        query: [(keys[column], float(row[column])) for column in np.argsort(-row.round(5), kind="stable")]
        for query, row in zip(queries, matrix, strict=True)
    }


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_dense_search_is_the_full_matrix(
    find: Callable[..., Lists],
    make_model: Callable[..., SentenceTransformer],
    monkeypatch: pytest.MonkeyPatch,
    similarity: str,
    chunk_size: int,
) -> None:
    """With prompts of its own for queries and documents, in chunks that hold less and more than the depth."""
    model = make_model(similarity_fn_name=similarity, prompts={"query": "find: ", "document": "text: "})
    corpus = dict(zip(CORPUS, ANSWERS, strict=False))  # no text twice: equal ones differ by a rounding in batches
    oracle = dense_oracle(model, QUERIES, corpus)
    plain = dense_oracle(make_model(similarity_fn_name=similarity), QUERIES, corpus)
    assert cut(oracle, 5) != cut(plain, 5), "the prompts change nothing: the comparison would not see them"
    monkeypatch.setattr("st_m3se.retrieval.search.QUERIES", {"cpu": 3})
    monkeypatch.setattr("st_m3se.retrieval.search.DOCUMENTS", (4, 4))
    found = find(model, corpus=corpus, depth=5, chunk_size=chunk_size, batch_size=3)
    assert_same_lists(found, cut(oracle, 5), tolerance=1e-3)
    assert_same_lists(find(model, corpus=corpus, chunk_size=chunk_size), oracle, tolerance=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_loaded_as_what_it_is(
    kind: str, checkpoint: Path, tmp_path: Path, find: Callable[..., Lists]
) -> None:
    """Prevents plausible numbers of a sparse or multi-vector encoder's trunk, loaded as a bi-encoder."""
    folder = save_encoder(kind, checkpoint, tmp_path / kind)
    model = make_encoder(kind, checkpoint)
    corpus = dict(zip(CORPUS, ANSWERS, strict=False))
    scores = model.similarity(model.encode_query(list(QUERIES.values())), model.encode_document(list(corpus.values())))
    oracle = {query: dict(zip(corpus, row, strict=True)) for query, row in zip(QUERIES, scores.tolist(), strict=True)}
    for source in (str(folder), folder, model):
        found = find(source, corpus=corpus, depth=20, chunk_size=5)
        assert {query: pytest.approx(row, abs=1e-4) for query, row in oracle.items()} == {
            query: dict(pairs) for query, pairs in found.items()
        }
        assert all(pairs == sorted(pairs, key=lambda pair: -pair[1]) for pairs in found.values())
    described = TeacherScores.open(tmp_path / "run").manifest["source"]["candidates"]
    assert described[0]["kind"] == {"dense": "bi-encoder"}.get(kind, f"{kind} encoder")


def test_a_cross_encoder_is_no_source(checkpoint: Path, tmp_path: Path, find: Callable[..., Lists]) -> None:
    """Prevents candidates by the mean of a cross-encoder's token embeddings."""
    folder = make_cross_encoder(checkpoint, tmp_path / "judge")
    with pytest.raises(ValueError, match="is a cross-encoder: it scores pairs and cannot search"):
        find(str(folder))
    with pytest.raises(TypeError, match=r"a source is .*score the candidates with it"):
        find(CrossEncoder(str(folder), device="cpu"))


def test_equal_scores_keep_the_order_of_the_corpus() -> None:
    """Random scores with many ties, against a stable sort of everything."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 40), generator=generator).float()
    for depth in (1, 5, 39, 40, 60):
        found = search(scores, torch.eye(40), depth)
        expected, places = scores.sort(dim=1, descending=True, stable=True)
        assert np.array_equal(found.scores[:, :40], expected[:, :depth].numpy())
        assert np.array_equal(found.rows[:, :40], places[:, :depth].numpy())
        assert (found.rows[:, 40:] == -1).all()
        for row, place in zip(scores[:20].numpy(), places[:20, :depth].numpy(), strict=True):
            turned = np.arange(40)[::-1]
            documents, best = _best(turned, row[::-1], depth)
            assert documents.tolist() == place.tolist()
            assert best.tolist() == row[place].tolist()


def test_several_sources_are_merged_by_reciprocal_rank(
    find: Callable[..., Lists], make_model: Callable[..., SentenceTransformer]
) -> None:
    model = make_model()
    lists = [find("bm25", depth=6), find(model, depth=6)]
    order = {key: place for place, key in enumerate(CORPUS)}
    expected: Lists = {}
    for query in QUERIES:
        fused: dict[Any, float] = {}
        for one in lists:
            for rank, (key, _) in enumerate(one[query], start=1):
                fused[key] = fused.get(key, 0.0) + 1 / (60 + rank)
        expected[query] = sorted(fused.items(), key=lambda pair: (-pair[1], order[pair[0]]))[:6]
    merged = find("bm25", model, depth=6)
    assert_same_lists(merged, expected, tolerance=1e-7)
    assert any(merged[query] != lists[0][query] for query in QUERIES)


def test_the_same_ranks_in_another_order_of_the_sources_are_a_tie() -> None:
    """Prevents sums that differ in the last digit of a double, and not in what is stored, from deciding the order."""
    corpus, nothing = Texts.open(dict.fromkeys(map(str, range(30)), "x")), Pairs(*np.zeros((2, 0), np.int64))
    job = Job(Texts.open({"q": "x"}, "queries"), corpus, 30, nothing, np.zeros(30, bool), nothing, 1, 1, False)
    uneven = 0
    for first, second, third in itertools.permutations(range(12), 3):
        ranks = [(first, second, third), (third, first, second), (second, third, first)]  # of documents 0, 1, 2
        rows = np.arange(3, 15, dtype=np.int32) * np.ones((3, 1, 1), np.int32)
        for document, places in enumerate(ranks):
            for source, place in enumerate(places):
                rows[source, 0, place] = document
        found = [Found(one, np.zeros((1, 12), np.float32), np.zeros(0, np.float32)) for one in rows]
        best, scores = _merged(job, found, 0)
        assert [document for document in best if document < 3] == [0, 1, 2]
        assert scores == sorted(np.float32(scores).tolist(), reverse=True)
        uneven += len({sum(1 / (61 + place) for place in places) for places in ranks}) > 1
    assert uneven > 10, "every sum comes out even: nothing is compared"


def without(lists: Lists, banned: Callable[[Any, Any], bool]) -> Lists:
    return {query: [pair for pair in pairs if not banned(query, pair[0])] for query, pairs in lists.items()}


@pytest.mark.parametrize("source", ["bm25", "model"])
@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_exclusions_make_room_for_the_next(
    find: Callable[..., Lists], make_model: Callable[..., SentenceTransformer], source: str, chunk_size: int
) -> None:
    """Prevents lists that are shorter than the depth because the excluded were cut out afterwards."""
    search = make_model() if source == "model" else source
    whole = find(search, depth=1000, chunk_size=chunk_size)
    pairs = {query: [key for key, _ in whole[query][:2]] for query in list(QUERIES)[::2]} | {"other": ["d0"]}
    banned = [key for key, _ in whole["q1"][:1]]
    found = find(search, depth=3, exclude=pairs, exclude_documents=banned, chunk_size=chunk_size)
    expected = without(whole, lambda query, key: key in pairs.get(query, ()) or key in banned)
    assert_same_lists(found, cut(expected, 3), tolerance=1e-5)
    assert found != cut(whole, 3)
    queries = {key: text for key, text in CORPUS.items() if text and not key.startswith("again")}
    same = find(search, queries=queries, depth=1000, chunk_size=chunk_size)
    assert all(key in dict(same[key]) for key in queries)
    found = find(search, queries=queries, depth=3, exclude_same_id=True, chunk_size=chunk_size)
    assert_same_lists(found, cut(without(same, lambda query, key: query == key), 3), tolerance=1e-5)
    nothing = find(search, exclude_documents=list(CORPUS), chunk_size=chunk_size)
    assert nothing == {query: [] for query in QUERIES}


@pytest.mark.parametrize("sources", [["bm25"], ["model"], ["bm25", "model"]], ids="+".join)
def test_positives_join_the_list_with_their_own_score(
    find: Callable[..., Lists], make_model: Callable[..., SentenceTransformer], sources: list[str]
) -> None:
    model = make_model()
    searches = [model if source == "model" else source for source in sources]
    positives = {query: {"d0": 1, "d91": 2, "d7": 0} for query in QUERIES} | {"other": {"lost": 1}}
    exclude = {"q3": ["d91"], "q4": ["d0", "d91"]}
    options = {"depth": 3, "exclude": exclude, "chunk_size": 7}
    lists, found = find(*searches, **options), find(*searches, positives=positives, **options)
    full = find(*searches, exclude=exclude, depth=1000)
    scores = {query: dict(pairs) for query, pairs in full.items()}
    grown = 0
    for query, pairs in found.items():
        assert pairs[: len(lists[query])] == lists[query]
        added = pairs[len(lists[query]) :]
        allowed = {"d0", "d91"} - set(exclude.get(query, ()))
        assert {key for key, _ in added} == allowed - {key for key, _ in lists[query]}
        for key, score in added:
            expected = scores[query].get(key, 0.0) if len(sources) == 1 else score
            assert score == pytest.approx(expected, abs=1e-5)
        assert [score for _, score in pairs] == sorted((score for _, score in pairs), reverse=True)
        grown += len(added)
    assert grown > len(QUERIES) / 2


def test_ids_may_be_integers_and_lists_empty(find: Callable[..., Lists]) -> None:
    queries = {7: "list of strings", -1: "?!"}
    corpus = {2**62: "a list of strings", 3: "other"}
    found = find("bm25", queries=queries, corpus=corpus, positives={-1: {3: 1}})
    assert [key for key, _ in found[7]] == [2**62]
    assert found[-1] == [(3, 0.0)]


def test_the_store_says_where_it_comes_from(tmp_path: Path, make_model: Callable[..., SentenceTransformer]) -> None:
    model = make_model(prompts={"query": "find: ", "document": ""})
    find_candidates(
        QUERIES, CORPUS, [BM25(k1=0.9), model], tmp_path / "run", depth=4, exclude={"q1": ["d0"]}, positives={}
    )
    store = TeacherScores.open(tmp_path / "run")
    store.validate()
    source = store.manifest["source"]
    assert source["candidates"][0] == {
        "name": "bm25",
        "k1": 0.9,
        "b": 0.75,
        "stopwords": "english",
        "stemmer": "english",
        "tokens": "words",
    }
    assert source["candidates"][1]["prompts"] == {"query": "find: ", "document": ""}
    assert source["candidates"][1]["similarity"] == "cosine"
    assert source["merged_by"] == "reciprocal rank fusion, k = 60"
    assert source["depth"] == 4
    assert source["excluded"] == {"pairs": 1, "documents": 0, "same_id": False}
    assert store.manifest["teacher"] is None
    assert set(store.manifest["inputs"]) == {"queries", "corpus"}


def test_what_cannot_be_done_is_said_before_the_work(
    tmp_path: Path, find: Callable[..., Lists], make_model: Callable[..., SentenceTransformer]
) -> None:
    for options, message in [
        ({"depth": 0}, "depth, chunk_size and batch_size must be at least 1"),
        ({"positives": {"q1": {"lost": 1}}}, r"positives: 1 of 1 ids are not in the corpus .* first 'lost'"),
        ({"exclude": {1: ["d0"]}}, r"none of the 1 queries of exclude, first 1 \(int\), is among"),
        ({"exclude_documents": ["lost"]}, r"exclude_documents: 1 of 1 ids are not in the corpus"),
        ({"corpus": {"d1": "? !"}}, "no text of .* has a word of two letters"),
    ]:
        with pytest.raises(ValueError, match=message):
            find("bm25", **options)
    with pytest.raises(ValueError, match="a source is named twice"):
        find("bm25", BM25())
    with pytest.raises(ValueError, match=r"there is no stemmer 'englisch'; there are .*english"):
        find(BM25(stemmer="englisch"))
    with pytest.raises(ValueError, match="sources must be a list"):
        find_candidates(QUERIES, CORPUS, "bm25", tmp_path / "run")
    with pytest.raises(ValueError, match="sources must be a list"):
        find()
    with pytest.raises(TypeError, match="a source is"):
        find(3)
    assert list(tmp_path.iterdir()) == []
    find("bm25")
    with pytest.raises(FileExistsError, match="exists"):
        find(make_model(), overwrite=False)
    broken = make_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="similarities that are not finite"):
        find(broken, overwrite=True)
    assert len(TeacherScores.open(tmp_path / "run")) == len(QUERIES)


def test_what_evaluation_goes_on_with_stops_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One policy, one switch: an id twice, an empty text, a pair judged twice, an absent document or query."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    documents = [("d1", "an old boat"), ("d2", "a green boat"), ("d3", ""), ("d1", "a blue boat"), ("d4", "a tree")]
    for name, texts in (("corpus", documents), ("queries", [("q1", "boat"), ("q2", "tree")])):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    judged = [
        ("q1", "d2", 1),
        ("q1", "d1", 0),
        ("q1", "d1", 1),
        ("q1", "lost", 1),
        ("q2", "d4", 1),
        ("nobody", "d1", 1),
    ]
    path = data / "qrels" / "train.tsv"
    path.write_text("qid\tpid\trelevance\n" + "".join(f"{q}\t{d}\t{grade}\n" for q, d, grade in judged))
    expected = {
        "documents whose id repeats": "the last text counts",
        "empty documents": "kept",
        "contradictory judgements": "the last one in the file counts",
        "judgements of absent documents": "1 of them are relevant",
    }

    def told() -> str:
        said = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
        caplog.clear()
        return said

    command = ["candidates", "--data", str(data), "--split", "train", "--include-positives", str(tmp_path / "run")]
    refused = CliRunner().invoke(app, [*command, "--strict"])
    assert refused.exit_code == 1
    assert "documents whose id repeats: 1 (d1); " in refused.output
    assert "judgements of absent queries: 1 (nobody)" in refused.output
    assert not (tmp_path / "run").exists()
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    assert "2 queries are judged in" in made.output  # not 3
    found = told()
    assert all(f"candidates: {kind}: 1 (" in found and effect in found for kind, effect in expected.items()), found
    assert "judgements of absent queries: 1 (nobody); these queries are left out" in found
    run = TeacherScores.open(tmp_path / "run")
    assert {row.query_id: set(row.document_ids) for row in run} == {"q1": {"d1", "d2"}, "q2": {"d4"}}

    def judge(pairs: list[tuple[str, str]]) -> list[float]:
        assert not any("old" in text for _, text in pairs)
        return [float(len(text)) for _, text in pairs]

    lists = {row.query_id: [*row.document_ids, "d3"] for row in run}
    inputs = lists, data / "queries.jsonl", data / "corpus.jsonl"
    with pytest.raises(FormatError, match="documents whose id repeats: 1"):
        score_candidates(judge, *inputs, tmp_path / "scores", strict=True)
    scores = score_candidates(judge, *inputs, tmp_path / "scores", show_progress_bar=False)
    assert "score_candidates: documents whose id repeats: 1 (d1)" in told()
    with pytest.raises(FormatError, match=r"contradictory judgements: 1 \(q1 d1\)"):
        build_distillation_dataset(scores, data, data, path, strict=True)
    dataset = build_distillation_dataset(scores, data, data, path)
    found = told()
    assert all(f"{kind}: 1 (" in found and effect in found for kind, effect in expected.items()), found
    assert set(dataset[0]["relevant_ids"]) == {"d1", "d2"}
    assert "a blue boat" in dataset[0]["documents"]


def test_a_missing_package_names_the_extra(tmp_path: Path) -> None:
    for module in ("bm25s", "Stemmer"):
        code = (
            f"import sys; sys.modules[{module!r}] = None\n"
            "from st_m3se import find_candidates\n"
            f"find_candidates({{'q': 'a'}}, {{'d': 'a'}}, ['bm25'], {str(tmp_path / 'run')!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"ImportError: this needs {module}" in done.stderr
        assert 'pip install "st-m3se[candidates]"' in done.stderr


# The command line.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BEIR folder."""
    data = tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    documents = [{"_id": key, "title": "", "text": text} for key, text in CORPUS.items()]
    (data / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (data / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": key, "text": text}) for key, text in QUERIES.items())
    )
    (data / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td94\t1\nq2\tempty\t1\nq0\td0\t1\n")
    return data


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of `st-m3se candidates`."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["candidates", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_help_says_what_it_does() -> None:
    out = help_of(candidates)
    for option in ("data", "queries", "corpus", "source", "depth", "split", "qrels", "include-positives", "exclude"):
        assert f"--{option}" in out
    assert "bm25, or the name or folder of a bi-encoder" in out


def test_the_command_line_finds_what_the_function_finds(
    tmp_path: Path, folder: Path, find: Callable[..., Lists], checkpoint: Path
) -> None:
    out, _ = run("--data", folder, tmp_path / "out", "--depth", 4)
    assert out == (
        f"wrote {tmp_path / 'out'}: 16 queries, {sum(map(len, find('bm25', depth=4).values()))} candidates\n"
        "note: 3 queries have no candidate\n"
    )
    queries, corpus = folder / "queries.jsonl", folder / "corpus.jsonl"
    options = ["--queries", queries, "--corpus", corpus, "--stemmer", "none", "--stopwords", "none", "--overwrite"]
    run(*options, tmp_path / "out", "--depth", 4)
    found = {
        row.query_id: list(zip(row.document_ids, row.scores, strict=True))
        for row in TeacherScores.open(tmp_path / "out")
    }
    assert found == find(PLAIN, depth=4)
    run("--data", folder, "--source", "bm25", "--source", checkpoint, tmp_path / "both", "--device", "cpu")
    names = [entry["name"] for entry in TeacherScores.open(tmp_path / "both").manifest["source"]["candidates"]]
    assert names == ["bm25", str(checkpoint)]
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "out"), str(tmp_path / "out.run")])
    assert result.exit_code == 0, result.output
    again = {row.query_id: row for row in read_run(Reading(tmp_path / "out.run"))}
    assert {query: row.document_ids for query, row in again.items()} == {
        query: [key for key, _ in pairs] for query, pairs in found.items() if pairs
    }


def test_a_split_chooses_queries_and_positives(tmp_path: Path, folder: Path) -> None:
    out, _ = run("--data", folder, "--split", "train", "--depth", 2, tmp_path / "plain")
    assert out.startswith(f"2 queries are judged in {folder}, split train\n")
    plain = TeacherScores.open(tmp_path / "plain")
    assert plain.query_ids().to_pylist() == ["q2", "q0"]
    assert all("empty" not in row.document_ids for row in plain)
    qrels = folder / "qrels" / "train.tsv"
    run("--data", folder, "--qrels", qrels, "--include-positives", "--depth", 2, tmp_path / "with")
    assert TeacherScores.open(tmp_path / "with")["q2"].document_ids == [*plain["q2"].document_ids, "d94", "empty"]
    ids = tmp_path / "ids.txt"
    ids.write_text("again0\n\n d0 \n")
    run("--data", folder, "--exclude", qrels, "--exclude", ids, tmp_path / "less", "--split", "train")
    less = TeacherScores.open(tmp_path / "less")
    run("--data", folder, tmp_path / "all", "--split", "train")
    everything = TeacherScores.open(tmp_path / "all")
    gone = {"q2": {"d94", "empty", "again0", "d0"}, "q0": {"again0", "d0"}}
    for query, banned in gone.items():
        assert less[query].document_ids == [key for key in everything[query].document_ids if key not in banned]
    assert any(len(less[query].document_ids) < len(everything[query].document_ids) for query in gone)


def test_integer_ids_from_text_files(tmp_path: Path) -> None:
    (tmp_path / "q.tsv").write_text("1\tlist of strings\n2\tfile\n")
    (tmp_path / "c.tsv").write_text("10\ta list of strings\n11\tfile\n12\tanother file\n")
    (tmp_path / "qrels").write_text("1 0 12 1\n")
    options = ["--queries", tmp_path / "q.tsv", "--corpus", tmp_path / "c.tsv", "--qrels", tmp_path / "qrels"]
    run(*options, "--include-positives", "--ids", "int", tmp_path / "out")
    assert TeacherScores.open(tmp_path / "out")[1].document_ids == [10, 12]
    (tmp_path / "qrels").write_text("1 0 d12 1\n")
    assert "'d12' is not an integer" in run(*options, "--ids", "int", tmp_path / "x", code=1)[1]


def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "x"
    assert "name either a folder with --data" in run(out, code=2)[1]
    assert "name either a folder with --data" in run("--data", folder, "--queries", folder, out, code=2)[1]
    assert "name either a folder with --data" in run("--queries", folder, out, code=2)[1]
    assert (
        "--split names a file of --data"
        in run(*["--queries", folder, "--corpus", folder, "--split", "x", out], code=2)[1]
    )
    assert "needs --split or --qrels" in run("--data", folder, "--include-positives", out, code=2)[1]
    other = ["--source", "no-model", "--stemmer", "german"]
    assert "are for bm25" in run("--data", folder, *other, out, code=2)[1]
    assert "no judgements for the split 'dev'" in run("--data", folder, "--split", "dev", out, code=1)[1]
    assert "there is no such folder" in run("--data", tmp_path / "lost", out, code=1)[1]
    (tmp_path / "bad").write_text("d1\nq1 d2\n")
    error = run(
        "--queries",
        folder / "queries.jsonl",
        "--corpus",
        folder / "queries.jsonl",
        "--exclude",
        tmp_path / "bad",
        out,
        code=1,
    )[1]
    assert f"{tmp_path / 'bad'}:2: expected one document id" in error
    assert not out.exists()


SCIFACT = Path(__file__).parents[2].parent / "shared" / "data" / "scifact"


@pytest.mark.slow
@pytest.mark.skipif(not SCIFACT.is_dir(), reason="the SciFact set is not here")
def test_bm25_is_as_good_as_published(tmp_path: Path) -> None:
    """SciFact, nDCG@10: BEIR's table says 0.665 for BM25; bm25s with these settings 0.68 to 0.69."""
    import ir_measures

    from st_m3se.data.qrels import read_qrels

    run("--data", SCIFACT, "--split", "test", "--depth", 100, tmp_path / "run")
    store = TeacherScores.open(tmp_path / "run")
    found = {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in store}
    measured = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], read_qrels(SCIFACT / "qrels" / "test.tsv"), found)
    assert 0.66 < measured[ir_measures.nDCG @ 10] < 0.70
