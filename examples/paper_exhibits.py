"""The exhibits of `reproduce_paper.py`: each trains what it lacks, draws its figure, and adds to the summary."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from paper_task import MEASURES, SPLITS, Task, means, open_task
from paper_training import Budget, Measured, Unit, prepare_teacher, run_unit

from st_m3se.diagnostics import Evolution, diagnose, html_section, plot_gap, save_figure, track
from st_m3se.diagnostics.report import render_text, write_evolution, write_report
from st_m3se.distillation.stages import claim, identity, write_text
from st_m3se.evaluation import GivenRun, compare, evaluate
from st_m3se.evaluation.data import qrels_set
from st_m3se.scores import TeacherScores

RATES = {"tiny": 5e-4, "minilm": 5e-5}
SIZES = {"tiny": [32, 64, 128], "minilm": [64, 128, 256, 384]}


class Reproduction:
    """The exhibits of one task in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Open the task."""
        self.args = args
        self.folder: Path = args.output
        self.sizes: list[int] = sorted(args.sizes or SIZES.get(args.student, SIZES["minilm"]))
        rate = args.learning_rate or RATES.get(args.student, RATES["minilm"])
        self.budget = Budget(args.student, args.epochs, args.batch_size, rate, args.scale, args.max_length)
        self.task: Task = open_task(
            args.data,
            self.folder / "candidates",
            train_queries=args.train_queries,
            measured_queries=args.measured_queries,
            depth=args.depth,
            list_size=args.list_size,
        )
        claim(
            self.folder,
            {
                **{name: str(vars(args)[name]) for name in ("list_size", "depth", "teacher_epochs")},
                **asdict(self.budget),
                "student": identity(args.student),
                "teacher": identity(args.teacher),
                "data": self.task.fingerprint,
            },
            beside=["candidates"],
        )
        # The query is one of those trained on, as in the paper.
        self.tracked = track(
            self.task.candidates("train"), self.task.queries, self.task.corpus, self.task.qrels["train"], seed=0
        )
        self._teacher: tuple[TeacherScores, Measured] | None = None
        self.summary: dict[str, Any] = {
            "data": {
                "name": self.task.name,
                "documents": len(self.task.corpus),
                "training lists": len(self.task.lists),
                "measured queries": {split: len(self.task.qrels[split]) for split in SPLITS},
                "ceiling": {split: self.task.ceiling(split) for split in SPLITS},
            },
            "arguments": {key: str(value) for key, value in vars(args).items()},
        }

    def teacher(self) -> tuple[TeacherScores, Measured]:
        """The teacher's scores of the training lists, and its measures."""
        if self._teacher is None:
            self._teacher = prepare_teacher(
                self.args.teacher, self.task, self.args.teacher_epochs, self.budget, self.folder / "teacher"
            )
        return self._teacher

    def unit(self, kind: str, loss: str = "no-teacher", **changes: Any) -> Unit:
        """What is trained, as in the table but for the changes."""
        options = {"size": self.sizes[-1], "dropout": self.args.dropout, "seed": self.args.seeds[0], **changes}
        return Unit(kind, loss, **options)

    def measured(self, unit: Unit) -> Measured:
        """The measures of a training, which is done if need be; distilled ones take the teacher's scores."""
        print(f"== {unit.name}", flush=True)
        taught = None if unit.loss == "no-teacher" else self.teacher()[0]
        return run_unit(unit, self.task, taught, self.budget, self.unit_folder(unit), self.tracked)

    def unit_folder(self, unit: Unit) -> Path:
        """Where a training is kept."""
        return self.folder / "units" / unit.name

    def kept(self, unit: Unit) -> Path:
        """The folder of a training, which is done if need be."""
        self.measured(unit)
        return self.unit_folder(unit)

    def seeds(self, kind: str, loss: str = "no-teacher", **changes: Any) -> list[Unit]:
        """All seeds of a training."""
        return [self.unit(kind, loss, seed=seed, **changes) for seed in self.args.seeds]

    def show_teacher(self) -> None:
        """Is there anything to learn?"""
        taught = self.teacher()[1]["test"]
        plain = [self.measured(unit)["test"] for unit in self.seeds("bi-encoder")]
        mean = {measure: np.mean([values[measure] for values in plain], axis=0) for measure in MEASURES}
        bm25 = self.task.measured("test", self.task.runs["test"])
        tests = compare({"bi-encoder": mean["RR@10"], "teacher": taught["RR@10"]}, "RR@10", baseline="bi-encoder")
        better = tests[0].difference > 0 and tests[0].significant
        self.summary["teacher"] = {
            "test": {"BM25": means(bm25), "bi-encoder": means(mean), "teacher": means(taught)},
            "better than the bi-encoder": better,
            "difference": tests[0].difference,
            "p": tests[0].randomisation_p,
        }
        word = "is" if better else "is NOT (significantly)"
        print(
            f"The teacher {word} better than the bi-encoder that nobody taught: RR@10 {taught['RR@10'].mean():.3f} and "
            f"{mean['RR@10'].mean():.3f}, p = {tests[0].randomisation_p:.4f}"
        )
        if not better:
            print("There is little to learn from it here. Try more --teacher-epochs, or another --teacher.")

    def show_table(self) -> None:
        """All systems on the test queries, as an evaluation with its report."""
        self.teacher()
        runs = {
            "BM25": [self.folder / "candidates" / "test-run"],
            "teacher": [self.folder / "teacher" / "scores" / "test"],
        }
        for kind, loss in (
            ("cross-encoder", "no-teacher"),
            *(("bi-encoder", loss) for loss in ("no-teacher", *self.args.losses)),
        ):
            units = self.seeds(kind, loss)
            runs[units[0].system] = [self.kept(unit) / "scores" / "test" for unit in units]
        test = self.task.qrels["test"]
        section = self.folder / "diagnosis"
        results = evaluate(
            qrels_set(test, name=self.task.name, run=self.task.runs["test"], corpus=self.task.corpus),
            {name: [GivenRun(path) for path in paths] for name, paths in runs.items()},
            self.folder / "table",
            measures=MEASURES,
            depth=self.args.depth,
            exclude_same_id=False,
            baseline="bi-encoder",
            sections=[html_section(section)] if (section / "diagnosis.json").is_file() else [],
        )
        values = results.values[self.task.name]
        seeds = {
            (group, measure): [float(values[system][measure].mean()) for system in systems]
            for group, systems in results.groups.items()
            for measure in MEASURES
        }
        mean = results.measured(self.task.name, "RR@10")
        self.summary["table"] = {
            "test": {
                group: {
                    measure: {"mean": float(np.mean(seeds[group, measure])), "seeds": seeds[group, measure]}
                    for measure in MEASURES
                }
                for group in runs
            },
            "RR@10 against": {
                baseline: [vars(test) for test in compare(mean, "RR@10", baseline=baseline)]
                for baseline in ("bi-encoder", "bi-encoder+margin-mse", "bi-encoder+softmax-cross-entropy")
                if baseline in mean
            },
        }

    def show_gap(self) -> None:
        """RR@10 on training and test queries against size, and against dropout."""
        kinds = [("cross-encoder", "no-teacher"), ("bi-encoder", "no-teacher"), ("bi-encoder", self.args.distilled)]
        for axis, places in (("size", self.sizes), ("dropout", sorted(self.args.dropouts))):
            means_of: dict[str, np.ndarray] = {}  # the plain bi-encoder's, of each test query
            found: dict[str, dict[str, dict[float, list[float]]]] = {}
            for kind, loss in kinds:
                splits = found.setdefault(Unit(kind, loss, 0, 0, 0).system, {split: {} for split in SPLITS})
                for place in places:
                    seeds = [self.measured(unit) for unit in self.seeds(kind, loss, **{axis: place})]
                    for split in SPLITS:
                        splits[split][place] = [float(measured[split]["RR@10"].mean()) for measured in seeds]
                    if (kind, loss) == ("bi-encoder", "no-teacher"):
                        means_of[str(place)] = np.mean([measured["test"]["RR@10"] for measured in seeds], axis=0)
            label = {"size": "embedding size", "dropout": "dropout"}[axis]
            save_figure(plot_gap(found, axis=label), self.folder / f"gap_{axis}")
            write_text(self.folder / f"gap_{axis}.json", json.dumps(found, indent=1) + "\n")
            self.summary[f"gap {axis}"] = {
                system: {
                    str(place): {split: float(np.mean(splits[split][place])) for split in SPLITS} for place in places
                }
                for system, splits in found.items()
            }
            if len(places) > 1:
                tests = compare(means_of, "RR@10", baseline=str(places[0]))
                self.summary[f"bi-encoder by {axis}"] = [vars(test) for test in tests]

    def show_margins(self) -> None:
        """Densities and margins on the test queries, from the scores that the trainings have left."""
        distilled = f"bi-encoder+{self.args.distilled}"
        folders = {
            "teacher": self.folder / "teacher",
            "cross-encoder": self.kept(self.unit("cross-encoder")),
            "bi-encoder": self.kept(self.unit("bi-encoder")),
            distilled: self.kept(self.unit("bi-encoder", self.args.distilled)),
        }
        self.teacher()
        stores = {name: TeacherScores.open(folder / "scores" / "test") for name, folder in folders.items()}
        found = diagnose(
            {"BM25": self.task.runs["test"], **stores},
            self.task.candidates("test"),
            self.task.qrels["test"],
            self.folder / "diagnosis",
            name=f"{self.task.name} test",
            gap=("bi-encoder", distilled, "teacher"),
            exclude_same_id=False,
        )
        write_report(found, self.folder / "diagnosis")
        print(render_text(found))
        self.summary["margins"] = {
            name: {number: list(value) for number, value in separation.numbers.items()}
            for name, separation in found.scorers.items()
        }
        self.summary["closed share"] = None if found.gap is None else str(found.gap)

    def show_evolution(self) -> None:
        """Scores during training, side by side."""
        units = [self.unit("cross-encoder"), self.unit("bi-encoder"), self.unit("bi-encoder", self.args.distilled)]
        folders = [self.kept(unit) for unit in units]
        write_evolution([Evolution.read(folder / "score_evolution.csv") for folder in folders], self.folder)
        self.summary["evolution"] = {
            folder.name: json.loads((folder / "score_evolution.json").read_text(encoding="utf-8"))["share"]
            for folder in folders
        }
