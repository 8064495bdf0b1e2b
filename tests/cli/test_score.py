from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retrieval.test_scoring import CANDIDATES, CORPUS, QUERIES, TEXTS, make_cross_encoder
from sentence_transformers import CrossEncoder
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.scores import TeacherScores


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of `st-m3se score`."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        app, ["score", *map(str, arguments)]
    )
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher, candidates and texts as files, and the folder as the working directory."""
    make_cross_encoder(checkpoint, tmp_path / "teacher")
    make_cross_encoder(checkpoint, tmp_path / "other", seed=1)
    rows = (
        (query, [f"d{document}" for document in listed], np.zeros(len(listed))) for query, listed in CANDIDATES.items()
    )
    TeacherScores.from_rows(rows, tmp_path / "run")
    for name, prefix, texts in (("queries", "", QUERIES), ("corpus", "d", CORPUS)):
        lines = [json.dumps({"_id": f"{prefix}{key}", "text": text}) for key, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = ["--candidates", "run", "--queries", "queries.jsonl", "--corpus", "corpus.jsonl"]


def expected(teacher: str) -> np.ndarray:
    return CrossEncoder(teacher, device="cpu").predict(TEXTS, activation_fn=torch.nn.Identity())


def flat(store: TeacherScores) -> np.ndarray:
    return np.concatenate([row.scores for row in store])


def test_the_help_names_every_option() -> None:
    out, _ = run("--help")
    names = (
        "teacher candidates queries corpus max-length dtype prompt batch-tokens shard-queries device backend revision"
    )
    for option in [*names.split(), "trust-remote-code"]:
        assert f"--{option}" in out
    assert "accelerate launch -m st_m3se score" in " ".join(out.split())


def test_it_scores_and_goes_on_and_says_what_differs(folder: Path) -> None:
    out, _ = run("out", "--teacher", "teacher", *FILES, "--device", "cpu", "--shard-queries", 4)
    assert out == "wrote out: 16 queries, 36 scores of teacher (float32, max length 64)\n"
    np.testing.assert_allclose(flat(TeacherScores.open("out")), expected("teacher"), atol=1e-5)
    assert run("out", "--teacher", folder / "teacher", *FILES, "--device", "cpu")[0] == out  # the weights are the same
    _, err = run("out", "--teacher", "teacher", *FILES, "--device", "cpu", "--max-length", 32, code=1)
    assert "--max-length was 64 and is 32" in err
    assert err.count("\n") <= 3


def test_several_teachers(folder: Path) -> None:
    out, _ = run("out", "--teacher", "teacher", "--teacher", "other/", *FILES, "--device", "cpu")
    assert out.count("wrote") == 2
    for name in ("teacher", "other"):
        np.testing.assert_allclose(flat(TeacherScores.open(folder / "out" / name)), expected(name), atol=1e-5)
    assert "two of the teachers" in run("x", "--teacher", "a/t", "--teacher", "b/t", *FILES, code=2)[1]


def test_errors_are_one_line(folder: Path) -> None:
    _, err = run("out", "--teacher", "teacher", "--candidates", "lost", *FILES[2:], code=1)
    assert err == "error: lost: there is no such file or folder.\n"
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "text": "alone"}\n')
    _, err = run("out", "--teacher", "teacher", *FILES, "--device", "cpu", code=1)
    assert "are not in the corpus" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_an_interrupt_says_what_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = CrossEncoder.forward, []

    def stopped(*given: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return forward(*given, **options)

    monkeypatch.setattr("st_m3se.retrieval.teacher_models.FETCH_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, "forward", stopped)
        _, err = run("out", "--teacher", "teacher", *FILES, "--device", "cpu", "--batch-tokens", 200, code=130)
    saved = int(err.splitlines()[-1].split()[1])
    assert 2 < saved < 36
    assert err.splitlines()[-1] == f"stopped, {saved} of 36 pairs saved; the same command continues."
    run("out", "--teacher", "teacher", *FILES, "--device", "cpu")
    np.testing.assert_allclose(flat(TeacherScores.open("out")), expected("teacher"), atol=1e-5)


@pytest.mark.slow
def test_torchrun_divides_the_shards(folder: Path) -> None:
    """Two real processes under the launcher; accelerate launch starts them by the same module."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "st_m3se"]
    done = subprocess.run(
        [*command, "score", "out", "--teacher", "teacher", *FILES, "--device", "cpu", "--shard-queries", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote out: 16 queries, 36 scores") == 1, "said once"
    np.testing.assert_allclose(flat(TeacherScores.open("out")), expected("teacher"), atol=1e-5)
