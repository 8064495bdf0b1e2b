"""The main job, from a folder of texts to a measured student: this package beside a plain sentence-transformers script.

Both do the same work in processes of their own, in turn: load the models, search the corpus with the student for the
candidates of each training query, score the judged document and the best others with the teacher, train the student on
these lists (as many of them, of one length, the same batches and learning rate), search the corpus again with the
distilled student and measure test nDCG@10.

The plain script is what the documentation of sentence-transformers adds up to: `mine_hard_negatives`,
`CrossEncoder.predict`, `MarginMSELoss` or `DistillKLDivLoss`, `InformationRetrievalEvaluator`. Ours calls
`find_candidates`, `score_candidates`, `build_distillation_dataset`, a loss with in-batch negatives and
`RetrievalEvaluator`, and pays for what a plain script does not have: a store on disk that survives a kill, checks,
fingerprints. A third row scores with `dtype="int8"`.

    python benchmarks/main_job.py --data ../shared/data/msmarco-train

Without --teacher and --student the models are those of the extra `demo`. About half an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

STAGES = ("load", "candidates", "teacher", "training", "evaluation")
SCALE = 20.0
WAYS = ("plain, DistillKLDivLoss", "plain, MarginMSELoss", "ours", "ours, int8 teacher")


def make_data(source: Path, target: Path, queries: int, documents: int) -> None:
    """A smaller folder: so many training and as many test queries, and so many documents, the judged among them."""
    from st_m3se.data.collection import Collection

    rng = random.Random(0)
    kept: dict[str, None] = {}
    asked: list[str] = []
    (target / "qrels").mkdir(parents=True)
    for split in ("train", "test"):
        collection = Collection.open(source, split)
        qrels = {str(query): judged for query, judged in (collection.qrels or {}).items() if max(judged.values()) > 0}
        chosen = rng.sample(sorted(qrels), min(queries, len(qrels)))
        lines = [f"{q}\t{d}\t{grade}\n" for q in chosen for d, grade in qrels[q].items() if grade > 0]
        (target / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(lines), encoding="utf-8"
        )
        kept |= dict.fromkeys(line.split("\t")[1] for line in lines)
        asked += chosen
    texts, corpus = collection.texts
    others = sorted(str(each) for each in corpus if str(each) not in kept)
    chosen = [*kept, *rng.sample(others, max(0, min(documents - len(kept), len(others))))]
    for name, ids, source_texts in (("queries", list(dict.fromkeys(asked)), texts), ("corpus", chosen, corpus)):
        with (target / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for key, text in zip(ids, source_texts.take(ids), strict=True):
                file.write(json.dumps({"_id": key, "text": text}) + "\n")


class Clock:
    """Wall and CPU seconds of each stage."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name], self.cpu[name] = time.perf_counter() - wall, time.process_time() - cpu


