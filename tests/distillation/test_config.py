"""One source of options: the class, the flags and the TOML file say the same."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from st_m3se.cli import app
from st_m3se.distillation import DistillationConfig

GIVEN = {
    "data": "my data",
    "teacher": ("a", 'b "quoted"'),
    "student": "s",
    "train_queries": 7,
    "judgements": False,
    "scale": 30.0,
    "seeds": (1, 2),
    "false_negatives": "relabel",
    "false_negative_margin": 0.5,
}


def test_a_file_holds_every_option_and_comes_back(tmp_path: Path) -> None:
    config = DistillationConfig().with_options(GIVEN)
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert DistillationConfig.from_toml(tmp_path / "c.toml") == config
    text = DistillationConfig().to_toml()
    assert all(f"\n{each.name} = " in text or f"\n# {each.name} =" in text for each in fields(DistillationConfig))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('lerning_rate = 1e-4\nteacher = "t"', "c.toml: there is no option lerning_rate"),
        ("epochs = true", "c.toml: epochs must be a number"),
        ("scored = 1", "scored must be at least 2"),
        ("batch_size = 1.5", "batch_size must be a whole number"),
        ('loss = "mse"', "loss must be one of combined"),
        ("seeds = [1, 1]", "seeds must hold"),
        ("teacher = [1]", "teacher must be a text, or several"),
        ("learning_rate = nan", "learning_rate must be a finite number"),
        ("no toml", "c.toml: no TOML"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        DistillationConfig.from_toml(tmp_path / "c.toml")
    done = CliRunner().invoke(app, ["distill", "--config", str(tmp_path / "c.toml")])
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert words.split(": ")[-1].split(" must ")[-1] in done.output


def test_flags_win_over_the_file_and_the_result_is_written(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('teacher = "t"\nepochs = 3\nensemble = true\n', encoding="utf-8")
    out = tmp_path / "all.toml"
    arguments = ["--config", str(tmp_path / "c.toml"), "--epochs", "2", "--no-ensemble", "--seeds", "4", "--seeds", "5"]
    done = CliRunner().invoke(app, ["distill", *arguments, "--write-config", str(out)])
    assert done.exit_code == 0, done.output
    expected = DistillationConfig(teacher=("t",), epochs=2.0, ensemble=False, seeds=(4, 5))
    assert DistillationConfig.from_toml(out) == expected


def test_what_is_missing_is_named() -> None:
    for arguments, words in ([], "data is missing"), (["--quick"], "--quick belongs to --demo"):
        done = CliRunner().invoke(app, ["distill", *arguments])
        assert done.exit_code == 1
        assert words in done.output
