"""The paper's table on the paper's data: MS MARCO and TREC DL 2019, a dual encoder and what each loss makes of it.

    python benchmarks/msmarco.py --folder ../shared/data --work /tmp/msmarco                        # a CPU, two hours
    python benchmarks/msmarco.py --folder ../shared/data --work /tmp/msmarco --student teacher-6    # a GPU

A trunk that was never trained for dense search is trained on the same lists with each loss of the package: with the
labels alone (the paper's dual encoder) and from the scores of ms-marco-MiniLM-L12-v2. Every model then re-ranks what
BM25 found for held-out queries of MS MARCO, and three published first stages of TREC DL 2019 (BM25, TAS-B, SPLADE++),
where a passage counts for RR@10 from grade 2. Beside it stands what the paper has; there a 6-layer BERT learned from
all of MS MARCO, and here a smaller one from a part, so that differences between rows can be compared, and levels not.

--folder has msmarco-train and trec-dl19: BEIR folders, the second with candidates.run and runs/*.run. Resumable; the
trunk is 'tiny' (a 2-layer BERT), 'teacher-6' (the first six layers of the teacher), or any model by name or path.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoTokenizer, BertModel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from benchmark_results import provenance, save, table  # noqa: E402
from loss_comparison import CONTROL, RECIPE, Comparison, parsed, shared_arguments  # noqa: E402

from st_m3se import Collection, TeacherScores, score_candidates  # noqa: E402
from st_m3se.core.scored_list import ScoredList  # noqa: E402
from st_m3se.distillation.config import LOSSES  # noqa: E402
from st_m3se.distillation.demo_models import demo_teacher_folder, load_student, onnx_scorer  # noqa: E402
from st_m3se.distillation.lists import Run, run_of  # noqa: E402
from st_m3se.distillation.stages import write_text  # noqa: E402
from st_m3se.evaluation import compare, per_query  # noqa: E402
from st_m3se.scores import convert  # noqa: E402

FIRST_STAGES = {"BM25": "candidates.run", "TAS-B": "runs/tasb.run", "SPLADE++": "runs/spladepp.run"}
HELD_OUT = "MS MARCO"
MEASURES = {HELD_OUT: ("nDCG@10", "RR@10"), **dict.fromkeys(FIRST_STAGES, ("nDCG@10", "RR(rel=2)@10"))}
ROWS = (CONTROL, RECIPE, *LOSSES)
MEASURED = 10  # documents of a list that the measures look at
PAPER = {  # MS MARCO RR@10 and nDCG@10, TREC DL 2019 RR@10 and nDCG@10, re-ranking BM25
    "BM25": (0.194, 0.241, 0.689, 0.501),
    "teacher": (0.370, 0.430, 0.829, 0.749),
    CONTROL: (0.310, 0.360, 0.834, 0.677),
    "score-mse": (0.289, 0.343, 0.781, 0.693),
    "margin-mse": (0.334, 0.392, 0.867, 0.718),
    "rank-distil": (0.249, 0.301, 0.852, 0.708),
    "softmax-cross-entropy": (0.346, 0.405, 0.846, 0.726),
    "m3se": (0.349, 0.406, 0.852, 0.714),
}


class MSMarco(Comparison):
    """The training of :class:`Comparison`, measured by re-ranking."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__("msmarco-train", args)
        self.judged = Collection.open(args.folder / "trec-dl19", "test", id_type="str")
        self.runs: dict[str, Run] = {HELD_OUT: _best({q: self.candidates.lexical[q] for q in self.test}, args.held_out)}
        self.qrels: dict[str, Any] = {HELD_OUT: self.data.qrels["test"]}
        for stage, file in FIRST_STAGES.items():
            store = args.work / "first-stages" / stage
            if not store.is_dir():
                convert(args.folder / "trec-dl19" / file, store)
            opened = TeacherScores.open(store)
            asked = [query for query in self.judged.qrels or {} if query in opened]
            self.runs[stage], self.qrels[stage] = _best(run_of(opened, asked), args.first_stage), self.judged.qrels

    def student(self) -> SentenceTransformer:
        """The trunk, with texts cut as everywhere here."""
        student = first_layers(6) if self.args.student == "teacher-6" else load_student(self.args.student)
        student.max_seq_length = self.args.max_length
        return student

    def ranked(self, student: Any) -> dict[str, Any]:
        """The lists of each first stage as a model ranks them: a student, or a function of pairs."""
        lists: dict[str, dict[str, list[str]]] = {
            "held-out": {q: list(found) for q, found in self.runs[HELD_OUT].items()}
        }
        lists["judged"] = {}
        for stage in FIRST_STAGES:
            for query, found in self.runs[stage].items():
                known = lists["judged"].setdefault(query, [])
                known += [document for document in found if document not in known]
        texts = {"held-out": (self.data.queries, self.data.corpus), "judged": self.judged.texts}
        scores: dict[str, Run] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for name, candidates in lists.items():
                queries, corpus = texts[name]
                store = score_candidates(student, candidates, queries, corpus, Path(scratch) / name, name="model")
                scores[name] = run_of(store, candidates)
        ranked = {
            stage: {query: {d: known[query][d] for d in found} for query, found in run.items()}
            for stage, run in self.runs.items()
            for known in [scores["held-out" if stage == HELD_OUT else "judged"]]
        }
        return {"reranked": {stage: _best(run, MEASURED) for stage, run in ranked.items()}}

    def teacher(self) -> dict[str, Any]:
        """The same of the teacher; kept."""
        path = self.folder / "teacher.json"
        if not path.is_file():
            write_text(path, json.dumps(self.ranked(onnx_scorer(self.args.max_length))))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def values(self, stage: str, run: Run) -> dict[str, np.ndarray]:
        """Each measure for each judged query."""
        rows = [ScoredList(query, list(found), list(found.values())) for query, found in run.items()]
        queries = list(self.qrels[stage])
        found = per_query(rows, self.qrels[stage], MEASURES[stage], exclude_same_id=False, query_ids=queries)
        return {name: found[measure] for name, measure in zip(("nDCG@10", "RR@10"), MEASURES[stage], strict=True)}


