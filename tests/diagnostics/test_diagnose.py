"""From texts and models to figures: the scores against the models', the numbers against the files."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from st_m3se import BM25, find_candidates
from st_m3se.cli import app
from st_m3se.core.errors import FormatError
from st_m3se.data.qrels import read_qrels
from st_m3se.data.texts import Texts
from st_m3se.diagnostics import Diagnosis, diagnose, html_section
from st_m3se.scores import TeacherScores

NAMES = ["bm25", "student", "cross", "stored"]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["diagnose", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture(scope="module")
def stored(beir: Path, cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of a teacher that is not here: some 40 documents of each test query."""
    folder = tmp_path_factory.mktemp("stored") / "teacher"
    qrels = read_qrels(beir / "qrels" / "test.tsv")
    corpus = list(Texts.open(beir))
    random = np.random.default_rng(0)
    rows = []
    for query, relevant in qrels.items():
        documents = list(dict.fromkeys([*relevant, *random.permutation(corpus)[:40].tolist()]))
        rows.append((query, documents, random.normal(size=len(documents)) + [3.0 * (d in relevant) for d in documents]))
    TeacherScores.from_rows(rows, folder, manifest={"teacher": "far/away"})
    return folder


@pytest.fixture(scope="module")
def out(beir: Path, student: Path, cross_encoder: Path, stored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of the command over every kind of scorer."""
    folder = tmp_path_factory.mktemp("out") / "look"
    output = run(
        *("--data", beir, "--split", "test", "--depth", 12, "--resamples", 50, "--output", folder),
        *("--scorer", "bm25", "--scorer", student, "--scorer", f"cross={cross_encoder}"),
        *("--scores", f"stored={stored}", "--gap", "student,cross,stored"),
    )
    for name in NAMES:
        assert re.search(rf"^{name} +\d\.\d\d\d \[", output, re.MULTILINE), output
    assert "From student to cross, with stored as the teacher: RR@10" in output
    assert "documents that stored has not scored" in output
    return folder


def test_every_file_of_the_report_is_there(out: Path) -> None:
    for name in ("score_densities", "margins"):
        for kind in ("png", "svg", "csv"):
            assert (out / f"{name}.{kind}").stat().st_size > 1000
    assert {folder.name for folder in (out / "scores").iterdir()} == set(NAMES)
    assert (out / "report.html").read_text().count("data:image/svg+xml;base64,") == 2
    assert not list((out / "scores").glob(".*"))


def test_the_scores_are_the_models_own(out: Path, beir: Path, student: Path, cross_encoder: Path) -> None:
    """Each scorer against its own library call on the same pairs: prevents a probability for a logit, or mixed rows."""
    queries, corpus = Texts.open(beir, "queries"), Texts.open(beir)
    stores = {name: TeacherScores.open(out / "scores" / name) for name in NAMES}
    lists = [(row.query_id, list(row.document_ids)) for row in stores["student"]]
    assert len(lists) == 16
    for name in NAMES:
        assert [(row.query_id, list(row.document_ids)) for row in stores[name]] == lists
    bi, cross = SentenceTransformer(str(student), device="cpu"), CrossEncoder(str(cross_encoder), device="cpu")
    for query, documents in lists:
        texts = corpus.take(documents)
        similarity = bi.similarity(bi.encode_query([queries[query]]), bi.encode_document(texts))[0]
        np.testing.assert_allclose(stores["student"][query].scores, similarity, atol=1e-5)
        logits = cross.predict([(queries[query], text) for text in texts], activation_fn=torch.nn.Identity())
        np.testing.assert_allclose(stores["cross"][query].scores, logits, atol=1e-5)


def test_bm25_scores_are_those_of_the_search(out: Path, beir: Path, tmp_path: Path) -> None:
    store = TeacherScores.open(out / "scores" / "bm25")
    queries = Texts.open(beir, "queries")
    asked = {query: queries[query] for query in store.query_ids().to_pylist()}
    found = find_candidates(asked, beir, ["bm25"], tmp_path / "run", depth=48, show_progress_bar=False)
    for row in store:
        known = dict(zip(found[row.query_id].document_ids, found[row.query_id].scores, strict=True))
        assert list(row.scores) == [known.get(document, 0.0) for document in row.document_ids]
    assert store.manifest["teacher"] == "bm25"
    assert store.manifest["source"]["candidates"][0]["k1"] == BM25().k1


def test_the_numbers_can_be_computed_again_from_the_folder(out: Path) -> None:
    """From scores/ and qrels.tsv alone, with sklearn."""
    content = json.loads((out / "diagnosis.json").read_text())
    qrels = read_qrels(out / "qrels.tsv")
    with (out / "numbers.csv").open() as stream:
        numbers = {(row["scorer"], row["number"]): row for row in csv.DictReader(stream)}
    for name in NAMES:
        flags: list[bool] = []
        scores: list[float] = []
        per_query = []
        for row in TeacherScores.open(out / "scores" / name):
            own = [document in qrels[row.query_id] for document in row.document_ids]
            per_query.append(roc_auc_score(own, row.scores))
            flags += own
            scores += row.scores
        found = content["scorers"][name]["numbers"]
        assert found["auc_per_query"][0] == pytest.approx(np.mean(per_query), abs=1e-12)
        assert found["auc_pooled"][0] == pytest.approx(roc_auc_score(flags, scores), abs=1e-12)
        assert float(numbers[name, "overlap"]["value"]) == found["overlap"][0]
        assert content["data"]["positives"] == sum(flags)
        assert content["data"]["negatives"] == len(flags) - sum(flags)
        curves = content["scorers"][name]["curves"]
        step = (curves["x"][-1] - curves["x"][0]) / (len(curves["x"]) - 1)
        overlap = sum(map(min, curves["positives"], curves["negatives"])) * step
        assert found["overlap"][0] == pytest.approx(overlap, rel=1e-4)
    assert content["scorers"]["stored"]["description"]["teacher"] == "far/away"


def test_it_loads_as_it_was_saved(out: Path, tmp_path: Path) -> None:
    loaded = Diagnosis.load(out)
    assert list(loaded.scorers) == NAMES
    loaded.save(tmp_path)
    for name in ("diagnosis.json", "numbers.csv", "score_densities.csv", "margins.csv"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    with pytest.raises(FormatError, match="st-m3se diagnose"):
        Diagnosis.load(tmp_path / "lost")
    (tmp_path / "diagnosis.json").write_text('{"format": 99}')
    with pytest.raises(FormatError, match="format 99"):
        Diagnosis.load(tmp_path)


def test_the_same_command_scores_nothing_again(
    beir: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished scorer is not run again, and one that would be another is refused."""
    command = ["--data", beir, "--split", "dev", "--scorer", student, "--depth", 5, "--resamples", 5, "-o", tmp_path]
    first = run(*command)
    before = (tmp_path / "diagnosis.json").read_text()
    calls: list[int] = []
    monkeypatch.setattr(SentenceTransformer, "encode", lambda *_, **__: calls.append(1))
    assert run(*command) == first
    assert not calls
    after = json.loads((tmp_path / "diagnosis.json").read_text())
    assert after["scorers"] == json.loads(before)["scorers"]
    monkeypatch.undo()
    output = run(*command, "--max-length", 8, code=1)
    assert "error:" in output
    assert "--max-length" in output


def test_functions_loaded_models_and_settings_of_bm25_are_scorers(beir: Path, student: Path, tmp_path: Path) -> None:
    def words(pairs: list[tuple[str, str]]) -> list[float]:
        return [float(len(set(query.split()) & set(text.split()))) for query, text in pairs]

    qrels = read_qrels(beir / "qrels" / "dev.tsv")
    corpus = list(Texts.open(beir))
    candidates = {query: list(dict.fromkeys([*relevant, *corpus[:9]])) for query, relevant in qrels.items()}
    scorers: dict[str, Any] = {
        "common words": words,
        "loaded": SentenceTransformer(str(student), device="cpu"),
        "plain bm25": BM25(stemmer=None),
    }
    found = diagnose(
        scorers, candidates, qrels, tmp_path, queries=beir, corpus=beir, n_resamples=5, show_progress_bar=False
    )
    assert list(found.scorers) == list(scorers)
    assert found.descriptions["common words"]["teacher"] == "common words"
    store = TeacherScores.open(tmp_path / "scores" / "common_words")
    queries, texts = Texts.open(beir, "queries"), Texts.open(beir)
    for row in store:
        assert list(row.scores) == words([(queries[row.query_id], texts[d]) for d in row.document_ids])


def test_the_data_may_be_as_they_are_in_the_wild(beir: Path, tmp_path: Path) -> None:
    """Judged documents and queries that are not there, grades, an id that repeats: said, and nothing stops."""
    folder = tmp_path / "wild"
    shutil.copytree(beir, folder)
    lines = (folder / "corpus.jsonl").read_text().splitlines()
    (folder / "corpus.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    qrels = "q00\td00\t2\nq00\td01\t1\nq01\td01\t2\nq02\tlost\t2\nlost\td00\t2\nq03\td03\t1\n"
    (folder / "qrels" / "odd.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    output = run(
        *("--data", folder, "--split", "odd", "--scorer", "bm25", "--min-relevance", 2, "--depth", 9),
        *("--resamples", 5, "-o", tmp_path / "out"),
    )
    assert output.startswith("2 queries, 2 relevant")
    assert output.count("in the data: 1 ") == 3
    assert read_qrels(tmp_path / "out" / "qrels.tsv") == {"q00": {"d00": 1}, "q01": {"d01": 1}}
    assert "In the data:" in (tmp_path / "out" / "report.html").read_text()


def test_a_trec_run_gives_the_lists(beir: Path, tmp_path: Path) -> None:
    run_file = tmp_path / "first.run"
    run_file.write_text("".join(f"q00 Q0 d{rank:02} {rank + 1} {9 - rank} tag\n" for rank in range(6)))
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("q00 0 d02 1\n")
    run(
        "--data",
        beir,
        "--qrels",
        qrels,
        "--candidates",
        run_file,
        "--scorer",
        "bm25",
        "--resamples",
        5,
        "-o",
        tmp_path / "out",
    )
    (row,) = TeacherScores.open(tmp_path / "out" / "scores" / "bm25")
    assert sorted(map(str, row.document_ids)) == [f"d{rank:02}" for rank in range(6)]


def test_stores_alone_need_no_texts(stored: Path, beir: Path, tmp_path: Path) -> None:
    output = run(
        *("--scores", stored, "--candidates", stored, "--qrels", beir / "qrels" / "test.tsv", "-o", tmp_path),
        *("--resamples", 5, "--max-queries", 7),
    )
    assert output.startswith("7 queries, 7 relevant")
    assert Diagnosis.load(tmp_path).data["left_out"] == {"queries not drawn": 9}


def test_the_section_is_html_and_its_drawings_are_images(out: Path) -> None:
    """A drawing may come from another's folder: as an image it has no script and no ids in the page around it."""
    title, section = html_section(out)
    assert title == "How the scorers separate relevant documents: animals test"
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"/>', section)
    assert [base64.b64decode(image) for image, _ in images] == [
        (out / f"{name}.svg").read_bytes() for name in ("score_densities", "margins")
    ]
    assert "<svg" not in section
    for name in NAMES:
        assert f"<td>{name}</td>" in section


def test_the_section_is_well_formed(out: Path) -> None:
    """A browser mends what is not closed; the page around it would pay for that."""
    _, section = html_section(out)
    parsed = ElementTree.fromstring(f"<div>{section}</div>")
    assert len(parsed.findall("figure")) == 2


def test_evolutions_are_drawn_side_by_side_with_and_without_scorers(beir: Path, tmp_path: Path) -> None:
    records = []
    for name in ("teacher", "student"):
        records.append(tmp_path / f"{name}.csv")
        rows = [f'{step},0.1,q,"d,{place}",{int(place < 2)},{step * place}' for step in (0, 5) for place in range(4)]
        records[-1].write_text("\n".join(["step,epoch,query_id,document_id,positive,score", *rows]) + "\n")
    given = ["--evolution", records[0], "--evolution", f"DE={records[1]}"]
    assert "evolution.png" in run(*given, "-o", tmp_path / "alone")
    with (tmp_path / "alone" / "evolution.csv").open() as stream:
        found = list(csv.DictReader(stream))
    assert [row["model"] for row in found] == ["teacher"] * 8 + ["DE"] * 8
    assert found[7] == {
        **{"model": "teacher", "step": "5", "query_id": "q", "document_id": "d,3", "positive": "0", "score": "15"}
    }
    page = tmp_path / "both" / "report.html"
    run("--data", beir, "--split", "dev", "--scorer", "bm25", "--resamples", 5, "-o", page.parent)
    assert page.read_text().count("data:image/svg+xml;base64,") == 2
    run(*given, "-o", page.parent)
    assert page.read_text().count("data:image/svg+xml;base64,") == 3
    page.unlink()
    run("--data", beir, "--split", "dev", "--scorer", "bm25", "--resamples", 5, *given, "-o", page.parent)
    assert page.read_text().count("data:image/svg+xml;base64,") == 3


def test_the_command_adds_to_a_model_card(beir: Path, student: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(student, copy)
    output = run(
        *("--data", beir, "--split", "dev", "--scorer", f"tiny={copy}", "--depth", 5, "--resamples", 5),
        *("-o", tmp_path / "look", "--model-card", copy),
    )
    assert f"added the margin plot to {copy / 'README.md'}" in output
    assert "| tiny |" in (copy / "README.md").read_text()


def test_mistakes_are_explained(beir: Path, student: Path, stored: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        ([], "name what to look at"),
        (["--scorer", "bm25"], "name the judgements"),
        (["--scorer", "bm25", "--split", "test"], "--split is for --data"),
        (["--scorer", "bm25", "--qrels", "x"], "name either a folder with --data"),
        (["--data", beir, "--split", "test", "--scorer", "bm25", "--gap", "a,b"], "BEFORE,AFTER,TEACHER"),
        (["--data", beir, "--split", "test", "--scorer", "bm25", "--gap", "a,b,c"], "'a' is none of bm25"),
        (["--data", beir, "--split", "test", "--scorer", student, "--scorer", student], "two scorers are called"),
    ):
        assert expected in run(*arguments, "-o", tmp_path / "no", code=2), arguments
    for data, split in ((beir, "lost"), (tmp_path / "lost", "test")):
        output = run("--data", data, "--split", split, "--scorer", "bm25", "-o", tmp_path / "no", code=1)
        assert "error:" in output
        assert "lost" in output
    with pytest.raises(ValueError, match="would share the folder"):
        diagnose({"a/b": "bm25", "a_b": "bm25"}, stored, {"q": {"d": 1}}, tmp_path)
    with pytest.raises(ValueError, match="reads texts"):
        diagnose({"bm25": "bm25"}, stored, read_qrels(beir / "qrels" / "test.tsv"), tmp_path, show_progress_bar=False)


def test_mistakes_are_found_before_anything_is_scored(beir: Path, student: Path, tmp_path: Path) -> None:
    given = ["--data", beir, "--scorer", f"a={student}", "--scorer", "bm25", "--resamples", 5, "-o", tmp_path]
    assert "no/such-model is no model" in run(*given, "--scorer", "no/such-model", code=1)
    assert "'mystery@3' is not a measure" in run(*given, "--gap", "a,a,bm25", "--measure", "mystery@3", code=1)
    assert not (tmp_path / "scores").exists()


def test_a_refused_command_leaves_the_folder_as_it_was(beir: Path, student: Path, tmp_path: Path) -> None:
    """Prevents scores and judgements of other lists than those of the report that stays."""
    given = ["--data", beir, "--split", "dev", "--scorer", "bm25", *("--scorer", student, "-o", tmp_path)]
    given += ["--resamples", 5]
    run(*given, "--depth", 5)
    files = [tmp_path / "qrels.tsv", *sorted((tmp_path / "scores").rglob("*.parquet"))]
    before = [file.read_bytes() for file in files]
    assert "was begun with something else" in run(*given, "--max-queries", 3, code=1)
    assert [file.read_bytes() for file in files] == before


def test_the_help_teaches() -> None:
    text = " ".join(run("--help").split())
    for phrase in ("st-m3se diagnose --data scifact", "AUC per query", "goes on with the same command", "--gap"):
        assert phrase in text
