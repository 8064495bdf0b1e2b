"""The whole way with tiny models: what comes out, what is refused, and what is made once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from example_fixtures import make_teacher, other_words, shared_words
from sentence_transformers import CrossEncoder, SentenceTransformer

from st_m3se import APITeacher, find_candidates
from st_m3se.distillation import DistillationConfig, PoorTeacherError, lists
from st_m3se.scores import TeacherScores, combine, convert

from .conftest import FAST

Run = Callable[..., dict[str, Any]]
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
SYSTEMS = {"BM25", "student before", "student without a teacher", "student after", "teacher", "teacher + student"}


def parameters(folder: Path) -> torch.Tensor:
    model = SentenceTransformer(str(folder), device="cpu")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_whole_way(run: Run, tmp_path: Path, models: dict[str, str]) -> None:
    """Trains, measures, saves and says with what; the same call again makes nothing, another option only its part."""
    results = run(control=True, seeds=(1, 2))
    assert set(results["systems"]) == SYSTEMS
    place = [each["folder"] for each in results["trainings"]["student after"]].index(results["model_from"])
    own = results["seeds"]["student after"][place]["nDCG@10"]
    told = f"Means over 2 seeds. The model is that of seed {place + 1}, the best on dev: nDCG@10 {own:.3f}"
    assert told in (tmp_path / "out" / "model" / "README.md").read_text()
    assert results["systems"]["teacher"]["nDCG@10"] == 1.0
    after, before = (results["systems"][name]["nDCG@10"] for name in ("student after", "student before"))
    assert after > before
    found = results["against_student_after"]["student before"]["nDCG@10"]
    assert found["difference"] == pytest.approx(after - before)
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    assert results["queries"] == {"train": 16, "dev": 16, "test": 16}
    assert results["config"]["seeds"] == (1, 2)
    assert len(results["seeds"]["student after"]) == 2
    assert after == pytest.approx(sum(seed["nDCG@10"] for seed in results["seeds"]["student after"]) / 2)
    for trainings in results["trainings"].values():
        for training in trainings:
            assert [point["share"] for point in training["curve"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text())["systems"] == results["systems"]
    assert json.loads((out / "dev_curve.json").read_text())["teacher"] == pytest.approx(1.0)
    card = (out / "model" / "README.md").read_text()
    assert "| **student after** |" in card
    assert f"from_toml({str(out / 'config.toml')!r})" in card
    assert DistillationConfig.from_toml(out / "config.toml").epochs == 4
    assert not torch.equal(parameters(out / "model"), parameters(Path(models["student"])))
    best = out / results["model_from"] / "model"
    assert torch.equal(parameters(out / "model"), parameters(best))
    assert not list(out.glob("training-*/checkpoints")) + list(out.glob("training-*/state-*"))

    stages = {path: path.stat().st_mtime_ns for path in out.glob("*/finished.json")}
    assert run(control=True, seeds=(1, 2))["systems"] == results["systems"]
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/finished.json")} == stages
    run(epochs=1)
    added = {path.parent.name.rsplit("-", 1)[0] for path in out.glob("*/finished.json") if path not in stages}
    assert added == {"training-student-seed1", "run-student-seed1"}


def test_a_changed_teacher_makes_its_scores_anew(run: Run, tmp_path: Path, capsys: Any) -> None:
    """Prevents another teacher's numbers from being taken for this one's."""
    run(epochs=1)
    results = run(epochs=1, teacher={"other": other_words}, anyway=True, show=True)
    assert results["systems"]["teacher"]["nDCG@10"] < 1.0
    assert len(list((tmp_path / "out").glob("teacher-train-*"))) == 2
    assert "made anew: not as before are teacher" in capsys.readouterr().out


def test_a_teacher_that_is_no_better_is_refused_before_the_training(run: Run, tmp_path: Path) -> None:
    with pytest.raises(PoorTeacherError, match=r"The teacher is no better than the student .* --anyway") as kept:
        run(teacher={"other": other_words}, ensemble=False)
    assert not list((tmp_path / "out").glob("t*-train-*")), "no pair was scored for it"
    run(teacher={"other": other_words}, ensemble=False, anyway=True, judgements=False, epochs=1)
    assert kept.tb is not None, "a notebook keeps the error, and with it all that the first call held"


def test_a_student_that_became_worse_is_not_handed_out(
    run: Run, tmp_path: Path, models: dict[str, str], capsys: Any
) -> None:
    results = run(teacher={"other": other_words}, ensemble=False, anyway=True, judgements=False, show=True)
    assert results["kept_start"]
    assert results["trainings"]["student after"][0]["kept"] == 0
    assert torch.equal(parameters(tmp_path / "out" / "model"), parameters(Path(models["student"])))
    assert results["systems"]["student after"] == results["systems"]["student before"]
    assert "the model is the student as it comes" in capsys.readouterr().out
    assert "worse on held-out queries" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_without_judgements_agreement_is_measured_and_said(run: Run, beir: Path, capsys: Any) -> None:
    for file in (beir / "qrels").iterdir():
        file.unlink()
    (beir / "qrels").rmdir()
    results = run(show=True)
    assert results["judged_by"] == "the teacher's first choice"
    assert results["config"]["judgements"] is None
    assert not results["check_on_dev"]["measured"]
    assert results["systems"]["teacher + student"]["RR@10"] == 1.0, "it is the judge"
    assert results["systems"]["student after"]["nDCG@10"] > results["systems"]["student before"]["nDCG@10"]
    printed = capsys.readouterr().out
    assert "Nobody has judged held-out queries" in printed
    assert "not how good either is" in printed


def test_queries_without_judgements_beside_judged_ones(run: Run, beir: Path, capsys: Any) -> None:
    """Left aside with a word; or taught by the teacher alone, with a control of the judged ones and as many steps."""
    lines = (beir / "qrels" / "train.tsv").read_text().splitlines(keepends=True)
    (beir / "qrels" / "train.tsv").write_text("".join(lines[:9]))
    aside = run(show=True)
    printed = capsys.readouterr().out
    assert "8 queries have no judgements: left aside; --unjudged" in printed
    assert aside["queries"]["train"] == aside["trainings"]["student after"][0]["lists"] == 8
    results = run(unjudged=True, control=True, show=True)
    assert "left aside" not in capsys.readouterr().out
    assert results["queries"] == {"train": 16, "dev": 16, "test": 16}
    (student,), (control,) = (results["trainings"][name] for name in ("student after", "student without a teacher"))
    assert (student["lists"], control["lists"]) == (16, 8)
    assert student["steps"] == control["steps"]
    (beir / "qrels" / "train.tsv").write_text("".join(lines))
    run(unjudged=True, show=True)
    assert "--unjudged adds nothing" in capsys.readouterr().out


def test_several_teachers_teach_with_their_mean(run: Run, tmp_path: Path, models: dict[str, str]) -> None:
    teachers = {"shared words": shared_words, "encoder": models["student"]}
    results = run(teacher=teachers, ensemble=False, epochs=1)
    stages = {name: tmp_path / "out" / folder for name, folder in results["stages"].items()}
    mean = TeacherScores.open(stages["mean-train"] / "teachers")
    parts = [TeacherScores.open(stages["teacher-train"] / f"teacher-{number}") for number in (1, 2)]
    assert mean.manifest["source"]["method"] == "combine"
    assert all(len(part) == len(mean) == 16 for part in parts)


def test_scores_that_are_there_are_taken(run: Run, tmp_path: Path, beir: Path) -> None:
    """Prevents the teacher from being asked again, and queries without scores from being trained on."""
    from st_m3se.distillation import open_data

    data, asked = open_data(beir), []
    scored = {split: list(data.qrels[split])[:9] for split in data.qrels}
    rows = [
        (query, documents, shared_words([(data.queries[query], data.corpus[document]) for document in documents]))
        for part in scored.values()
        for query in part
        for documents in [[*data.qrels["train"].get(query, {}), *list(data.corpus)[:5]]]
    ]
    rows = [(query, list(dict.fromkeys(ids)), scores[: len(dict.fromkeys(ids))]) for query, ids, scores in rows]
    TeacherScores.from_rows(rows, tmp_path / "scores")

    def teacher(pairs: list[tuple[str, str]]) -> list[float]:
        asked.extend(query for query, _ in pairs)
        return shared_words(pairs)

    results = run(scores=tmp_path / "scores", teacher={"words": teacher}, epochs=1, anyway=True)
    assert results["queries"] == {"train": 9, "dev": 16, "test": 16}
    assert set(asked) == {data.queries[q] for split in ("dev", "test") for q in data.qrels[split]} - {
        data.queries[q] for part in scored.values() for q in part
    }
    train = TeacherScores.open(tmp_path / "out" / results["stages"]["teacher-train"] / "teacher-1")
    assert {str(row.query_id): list(row.document_ids) for row in train} == {
        query: ids for query, ids, _ in rows if query in scored["train"]
    }


def lists_of(beir: Path, *, every: bool = True) -> list[tuple[str, list[str], list[float]]]:
    """Each query's relevant document, which no search need find, and the first five of the corpus."""
    from st_m3se.distillation import open_data

    data = open_data(beir)
    return [
        (query, ids, shared_words([(data.queries[query], data.corpus[document]) for document in ids]))
        for split in (data.qrels if every else ["train"])
        for query, relevant in data.qrels[split].items()
        for ids in [list(dict.fromkeys([*relevant, *list(data.corpus)[:5]]))]
    ]


