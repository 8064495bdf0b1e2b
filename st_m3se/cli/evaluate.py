"""`st-m3se evaluate`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st_m3se.cli import options
from st_m3se.cli.evaluated_systems import Given, read_systems

if TYPE_CHECKING:
    from st_m3se.evaluation.data import EvaluationSet

__all__ = ["evaluate"]


def evaluate(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RESULTS", help="With --compare: results.json files, or folders that hold one."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The folder of runs and report. What is there already of the same evaluation is not made again.",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A BEIR folder: corpus, queries and qrels. Repeatable."),
    ] = None,
    beir_set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME", help="A BEIR set by its name, downloaded once: scifact, nq. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which judgements: test, dev or train.")] = "test",
    qrels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Judgements, TREC or BEIR, in place of the folder's. Without --data and --set, runs are measured "
            "on them alone.",
        ),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Re-rank this run (likewise, or MS MARCO's top1000) instead of searching the corpus.",
        ),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --qrels and without --data: the queries.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --qrels and without --data: the documents.")
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SYSTEM",
            help="bm25, or the name or folder of a bi-encoder, sparse encoder or multi-vector encoder. Repeatable. "
            "NAME=MODEL1,MODEL2 are seeds of one system.",
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="A finished run: TREC, ColBERT, any file that st-m3se convert reads, or a store. Repeatable. "
            "NAME=FILE1,FILE2 are seeds of one system.",
        ),
    ] = None,
    rerank: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MODEL",
            help="A cross-encoder that re-ranks each --system (without any: each --run), or --candidates. Repeatable.",
        ),
    ] = None,
    rerank_depth: Annotated[
        int,
        typer.Option(min=1, help="Documents that are re-ranked; the others follow below, in their old order."),
    ] = 100,
    first_stage: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Re-rank only this system or run. Repeatable."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]KIND",
            help="bi-encoder, sparse or multi-vector. Without it, the model's configuration says so.",
        ),
    ] = None,
    query_prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]TEXT", help="In front of queries. Default: the model's own."),
    ] = None,
    document_prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]TEXT", help="In front of documents, likewise."),
    ] = None,
    max_length: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]N", help="Tokens of a text; for a re-ranker's pairs name it: NAME=N."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]N", help="Of a cross-encoder with several labels, the one that is the score."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    tokens: options.Tokens = "words",
    dtype: options.Dtype = "auto",
    measure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="As ir_measures writes them: P@5, RR(rel=2)@10. Repeatable; the first is the headline. Default: "
            "nDCG@10, RR@10, R@100, R@1000, AP.",
        ),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Documents per query that a search finds.")] = 1000,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Test every other system against this one. Default: all pairs."),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(help="Of intervals; the tests' level is 1 minus this. Default: 0.95."),
    ] = None,
    exclude_same_id: Annotated[
        bool,
        typer.Option(
            "--exclude-same-id/--no-exclude-same-id",
            help="BEIR's rule: a document with the query's own id is no result, unless it is judged for the query.",
        ),
    ] = True,
    strict: options.Strict = False,
    batch_size: options.BatchSize = 32,
    device: options.Device = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of embeddings. Default: OUT/embeddings.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots; needs the extra named plot.")] = True,
    diagnosis: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="What st-m3se diagnose has written: its figures and numbers become a section of report.html.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Put the RESULTS of several evaluations beside each other.")
    ] = False,
    common_queries: Annotated[
        bool, typer.Option("--common-queries", help="With --compare: on the queries that all files have.")
    ] = False,
) -> None:
    r"""Evaluate systems: from models to measures, significance and a report.

    OUT gets each run (SET/SYSTEM/run.trec), results.json, per_query.jsonl,
    tables as Markdown and LaTeX, plots, and report.html, one page with
    everything. The same command again makes only what is missing. With several
    sets, {set} in FILE of --run, --candidates and --qrels stands for each set's
    name. The command needs the extra named eval.

    Search a BEIR set, and re-rank each system's first 100 documents:

    st-m3se evaluate --set scifact --system bm25 --system my/student \
    --rerank cross-encoder/ms-marco-MiniLM-L6-v2 --output out

    Three seeds of one system on two folders, tested against BM25:

    st-m3se evaluate --data scifact --data cranfield --system bm25 \
    --system ours=seed1,seed2,seed3 --baseline bm25 --output out

    Measure finished runs, without any text:

    st-m3se evaluate --qrels qrels.dl19-passage.txt --run bm25=bm25.run \
    --run colbert=colbert.run --measure "RR(rel=2)@10" --output out

    Re-rank a given run, as papers on MS MARCO do:

    st-m3se evaluate --data msmarco --split dev --candidates top1000.run \
    --system student --rerank teacher --output out

    Two evaluations side by side:

    st-m3se evaluate --compare a/results.json b/results.json
    """
    if compare:
        _compare(results or [], output, common_queries, baseline, confidence, plots, diagnosis)
        return
    if results:
        raise typer.BadParameter(f"{results[0]} is not expected here: results are compared with --compare.")
    if output is None:
        raise typer.BadParameter("name the folder of runs and report.", param_hint="--output")
    if not (data or beir_set or qrels):
        raise typer.BadParameter("name what to evaluate on: --data FOLDER, --set NAME, or --qrels FILE.")
    if (queries or corpus) and (data or beir_set or not qrels):
        raise typer.BadParameter("--queries and --corpus go with --qrels and without --data and --set.")
    if not (system or run or candidates):
        raise typer.BadParameter("name what to evaluate, such as --system bm25.", param_hint="--system")

    from st_m3se.core.extras import require
    from st_m3se.evaluation.evaluation import evaluate as evaluate_systems

    require("rich", "eval")
    sections = _sections(diagnosis)
    sets = list(_sets(data or [], beir_set or [], split, qrels, candidates, queries, corpus, strict))
    given = Given(
        systems=system or [],
        runs=run or [],
        rerank=rerank or [],
        rerank_depth=rerank_depth,
        first_stages=first_stage or [],
        dtype=None if dtype == "auto" else dtype,
        options={
            "kind": kind or [],
            "query-prompt": query_prompt or [],
            "document-prompt": document_prompt or [],
            "max-length": max_length or [],
            "label": label or [],
        },
        trust_remote_code=trust_remote_code,
        tokens=tokens,
    )
    unscored = any(finding.kind == "candidates without scores" for each in sets for finding in each.findings)
    systems = read_systems(given, candidates=candidates is not None, unscored=unscored)
    measured = evaluate_systems(
        sets,
        systems,
        output,
        measures=measure,
        depth=depth,
        exclude_same_id=exclude_same_id,
        strict=strict,
        confidence=0.95 if confidence is None else confidence,
        baseline=baseline,
        batch_size=batch_size,
        device=device,
        cache_dir=cache,
        plots=plots,
        sections=sections,
    )
    _show(measured, output)


def _compare(
    files: Sequence[Path],
    output: Path | None,
    common_queries: bool,
    baseline: str | None,
    confidence: float | None,
    plots: bool,
    diagnosis: Path | None,
) -> None:
    if not files:
        raise typer.BadParameter("name the results.json files to compare.")

    from st_m3se.evaluation.comparison import compare_files
    from st_m3se.evaluation.report import write_report

    results = compare_files(files, common_queries=common_queries, baseline=baseline, confidence=confidence)
    if output is not None:
        write_report(results, output, plots=plots, sections=_sections(diagnosis))
    _show(results, output)


def _sections(diagnosis: Path | None) -> list[tuple[str, str]]:
    """The page's further sections."""
    from st_m3se.diagnostics.report import html_section

    return [] if diagnosis is None else [html_section(diagnosis)]


