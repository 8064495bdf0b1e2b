"""The reproduction with tiny random models: every exhibit, and again without training anything."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("bm25s", "ir_measures", "matplotlib", "rich"):
    pytest.importorskip(package, reason=f'the example needs {package}: pip install -e ".[demo,plot]"')

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import paper_summary  # noqa: E402
import paper_training  # noqa: E402
import reproduce_paper  # noqa: E402
from paper_task import open_task  # noqa: E402
from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402

from st_m3se.data.qrels import read_qrels  # noqa: E402
from st_m3se.scores import TeacherScores  # noqa: E402

LOSSES = ["m3se", "softmax-cross-entropy"]


@pytest.fixture(scope="module")
def command(beir: Path, student: Path, cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("paper") / "out"
    options: dict[str, Any] = {
        "data": beir,
        "student": student,
        "teacher": cross_encoder,
        "output": output,
        "train-queries": 12,
        "measured-queries": 8,
        "depth": 6,
        "batch-size": 6,
        "epochs": 1,
        "teacher-epochs": 1,
        "max-length": 32,
        "learning-rate": 0.01,
    }
    lists = ["--sizes", "8", "16", "--dropouts", "0.1", "0.3", "--seeds", "1", "2", "--losses", *LOSSES]
    return [*(str(part) for name, value in options.items() for part in (f"--{name}", value)), *lists]


def output_of(command: list[str]) -> Path:
    return Path(command[command.index("--output") + 1])


@pytest.mark.slow
def test_every_exhibit_is_made_and_nothing_is_trained_twice(
    command: list[str], beir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce_paper.main(command) == 0
    out = output_of(command)
    for name in ("gap_size", "gap_dropout", "evolution"):
        for kind in ("png", "svg"):
            assert (out / f"{name}.{kind}").stat().st_size > 1000
    assert (out / "diagnosis" / "report.html").is_file()
    assert "How the scorers separate" in (out / "table" / "report.html").read_text()
    summary = json.loads((out / "summary.json").read_text())
    found = summary["table"]["test"]
    assert list(found) == [
        "BM25",
        "teacher",
        "cross-encoder",
        "bi-encoder",
        *(f"bi-encoder+{loss}" for loss in LOSSES),
    ]
    assert [len(found[group]["RR@10"]["seeds"]) for group in found] == [1, 1, 2, 2, 2, 2]
    assert set(summary["table"]["RR@10 against"]) == {"bi-encoder", "bi-encoder+softmax-cross-entropy"}
    gap = json.loads((out / "gap_size.json").read_text())
    assert {system: sorted(splits["train"]) for system, splits in gap.items()} == {
        system: ["16", "8"] for system in ("cross-encoder", "bi-encoder", "bi-encoder+m3se")
    }
    text = (out / "summary.md").read_text()
    assert text.count("as in the paper") == 6
    assert text in capsys.readouterr().out

    # The numbers from the run files, by a plain loop.
    qrels = read_qrels(beir / "qrels" / "test.tsv")
    values = []
    measured = TeacherScores.open(out / "candidates" / "test-run").query_ids().to_pylist()
    unit = paper_training.Unit("bi-encoder", "m3se", 16, 0.1, 2)
    store = TeacherScores.open(out / "units" / unit.name / "scores" / "test")
    for query in measured:
        ranked: list[Any] = []
        if query in store:
            row = store[query]
            ranked = [d for _, d in sorted(zip(row.scores, row.document_ids, strict=True), reverse=True)][:10]
        values.append(next((1 / rank for rank, d in enumerate(ranked, 1) if d in qrels[query]), 0.0))
    assert found["bi-encoder+m3se"]["RR@10"]["seeds"][1] == pytest.approx(np.mean(values))

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this was trained already")

    monkeypatch.setattr(paper_training, "train_bi_encoder", never)
    monkeypatch.setattr(paper_training, "train_cross_encoder", never)
    assert reproduce_paper.main([*command, "--exhibits", "gap", "teacher", "table"]) == 0
    again = json.loads((out / "summary.json").read_text())
    assert again == summary | {"arguments": again["arguments"]}
    monkeypatch.undo()
    assert reproduce_paper.main([*command, "--epochs", "2", "--exhibits", "evolution"]) == 2
    assert "other settings (epochs)" in capsys.readouterr().err
    # Another teacher, and another one under the name of the first: neither may pass for the one that taught here.
    teacher = Path(command[command.index("--teacher") + 1])
    other = out.parent / "other-teacher"
    CrossEncoder(str(teacher)).save_pretrained(str(other))
    assert reproduce_paper.main([*command, "--teacher", str(other), "--exhibits", "teacher"]) == 2
    assert "other settings (teacher)" in capsys.readouterr().err
    kept = summary_of(out)
    weights = teacher / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4] + bytes(4))
        assert reproduce_paper.main([*command, "--exhibits", "teacher"]) == 2
        assert "other settings (teacher)" in capsys.readouterr().err
    finally:
        weights.write_bytes(content)
    assert summary_of(out) == kept


def summary_of(out: Path) -> str:
    return (out / "summary.json").read_text()


class Killed(BaseException):
    """A kill, as far as what is on the disk goes."""


@pytest.mark.parametrize("moment", ["checkpoint", "model", "scores", "result"])
def test_a_killed_training_goes_on_to_the_same_numbers(
    moment: str, beir: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a half-written checkpoint, model or JSON file from stopping every later try."""
    task = open_task(str(beir), tmp_path / "c", train_queries=12, measured_queries=4, depth=4, list_size=4)
    budget = paper_training.Budget(str(student), 2, 4, 1e-2, 20.0, 32)
    unit = paper_training.Unit("bi-encoder", "no-teacher", 8, 0.1, 1)
    expected = paper_training.run_unit(unit, task, None, budget, tmp_path / "whole")

    def kill(*args: Any, **kwargs: Any) -> None:
        raise Killed

    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:
        if moment == "checkpoint":
            patch.setattr("transformers.trainer_callback.TrainerState.save_to_json", kill)
        elif moment == "model":
            patch.setattr(SentenceTransformer, "save_pretrained", kill)
        elif moment == "scores":
            patch.setattr(paper_training, "score", kill)
        else:
            patch.setattr(paper_training, "write_checked_json", kill)
        with pytest.raises(Killed):
            paper_training.run_unit(unit, task, None, budget, folder)
    found = paper_training.run_unit(unit, task, None, budget, folder)
    for split, measures in expected.items():
        for measure, values in measures.items():
            assert np.array_equal(found[split][measure], values)
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(path.name for path in (tmp_path / "whole").iterdir())
    with pytest.raises(ValueError, match=r"other settings \(data\)"):
        paper_training.run_unit(
            unit, replace(task, relevant=dict.fromkeys(task.relevant, 1), lists={}), None, budget, folder
        )


