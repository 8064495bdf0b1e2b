"""Whole evaluations with small real models, beside beir, pytrec_eval and the host's own similarities."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retrieval.test_scoring import make_cross_encoder
from sentence_transformers import CrossEncoder, SentenceTransformer

from evaluation.beir_folder import DOCUMENTS, QRELS, save_encoder, write_set
from evaluation.encoders import CORPUS, KINDS, QUERIES, make_encoder
from st_m3se import BM25, find_candidates
from st_m3se.core.errors import FormatError
from st_m3se.diagnostics import JudgedLists
from st_m3se.evaluation import Encoder, GivenRun, ReRanker, Results, RetrievalEvaluator, open_set, qrels_set
from st_m3se.evaluation import evaluate as evaluate_systems
from st_m3se.scores import ScoredList, TeacherScores

MEASURES = ("nDCG@10", "RR@10", "R@100", "AP")
NAMES = {"dense": "bi-encoder", "sparse": "sparse encoder", "multi-vector": "multi-vector encoder"}


def evaluate(*arguments: Any, **options: Any) -> Results:
    given: dict[str, Any] = {"measures": MEASURES, "plots": False, "show_progress_bar": False, "device": "cpu"}
    return evaluate_systems(*arguments, **{**given, **options})


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small need not be collected one by one, which takes longer than what they do."""
    monkeypatch.setattr("st_m3se.evaluation.evaluation._free", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "small")


