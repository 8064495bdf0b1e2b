"""`st-m3se diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from st_m3se.cli import options
from st_m3se.cli.options import check_texts, split_name

if TYPE_CHECKING:
    from st_m3se.diagnostics.scoring import Scorer
    from st_m3se.evaluation.data import EvaluationSet, Finding
    from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["diagnose"]

NAMES = r"[^/\\]+"  # of scorers, for figures


def diagnose(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The folder for figures, numbers and scores.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A BEIR folder: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv; or the name of a BEIR set.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which judgements of --data: test (the default), dev or train.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SCORER",
            help="bm25, or the name or folder of a CrossEncoder or SentenceTransformer. Repeat it to compare. NAME= is "
            "what figures call it.",
        ),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]STORE",
            help="Scores that are there already, such as a teacher's. Documents that it lacks are left out for all "
            "scorers. Repeatable.",
        ),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="The lists: a store or a TREC run, whose scores are ignored. Without it: the best --depth documents "
            "by BM25, and the relevant ones.",
        ),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Documents per query without --candidates.")] = 50,
    queries: options.Queries = None,
    corpus: options.Corpus = None,
    qrels: options.Qrels = None,
    min_relevance: Annotated[
        int, typer.Option(min=1, help="The grade from which a document is relevant; TREC DL: 2.")
    ] = 1,
    max_queries: Annotated[int | None, typer.Option(min=1, help="Look at so many queries, drawn at random.")] = None,
    gap: Annotated[
        str | None,
        typer.Option(
            metavar="BEFORE,AFTER,TEACHER",
            help="Three of the scorers: how much of the teacher's lead over BEFORE has AFTER closed?",
        ),
    ] = None,
    measure: Annotated[str, typer.Option(help="What the lead is measured in.")] = "RR@10",
    evolution: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CSV",
            help="A record of ScoreEvolutionCallback, to be drawn; several stand side by side. Needs no --data; a "
            "report in OUT gets it too.",
        ),
    ] = None,
    model_card: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Add the margin plot to the card of this saved model.")
    ] = None,
    exclude_same_id: Annotated[
        bool,
        typer.Option(
            "--exclude-same-id/--keep-same-id",
            help="Leave out the document with the query's own id, unless it is judged for it.",
        ),
    ] = True,
    strict: options.Strict = False,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="For these draws and for --max-queries.")] = 0,
    max_length: options.MaxLength = None,
    dtype: options.Dtype = "auto",
    batch_tokens: options.BatchTokens = None,
    device: options.Device = None,
    backend: options.BackendOption = "torch",
    label: options.Label = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show how far scorers separate relevant documents from others, over the same lists.

    For example: st-m3se diagnose --data scifact --split test --scorer bm25 --scorer student --scorer teacher -o look

    OUT gets, as PNG and SVG with their data as CSV: score_densities, the scores of relevant and other documents, with a
    panel for each scorer; and margins, the normalised margins of all scorers in one plot. report.html has both and a
    table of numbers with bootstrap intervals: overlap (0: apart, 1: alike), AUC per query and pooled, and the margins'
    peak and mean. scores/ keeps every score. A run that was killed goes on with the same command.

    With --gap base,student,teacher: from where to where the student has come, and where its teacher is.
    """
    if scorer or scores:
        if data is None and split is not None:
            raise typer.BadParameter("--split is for --data; for a file of judgements, use --qrels.")
        if data is None and qrels is None:
            raise typer.BadParameter("name the judgements: --data, or --qrels.")
        check_texts(data, queries, corpus, needed=bool(scorer) or candidates is None)
    elif not evolution or any(given is not None for given in (data, queries, corpus, qrels, split, candidates)):
        raise typer.BadParameter("name what to look at: --scorer or --scores, or only --evolution.")
    elif model_card is not None or gap is not None:
        raise typer.BadParameter("--model-card and --gap need scorers.")
    names = None if gap is None else tuple(name.strip() for name in gap.split(","))
    if names is not None and len(names) != 3:
        raise typer.BadParameter("expected three names: BEFORE,AFTER,TEACHER.", param_hint="--gap")

    from st_m3se.core.extras import require
    from st_m3se.diagnostics.diagnosis import DIAGNOSIS
    from st_m3se.diagnostics.diagnosis import diagnose as look
    from st_m3se.diagnostics.model_card import add_to_model_card
    from st_m3se.diagnostics.report import render_text, write_evolution, write_page, write_report
    from st_m3se.diagnostics.tracking import Evolution
    from st_m3se.evaluation.data import open_set, qrels_set

    require("matplotlib", "plot")  # not after hours of scoring
    records = [Evolution.read(path, name) for name, path in (split_name(each, NAMES) for each in evolution or [])]
    if not scorer and not scores:
        write_evolution(records, output)
        if (output / DIAGNOSIS).is_file():
            write_page(output)
        typer.echo(f"wrote {output / 'evolution.png'}, .svg and .csv")
        return
    scorers = _scorers(scorer or [], scores or [])
    if names is not None and (unknown := [name for name in names if name not in scorers]):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(scorers)}.", param_hint="--gap")
    if data is not None:
        opened = open_set(data, split=split or "test", run=candidates, qrels=qrels, strict=strict)
        name = f"{opened.name} {opened.split}"
    else:
        name = qrels.stem if qrels is not None else ""
        opened = qrels_set(qrels or "", name=name, run=candidates, queries=queries, corpus=corpus, strict=strict)
    of_models: dict[str, Any] = {
        "max_length": max_length,
        "dtype": None if dtype == "auto" else dtype,
        "batch_tokens": batch_tokens,
        "device": device,
        "backend": backend,
        "label": label,
        "trust_remote_code": trust_remote_code,
    }
    found = look(
        scorers,
        opened.candidates or _find(opened, output, depth, min_relevance),
        opened.qrels,
        output,
        queries=opened.queries,
        corpus=opened.corpus,
        name=name,
        notes=[_note(finding) for finding in opened.findings],
        gap=None if names is None else (names[0], names[1], names[2]),
        measure=measure,
        min_relevance=min_relevance,
        exclude_same_id=exclude_same_id,
        max_queries=max_queries,
        n_resamples=resamples,
        seed=seed,
        **of_models,
    )
    write_report(found, output, records)
    typer.echo(render_text(found))
    if model_card is not None:
        typer.echo(f"added the margin plot to {add_to_model_card(model_card, output)}")
    typer.echo(f"wrote {output / 'report.html'}, score_densities and margins (.png, .svg, .csv), numbers.csv, scores/")


