"""`st-m3se describe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from st_m3se.core.reading import IdType
from st_m3se.data.qrels import Qrels, read_qrels
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["describe"]

COUNTED = ("format", "version", "queries", "scores", "shards")  # the summary counts what is really there


def describe(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="A store, a folder of Parquet files, or one Parquet file.")
    ],
    qrels: Annotated[
        Path | None,
        typer.Option(help="The positives, TREC or BEIR: counts those that have a score, and their margins."),
    ] = None,
    bins: Annotated[int, typer.Option(min=1, help="Bars of each histogram.")] = 20,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Check every row first, and stop at what is wrong with status 1."),
    ] = False,
) -> None:
    """Print what a store of teacher scores holds.

    For example: st-m3se describe scores --qrels scifact/qrels/train.tsv

    Its manifest, the lengths of the lists, and histograms of the scores and of the margins: each positive's score minus
    each negative's where --qrels names the positives, and else the list's highest score minus each of the others.
    """
    scores = TeacherScores.open(store)
    judged = None if qrels is None else _judgements(qrels, scores)
    if validate:
        scores.validate()
    typer.echo(f"{store}: {len(scores):,} queries in {len(scores.files)} Parquet files")
    for name, value in scores.manifest.items():
        if name not in COUNTED and value is not None:
            for line in _lines(name, value):
                typer.echo(line)
    typer.echo(str(scores.describe(judged, bins=bins, show_progress_bar=True)))
    if validate:
        typer.echo("valid")


def _judgements(path: Path, scores: TeacherScores) -> Qrels:
    """The qrels with ids of the store's types."""
    kinds: list[IdType] = ["int" if kind is int else "str" for kind in scores.id_types]
    return read_qrels(path, id_type=kinds[0], document_id_type=kinds[1])


def _lines(name: str, value: Any) -> list[str]:
    if name == "parents":
        return ["parents:", *(f"  {json.dumps(parent, ensure_ascii=False)}" for parent in value)]
    return [f"{name.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"]