def arguments(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The training arguments of both."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": 1e-4,
        "warmup_steps": 0.1,
        "seed": 1,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def plain(data: Path, options: argparse.Namespace, folder: Path, clock: Clock, loss_name: str) -> float:
    """The script that a user of sentence-transformers writes; returns test nDCG@10."""
    import csv

    import torch
    from datasets import Dataset
    from sentence_transformers import (
        CrossEncoder,
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss
    from sentence_transformers.util import mine_hard_negatives

    with clock.stage("load"):
        student, teacher = SentenceTransformer(options.student), CrossEncoder(options.teacher)
        texts = {}
        for name in ("queries", "corpus"):
            with (data / f"{name}.jsonl").open(encoding="utf-8") as file:
                texts[name] = {record["_id"]: record["text"] for record in map(json.loads, file)}
        qrels: dict[str, dict[str, set[str]]] = {"train": {}, "test": {}}
        for split, judged in qrels.items():
            with (data / "qrels" / f"{split}.tsv").open(encoding="utf-8") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    judged.setdefault(row["query-id"], set()).add(row["corpus-id"])
    with clock.stage("candidates"):
        pairs = [
            {"query": texts["queries"][query], "positive": texts["corpus"][min(relevant)]}
            for query, relevant in qrels["train"].items()
        ]
        negatives = options.list_size - 1
        mined = mine_hard_negatives(
            Dataset.from_list(pairs),
            student,
            corpus=list(texts["corpus"].values()),
            num_negatives=negatives,
            output_format="n-tuple",
            verbose=False,
        )
    with clock.stage("teacher"):
        columns = ["positive", *(f"negative_{place}" for place in range(1, negatives + 1))]
        asked = [(row["query"], row[column]) for row in mined for column in columns]
        scores = teacher.predict(asked, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        lists = scores.reshape(len(mined), len(columns)).tolist()
        if loss_name == "MarginMSELoss":
            lists = [[(first - other) / SCALE for other in others] for first, *others in lists]
        mined = mined.add_column("label", lists)
    with clock.stage("training"):
        loss = (
            MarginMSELoss(student)
            if loss_name == "MarginMSELoss"
            else DistillKLDivLoss(student, student_temperature=1 / SCALE)
        )
        training = SentenceTransformerTrainingArguments(**arguments(options, folder))
        SentenceTransformerTrainer(model=student, args=training, train_dataset=mined, loss=loss).train()
        student.save_pretrained(str(folder / "model"))
    with clock.stage("evaluation"):
        evaluator = InformationRetrievalEvaluator(
            {query: texts["queries"][query] for query in qrels["test"]}, texts["corpus"], qrels["test"]
        )
        return float(evaluator(student)["cosine_ndcg@10"])


def ours(data: Path, options: argparse.Namespace, folder: Path, clock: Clock, dtype: str | None) -> float:
    """The same with this package; returns test nDCG@10."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    from st_m3se import (
        Collection,
        DistillationCollator,
        SoftmaxCrossEntropyLoss,
        build_distillation_dataset,
        find_candidates,
        score_candidates,
    )

    with clock.stage("load"):
        student = SentenceTransformer(options.student)
        train = Collection.open(data, "train")
        asked = list(train.qrels or {})
        queries = dict(zip(asked, train.texts[0].take(asked), strict=True))
    with clock.stage("candidates"):
        candidates = find_candidates(
            queries, data, [student], folder / "candidates", depth=options.list_size, positives=train.qrels
        )
    with clock.stage("teacher"):
        scores = score_candidates(str(options.teacher), candidates, data, data, folder / "scores", dtype=dtype)  # type: ignore[arg-type]
    with clock.stage("training"):
        lists = build_distillation_dataset(scores, data=data, split="train", list_size=options.list_size)
        training = SentenceTransformerTrainingArguments(**arguments(options, folder))
        loss = SoftmaxCrossEntropyLoss(student, SCALE, in_batch_negatives=True)
        SentenceTransformerTrainer(
            model=student,
            args=training,
            train_dataset=lists,
            loss=loss,
            data_collator=DistillationCollator(preprocess_fn=student.preprocess),
        ).train()
        student.save_pretrained(str(folder / "model"))
    with clock.stage("evaluation"):
        return ndcg(data, student)


def child(way: str, data: Path, options: argparse.Namespace) -> None:
    """One way, from the start to the end of a process; prints its seconds and nDCG@10."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if way.startswith("plain"):
            value = plain(data, options, Path(folder), clock, way.split(", ")[1])
        else:
            value = ours(data, options, Path(folder), clock, "int8" if "int8" in way else None)
    print(json.dumps({"wall": clock.wall, "cpu": clock.cpu, "value": value}))


def ndcg(data: Path, student: Any) -> float:
    """Test nDCG@10, as this package measures it."""
    from st_m3se.evaluation import RetrievalEvaluator

    return float(RetrievalEvaluator(data, measures=["nDCG@10"]).compute_metrics(student)["nDCG@10"])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all ways in turn, and make the table of their medians."""
    import numpy as np
    from benchmark_results import table
    from sentence_transformers import SentenceTransformer

    found: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        make_data(options.data, data, options.queries, options.documents)
        start = ndcg(data, SentenceTransformer(options.student))
        for turn in range(options.rounds):
            for way in options.ways if turn % 2 else options.ways[::-1]:  # none is always first
                command = [sys.executable, __file__, *sys.argv[1:], "--child", way, "--child-data", str(data)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, found[way][-1], flush=True)
    plainest = [way for way in options.ways if way.startswith("plain")]
    totals = {
        way: [float(np.median([sum(run[kind].values()) for run in runs])) for kind in ("wall", "cpu")]
        for way, runs in found.items()
    }
    best = [min(totals[way][kind] for way in plainest) for kind in (0, 1)] if plainest else [float("nan")] * 2
    rows = []
    for way, runs in found.items():
        stages = [float(np.median([run["wall"][stage] for run in runs])) for stage in STAGES]
        wall, cpu = totals[way]
        quality = float(np.mean([run["value"] for run in runs]))
        rows.append([way, *stages, wall, best[0] / wall, cpu, best[1] / cpu, quality])
    title = (
        f"{options.data.name}: {options.queries} training queries with lists of {options.list_size}, "
        f"{options.documents:,} documents, {options.epochs} epoch(s), {options.rounds} round(s); test nDCG@10 of the "
        f"student as it comes: {start:.4f}"
    )
    columns = ["", *(f"{stage}, s" for stage in STAGES), "all, s", "times as fast", "CPU s", "by CPU s", "nDCG@10"]
    return [table(title, columns, rows)]


def main() -> None:
    """Measure, print the table, and write results/main_job.json."""
    from benchmark_results import provenance, render, save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "msmarco-train", help="a BEIR folder")
    add("--teacher", help="a cross-encoder's name or folder; without it the demo's")
    add("--student", help="a bi-encoder's name or folder; without it the demo's all-MiniLM-L6-v2")
    add("--queries", type=int, default=1_000, help="for training, and for the test [%(default)s]")
    add("--documents", type=int, default=4_000, help="of the corpus [%(default)s]")
    add("--list-size", type=int, default=8, help="documents of a list, the judged one among them [%(default)s]")
    add("--batch-size", type=int, default=16)
    add("--epochs", type=int, default=1)
    add("--rounds", type=int, default=1, help="of all ways; the table has medians [%(default)s]")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of {'; '.join(WAYS)} [all]")
    add("--output", type=Path, default=HERE / "results" / "main_job.json")
    add("--child", help=argparse.SUPPRESS)
    add("--child-data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.teacher is None or options.student is None:
        from st_m3se.distillation.demo_models import MINILM, demo_teacher_folder, weights_folder

        options.teacher = options.teacher or str(demo_teacher_folder())
        options.student = options.student or str(weights_folder(*MINILM))
    if options.child:
        child(options.child, options.child_data, options)
        return
    facts = provenance()
    tables = measure(options)
    print(render({"command": " ".join(sys.argv), "provenance": facts, "tables": tables}))
    save(options.output, "main_job", facts, tables)


if __name__ == "__main__":
    main()
