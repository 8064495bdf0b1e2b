"""The README's Python blocks run as they stand, with a tiny model in place of the named one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from st_m3se.cli import app

README = Path(__file__).parents[1] / "README.md"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXT = README.read_text(encoding="utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
BLOCKS = [block for block in PYTHON if MODEL in block]
COMMANDS = re.findall(r"^st-m3se ([^#\n]+)", TEXT, flags=re.MULTILINE)


def test_the_readme_shows_the_trainer_and_fit() -> None:
    """Guards the next test against running nothing."""
    assert len(BLOCKS) >= 2
    assert any("SentenceTransformerTrainer(" in block for block in BLOCKS)
    assert any("model.fit(" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who pastes a block gets a trained model, not an exception."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(block.replace(MODEL, str(checkpoint)), "README.md", "exec"), namespace)
    before = namespace["SentenceTransformer"](str(checkpoint)).state_dict()
    after = namespace["model"].state_dict()
    assert any(not before[name].equal(value.cpu()) for name, value in after.items())


def test_the_score_commands_and_code_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed from the README in order: convert, convert back, open."""
    monkeypatch.chdir(tmp_path)
    Path("kd.jsonl").write_text('{"query_id": "q1", "document_ids": ["d1", "d2"], "scores": [9.5, -3.0]}\n')
    assert len(COMMANDS) >= 2
    for command in COMMANDS:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
    assert Path("kd.run.gz").is_file()
    (block,) = [block for block in PYTHON if "TeacherScores" in block]
    exec(compile(block, "README.md", "exec"), {})
    assert "['d1', 'd2'] [9.5, -3.0]" in capsys.readouterr().out
