"""Which loss teaches a student most: every loss of the package, a control without a teacher, and the host's own losses.

    python benchmarks/loss_comparison.py --data nl2bash insuranceqa --folder ../shared/data --work /tmp/losses

Each set is a BEIR folder with train and test judgements. All rows train the same student on the same lists: candidates
of BM25 and of a guide, scored by the cross-encoder of the demo (--ensemble: averaged with the guide). The guide is the
student as it comes, or with --guide another encoder, such as a larger one. With --unlabelled the training queries keep
no label: the control takes the search's best candidate for the positive, the others the teacher's. With --labelled N,
N of them keep theirs, and the control trains on these N alone, for as many steps as the others.
Rows: the student as it is, the control (the labels' contrastive loss, the same lists and steps), each loss, the host's
MarginMSELoss and DistillKLDivLoss for as much CPU time as softmax cross-entropy took, and the teacher re-ranking its
candidates. Where the teacher is no better than the student there is nothing to distil, and the table says so.
--out-of-domain measures the students of each set on others as well, which no training has seen.

Resumable: a row and seed that is in --work is not trained again. The tables are made from the rankings that are there,
and --tables-only makes them again. Needs the extra `demo`. Hours on a CPU; --losses, --seeds and the sizes cut it down.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from benchmark_results import provenance, save, table  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as host_losses  # noqa: E402

from st_m3se import build_distillation_dataset, score_candidates  # noqa: E402
from st_m3se.data.texts import Texts  # noqa: E402
from st_m3se.distillation.config import LOSSES, DistillationConfig  # noqa: E402
from st_m3se.distillation.data import DistillationData, in_hash_order, open_data  # noqa: E402
from st_m3se.distillation.demo_models import load_student, onnx_scorer  # noqa: E402
from st_m3se.distillation.lists import (  # noqa: E402
    Candidates,
    Run,
    measure,
    run_of,
    search,
    training_epochs,
    training_lists,
    training_qrels,
)
from st_m3se.distillation.recipe import arguments, train_student  # noqa: E402
from st_m3se.distillation.stages import write_text  # noqa: E402
from st_m3se.evaluation import compare  # noqa: E402
from st_m3se.retrieval.models import load_encoder  # noqa: E402
from st_m3se.scores import TeacherScores, combine  # noqa: E402

CONTROL, START, TEACHER, RECIPE = "contrastive", "student as it is", "teacher", "combined"
HOST = ("host MarginMSELoss", "host DistillKLDivLoss")
ROWS = (CONTROL, RECIPE, *LOSSES, *HOST)
SCALE = 20.0  # of every cosine; the host's losses take it by their labels and temperature
PROBE_STEPS = 3


def cut(data: DistillationData, args: argparse.Namespace) -> DistillationData:
    """The set with at most so many queries and documents: those judged and others, in an order fixed by a hash."""
    data.cut({split: getattr(args, f"{split}_queries") for split in data.qrels})
    needed = [document for split in data.qrels.values() for relevant in split.values() for document in relevant]
    ordered = in_hash_order(str(document) for document in data.corpus)
    kept = list(dict.fromkeys([*needed, *ordered]))[: max(args.documents, len(set(needed)))]
    data.corpus = Texts.open(dict(zip(kept, data.corpus.take(kept), strict=True)))
    return data


ELSEWHERE = ("data", "folder", "losses", "seeds", "work", "output", "tables_only", "out_of_domain")
"""Options that a ranking does not depend on."""
LATER = ("guide", "unlabelled", "labelled", "start_weight")
"""Options that came after the first rankings, whose files keep their names."""


def ranking_name(row: str, seed: int, args: argparse.Namespace) -> str:
    """The file of a ranking: another one where an option differs that it depends on."""
    options = {name: value for name, value in vars(args).items() if name not in LATER or value}
    key = {name: str(value) for name, value in options.items() if name not in ELSEWHERE}
    stem = hashlib.sha256(json.dumps([row, seed, sorted(key.items())]).encode()).hexdigest()[:10]
    return f"{row.replace(' ', '-')}-{seed}-{stem}.json"


class Comparison:
    """One set: its candidates, teacher scores and lists, and the ranking of each row and seed."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.folder = args.work / name
        self.data = cut(open_data(args.folder / name), args)
        foreign = [other for other in args.out_of_domain if other != name]
        self.foreign = {other: cut(open_data(args.folder / other), args) for other in foreign}
        self.candidates = Candidates.open(self.data, self.found(), judged=not args.unlabelled)
        if args.labelled is not None:
            for query in list(self.data.qrels["train"])[args.labelled :]:
                self.data.qrels["train"][query] = {}
        self.test = list(self.data.qrels["test"])
        self.scores = {split: self.scored(split, size) for split, size in (("train", args.scored), ("test", args.pool))}

    def place(self, name: str, *key: Any) -> Path:
        """A folder that is another one with other texts, another length, or another ``key``."""
        whole = repr((self.args.max_length, self.data.corpus.fingerprint, self.data.queries.fingerprint, *key))
        path: Path = self.folder / f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"
        return path

    def found(self) -> Path:
        """The candidates' folder: one for all that they depend on, made where it is not there."""
        args = self.args
        folder = self.place("candidates", args.guide or args.student, self.data.qrels)
        if not (folder / "guide" / "manifest.json").is_file():  # the last one that is made
            guide = self.student() if args.guide is None else self.shortened(load_encoder(args.guide))
            Candidates.find(self.data, guide, folder, pool=max(args.scored, args.pool))
        return folder

    def scored(self, split: str, size: int) -> TeacherScores:
        """The teacher's scores of a split, in a folder of their own for all that they depend on."""
        pools = self.candidates.pools(split, size)
        folder = self.place(f"teacher_scores/{split}", pools)
        name, scorer = f"demo, {self.args.max_length} tokens", onnx_scorer(self.args.max_length)
        scores = score_candidates(
            scorer, pools, self.data.queries, self.data.corpus, folder, name=name, shard_queries=64
        )
        if not self.args.ensemble:
            return scores
        mean = folder.with_name(f"{split}-with-guide")
        return combine([scores, self.candidates.guide], mean, missing="drop", overwrite=True)

    def student(self) -> SentenceTransformer:
        """The student as it comes, with texts cut as everywhere here."""
        student: SentenceTransformer = self.shortened(load_student(self.args.student))
        return student

    def shortened(self, encoder: Any) -> Any:
        """An encoder that reads no more tokens than all others here."""
        encoder.max_seq_length = min(encoder.max_seq_length or self.args.max_length, self.args.max_length)
        return encoder

    def rankings(self, row: str, seed: int) -> dict[str, Any]:
        """The ranking of the test queries and the CPU seconds of the training, from disk or made now."""
        path = self.folder / "runs" / ranking_name(row, seed, self.args)
        if path.is_file():
            known = dict(json.loads(path.read_text(encoding="utf-8")))
            if not self.foreign.keys() - known.get("out_of_domain", {}).keys():
                return known
        if self.args.tables_only:
            raise SystemExit(f"{path} is missing, or some sets in it: run without --tables-only to make it.")
        print(f"{self.name}: {row}, seed {seed}", flush=True)
        student, seconds = self.trained(row, seed)
        result = {"row": row, "seed": seed, "cpu_seconds": seconds, **self.ranked(student)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result))
        return result

    def ranked(self, student: SentenceTransformer) -> dict[str, Any]:
        """What a student finds for the test queries, here and out of domain."""
        return {
            "run": self.found_by(student, self.data),
            "out_of_domain": {name: self.found_by(student, data) for name, data in self.foreign.items()},
        }

    def found_by(self, student: SentenceTransformer, data: DistillationData) -> Run:
        """The first documents of a set's test queries."""
        test = list(data.qrels["test"])
        run = run_of(search(student, data, test, self.folder / "found-by-student"), test)
        return {query: dict(list(listed.items())[: self.args.depth]) for query, listed in run.items()}

    def trained(self, row: str, seed: int) -> tuple[SentenceTransformer, float]:
        """A student, and the CPU seconds of its training."""
        args, student = self.args, self.student()
        torch.manual_seed(seed)
        start = time.process_time()
        if row in HOST:
            self.train_host(student, row, seed, float(self.rankings("softmax-cross-entropy", seed)["cpu_seconds"]))
        elif row != START:
            lists = training_lists(
                self.scores["train"],
                self.candidates,
                list_size=args.list_size,
                false_negatives="leave-out" if args.filter else "keep",
                seed=seed,
                teacher=row != CONTROL,
            )
            epochs = training_epochs(args.epochs, self.candidates, teacher=row != CONTROL)
            options = {
                name: getattr(args, name) for name in ("list_size", "batch_size", "learning_rate", "start_weight")
            }
            config = DistillationConfig(scale=SCALE, epochs=epochs, **options)
            with tempfile.TemporaryDirectory() as scratch:
                train_student(student, lists, row, Path(scratch), config, seed=seed, keep_start=False)
        return student, time.process_time() - start

    def train_host(self, student: SentenceTransformer, row: str, seed: int, seconds: float) -> None:
        """Train with a loss of sentence-transformers for so many CPU seconds: a few steps tell how many fit."""
        args = self.args
        columns = build_distillation_dataset(
            self.scores["train"],
            self.data.queries,
            self.data.corpus,
            training_qrels(self.scores["train"], self.candidates),
            list_size=args.list_size,
            layout="columns",
            absolute_margin=0.0 if args.filter else None,
            resample=False,
            seed=seed,
        )
        rows = [dict(each) for each in columns]
        if row == HOST[0]:
            for each in rows:
                first, *others = each["label"]
                each["label"] = [(first - other) / SCALE for other in others]

        def train(model: SentenceTransformer, steps: int) -> None:
            loss = (
                host_losses.MarginMSELoss(model)
                if row == HOST[0]
                else host_losses.DistillKLDivLoss(model, student_temperature=1 / SCALE)
            )
            options = arguments(self.folder, 1, args.batch_size, args.learning_rate, seed) | {"max_steps": steps}
            SentenceTransformerTrainer(
                model=model,
                args=SentenceTransformerTrainingArguments(**options),
                train_dataset=Dataset.from_list(rows),
                loss=loss,
            ).train()
            model.eval()

        start = time.process_time()
        train(self.student(), PROBE_STEPS)
        train(student, max(1, round(seconds / ((time.process_time() - start) / PROBE_STEPS))))