def _show(results: Any, output: Path | None) -> None:
    from st_m3se.evaluation.tables import render_terminal

    render_terminal(results)
    if output is not None:
        typer.echo(f"wrote {output}: report.html, report.md, report.tex, results.json, per_query.jsonl")


def _sets(
    folders: Sequence[Path],
    names: Sequence[str],
    split: str,
    qrels: str | None,
    candidates: str | None,
    queries: Path | None,
    corpus: Path | None,
    strict: bool,
) -> Iterator[EvaluationSet]:
    from st_m3se.evaluation.data import open_set, qrels_set
    from st_m3se.evaluation.systems import file_stem

    if not folders and not names:
        name = re.sub(r"^qrels[._-]", "", file_stem(str(qrels)))
        texts = {"queries": queries, "corpus": corpus}
        yield qrels_set(str(qrels), name=name, split=split, run=candidates, strict=strict, **texts)
    several = len(folders) + len(names) > 1
    sources: list[tuple[Path | str, str]] = [(folder, folder.resolve().name) for folder in folders]
    for source, name in [*sources, *((name, name) for name in names)]:
        files = []
        for option, file in (("--qrels", qrels), ("--candidates", candidates)):
            if file is not None and several and "{set}" not in file:
                raise ValueError(f"{option} {file} cannot be that of each set: write {{set}} where the set's name is.")
            files.append(None if file is None else file.replace("{set}", name))
        yield open_set(source, split=split, qrels=files[0], run=files[1], strict=strict)
