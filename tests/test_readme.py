"""The README's Python blocks run as they stand, with a tiny model in place of the named one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from example_fixtures import make_beir, make_student, make_teacher
from students import trunk_config, untrained
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.scores import TeacherScores

README = Path(__file__).parents[1] / "README.md"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXT = README.read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
BLOCKS = [block for block in PYTHON if MODEL in block]
COMMANDS = re.findall(r"^st-m3se ([^#\n]+)", TEXT, flags=re.MULTILINE)
CROSS_ENCODER = "cross-encoder/ms-marco-MiniLM-L6-v2"


def test_the_readme_shows_the_trainer_and_fit() -> None:
    """Guards the next test against running nothing."""
    assert len(BLOCKS) >= 2
    assert any("SentenceTransformerTrainer(" in block for block in BLOCKS)
    assert any("model.fit(" in block for block in BLOCKS)


def type_commands(*names: str, **replaced: str) -> None:
    """Type the README's commands of these names, in its order."""
    typed = [command for command in COMMANDS if command.split()[0] in names]
    assert len(typed) >= len(names)
    for command in typed:
        words = [replaced.get(word, word) for word in command.split()]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


def run(code: str, checkpoint: Path, file: str = "README.md") -> dict[str, Any]:
    """Run code with a tiny model in place of the named one, and see that it was trained."""
    namespace: dict[str, Any] = {}
    exec(compile(code.replace(MODEL, str(checkpoint)), file, "exec"), namespace)
    before = namespace["SentenceTransformer"](str(checkpoint)).state_dict()
    after = namespace["model"].state_dict()
    assert any(not before[name].equal(value.cpu()) for name, value in after.items())
    return namespace


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who pastes a block gets a trained model, not an exception."""
    monkeypatch.chdir(tmp_path)
    run(block, checkpoint)


def test_the_steps_end_in_a_model_that_is_used(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands, the example behind them, and the README's way to use what it saved."""
    monkeypatch.chdir(tmp_path)
    make_beir(tmp_path / "my-data")
    teacher = make_teacher(tmp_path)
    type_commands("candidates", "score", "describe", **{MODEL: str(checkpoint), CROSS_ENCODER: str(teacher)})
    example = README.with_name("examples") / "step_by_step.py"
    namespace = run(example.read_text(encoding="utf-8"), checkpoint, str(example))
    logged = [entry for entry in namespace["trainer"].state.log_history if "eval_dev_kendall_tau" in entry]
    assert len(logged) >= 2
    dev, train = ({row["query"] for row in namespace[f"{part}_dataset"]} for part in ("dev", "train"))
    assert not dev & train
    trained = {name: value.cpu() for name, value in namespace["model"].state_dict().items()}
    (use,) = [code for code in PYTHON if 'SentenceTransformer("distilled/model")' in code]
    exec(compile(use, "README.md", "exec"), namespace)
    assert all(trained[name].equal(value.cpu()) for name, value in namespace["model"].state_dict().items())
    assert namespace["small"].dtype == "int8"


@pytest.mark.parametrize(
    ("name", "kind", "auto"),
    [
        ("distilbert/distilbert-base-uncased", "distilbert", AutoModelForMaskedLM),
        ("answerdotai/ModernBERT-base", "modernbert", AutoModel),
    ],
)
def test_other_students_train_on_the_first_block_s_rows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, auto: Any
) -> None:
    """In 15 lines each, with a tiny model of the kind that is named."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    untrained(auto, trunk_config(kind, tokenizer)).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    namespace: dict = {}
    exec(compile(BLOCKS[0].replace(MODEL, str(checkpoint)), "README.md", "exec"), namespace)
    (block,) = [block for block in PYTHON if name in block]
    assert len(block.splitlines()) <= 16
    code, _, training = block.replace(name, "tiny").partition("trainer.train()")
    exec(compile(code, "README.md", "exec"), namespace)
    before = {key: value.clone() for key, value in namespace["model"].state_dict().items()}
    exec(compile(f"trainer.train(){training}", "README.md", "exec"), namespace)
    assert any(not before[key].equal(value.cpu()) for key, value in namespace["model"].state_dict().items())


def test_the_convert_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed from the README in order: convert, and convert back."""
    monkeypatch.chdir(tmp_path)
    Path("kd.jsonl").write_text('{"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [9.5, -3.0]}\n')
    type_commands("convert")
    assert Path("kd.run.gz").is_file()
    assert TeacherScores.open("scores")["q1"].scores == [9.5, -3.0]


def test_the_combine_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("scores-minilm", "scores-bge"):
        TeacherScores.from_rows([("q1", ["d1", "d2"], [9.5, -3.0])], tmp_path / name)
    TeacherScores.from_rows([("q1", ["d1", "d2"], [-1.0, -2.0])], tmp_path / "llm-order", manifest={"scale": "rank"})
    type_commands("combine")
    assert TeacherScores.open("scores")["q1"].scores == pytest.approx([0.0, -0.6931], abs=1e-4)
    assert TeacherScores.open("scores-both")["q1"].scores == [6.25, -6.25]  # their spread, without their mean


def test_the_evaluation_and_diagnosis_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first folder of the session goes through everything that follows training."""
    monkeypatch.chdir(tmp_path)
    make_beir(tmp_path / "my-data")
    student, teacher = make_student(tmp_path), make_teacher(tmp_path)
    Path("distilled").mkdir()
    student.rename("distilled/model")
    models = {f"before={MODEL}": "before=distilled/model", f"teacher={CROSS_ENCODER}": f"teacher={teacher}"}
    type_commands("evaluate", "diagnose", **models)
    assert "student" in Path("evaluation/report.html").read_text(encoding="utf-8")
    assert Path("diagnosis/margins.png").is_file()
