"""See on your own data what the paper behind M3SE saw: the train/test gap, the table of losses, margins, evolution.

    pip install -e ".[demo,plot]" && python examples/reproduce_paper.py --output paper          # --help: the manual
    python examples/reproduce_paper.py --data path/to/beir/medquad --student minilm --output paper-medquad

What: a cross-encoder (CA) and bi-encoders (DE) from the same trunk, trained on the same lists with the same budget, and
bi-encoders distilled from a large cross-encoder that is first fine-tuned on these lists. All systems re-rank what BM25
finds. Exhibits, each of which goes on where it was when the same command is given again:

    teacher    is the teacher better than the student that nobody taught? If not, nothing can be learned from it
    table      BM25, CA, teacher, DE, and DE distilled with every loss, several seeds, significance
    gap        RR@10 on training and on test queries against the size of the embedding, and against dropout
    margins    score densities and normalised margins of BM25, teacher, CA, DE and distilled DE on the test queries
    evolution  scores of a few documents of one training query during training, CA beside DE beside distilled DE

OUT gets units/ (each training's scores and values per query), teacher/, table/ (report.html, results.json), gap_size,
gap_dropout, evolution (.png, .svg, .json or .csv), diagnosis/ (report.html), summary.json and summary.md, which says
where the paper's picture is confirmed and where it is not. made_from.json says what it all comes from: another teacher,
other data or settings need another OUT.

Hardware and time: a GPU is used where there is one. Without arguments it took 100 minutes on one CPU core beside other
work: 20 minutes of it for the 12-layer teacher, fine-tuned on 2,400 pairs and scoring 14,400, and one to two for each
of the 60 trainings. What came of it is in benchmarks/results/paper_python_docs. On medquad (64 tokens, 1,000 lists)
there was nothing to learn: the bi-encoder that nobody taught reached RR@10 0.91 on test, the fine-tuned teacher 0.90.
Larger students take hours: one exhibit at a time, with --exhibits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from paper_summary import render_summary
from paper_task import MEASURES, SPLITS, Task, means, open_task
from paper_training import Budget, Measured, Unit, prepare_teacher, run_unit
from transformers.utils import logging as transformers_logging

from st_m3se.diagnostics import Evolution, diagnose, html_section, plot_gap, save_figure, track
from st_m3se.diagnostics.report import render_text, write_evolution, write_report
from st_m3se.distillation.config import LOSSES
from st_m3se.distillation.stages import claim, identity, read_result, write_text
from st_m3se.evaluation import compare
from st_m3se.evaluation.data import qrels_set
from st_m3se.evaluation.provenance import provenance
from st_m3se.evaluation.report import write_report as write_evaluation
from st_m3se.evaluation.results import EvaluatedSet, Results
from st_m3se.scores import TeacherScores

EXHIBITS = ("teacher", "table", "gap", "margins", "evolution")
RATES = {"tiny": 5e-4, "minilm": 5e-5}
SIZES = {"tiny": [32, 64, 128], "minilm": [64, 128, 256, 384]}


def build_parser() -> argparse.ArgumentParser:
    """The command line; its help is the manual."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="python", help="'python' (docstrings of this Python) or a BEIR folder")
    add("--output", type=Path, default=Path("paper"), help="everything goes here")
    add("--exhibits", nargs="+", choices=EXHIBITS, default=list(EXHIBITS), help="what to make")
    add("--student", default="tiny", help="trunk of CA and DE: 'tiny', 'minilm', a path or a hub name")
    add("--teacher", default="demo", help="'demo' (ms-marco-MiniLM-L12-v2), a path or a hub name of a cross-encoder")
    add("--teacher-epochs", type=float, default=1.0, help="fine-tuning of the teacher on the training lists; 0: none")
    add("--train-queries", type=int, default=600, help="queries to train on")
    add("--measured-queries", type=int, default=300, help="queries of each split to measure")
    add("--depth", type=int, default=20, help="documents to re-rank")
    add("--list-size", type=int, default=4, help="documents of a training list")
    add("--sizes", type=int, nargs="+", help="embedding sizes of the gap, the last one that of the table")
    add("--dropouts", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="dropouts of the gap's second axis")
    add("--dropout", type=float, default=0.1, help="everywhere else")
    add("--losses", nargs="+", choices=sorted(LOSSES), default=list(LOSSES), help="the losses of the table")
    add("--distilled", choices=sorted(LOSSES), default="m3se", help="the loss of the other exhibits")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the trainings")
    add("--epochs", type=float, default=5.0, help="of every training but the teacher's")
    add("--batch-size", type=int, default=32, help="lists per step")
    add("--learning-rate", type=float, help="of CA and DE; 5e-4 for tiny, else 5e-5")
    add("--scale", type=float, default=20.0, help="a student's score is this times its cosine")
    add("--max-length", type=int, default=80, help="tokens of a text or pair")
    return parser


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

    def unit(self, kind: str, loss: str = "no-teacher", **changes: Any) -> Measured:
        """One training; distilled ones take the teacher's scores."""
        options = {"size": self.sizes[-1], "dropout": self.args.dropout, "seed": self.args.seeds[0], **changes}
        unit = Unit(kind, loss, **options)
        print(f"== {unit.name}", flush=True)
        taught = None if loss == "no-teacher" else self.teacher()[0]
        return run_unit(unit, self.task, taught, self.budget, self.unit_folder(unit), self.tracked)

    def unit_folder(self, unit: Unit) -> Path:
        """Where a training is kept."""
        return self.folder / "units" / unit.name

    def first(self, kind: str, loss: str = "no-teacher") -> Path:
        """The folder of the first seed of a system, trained if need be."""
        self.unit(kind, loss)
        return self.unit_folder(Unit(kind, loss, self.sizes[-1], self.args.dropout, self.args.seeds[0]))

    def seeds(self, kind: str, loss: str = "no-teacher", **changes: Any) -> list[Measured]:
        """All seeds of a training."""
        return [self.unit(kind, loss, seed=seed, **changes) for seed in self.args.seeds]

    def show_teacher(self) -> None:
        """Is there anything to learn?"""
        taught = self.teacher()[1]["test"]
        plain = [measured["test"] for measured in self.seeds("bi-encoder")]
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
        bm25 = {"test": self.task.measured("test", self.task.runs["test"])}
        found: dict[str, list[Measured]] = {"BM25": [bm25], "teacher": [self.teacher()[1]]}
        found["cross-encoder"] = self.seeds("cross-encoder")
        found["bi-encoder"] = self.seeds("bi-encoder")
        for loss in self.args.losses:
            found[f"bi-encoder, {loss}"] = self.seeds("bi-encoder", loss)
        systems, values = {}, {}
        for group, seeds in found.items():
            for number, measured in enumerate(seeds, start=1):
                name = f"{group} #{number}" if len(seeds) > 1 else group
                systems[name] = {"kind": group.split(",")[0], "group": group}
                values[name] = measured["test"]
        source = qrels_set(
            self.task.qrels["test"], name=self.task.name, run=self.task.runs["test"], corpus=self.task.corpus
        )
        evaluated = EvaluatedSet.of(source)
        order = {query: place for place, query in enumerate(self.task.qrels["test"])}
        places = [order[query] for query in evaluated.query_ids]
        results = Results(
            provenance(),
            {
                "measures": list(MEASURES),
                "depth": self.args.depth,
                "exclude_same_id": False,
                "strict": False,
                "confidence": 0.95,
                "baseline": "bi-encoder",
            },
            {self.task.name: evaluated},
            systems,
            {
                self.task.name: {
                    name: {measure: each[places] for measure, each in measures.items()}
                    for name, measures in values.items()
                }
            },
        )
        section = self.folder / "diagnosis"
        sections = [html_section(section)] if (section / "diagnosis.json").is_file() else []
        write_evaluation(results, self.folder / "table", sections=sections)
        mean = {
            group: np.mean([measured["test"]["RR@10"] for measured in seeds], axis=0) for group, seeds in found.items()
        }
        self.summary["table"] = {
            "test": {
                group: {
                    measure: {
                        "mean": float(np.mean([measured["test"][measure].mean() for measured in seeds])),
                        "seeds": [float(measured["test"][measure].mean()) for measured in seeds],
                    }
                    for measure in MEASURES
                }
                for group, seeds in found.items()
            },
            "RR@10 against": {
                baseline: [vars(test) for test in compare(mean, "RR@10", baseline=baseline)]
                for baseline in ("bi-encoder", "bi-encoder, margin-mse", "bi-encoder, softmax-cross-entropy")
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
                    seeds = self.seeds(kind, loss, **{axis: place})
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
        distilled = f"bi-encoder, {self.args.distilled}"
        folders = {
            "teacher": self.folder / "teacher",
            "cross-encoder": self.first("cross-encoder"),
            "bi-encoder": self.first("bi-encoder"),
            distilled: self.first("bi-encoder", self.args.distilled),
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
        folders = [self.first("cross-encoder"), self.first("bi-encoder"), self.first("bi-encoder", self.args.distilled)]
        write_evolution([Evolution.read(folder / "score_evolution.csv") for folder in folders], self.folder)
        self.summary["evolution"] = {
            folder.name: json.loads((folder / "score_evolution.json").read_text(encoding="utf-8"))["share"]
            for folder in folders
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the exhibits."""
    args = build_parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        reproduction = Reproduction(args)
        # The margins before the table, whose page shows them.
        for exhibit in sorted(args.exhibits, key=("teacher", "margins", "table", "gap", "evolution").index):
            getattr(reproduction, f"show_{exhibit}")()
            args.output.mkdir(parents=True, exist_ok=True)
            file = args.output / "summary.json"
            summary = (read_result(file) or {}) | reproduction.summary
            write_text(file, json.dumps(summary, indent=1) + "\n")
            write_text(args.output / "summary.md", render_summary(summary))
        print((args.output / "summary.md").read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