@pytest.fixture(scope="module")
def models(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders of each kind, another dense one, and a cross-encoder."""
    root = tmp_path_factory.mktemp("models")
    saved = {kind: save_encoder(kind, checkpoint, root / kind) for kind in KINDS}
    saved["other"] = save_encoder("dense", checkpoint, root / "other", shift=0.05)
    saved["judge"] = make_cross_encoder(checkpoint, root / "judge")
    return saved


def ranking(output: Path, system: str, name: str = "small") -> dict[str, list[str]]:
    return {row.query_id: list(row.document_ids) for row in TeacherScores.open(output / name / system / "run")}


def trec(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        query, _, document, _, score, _ = line.split()
        found.setdefault(query, {})[document] = float(score)
    return found


def judge(pairs: list[tuple[str, str]]) -> list[float]:
    """Words in common, then the shorter document."""
    return [len(set(query.split()) & set(text.lower().split())) - len(text) / 1000 for query, text in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_ranks_by_the_hosts_own_similarity(
    kind: str, models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    results = evaluate(folder, {"model": models[kind]}, tmp_path / "out")
    model = Encoder(models[kind]).load("cpu")
    scores = model.similarity(model.encode_query(list(QUERIES.values())), model.encode_document(list(CORPUS.values())))
    scores = scores.detach().numpy()
    run = trec(tmp_path / "out" / "small" / "model" / "run.trec")
    assert run.keys() == QUERIES.keys()
    for row, query in enumerate(QUERIES):
        got = np.array([run[query][document] for document in CORPUS])
        np.testing.assert_allclose(got, scores[row], atol=1e-4)
    assert np.ptp(scores) > 0.01, "all scores are alike: the comparison would say nothing"
    assert results.systems["model"]["kind"] == NAMES[kind]


def test_measures_are_those_of_trec_eval_on_the_run_file(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    systems = {"bm25": "bm25", "dense": models["dense"], "re": ReRanker(judge, "bm25", depth=3)}
    results = evaluate(folder, systems, tmp_path / "out")
    theirs = {"nDCG@10": "ndcg_cut_10", "R@100": "recall_100", "AP": "map"}
    for system in systems:
        evaluator = pytrec_eval.RelevanceEvaluator(QRELS, {"ndcg_cut.10", "recall.100", "map"})
        expected = evaluator.evaluate(trec(tmp_path / "out" / "small" / system / "run.trec"))
        for ours, name in theirs.items():
            got = dict(zip(QUERIES, results.values["small"][system][ours], strict=True))
            assert got == pytest.approx({query: expected.get(query, {}).get(name, 0.0) for query in QUERIES}), ours
    assert results.values["small"]["bm25"]["nDCG@10"].mean() > 0.2


def test_figures_are_those_of_beirs_own_evaluation(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """The same model and set through beir's loader, exact search and evaluator."""
    loader = pytest.importorskip("beir.datasets.data_loader")
    evaluation = pytest.importorskip("beir.retrieval.evaluation")
    search = pytest.importorskip("beir.retrieval.search.dense")
    sentence_bert = pytest.importorskip("beir.retrieval.models.sentence_bert")
    # Half of the queries have the id of a document: BEIR's rule leaves that one out.
    renamed = {DOCUMENTS[place] if place % 2 else query: text for place, (query, text) in enumerate(QUERIES.items())}
    distinct = {document: text for document, text in CORPUS.items() if not document.startswith("again")}
    # ... which it does even if it is judged, and this package does not.
    qrels = {
        query: {document: grade for document, grade in grades.items() if document != query}
        for query, grades in zip(renamed, QRELS.values(), strict=True)
    }
    write_set(tmp_path / "arguana", renamed, distinct, qrels)
    results = evaluate(tmp_path / "arguana", {"model": models["dense"]}, tmp_path / "out", depth=100)

    corpus, queries, judged = loader.GenericDataLoader(str(tmp_path / "arguana")).load(split="test")
    model = search.DenseRetrievalExactSearch(
        sentence_bert.SentenceBERT(str(models["dense"]), device="cpu"), show_progress_bar=False
    )
    retriever = evaluation.EvaluateRetrieval(model, k_values=[1, 10, 100], score_function="cos_sim")
    found = retriever.retrieve(corpus, queries)
    ndcg, average, recall, _ = retriever.evaluate(judged, found, [1, 10, 100])
    means = {name: values.mean() for name, values in results.values["arguana"]["model"].items()}
    assert means["nDCG@10"] == pytest.approx(ndcg["NDCG@10"], abs=1e-5)
    assert means["AP"] == pytest.approx(average["MAP@100"], abs=1e-5)
    assert means["R@100"] == pytest.approx(recall["Recall@100"], abs=1e-5)
    assert 0.05 < means["nDCG@10"] < 0.95
    evaluate(tmp_path / "arguana", {"model": models["dense"]}, tmp_path / "kept", depth=100, exclude_same_id=False)
    assert all(
        query in found for query, found in ranking(tmp_path / "kept", "model", "arguana").items() if query[0] == "d"
    )


@pytest.mark.parametrize("judged", [True, False])
def test_questions_and_answers_that_are_numbered_alike(judged: bool, models: dict[str, Path], tmp_path: Path) -> None:
    """Prevents a model that finds every answer from being at 0.0; in every way to rank, and in the trainer."""
    texts = {str(place): answer for place, answer in enumerate(CORPUS.values()) if answer and place < 8}
    qrels = {key: {key: 1} if judged else {"none": 1} for key in texts}
    data = write_set(tmp_path / "faq", texts, texts, qrels)
    rows = [ScoredList(key, [key, "0" if key != "0" else "1"], [2.0, 1.0]) for key in texts]
    run = tmp_path / "run"
    TeacherScores.from_rows(rows, run)
    systems: dict[str, Any] = {
        "bm25": "bm25", "dense": models["dense"], "run": GivenRun(run), "re": ReRanker(judge, "run")
    }  # fmt: skip
    results = evaluate(data, systems, tmp_path / "out", depth=100)
    found = {name: values["RR@10"].mean() for name, values in results.values["faq"].items()}
    assert found == dict.fromkeys(systems, float(judged))
    for name in systems:
        own = sum(key in documents for key, documents in ranking(tmp_path / "out", name, "faq").items())
        assert own == (8 if judged or name in ("run", "re") else 0)
    told = {finding.kind: finding for finding in results.sets["faq"].findings}
    assert ("8 of them are judged" in told["query ids that are document ids"].effect) == judged
    assert ("run: documents with the id of their query" in told) == (not judged)
    model = SentenceTransformer(str(models["dense"]), device="cpu")
    evaluator = RetrievalEvaluator(data, measures=["RR@10"], name="", write_csv=False)
    assert evaluator(model) == {"RR@10": float(judged)}
    graded = {row.query_id: dict(zip(row.document_ids, (0, 1), strict=True)) for row in rows}
    assert JudgedLists.of(TeacherScores.open(run), graded).by_query() == {
        key: list(grades) for key, grades in graded.items()
    }
    if judged:
        for same in (True, False):
            lists = find_candidates(texts, texts, ["bm25"], tmp_path / f"c{same}", exclude_same_id=same, judged=qrels)
            assert all(row.query_id in row.document_ids for row in lists)


def test_a_re_ranker_orders_the_first_documents_and_the_rest_follow(
    models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    shutil.rmtree(folder)  # texts that stand there twice would tie
    write_set(folder, corpus={document: text for document, text in CORPUS.items() if not document.startswith("again")})
    systems: dict[str, Any] = {"bm25": "bm25", "dense": models["dense"]}
    systems |= {f"{stage}+ce": ReRanker(models["judge"], stage, depth=4) for stage in ("bm25", "dense")}
    results = evaluate(folder, systems, tmp_path / "out")
    cross_encoder = CrossEncoder(str(models["judge"]), device="cpu")
    moved = 0
    for stage in ("bm25", "dense"):
        first, second = ranking(tmp_path / "out", stage), ranking(tmp_path / "out", f"{stage}+ce")
        for query, documents in first.items():
            top = documents[:4]
            pairs = [(QUERIES[query], CORPUS[document]) for document in top]
            scores = cross_encoder.predict(pairs, activation_fn=torch.nn.Identity()) if pairs else []
            expected = [
                document for _, document in sorted(zip(-np.array(scores), top, strict=True), key=lambda x: x[0])
            ]
            assert second[query] == expected + documents[4:]
            moved += expected != top
        stored = TeacherScores.open(tmp_path / "out" / "small" / f"{stage}+ce" / "run")
        assert all((np.diff(row.scores) < 0).all() for row in stored if len(set(row.scores)) == len(row.scores))
        assert all(len(row.scores) == len(first[row.query_id]) for row in stored)
        assert np.array_equal(results.values["small"][f"{stage}+ce"]["R@100"], results.values["small"][stage]["R@100"])
    assert moved > 5, "the re-ranker changes next to nothing: the comparison would say nothing"
    assert results.systems["dense+ce"]["kind"] == "re-ranker"
    assert results.systems["dense+ce"]["first_stage"] == "dense"


def test_huge_scores_keep_the_rest_in_order(folder: Path, tmp_path: Path) -> None:
    """Prevents ties below the re-ranked documents, which trec_eval would put in another order."""
    systems = {
        "dense": BM25(stopwords=None),
        "re": ReRanker(lambda pairs: [-1e9 - len(t) for _, t in pairs], "dense", depth=1),
    }
    evaluate(folder, systems, tmp_path / "out")
    for row in TeacherScores.open(tmp_path / "out" / "small" / "re" / "run"):
        assert (np.diff(np.asarray(row.scores, dtype=np.float32)) < 0).all()


def test_a_finished_evaluation_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(pairs: list[tuple[str, str]]) -> list[float]:
        calls.append(len(pairs))
        return judge(pairs)

    systems = {"bm25": "bm25", "re": ReRanker(counted, "bm25", depth=3)}
    first = evaluate(folder, systems, tmp_path / "out")
    pairs = sum(calls)
    assert pairs > 20
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "small").rglob("*") if path.is_file()}
    again = evaluate(folder, systems, tmp_path / "out", batch_size=7, measures=["P@5", *MEASURES])
    assert sum(calls) == pairs
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    for measure in MEASURES:
        for system in systems:
            np.testing.assert_array_equal(
                again.values["small"][system][measure], first.values["small"][system][measure]
            )
    assert again.measures == ("P@5", *MEASURES)
    assert again.seconds == first.seconds
    shutil.rmtree(tmp_path / "out" / "small" / "re")
    evaluate(folder, systems, tmp_path / "out")
    assert sum(calls) == 2 * pairs


