from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
from scores.score_samples import AMBIGUOUS, SAMPLES, write_sample
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.scores import TeacherScores
from st_m3se.scores.convert import DESTINATIONS, SOURCES


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of `st-m3se convert`."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["convert", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_help_names_every_format_and_option() -> None:
    out, _ = run("--help")
    text = " ".join(out.split())
    for word in (*SOURCES, *DESTINATIONS):
        assert word in text
    for option in ["from", "to", "on-error", "ids", "scores", "qrels", "column", "teacher", "overwrite"]:
        assert f"--{option}" in text
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "convert" in result.stdout


@pytest.mark.parametrize("name", ["colbert", "ranking"])
def test_it_says_which_format_it_took(tmp_path: Path, name: str) -> None:
    path = write_sample(tmp_path, name)
    named = ["--from", name] if name in AMBIGUOUS else []
    out, err = run(path, tmp_path / "store", "--teacher", "my/teacher", *named)
    assert out.startswith(f"read {path} as {name}: ")
    assert f"wrote {tmp_path / 'store'} as store" in out
    assert err == ""
    assert TeacherScores.open(tmp_path / "store").manifest["teacher"] == "my/teacher"


def test_there_and_back(tmp_path: Path) -> None:
    run(write_sample(tmp_path, "colbert"), tmp_path / "store")
    run(tmp_path / "store", tmp_path / "out.run.gz")
    assert gzip.decompress((tmp_path / "out.run.gz").read_bytes()).startswith(b"7 Q0 1 1 9.5 out\n")
    run(tmp_path / "store", tmp_path / "two.trec", "--tag", "minilm")
    assert (tmp_path / "two.trec").read_text().startswith("7 Q0 1 1 9.5 minilm\n")
    run(tmp_path / "store", tmp_path / "a name.run")  # two runs of one tag are one run to other tools
    assert (tmp_path / "a name.run").read_text().startswith("7 Q0 1 1 9.5 a_name\n")
    run(tmp_path / "out.run.gz", tmp_path / "again", "--ids", "int")
    assert TeacherScores.open(tmp_path / "again")[7] == TeacherScores.open(tmp_path / "store")[7]


@pytest.mark.parametrize("destination", ["store", "out.run"])
def test_a_sigmoid_is_noted(tmp_path: Path, destination: str) -> None:
    """Whoever publishes or converts such scores sees it before a student does."""
    (tmp_path / "kd.jsonl").write_text('{"query_id": "q", "document_ids": ["a", "b"], "scores": [0.998, 0.003]}\n')
    out, _ = run(tmp_path / "kd.jsonl", tmp_path / destination)
    assert "note: all scores lie in [0, 1], as a sigmoid's outputs do" in out
    (tmp_path / "raw.jsonl").write_text('{"query_id": "q", "document_ids": ["a", "b"], "scores": [6.2, -5.8]}\n')
    assert "note:" not in run(tmp_path / "raw.jsonl", tmp_path / f"raw-{destination}")[0]


def test_a_bad_line_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(SAMPLES["trec"] + b"7 Q0 d9 4 high bm25\n")
    out, err = run(path, tmp_path / "store", code=1)
    assert out == ""
    assert err == f"error: {path}:4: score must be a number, got 'high'.\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    out, err = run(path, tmp_path / "store", "--on-error", "skip")
    assert f"read {path} as trec: 2 queries, 3 scores" in out
    assert err == f"{path}:4: score must be a number, got 'high'.\nskipped 1 bad entries\n"


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    path = write_sample(tmp_path, "trec")
    assert "there is no such file" in run(tmp_path / "lost", tmp_path / "x", code=1)[1]
    assert "does not say what to write" in run(path, tmp_path / "x.docx", code=1)[1]
    (tmp_path / "x.csv").write_text("mine")
    assert "exists" in run(path, tmp_path / "x.csv", code=1)[1]
    assert (tmp_path / "x.csv").read_text() == "mine"
    run(path, tmp_path / "x.csv", "--overwrite")
    assert "expected COLUMN=NAME" in run(path, tmp_path / "y", "--column", "query", code=2)[1]
    assert "no format 'word'" in run(path, tmp_path / "y", "--from", "word", code=1)[1]
    run(tmp_path / "x.csv", tmp_path / "y", "--from", "csv", "--column", "score=score")


def test_it_runs_as_a_module_without_torch(tmp_path: Path) -> None:
    path = write_sample(tmp_path, "trec")
    code = (
        "import sys; from st_m3se.cli import app; assert not {'torch', 'datasets', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "st_m3se", "convert", str(path), str(tmp_path / "store")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "as trec" in done.stdout