def ndcg(run: Run, data: DistillationData) -> np.ndarray:
    """nDCG@10 of each test query."""
    return measure(run, data.qrels["test"])["nDCG@10"]


def tables_of(each: Comparison, rows: list[str], seeds: list[int]) -> list[dict[str, Any]]:
    """Means over seeds, the share of the teacher's lead that was closed, and p against start and control after Holm."""
    data, teacher = each.data, ndcg(run_of(each.scores["test"], each.test), each.data)
    results = {START: [each.rankings(START, 0)], **{row: [each.rankings(row, seed) for seed in seeds] for row in rows}}
    start = ndcg(results[START][0]["run"], data)
    bm25 = ndcg({query: each.candidates.lexical[query] for query in each.test}, data)
    by_seed = {row: [ndcg(result["run"], data) for result in results[row]] for row in rows}
    seconds = {row: float(np.mean([result["cpu_seconds"] for result in results[row]])) for row in rows}
    values = {row: np.mean(found, axis=0) for row, found in by_seed.items()}
    against_start = _p({START: start, **values}, START)
    against_control = _p(values, CONTROL) if CONTROL in values else {}
    lead = teacher.mean() - start.mean()
    lines: list[list[Any]] = [
        ["BM25", bm25.mean(), None, None, None, None, None],
        [START, start.mean(), None, None, None, None, None],
    ]
    for row in rows:
        closed = f"{(values[row].mean() - start.mean()) / lead:.0%}" if lead > 0 else "no lead"
        p = against_control.get(row)
        spread = _spread(by_seed[row])
        lines.append([row, values[row].mean(), spread, closed, against_start[row], p, round(seconds[row])])
    lines.append([TEACHER, teacher.mean(), None, None, None, None, None])
    labels = "training queries without labels" if each.args.unlabelled else "training"
    if each.args.labelled is not None:
        labels = f"training queries, {each.args.labelled} of them with labels"
    sizes = f"{len(data.qrels['train'])} {labels}, {len(each.test)} test queries, {len(data.corpus)} documents"
    verdict = "" if lead > 0 else "; the teacher is no better than the student: there is nothing to distil"
    columns = ["system", "nDCG@10", "seeds", "lead closed", "p, start", "p, control", "CPU seconds"]
    first = table(f"{each.name}: {sizes}, {len(seeds)} seed(s){verdict}", columns, lines)
    return [first, *(table_out_of_domain(each, name, results) for name in each.foreign)]