def _best(run: Run, size: int) -> Run:
    """The best documents of each query."""
    return {q: dict(sorted(found.items(), key=lambda item: -item[1])[:size]) for q, found in run.items()}


def first_layers(number: int) -> SentenceTransformer:
    """The teacher's first layers with mean pooling: a trunk that has seen pairs, and was never a bi-encoder."""
    source = demo_teacher_folder()
    trunk = BertModel.from_pretrained(source)
    trunk.encoder.layer = trunk.encoder.layer[:number]
    trunk.config.num_hidden_layers = number
    with tempfile.TemporaryDirectory() as scratch:
        trunk.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source).save_pretrained(scratch)
        transformer = Transformer(scratch)
        return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())])


def tables_of(each: MSMarco) -> list[dict[str, Any]]:
    """One table for each first stage: means over seeds, p against the dual encoder without a teacher after Holm."""
    tables = []
    reranked = {row: [each.rankings(row, seed)["reranked"] for seed in each.args.seeds] for row in each.args.losses}
    taught = each.teacher()["reranked"]
    for stage, first in each.runs.items():
        values = {"BM25" if stage == HELD_OUT else stage: [each.values(stage, first)]}
        values["teacher"] = [each.values(stage, taught[stage])]
        values |= {row: [each.values(stage, run[stage]) for run in runs] for row, runs in reranked.items()}
        means = {row: np.mean([found["nDCG@10"] for found in seeds], axis=0) for row, seeds in values.items()}
        p = {}
        if CONTROL in means and len(means) > 1:
            p = {test.second: test.holm_p for test in compare(means, "nDCG@10", baseline=CONTROL)}
        lines = []
        for row, seeds in values.items():
            paper: tuple[Any, ...] = PAPER.get(row, (None,) * 4) if stage in (HELD_OUT, "BM25") else (None,) * 4
            ndcg = [float(found["nDCG@10"].mean()) for found in seeds]
            spread = f"{min(ndcg):.4f} to {max(ndcg):.4f}" if len(ndcg) > 1 else None
            rr = float(np.mean([found["RR@10"].mean() for found in seeds]))
            known = (paper[1], paper[0]) if stage == HELD_OUT else (paper[3], paper[2])
            name = "dual encoder, no teacher" if row == CONTROL else row
            lines.append([name, float(np.mean(ndcg)), spread, rr, p.get(row), *known])
        title = f"{HELD_OUT}, held out, re-ranking BM25" if stage == HELD_OUT else f"TREC DL 2019, re-ranking {stage}"
        sizes = f"{len(each.data.qrels['train']):,} training queries, {len(each.args.seeds)} seed(s)"
        heads = ["", "nDCG@10", "seeds", "RR@10", "p, no teacher", "paper's nDCG@10", "paper's RR@10"]
        tables.append(table(f"{title}: {len(each.qrels[stage])} queries; {sizes}, {each.args.student}", heads, lines))
    return tables


def main() -> None:
    """Parse the command line, run what is missing, and write results/msmarco.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser)
    add = parser.add_argument
    add("--losses", nargs="+", choices=ROWS, default=list(ROWS), metavar="LOSS", help=f"of {', '.join(ROWS)} [all]")
    add("--held-out", type=int, default=20, help="documents of BM25 to re-rank on held-out queries [%(default)s]")
    add("--first-stage", type=int, default=100, help="documents to re-rank on TREC DL 2019 [%(default)s]")
    add("--output", type=Path, default=HERE / "results" / "msmarco.json")
    sizes = {"train_queries": 4_000, "dev_queries": 300, "test_queries": 500, "documents": 18_003, "pool": 1}
    training = {"batch_size": 32, "epochs": 2, "learning_rate": 5e-4}
    parser.set_defaults(work=Path("msmarco"), student="tiny", **sizes, **training)
    args = parsed(parser)
    args.out_of_domain = []
    facts = provenance()
    tables = tables_of(MSMarco(args))
    save(args.output, "msmarco", facts, tables)
    print(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
