"""`st-m3se evaluate`, from its help to its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation.beir_folder import DOCUMENTS, QRELS, save_encoder, write_set
from evaluation.encoders import CORPUS, QUERIES
from retrieval.test_scoring import make_cross_encoder
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.evaluation import Results

FAST = ["--output", "out", "--no-plots", "--device", "cpu"]
BM25 = ["--data", "small", "--system", "bm25", *FAST]


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of `st-m3se evaluate`."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["evaluate", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small need not be collected one by one, which takes longer than what they do."""
    monkeypatch.setattr("st_m3se.evaluation.evaluation._free", lambda: None)


@pytest.fixture(scope="module")
def root(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets, models, a run and judgements."""
    folder = tmp_path_factory.mktemp("work")
    write_set(folder / "small")
    write_set(folder / "second")
    save_encoder("dense", checkpoint, folder / "student")
    save_encoder("dense", checkpoint, folder / "seed2", shift=0.05)
    save_encoder("sparse", checkpoint, folder / "splade")
    make_cross_encoder(checkpoint, folder / "judge")
    make_cross_encoder(checkpoint, folder / "three", labels=3)
    lines = [
        f"{query} Q0 {DOCUMENTS[(place + step) % 16]} {step + 1} {9 - step} x\n"
        for place, query in enumerate(QUERIES)
        for step in range(4)
    ]
    (folder / "top.run").write_text("".join(lines))
    judged = [f"{query} 0 {document} {grade}\n" for query, found in QRELS.items() for document, grade in found.items()]
    (folder / "qrels.dl99.txt").write_text("".join(judged))
    return folder


@pytest.fixture(autouse=True)
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own in which the files are known by their names."""
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def results() -> Results:
    return Results.load("out")


def means(measure: str = "nDCG@10", name: str = "small") -> dict[str, float]:
    return {system: float(values[measure].mean()) for system, values in results().values[name].items()}


def test_the_help_teaches() -> None:
    out, _ = run("--help")
    names = (
        "data set split qrels candidates queries corpus system run rerank rerank-depth first-stage kind query-prompt "
        "document-prompt max-length dtype measure depth baseline confidence no-exclude-same-id strict batch-size "
        "device cache no-plots diagnosis compare common-queries output"
    )
    for name in names.split():
        assert re.search(rf"--{name}\b", out), name
    assert out.count("st-m3se evaluate ") >= 5  # examples
    assert "report.html" in out


def test_systems_re_rankers_and_seeds_in_one_run() -> None:
    out, _ = run(
        *BM25,
        *("--data", "second", "--system", "ours=student,seed2", "--system", "splade"),
        *("--rerank", "judge", "--rerank-depth", "3", "--baseline", "bm25"),
    )
    for text in ("bm25", "ours", "bm25+judge", "nDCG@10", "wrote out: report.html"):
        assert text in out
    found = results()
    assert list(found.sets) == ["small", "second"]
    assert list(found.groups) == ["bm25", "ours", "splade", "bm25+judge", "ours+judge", "splade+judge"]
    assert found.groups["ours+judge"] == ("ours+judge-1", "ours+judge-2")
    assert found.systems["splade"]["kind"] == "sparse encoder"
    assert found.systems["splade+judge"]["depth"] == 3
    assert found.baseline == "bm25"
    for name in ("run.trec", "system.json"):
        assert Path("out/second/bm25+judge", name).is_file()
    stamp = Path("out/small/bm25/run.trec").stat().st_mtime_ns
    run(*BM25, "--system", "ours=student", "--system", "ours-b=seed2")
    assert Path("out/small/bm25/run.trec").stat().st_mtime_ns == stamp
    assert list(results().groups) == ["bm25", "ours", "ours-b"]


def test_a_repeated_name_is_another_seed() -> None:
    run("--data", "small", "--system", "ours=student", "--system", "ours=seed2", *FAST)
    assert results().groups == {"ours": ("ours-1", "ours-2")}


def test_runs_can_be_seeds_of_one_system() -> None:
    shutil.copy("top.run", "second.run")
    shutil.copy("top.run", "third,run")
    run("--data", "small", "--run", "ours=top.run,second.run", "--run", "ours=third,run", *FAST)
    assert results().groups == {"ours": ("ours-1", "ours-2", "ours-3")}
    assert means()["ours-1"] == means()["ours-3"]


def test_options_for_all_and_for_one() -> None:
    run(
        *BM25,
        *("--system", "one=student", "--system", "two=student", "--rerank", "judge", "--first-stage", "bm25"),
        *("--query-prompt", "find: ", "--query-prompt", "two=count: ", "--max-length", "one=9", "--max-length", "20"),
        *("--max-length", "judge=30", "--dtype", "bfloat16"),
    )
    systems = results().systems
    assert systems["one"]["prompts"]["query"] == "find: "
    assert systems["two"]["prompts"]["query"] == "count: "
    assert [systems[name]["max_length"] for name in ("one", "two", "bm25+judge")] == [9, 20, 30]
    assert {systems[name]["dtype"] for name in ("one", "two", "bm25+judge")} == {"bfloat16"}
    assert "one+judge" not in systems


def test_what_a_re_ranker_could_not_do_is_said() -> None:
    """A teacher over BM25's first documents looks worse than a student that searched the whole corpus."""
    out, _ = run(*BM25, "--rerank", "judge", "--rerank", "student", "--rerank-depth", "2")
    text = " ".join(out.split())
    relevant = [(query, document) for query, found in QRELS.items() for document, grade in found.items() if grade > 0]
    lists = [line.split() for line in Path("out/small/bm25/run.trec").read_text().splitlines()]
    shown = {(query, document) for query, _, document, rank, *_ in lists if int(rank) <= 2}
    missed = [pair for pair in relevant if pair not in shown]
    share = f"{1 - len(missed) / len(relevant):.0%}"
    assert missed
    assert f"bm25+judge: relevant documents that it was not shown: {len(missed)}" in text
    assert f"the first 2 documents of bm25 hold {share} of the relevant ones" in text
    assert "bm25+student: re-ranks with a bi-encoder: 1 (student)" in text
    assert "bm25+judge: re-ranks" not in text


def test_the_kind_can_be_said() -> None:
    run("--data", "small", "--system", "dense=student", "--system", "other=student", "--kind", "other=sparse", *FAST)
    assert {name: system["kind"] for name, system in results().systems.items()} == {
        "dense": "bi-encoder",
        "other": "sparse encoder",
    }


def test_runs_are_measured_without_texts() -> None:
    options = ["--measure", "nDCG@10", "--measure", "RR(rel=2)@10", *FAST]
    run("--qrels", "qrels.dl99.txt", "--run", "top.run", "--run", "mine=top.run", *options)
    found = results()
    assert list(found.sets) == ["dl99"]
    assert found.measures == ("nDCG@10", "RR(rel=2)@10")
    assert means("RR(rel=2)@10", "dl99") == {"top": 1.0, "mine": 1.0}


def test_a_given_run_is_re_ranked() -> None:
    run("--data", "small", "--candidates", "top.run", "--system", "student", "--rerank", "judge", *FAST)
    found = results()
    assert found.sets["small"].form == "re-ranking"
    assert list(found.systems) == ["candidates", "student", "judge"]
    assert len(set(means("AP").values())) == 3
    assert len(set(means("R@100").values())) == 1


def test_without_another_system_runs_are_re_ranked() -> None:
    run("--data", "small", "--run", "first=top.run", "--rerank", "ce=judge", *FAST)
    assert list(results().systems) == ["first", "first+ce"]


def test_files_by_set() -> None:
    shutil.copy("top.run", "second.run")
    shutil.copy("top.run", "small.run")
    sets = ["--data", "small", "--data", "second", "--system", "bm25", *FAST]
    run(*sets, "--run", "given={set}.run", "--candidates", "{set}.run")
    assert results().sets["second"].form == "re-ranking"
    _, err = run(*sets, "--candidates", "small.run", code=1)
    assert "write {set} where the set's name is" in err


def test_two_evaluations_are_compared(folder: Path) -> None:
    run(*BM25)
    shutil.move("out", "a")
    run("--data", "small", "--system", "student", *FAST)
    shutil.move("out", "b")
    out, _ = run("--compare", "a/results.json", "b", "--baseline", "bm25")
    assert "bm25" in out
    assert "student" in out
    assert not (folder / "out").exists()
    run("--compare", "a", "b", "--output", "out", "--no-plots")
    assert list(results().systems) == ["bm25", "student"]
    assert Path("out/report.html").is_file()
    write_set(folder / "changed" / "small", corpus={**CORPUS, "empty": "no more"})
    run("--data", "changed/small", "--system", "bm25", "--output", "c", "--no-plots", "--device", "cpu")
    _, err = run("--compare", "a", "c", code=1)
    assert "not the same everywhere" in err
    run("--compare", "a", "c", "--common-queries")


def test_a_diagnosis_becomes_a_section_of_the_page() -> None:
    look = ["diagnose", "--data", "small", "--scorer", "bm25", "--depth", "4", "--resamples", "5", "-o", "look"]
    assert CliRunner().invoke(app, look).exit_code == 0
    run(*BM25, "--diagnosis", "look")
    page = Path("out/report.html").read_text()
    assert '<h2 id="section-1-title">How the scorers separate relevant documents: small test</h2>' in page
    assert page.count("data:image/svg+xml;base64,") == 2
    run("--compare", "out", "--diagnosis", "look", "--output", "compared", "--no-plots")
    assert Path("compared/report.html").read_text().count("data:image/svg+xml;base64,") == 2
    _, err = run("--data", "small", "--system", "bm25", "--diagnosis", "small", "--output", "other", code=1)
    assert "`st-m3se diagnose` makes one" in err
    assert not Path("other").exists(), "the diagnosis should be looked at before anything is made"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "bm25", *FAST], "name what to evaluate on"),
        (["--data", "small", *FAST], "name what to evaluate, such as --system bm25"),
        (["--data", "small", "--system", "bm25"], "name the folder of runs and report"),
        (["a.json", *BM25], "--compare"),
        (["--compare"], "name the results.json files"),
        (["--queries", "q.jsonl", *BM25], "--queries and --corpus go with --qrels"),
        (["--depth", "0", *BM25], "Invalid value for '--depth'"),
    ],
    ids=str,
)
def test_a_wrong_command_line_exits_with_2(arguments: list[str], message: str) -> None:
    _, err = run(*arguments, code=2)
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--system", "bm25"], "no such folder"),
        (["--set", "not-a-set", "--system", "bm25"], "no BEIR set of this name"),
        (["--data", "small", "--split", "dev", "--system", "bm25"], "dev"),
        (["--data", "small", "--strict", "--system", "bm25"], "empty documents: 1 (empty)"),
        (["--data", "small", "--system", "bm25", "--measure", "nDCG"], None),
        (["--data", "small", "--system", "bm25", "--measure", "mystery@3"], "mystery@3"),
        (
            ["--data", "small", "--system", "bm25", "--measure", "R@100", "--depth", "10"],
            "R@100 looks at more than the 10",
        ),
        (["--data", "small", "--system", "bm25", "--baseline", "bm26"], "there are bm25"),
        (["--data", "small", "--system", "bm25", "--system", "bm25"], "--system NAME=bm25"),
        (["--data", "small", "--system", "student,seed2"], "NAME=student,seed2"),
        (["--data", "small", "--run", "top.run,second.run"], "name it: NAME=top.run,second.run"),
        (["--data", "small", "--run", "top.run", "--run", "./top.run"], "--run NAME=./top.run"),
        (["--data", "small", "--system", "bm25", "--run", "bm25=top.run"], "two systems would be named 'bm25'"),
        (["--data", "small", "--system", "bm25", "--kind", "x=sparse"], "--kind is for 'x', which is no system here"),
        (["--data", "small", "--system", "bm25", "--kind", "bm25=sparse"], "'bm25' does not take it"),
        (
            ["--data", "small", "--system", "bm25", "--rerank", "judge", "--query-prompt", "judge=find: "],
            "--query-prompt judge=find: : 'judge' does not take it, so that it would change nothing",
        ),
        (["--data", "small", "--system", "bm25", "--query-prompt", "find: "], "no system here takes it"),
        (["--data", "small", "--system", "student", "--label", "1"], "no system here takes it"),
        (["--data", "small", "--system", "bm25", "--rerank", "judge", "--max-length", "9"], "no system here takes it"),
        (["--data", "small", "--system", "student", "--tokens", "bigrams"], "--tokens bigrams is for BM25"),
        (["--data", "small", "--system", "a=student", "--system", "a=bm25"], "'a' has BM25, which has no seeds"),
        (["--data", "small", "--system", "a=student,student"], "'a' has the same one twice"),
        (["--data", "small", "--system", "student", "--kind", "vague"], "--kind must be one of bi-encoder, sparse"),
        (["--data", "small", "--system", "student", "--max-length", "long"], "--max-length must be a number"),
        (["--data", "small", "--system", "bm25", "--first-stage", "bm25"], "there is no --rerank"),
        (["--data", "small", "--system", "bm25", "--rerank", "judge", "--first-stage", "x"], "there are bm25"),
        (["--data", "small", "--system", "judge"], "is a cross-encoder"),
        (["--data", "small", "--system", "no/such-model"], "no/such-model is no model"),
        (["--data", "small", "--system", "bm25", "--rerank", "small"], "small is no model"),
        (["--data", "small", "--system", "bm25", "--rerank", "three"], "has 3 labels"),
        (["--data", "small", "--system", "bm25", "--rerank", "three", "--label", "x"], "--label must be a number"),
        (["--data", "small", "--system", "bm25", "--tokens", "letters"], "tokens must be"),
        (["--data", "small", "--run", "absent.run"], "there is no such file"),
        (["--data", "small", "--run", "qrels.dl99.txt"], "no run"),
        (["--qrels", "qrels.dl99.txt", "--system", "bm25"], "finished runs (--run)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_is_one_line_with_a_remedy(arguments: list[str], message: Any) -> None:
    if message is None:  # a measure without a cut-off is one, too
        run(*arguments, *FAST)
        return
    _, err = run(*arguments, *FAST, code=1)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.strip().endswith(lines[0].strip()), "the error should be the last thing said"
    assert message in lines[0]
    assert "Traceback" not in err


def test_labels_and_remote_code_and_tokens_reach_the_systems() -> None:
    more = ["--label", "three=2", "--trust-remote-code", "--tokens", "bigrams"]
    run("--data", "small", "--system", "bm25", "--rerank", "three", *more, *FAST)
    systems = json.loads(Path("out/results.json").read_text())["systems"]
    assert systems["bm25"]["tokens"] == "bigrams"
    assert systems["bm25+three"]["label"] == 2


def test_a_changed_system_is_refused_by_name() -> None:
    run("--data", "small", "--system", "ours=student", *FAST)
    _, err = run("--data", "small", "--system", "ours=seed2", *FAST, code=1)
    assert "system.model was 'student' and is 'seed2'" in err
    run("--data", "small", "--system", "ours=student", "--no-exclude-same-id", *FAST[2:], "--output", "else")
    assert json.loads(Path("else/results.json").read_text())["settings"]["exclude_same_id"] is False
