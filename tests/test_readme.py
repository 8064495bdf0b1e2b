"""The README's Python blocks run as they stand, with a tiny model in place of the named one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_readme_shows_the_trainer_and_fit() -> None:
    """Guards the next test against running nothing."""
    assert len(BLOCKS) >= 2
    assert any("SentenceTransformerTrainer(" in block for block in BLOCKS)
    assert any("model.fit(" in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who pastes a block gets a trained model, not an exception."""
    monkeypatch.chdir(tmp_path)
    assert MODEL in block
    namespace: dict = {}
    exec(compile(block.replace(MODEL, str(checkpoint)), "README.md", "exec"), namespace)
    before = namespace["SentenceTransformer"](str(checkpoint)).state_dict()
    after = namespace["model"].state_dict()
    assert any(not before[name].equal(value.cpu()) for name, value in after.items())