def test_scores_that_are_no_teachers_are_refused(run: Run, tmp_path: Path, beir: Path) -> None:
    """Prevents ranks and BM25's scores from being taught as a teacher's."""
    store = tmp_path / "scores"
    TeacherScores.from_rows(lists_of(beir), store, manifest={"scale": "rank"})
    with pytest.raises(ValueError, match=r"has ranks and no scores.* --calibration log-rank"):
        run(scores=store)
    find_candidates(beir / "queries.jsonl", beir / "corpus.jsonl", ["bm25"], tmp_path / "run", depth=5)
    with pytest.raises(ValueError, match=r"the scores of a search for candidates.* st-m3se score"):
        run(scores=tmp_path / "run")


def test_scores_keep_their_teacher_and_held_out_lists_have_what_was_found(
    run: Run, tmp_path: Path, beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents one teacher's scores from being published as another's, and relevant documents that --include-positives
    put into held-out lists from making the teacher look better."""
    monkeypatch.setattr(lists, "DEPTH", 2)
    store = tmp_path / "scores"
    manifest = {"teacher": "hub/judge", "activation": "identity", "inputs": {"corpus": "of other texts"}}
    TeacherScores.from_rows(lists_of(beir), store, manifest=manifest)
    results = run(scores=store, epochs=1, anyway=True)
    assert results["teachers"] == ["hub/judge"]
    assert any("has the scores of hub/judge: it teaches" in note for note in results["notes"])
    assert any("where the text of an id has changed" in note for note in results["notes"])
    out = tmp_path / "out"
    taught = TeacherScores.open(out / results["stages"]["teacher-train"] / "teacher-1")
    assert (taught.manifest["teacher"], taught.manifest["activation"]) == ("hub/judge", "identity")
    assert "from hub/judge" in (out / "model" / "README.md").read_text()
    assert "Teacher: hub/judge" in (out / "report.html").read_text()
    runs = [
        lists.run_of(TeacherScores.open(out / results["stages"]["candidates"] / name), results["query_ids"])
        for name in ("bm25", "guide")
    ]
    test = TeacherScores.open(out / results["stages"]["teacher-test"] / "teacher-1")
    for row in test:
        best = [sorted(run[str(row.query_id)], key=run[str(row.query_id)].__getitem__)[-2:] for run in runs]
        allowed = {*chain.from_iterable(best)}
        assert {*map(str, row.document_ids)} <= allowed
    given = TeacherScores.open(store)
    assert any(len(given[q].document_ids) > len(test[q].document_ids) for q in results["query_ids"])


def test_published_probabilities_teach_without_their_model(run: Run, tmp_path: Path, beir: Path) -> None:
    """A file of others' scores, made logits of; its model is a name alone."""
    pairs = [
        (query, document, score)
        for query, ids, scores in lists_of(beir)
        for document, score in zip(ids, scores, strict=True)
    ]
    lines = [f"{query}\t{document}\t{1 / (1 + math.exp(-score)):.7f}" for query, document, score in pairs]
    (tmp_path / "published.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    convert(tmp_path / "published.tsv", tmp_path / "published")
    combine([tmp_path / "published"], tmp_path / "logits", calibration="logit")
    results = run(scores=tmp_path / "logits", teacher="a-model-that-is-nowhere", epochs=1, anyway=True)
    assert results["teachers"] == ["a-model-that-is-nowhere"]
    taught = TeacherScores.open(tmp_path / "out" / results["stages"]["teacher-train"] / "teacher-1")
    assert taught.manifest["teacher"] == "a-model-that-is-nowhere"
    for query, ids, scores in lists_of(beir, every=False):
        found = dict(zip(taught[query].document_ids, taught[query].scores, strict=True))
        assert [found[document] for document in ids] == pytest.approx(scores, abs=0.1)


def test_a_teacher_that_is_needed_is_looked_for_first(run: Run, tmp_path: Path, beir: Path) -> None:
    """Prevents a name that stands for a teacher who cannot be asked from being missed after hours of searching."""
    store = tmp_path / "scores"
    TeacherScores.from_rows(lists_of(beir, every=False), store, manifest={"teacher": "a-language-model"})
    with pytest.raises(ValueError, match=r"32 held-out queries have no scores in .* it cannot: a-language-model is no"):
        run(scores=store, teacher="a-language-model")
    assert not list((tmp_path / "out").glob("candidates-*"))


def test_bm25_may_match_bigrams(run: Run, beir: Path, tmp_path: Path) -> None:
    results = run(tokens="bigrams", epochs=1)
    manifest = TeacherScores.open(tmp_path / "out" / results["stages"]["candidates"] / "bm25").manifest
    assert "bigrams" in json.dumps(manifest)
    with pytest.raises(ValueError, match="tokens must be one of words, bigrams"):
        run(tokens="letters")


def test_a_loaded_teacher_that_was_trained_since_is_another_one(
    run: Run, tmp_path: Path, models: dict[str, str]
) -> None:
    model = CrossEncoder(models["teacher"], device="cpu")
    run(teacher=model, epochs=1, anyway=True)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    run(teacher=model, epochs=1, anyway=True)
    assert len(list((tmp_path / "out").glob("teacher-train-*"))) == 2


def test_a_function_and_an_api_teach_under_their_own_names(run: Run, tmp_path: Path) -> None:
    """And the report says what makes it again: no command line can name a function."""
    api = APITeacher(lambda query, documents: shared_words([(query, document) for document in documents]), "my-api")
    for teacher, name in ((shared_words, "example_fixtures.shared_words"), (api, "my-api")):
        results = run(teacher=teacher, epochs=1)
        assert results["config"]["teacher"] == (name,)
        again = f"st_m3se.distill(teacher={{{name!r}: ...}}, config=DistillationConfig.from_toml("
        assert results["command"].startswith(again)
        assert f"```python\n{again}" in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_pool_may_go_beyond_what_the_guide_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents BM25's documents from being without a score of the guide, which a large pool reaches."""
    monkeypatch.setattr(lists, "BM25_CANDIDATES", 1)
    monkeypatch.setattr(lists, "DEPTH", 5)
    results = run(pool=8, epochs=1)
    assert results["check_on_dev"]["measured"]


@pytest.mark.parametrize("file", ["model/precious.txt", "config.toml", "results.json", "notes/todo"])
def test_a_folder_of_the_user_s_is_left_alone(run: Run, tmp_path: Path, file: str) -> None:
    mine = tmp_path / "out" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"files in it that are not ours .* Name another output"):
        run()
    assert mine.read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file is a file\. Name another output"):
        run(output=tmp_path / "file")


def test_options_written_into_the_output_are_no_other_s_files(run: Run, tmp_path: Path, models: dict[str, str]) -> None:
    """`--write-config out/config.toml`, then `--config out/config.toml`."""
    config = DistillationConfig(
        data=str(tmp_path / "beir"),
        teacher=("shared words",),
        student=models["student"],
        output=str(tmp_path / "out"),
        **{name: value for name, value in FAST.items() if name != "show"},
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.toml").write_text(config.to_toml())
    assert run(config=config)["systems"]


@pytest.mark.parametrize(
    ("teacher", "student", "options", "message"),
    [
        ("trunk", "student", {}, "without a classification head"),
        ("teacher3", "student", {}, "has 3 labels"),
        ("teacher3", "student", {"teacher_label": 9}, "label=9 chooses"),
        ("teacher1", "student", {"device": "cuda:63"}, "device 'cuda:63' cannot be used here"),
        ("teacher1", "teacher1", {}, "teach with it"),
    ],
)
def test_what_cannot_teach_or_learn_is_refused_first(
    run: Run, models: dict[str, str], tmp_path: Path, teacher: str, student: str, options: dict[str, Any], message: str
) -> None:
    """Before the whole corpus is searched for candidates."""
    folder = Path(models["teacher"]).parent
    make_teacher(folder, 3)
    with pytest.raises(ValueError, match=message):
        run(teacher=str(folder / teacher), student=str(folder / student), **options)
    assert not list((tmp_path / "out").glob("*-*"))


def test_a_dry_run_counts_and_writes_nothing(run: Run, tmp_path: Path, models: dict[str, str], capsys: Any) -> None:
    planned = run(teacher=models["teacher"], dry_run=True, show=True)
    assert planned["pairs"] == {"train": 16 * 4, "dev": 16 * 8, "test": 16 * 8}
    assert planned["stages"][0][0] == "candidates"
    assert all(seconds > 0 for *_, seconds in planned["stages"])
    assert planned["seconds"] == pytest.approx(sum(seconds for *_, seconds in planned["stages"]))
    assert not (tmp_path / "out").exists()
    assert "64 pairs at" in capsys.readouterr().out


def test_a_loaded_student_is_left_alone(run: Run, tmp_path: Path, models: dict[str, str]) -> None:
    model = SentenceTransformer(models["student"], device="cpu")
    before = [p.detach().clone() for p in model.parameters()]
    run(student=model, epochs=1)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("option", ["teacher", "student", "guide"])
def test_a_slip_in_a_name_is_found_first(run: Run, option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no/such-model is no model"):
        run(**{option: "no/such-model"})
    assert not list((tmp_path / "out").glob("*-*"))


def test_two_processes_in_one_folder(run: Run, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="another process distils into"):
        run()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_where_an_unbroken_run_does(
    beir: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """Prevents half-written stages from being taken for whole ones, and trainings from going on elsewhere."""
    command = [sys.executable, str(HERE / "kill_process.py"), str(beir), models["student"], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    kills = int(done.stdout.split()[-1])
    assert kills >= 5
    whole, broken = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken"))
    for key in ("systems", "per_query", "against_student_after"):
        assert whole[key] == broken[key]
    curves = [
        {name: [each["curve"] for each in of["trainings"][name]] for name in of["trainings"]} for of in (whole, broken)
    ]
    assert curves[0] == curves[1]
    assert torch.equal(*(parameters(tmp_path / name / "model") for name in ("whole", "broken")))


@pytest.mark.slow
def test_two_launched_processes_end_where_one_does(beir: Path, models: dict[str, str], tmp_path: Path) -> None:
    """Without dropout, since processes draw other masks; sizes that leave whole batches."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    start = tmp_path / "still"
    SentenceTransformer(models["student"], device="cpu", config_kwargs=still).save_pretrained(str(start))
    options = ["--data", str(beir), "--teacher", models["teacher"], "--student", str(start), "--anyway"]
    options += ["--epochs", "2", "--learning-rate", "0.001", "--batch-size", "8", "--checkpoint-minutes", "0"]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --main_process_port 0"
    for name, launcher in (("two", launch.split()), ("one", [])):
        command = [sys.executable, *launcher, "-m", "st_m3se", "distill", *options, "--output", str(tmp_path / name)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["trainings"]["student after"][0]["steps"] == two["trainings"]["student after"][0]["steps"] == 4
    ends = [parameters(tmp_path / name / "model") for name in ("one", "two")]
    assert (ends[0] - parameters(start)).abs().max() > 1e-3
    assert (ends[0] - ends[1]).abs().max() < 1e-4
    assert one["systems"] == two["systems"]


def test_few_held_out_queries_refuse_nothing(run: Run, capsys: Any) -> None:
    """Prevents a handful of queries from deciding over a teacher, one way or the other."""
    results = run(teacher={"other": other_words}, dev_queries=5, epochs=1, show=True)
    assert not results["check_on_dev"]["measured"]
    assert "5 held-out queries are too few" in capsys.readouterr().out