def _scorers(models: list[str], stores: list[str]) -> dict[str, Scorer]:
    from st_m3se.scores.teacher_scores import TeacherScores

    found: dict[str, Scorer] = {}
    for given, is_store in [*((each, False) for each in models), *((each, True) for each in stores)]:
        name, value = split_name(given, NAMES)
        name = name or value.rstrip("/").rsplit("/", 1)[-1]
        if name in found:
            raise typer.BadParameter(f"two scorers are called {name!r}. Name them: --scorer NAME={value}.")
        found[name] = TeacherScores.open(value) if is_store else value
    return found


def _find(opened: EvaluationSet, output: Path, depth: int, min_relevance: int) -> TeacherScores:
    """The lists where none are given: BM25's, with the relevant documents."""
    from st_m3se.data.texts import Texts
    from st_m3se.retrieval.candidates import find_candidates

    if opened.queries is None or opened.corpus is None:
        raise ValueError("without --candidates lists are searched for, which needs texts: --data.")
    relevant = {
        query: {
            document: 1 for document, grade in grades.items() if grade >= min_relevance and document in opened.corpus
        }
        for query, grades in opened.qrels.items()
    }
    there = {query: documents for query, documents in relevant.items() if documents}
    if not there:
        raise ValueError(f"no query of {opened!r} has a relevant document in the corpus.")
    asked = Texts.open(dict(zip(there, opened.queries.take(list(there)), strict=True)), "queries")
    return find_candidates(
        asked, opened.corpus, ["bm25"], output / "candidates", depth=depth, positives=there, overwrite=True
    )


def _note(finding: Finding) -> str:
    more = ", ..." if finding.count > len(finding.examples) else ""
    return f"{finding.count:,} {finding.kind} ({', '.join(finding.examples)}{more})"