def table_out_of_domain(each: Comparison, name: str, results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the students of a set find in another one: means over seeds, and p against the start after Holm."""
    data = each.foreign[name]
    by_seed = {row: [ndcg(result["out_of_domain"][name], data) for result in found] for row, found in results.items()}
    means = {row: np.mean(found, axis=0) for row, found in by_seed.items()}
    start, against_start = means[START].mean(), _p(means, START)
    lines: list[list[Any]] = [[START, start, None, None, None]]
    for row in [row for row in results if row != START]:
        mean = means[row].mean()
        lines.append([row, mean, _spread(by_seed[row]), mean - start, against_start[row]])
    title = f"trained on {each.name}, tested on {name}: {len(data.qrels['test'])} test queries"
    return table(
        f"{title}, {len(data.corpus)} documents", ["system", "nDCG@10", "seeds", "to the start", "p, start"], lines
    )


def _spread(by_seed: list[np.ndarray]) -> str:
    """The lowest and the highest mean of a seed."""
    means = [values.mean() for values in by_seed]
    return f"{min(means):.4f} to {max(means):.4f}"


def _p(values: Mapping[str, np.ndarray], baseline: str) -> dict[str, float]:
    if len(values) < 2:
        return {}
    return {found.second: found.holm_p for found in compare(values, "nDCG@10", baseline=baseline)}


def shared_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison of students on the same lists, whatever they are measured on."""
    add = parser.add_argument
    add("--folder", type=Path, default=HERE.parent.parent / "shared" / "data", help="where the BEIR folders are")
    add(
        "--work",
        type=Path,
        default=Path("loss_comparison"),
        help="candidates, teacher scores and rankings [%(default)s]",
    )
    student = "'minilm', 'tiny' (never trained for dense search), a path or a name [%(default)s]"
    add("--student", default="minilm", help=student)
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--ensemble", action="store_true", help="teach with the mean of cross-encoder and guide, query by query")
    add("--guide", help="an encoder that finds candidates beside BM25, a path or a name [the student as it comes]")
    add("--unlabelled", action="store_true", help="use no label of the training queries")
    add("--labelled", type=int, metavar="N", help="only N of the training queries keep their labels")
    add("--filter", action="store_true", help="leave out negatives that the teacher scores above the known positive")
    for name, value in (("train", 600), ("dev", 100), ("test", 200)):
        add(f"--{name}-queries", type=int, default=value, help="at most [%(default)s]")
    add("--documents", type=int, default=4_000, help="of the corpus, all judged ones among them [%(default)s]")
    add("--scored", type=int, default=8, help="candidates per training query that the teacher scores [%(default)s]")
    add("--pool", type=int, default=20, help="candidates per test query that the teacher re-ranks [%(default)s]")
    add("--list-size", type=int, default=8)
    add("--batch-size", type=int, default=16)
    add("--epochs", type=int, default=1)
    add("--learning-rate", type=float, default=1e-4)
    add("--start-weight", type=float, default=0.0, help="the start's share in the weights of every row but the host's")
    add("--max-length", type=int, default=128)
    add("--tables-only", action="store_true", help="make the tables again from the rankings in --work")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, of options that go together."""
    args = parser.parse_args()
    if args.labelled is not None and (args.unlabelled or not 0 < args.labelled < args.train_queries):
        parser.error("--labelled: expected a number above 0 and below --train-queries, and no --unlabelled.")
    return args


def main() -> None:
    """Parse the command line, run what is missing, and write results/loss_comparison.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    add = parser.add_argument
    add("--data", nargs="+", default=["nl2bash", "insuranceqa", "scifact", "nfcorpus", "msmarco-train", "medquad"])
    add("--losses", nargs="*", default=list(ROWS), metavar="LOSS", help=f"of {', '.join(ROWS)}; none: only the leads")
    add("--out-of-domain", nargs="+", default=[], metavar="SET", help="also measure each student on these sets")
    add("--depth", type=int, default=10, help="documents of a ranking that are kept [%(default)s]")
    add("--output", type=Path, default=HERE / "results" / "loss_comparison.json")
    args = parsed(parser)
    if unknown := sorted(set(args.losses) - set(ROWS)):
        parser.error(f"--losses: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}.")
    facts, tables = provenance(), []
    for name in args.data:
        tables += tables_of(Comparison(name, args), args.losses, args.seeds)
        save(args.output, "loss_comparison", facts, tables)
    print(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