def test_a_lost_run_file_is_written_again(folder: Path, tmp_path: Path) -> None:
    evaluate(folder, "bm25", tmp_path / "out")
    system = tmp_path / "out" / "small" / "bm25"
    text, stamp = (system / "run.trec").read_text(), (system / "system.json").stat().st_mtime_ns
    (system / "run.trec").unlink()
    evaluate(folder, "bm25", tmp_path / "out")
    assert (system / "run.trec").read_text() == text
    assert (system / "system.json").stat().st_mtime_ns == stamp  # the ranking was not made anew


def test_a_damaged_ranking_is_made_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents measures of a ranking that nobody made."""
    first = evaluate(folder, "bm25", tmp_path / "out")
    system = tmp_path / "out" / "small" / "bm25"
    shard, run = next((system / "run").glob("*.parquet")), system / "run.trec"
    whole, text = shard.read_bytes(), run.read_text()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    other = tmp_path / "other"
    TeacherScores.open(system / "run").save(other)
    for damage in (
        lambda: shard.write_bytes(flipped),
        lambda: run.write_text(text.replace(" Q0 ", " Q0 x", 1)),
        lambda: TeacherScores.from_rows(list(TeacherScores.open(other))[:2], system / "run", overwrite=True),
    ):
        damage()
        caplog.clear()
        again = evaluate(folder, "bm25", tmp_path / "out")
        assert re.search("damaged, and the ranking is made anew|was changed after it was written", caplog.text)
        assert run.read_text() == text
        assert shard.read_bytes() == whole
        assert np.array_equal(again.values["small"]["bm25"]["nDCG@10"], first.values["small"]["bm25"]["nDCG@10"])


def test_a_killed_evaluation_goes_on(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """What was done before the failure stays, and the result is that of an evaluation that was never cut off."""
    fails = True

    def fragile(pairs: list[tuple[str, str]]) -> list[float]:
        if fails:
            raise KeyboardInterrupt
        return judge(pairs)

    systems = {"dense": models["dense"], "re": ReRanker(fragile, "dense", depth=3)}
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, systems, tmp_path / "out")
    assert not (tmp_path / "out" / "small" / "re" / "run").exists()
    run = tmp_path / "out" / "small" / "dense" / "run.trec"
    stamp = run.stat().st_mtime_ns
    fails = False
    resumed = evaluate(folder, systems, tmp_path / "out")
    assert run.stat().st_mtime_ns == stamp
    assert "re-rank" not in resumed.seconds["small"]["re"]  # a part of it was measured, which would be taken for all
    whole = evaluate(folder, systems, tmp_path / "whole")
    assert "re-rank" in whole.seconds["small"]["re"]
    for system in systems:
        assert ranking(tmp_path / "out", system) == ranking(tmp_path / "whole", system)


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_kill_left_neither_stops_an_evaluation_nor_stays(
    finished: bool, models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """After a kill while its first record was written, a system could never be evaluated again."""
    systems, bm25 = {"bm25": "bm25", "dense": models["dense"]}, tmp_path / "out" / "small" / "bm25"
    if finished:
        evaluate(folder, systems, tmp_path / "out")
        (embeddings,) = (tmp_path / "out" / "embeddings").iterdir()
        shutil.rmtree(bm25.with_name("dense"))
        places = [embeddings / "000000.npy", embeddings / "embeddings.json", bm25 / "run", bm25 / "run.trec"]
    else:
        places = [bm25 / "system.json"]
    for place in places:
        (place.parent / f".{place.name}.a1b2c3d4.tmp").mkdir(parents=True)
    evaluate(folder, systems, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_embeddings_are_shared_by_evaluations(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    evaluate(folder, {"one": models["dense"]}, tmp_path / "a", cache_dir=cache)
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert files
    evaluate(folder, {"two": models["dense"]}, tmp_path / "b", cache_dir=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")} == files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": {"model": "other"}}, r"system\.model was .*dense' and is .*other'"),
        ({"systems": {"model": {"query_prompt": "find: "}}}, r"system\.prompts\.query was '' and is 'find: '"),
        ({"systems": {"model": {"max_length": 8}}}, "max_length was 64 and is 8"),
        ({"systems": {"model": {"dtype": "bfloat16"}}}, "dtype was 'float32' and is 'bfloat16'"),
        ({"systems": {"model": "bm25"}}, "k1 was None and is 1.5"),
        ({"depth": 7}, "depth was 1000 and is 7"),
        ({"exclude_same_id": False}, "exclude_same_id was True and is False"),
        ({"corpus": True}, "set was"),
    ],
    ids=str,
)
def test_a_ranking_of_something_else_is_refused(
    change: dict[str, Any], message: str, models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """Prevents a report that mixes rankings of two models or settings under one name."""
    evaluate(folder, {"model": models["dense"]}, tmp_path / "out")
    system: Any = change.get("systems", {}).get("model")
    if isinstance(system, dict):
        system = Encoder(models["dense"], **system)
    elif system is not None:
        system = models.get(system, system)
    if "corpus" in change:
        shutil.rmtree(folder)
        write_set(folder, corpus={**CORPUS, "empty": "not any more"})
    options = {name: value for name, value in change.items() if name in ("depth", "exclude_same_id")}
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(folder, {"model": system or models["dense"]}, tmp_path / "out", measures=["nDCG@5"], **options)
    assert "delete that folder" in str(caught.value)


def test_a_model_that_was_trained_on_is_refused(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """The folder is the same, and the name; the weights are not."""
    place = tmp_path / "model"
    shutil.copytree(models["dense"], place)
    evaluate(folder, {"model": place}, tmp_path / "out")
    shutil.rmtree(place)
    shutil.copytree(models["other"], place)
    with pytest.raises(ValueError, match=r"something else: system\.fingerprint was"):
        evaluate(folder, {"model": place}, tmp_path / "out")


def test_a_re_ranker_of_another_first_stage_is_refused(folder: Path, tmp_path: Path) -> None:
    systems = {"first": BM25(), "re": ReRanker(judge, "first", depth=3)}
    evaluate(folder, systems, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "small" / "first")
    with pytest.raises(ValueError, match=r"first_stage\.system\.stemmer was 'english' and is None"):
        evaluate(folder, {**systems, "first": BM25(stemmer=None)}, tmp_path / "out")


def test_a_model_that_was_moved_is_the_same(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    evaluate(folder, {"model": models["dense"]}, tmp_path / "out")
    shutil.copytree(models["dense"], tmp_path / "moved")
    evaluate(folder, {"model": tmp_path / "moved"}, tmp_path / "out")


def test_what_is_no_ranking_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "small" / "bm25").mkdir(parents=True)
    (tmp_path / "out" / "small" / "bm25" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds no ranking"):
        evaluate(folder, "bm25", tmp_path / "out")
    assert (tmp_path / "out" / "small" / "bm25" / "thesis.tex").read_text() == "x"
    (tmp_path / "out" / "small" / "bm25" / "system.json").write_text("{")
    with pytest.raises(FormatError, match=r"system\.json.*Delete the folder"):
        evaluate(folder, "bm25", tmp_path / "out")


def test_seeds_are_one_system_in_the_report(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    systems = {
        "ours": [models["dense"], models["other"]],
        "bm25": "bm25",
        "re": ReRanker(judge, "ours", depth=2),
    }
    results = evaluate(folder, systems, tmp_path / "out", baseline="bm25")
    assert results.groups == {"ours": ("ours-1", "ours-2"), "bm25": ("bm25",), "re": ("re-1", "re-2")}
    cell = results.means.loc["nDCG@10", "small", "ours"]
    means = [results.values["small"][f"ours-{seed}"]["nDCG@10"].mean() for seed in (1, 2)]
    assert cell["mean"] == pytest.approx(np.mean(means))
    assert cell["deviation"] == pytest.approx(np.std(means, ddof=1))
    assert means[0] != means[1]
    assert set(results.tests["first"]) == {"bm25"}


def test_given_runs_are_measured_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Documents that the corpus does not have keep their ranks, as for trec_eval; lines may stand in any order."""
    lines = []
    for place, query in enumerate(list(QUERIES)[:12]):
        lines += [f"{query} Q0 stranger{place} 1 9.5 x", f"{query} Q0 {DOCUMENTS[place]} 2 9.25 x"]
    (tmp_path / "a.run").write_text("\n".join(["unknown Q0 d0 1 1 x", *reversed(lines)]) + "\n")
    results = evaluate(folder, {"given": GivenRun(tmp_path / "a.run")}, tmp_path / "out", measures=["RR@10"])
    np.testing.assert_array_equal(results.values["small"]["given"]["RR@10"], [0.5] * 12 + [0.0] * 4)
    kinds = {finding.kind: finding for finding in results.sets["small"].findings}
    assert kinds["given: queries without candidates"].count == 4
    assert kinds["given: candidates of queries that are not evaluated"].examples == ("unknown",)
    (tmp_path / "a.run").write_text("q0 Q0 d0 1 1 x\n")
    with pytest.raises(ValueError, match="contents was"):
        evaluate(folder, {"given": GivenRun(tmp_path / "a.run")}, tmp_path / "out", measures=["RR@10"])
    (tmp_path / "b.run").write_text("0 Q0 d0 1 1 x\n")
    with pytest.raises(FormatError, match="ids are others"):
        evaluate(folder, {"other": GivenRun(tmp_path / "b.run")}, tmp_path / "out")