@pytest.mark.parametrize(
    ("difference", "significant", "verdict"),
    [
        (0.02, True, "as in the paper |"),
        (0.02, False, "as in the paper, but within chance |"),
        (-0.02, True, "**not** as in the paper |"),
    ],
)
def test_a_difference_within_chance_is_no_confirmation(difference: float, significant: bool, verdict: str) -> None:
    """Prevents a summary that claims what its own tests do not show."""
    names = ("bi-encoder", "bi-encoder+margin-mse", "bi-encoder+m3se")
    values = {name: {"mean": value, "seeds": [value]} for name, value in zip(names, (0.3, 0.3, 0.32), strict=True)}
    test = {"second": names[2], "difference": difference, "holm_p": 0.5, "significant": significant}
    summary = {
        "data": {
            "name": "a set",
            "documents": 9,
            "training lists": 4,
            "measured queries": {"test": 3},
            "ceiling": {"test": 1.0},
        },
        "arguments": {"distilled": "m3se"},
        "table": {
            "test": {name: {"RR@10": value, "nDCG@10": value} for name, value in values.items()},
            "RR@10 against": {names[0]: [test], names[1]: [test]},
        },
    }
    better, best = [line for line in paper_summary.render_summary(summary).splitlines() if "as in the paper" in line]
    assert better.endswith(verdict)
    assert f"{difference:+.3f} over margin-mse, p = 0.5000 (Holm)" in best
    assert best.endswith("as in the paper |" if significant else "as in the paper, but within chance |")


def test_both_kinds_have_one_trunk_and_the_size_asked_for(student: Path) -> None:
    budget = paper_training.Budget(str(student), 1, 4, 1e-3, 20.0, 32)
    models = {
        kind: paper_training.build(paper_training.Unit(kind, "no-teacher", 8, 0.25, 3), budget)
        for kind in ("bi-encoder", "cross-encoder")
    }
    bi, cross = models["bi-encoder"], models["cross-encoder"]
    assert isinstance(bi, SentenceTransformer)
    assert bi.encode(["the red cat"]).shape == (1, 8)
    assert isinstance(cross, CrossEncoder)
    assert cross.num_labels == 1
    assert cross.predict([("where is the cat", "the red cat")]).shape == (1,)
    for one, other in zip(bi[0].parameters(), cross[0].parameters(), strict=True):
        assert one.equal(other)
    import torch

    assert {
        module.p for model in models.values() for module in model.modules() if isinstance(module, torch.nn.Dropout)
    } == {0.25}
