"""The example: run on a tiny BEIR folder with tiny random models, as the command it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("bm25s", "ir_measures", "scipy"):
    pytest.importorskip(package, reason=f'the example needs {package}: pip install -e ".[demo]"')

from example_fixtures import make_beir, make_student, make_teacher  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "distill_msmarco.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_example_distils_a_folder(tmp_path: Path) -> None:
    models = ["--student", make_student(tmp_path), "--teacher", make_teacher(tmp_path)]
    beir, output = make_beir(tmp_path / "beir"), tmp_path / "out"
    done = example("--data", beir, *models, "--output", output, "--quick")
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("student after", "whole corpus", "Model: ", "Check of the teacher"):
        assert words in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert results["queries"] == {"train": 16, "dev": 16, "test": 16}
    assert {"student without a teacher", "student after"} == set(results["trainings"])
    assert (output / "model" / "modules.json").is_file()


def test_bad_input_ends_with_one_message_and_code_2() -> None:
    done = example("--data", "no-such-folder", "--student", "s", "--teacher", "t")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: t is no model: there is no folder of this name")