def test_a_run_for_each_set_is_found_by_its_name(folder: Path, tmp_path: Path) -> None:
    second = write_set(tmp_path / "second")
    for name, document in (("small", DOCUMENTS[0]), ("second", "stranger")):
        (tmp_path / f"{name}.run").write_text(f"q0 Q0 {document} 1 1 x\n")
    systems = {"given": GivenRun(str(tmp_path / "{set}.run")), "bm25": "bm25"}
    results = evaluate([folder, second], systems, tmp_path / "out", measures=["RR@10"])
    assert results.values["small"]["given"]["RR@10"][0] == 1.0
    assert results.values["second"]["given"]["RR@10"][0] == 0.0
    assert list(results.sets) == ["small", "second"]
    (tmp_path / "second.run").unlink()
    with pytest.raises(FileNotFoundError, match=r"second.*should be .*second\.run"):
        evaluate([folder, second], systems, tmp_path / "new")
    assert not (tmp_path / "new").exists()  # it is refused before any work


def test_a_model_that_cannot_be_used_as_asked_is_refused_before_any_work(
    models: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """Prevents a length, a label or the like from ending an evaluation when its first systems have run for hours."""
    re_ranker = ReRanker(models["judge"], "bm25", max_length=65)
    for last in (Encoder(models["dense"], max_length=65), re_ranker):
        with pytest.raises(ValueError, match="max_length=65 is beyond the model's 64 positions"):
            evaluate(folder, {"bm25": "bm25", "last": last}, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_set_of_ids_takes_runs_only(tmp_path: Path) -> None:
    (tmp_path / "a.run").write_text("".join(f"{query} Q0 {next(iter(QRELS[query]))} 1 1 x\n" for query in QUERIES))
    judged = qrels_set(QRELS, name="ids")
    results = evaluate(judged, {"a": GivenRun(tmp_path / "a.run")}, tmp_path / "out", depth=5)
    assert results.values["ids"]["a"]["RR@10"].tolist() == [1.0] * 16
    assert results.sets["ids"].documents is None
    with pytest.raises(ValueError, match="bm25 needs texts, and the set ids has ids only"):
        evaluate(judged, "bm25", tmp_path / "out")


def candidate_run(path: Path) -> Path:
    """Six documents for each query, the relevant one in a middle place."""
    lines = []
    for place, query in enumerate(QUERIES):
        for rank, step in enumerate([7, 3, 0, 1, 9, 12], start=1):
            lines.append(f"{query} Q0 {DOCUMENTS[(place + step) % 16]} {rank} {10 - rank} x\n")
    path.write_text("".join(lines))
    return path


def test_a_set_with_a_run_is_re_ranked_and_not_searched(models: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    task = open_set(folder, run=candidate_run(tmp_path / "top.run"), cache_dir=tmp_path / "cache")
    assert task.form == "re-ranking"
    systems: dict[str, Any] = {"given": "candidates", "bm25": "bm25", **{kind: models[kind] for kind in KINDS}}
    systems["ce"] = ReRanker(judge, depth=3)
    systems["dense+ce"] = ReRanker(judge, "dense", depth=3)
    results = evaluate(task, systems, tmp_path / "out")
    runs = {system: ranking(tmp_path / "out", system) for system in systems}
    for query in QUERIES:
        for system in systems:
            assert sorted(runs[system][query]) == sorted(runs["given"][query]), system
        assert runs["ce"][query][3:] == runs["given"][query][3:]
        assert sorted(runs["dense+ce"][query][:3]) == sorted(runs["dense"][query][:3])
    assert results.values["small"]["given"]["RR@10"].tolist() == [1 / 3] * 16
    for kind in KINDS:
        model = Encoder(models[kind]).load("cpu")
        for query in list(QUERIES)[:4]:
            documents = runs["given"][query]
            texts = [CORPUS[document] for document in documents]
            scores = model.similarity(model.encode_query([QUERIES[query]]), model.encode_document(texts))[0]
            order = np.argsort(-scores.detach().numpy(), kind="stable")
            assert runs[kind][query] == [documents[place] for place in order], kind
    searched = evaluate(folder, {"bm25": "bm25"}, tmp_path / "searched")
    whole = trec(tmp_path / "searched" / "small" / "bm25" / "run.trec")
    for query, scores in trec(tmp_path / "out" / "small" / "bm25" / "run.trec").items():
        expected = {document: whole.get(query, {}).get(document, 0.0) for document in scores}
        assert scores == pytest.approx(expected)  # with the statistics of the whole corpus
    assert searched.sets["small"].form == "retrieval"


def test_without_a_run_there_is_nothing_given(folder: Path, tmp_path: Path) -> None:
    for system in ("candidates", ReRanker(judge)):
        with pytest.raises(ValueError, match="small comes with none"):
            evaluate(folder, {"x": system}, tmp_path / "out")


def test_a_measure_deeper_than_the_search_is_refused(folder: Path, tmp_path: Path) -> None:
    """Prevents an R@1000 that is in truth an R@50."""
    with pytest.raises(ValueError, match=r"R@100 looks at more than the 50 documents"):
        evaluate(folder, "bm25", tmp_path / "out", depth=50)
    results = evaluate(folder, "bm25", tmp_path / "out", depth=50, measures=None)
    assert results.measures == ("nDCG@10", "RR@10", "AP")
    with pytest.raises(ValueError, match="different names"):
        evaluate(folder, "bm25", tmp_path / "out", measures=["AP", "AP"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth and batch_size"),
        ({"confidence": 95}, "confidence must lie"),
        ({"baseline": "bm26"}, "baseline 'bm26' is no system here; there are bm25"),
        ({"measures": ["nDCG@ten"]}, "nDCG@ten"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(folder, "bm25", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_sets_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no set"):
        evaluate([], "bm25", tmp_path / "out")
    with pytest.raises(ValueError, match="two sets are named 'small'"):
        evaluate([folder, folder], "bm25", tmp_path / "out")
    for name in ("plots", "../up", "a b", "x//y"):
        with pytest.raises(ValueError, match="names a folder"):
            evaluate(replace(open_set(folder), name=name), "bm25", tmp_path / "out")
    part = replace(open_set(folder), name="cqadupstack/android")
    evaluate(part, "bm25", tmp_path / "out")
    assert (tmp_path / "out" / "cqadupstack" / "android" / "bm25" / "run.trec").is_file()


def test_options_of_a_loaded_model_are_refused(
    make_model: Callable[..., SentenceTransformer], checkpoint: Path
) -> None:
    model = make_model()
    assert Encoder(model).load(None) is model
    for options in ({"max_length": 8}, {"dtype": "float16"}, {"query_prompt": "q"}, {"kind": "bi-encoder"}):
        with pytest.raises(ValueError, match="loaded already"):
            Encoder(model, **options).load(None)  # type: ignore[arg-type]


def test_options_of_an_encoder_reach_the_model(models: dict[str, Path], checkpoint: Path) -> None:
    options: dict[str, Any] = {"query_prompt": "q: ", "document_prompt": "d: ", "max_length": 9, "dtype": "bfloat16"}
    model = Encoder(models["dense"], **options).load("cpu")
    assert model.prompts["query"] == "q: "
    assert model.prompts["document"] == "d: "
    assert model.max_seq_length == 9
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="query_length"):
        Encoder(models["multi-vector"], max_length=9).load("cpu")
    assert type(Encoder(checkpoint).load("cpu")).__name__ == "SentenceTransformer"
    assert type(Encoder(checkpoint, kind="sparse encoder").load("cpu")).__name__ == "SparseEncoder"


def test_loaded_models_of_each_kind_are_taken(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    systems = {kind: make_encoder(kind, checkpoint) for kind in KINDS}
    results = evaluate(folder, systems, tmp_path / "out")
    assert {name: system["kind"] for name, system in results.systems.items()} == NAMES


def test_ids_with_blanks_cost_the_trec_file_only(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder)
    write_set(folder, corpus={**CORPUS, "a b": CORPUS[DOCUMENTS[0]]})
    results = evaluate(folder, "bm25", tmp_path / "out")
    assert results.values["small"]["bm25"]["nDCG@10"].mean() > 0.2
    assert "run.trec is not written" in caplog.text
    assert not (tmp_path / "out" / "small" / "bm25" / "run.trec").exists()
    evaluate(folder, "bm25", tmp_path / "out")  # and is not tried again


def test_the_report_says_where_it_comes_from(folder: Path, tmp_path: Path) -> None:
    evaluate(folder, "bm25", tmp_path / "out", plots=True)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    origin = written["provenance"]
    assert origin["packages"].keys() >= {"sentence-transformers", "torch", "ir-measures", "bm25s"}
    assert origin["device"] == "cpu"
    for name in ("date", "st_m3se", "python", "system", "cpu", "command"):
        assert origin[name], name
    assert written["settings"]["depth"] == 1000
    assert written["systems"]["bm25"]["stemmer"] == "english"
    for name in ("report.html", "report.md", "report.tex", "per_query.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert list((tmp_path / "out" / "plots").glob("*.svg"))
