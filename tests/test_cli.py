"""What holds for all commands: the way in, and errors in the words of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import st_m3se
from st_m3se.cli import COMMANDS, app
from st_m3se.cli.errors import flags_of, in_flags
from st_m3se.scores import TeacherScores


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_the_way_in() -> None:
    """The version, and the commands in the order in which they are used."""
    assert run("--version")[0] == f"st-m3se {st_m3se.__version__}\n"
    out, _ = run("--help")
    steps = re.findall(r"^ *(?:\d\.)? (candidates|score|evaluate|diagnose) ", out, flags=re.MULTILINE)
    assert steps == ["candidates", "score", "evaluate", "diagnose"]


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_each_help_has_an_example(command: str) -> None:
    assert f"st-m3se {command} " in run(command, "--help")[0].split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "expected", "python"),
    [
        (["convert", "store", "store2"], "or --overwrite to replace it", "overwrite=True"),
        (["combine", "store", "other", "both"], "or --missing drop leaves them out", "missing="),
        (["combine", "flat", "flat", "both"], "--spread 1.0 gives", "spread="),
        (["combine", "store", "other", "both", "--spread", -1], "--spread is a positive number", "error: spread"),
        (["convert", "store", "out.tsv"], "Name the positives (--qrels)", "qrels="),
        (["convert", "store", "out.word"], "a store, or --to", "destination_format"),
        (["convert", "three.tsv", "out"], "Say which format it is (--from)", "format="),
        (["convert", "odd.csv", "out", "--from", "csv"], "--column document_id=NAME.", "columns="),
        (["candidates", "--data", "beir", "--split", "tset", "out"], "Choose one: --split", "split="),
        (["evaluate", "--data", "beir", "--split", "tset", "--system", "bm25", "-o", "o"], "one: --split", "split="),
        (["diagnose", "--data", "beir", "--split", "tset", "--scorer", "bm25", "-o", "o"], "one: --split", "split="),
    ],
)
def test_an_error_names_the_command_s_own_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], expected: str, python: str
) -> None:
    """Nobody at a prompt can type overwrite=True."""
    monkeypatch.chdir(tmp_path)
    for name, query in (("store", "q1"), ("store2", "q1"), ("other", "q2")):
        TeacherScores.from_rows([(query, ["d1", "d2"], [9.5, -3.0])], tmp_path / name)
    TeacherScores.from_rows([("q1", ["d1", "d2"], [1.0, 1.0])], tmp_path / "flat")
    Path("three.tsv").write_text("q1\td1\t1\n")
    Path("odd.csv").write_text("query_id,passage,score\nq1,d1,2.5\n")
    Path("beir/qrels").mkdir(parents=True)
    for name, text in (("queries", '{"_id": "q1", "text": "a"}\n'), ("corpus", '{"_id": "d1", "text": "a"}\n')):
        Path(f"beir/{name}.jsonl").write_text(text)
    for split in ("dev", "test"):
        Path(f"beir/qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    _, error = run(*arguments, code=1)
    assert expected in error
    assert python not in error
    if "tset" in arguments:
        assert "there are dev, test." in error


def test_only_what_a_command_has_becomes_a_flag() -> None:
    flags = flags_of(next(command for command in COMMANDS if command.__name__ == "evaluate"))
    assert in_flags("exclude_same_id=False, or batch_size=8", flags) == "--no-exclude-same-id, or --batch-size 8"
    distill = flags_of(next(command for command in COMMANDS if command.__name__ == "distill"))
    assert in_flags("Say it (label=...)", distill) == "Say it (--teacher-label)"
    assert in_flags("Did you mean 'generate_queries'?", distill) == "Did you mean 'generate_queries'?"
    for kept in ("system.max_length was 8", "tau=0.5", "my_data/max_length=3x.y/a", "depth(3)", "--max-length=3"):
        assert in_flags(kept, flags) == kept
