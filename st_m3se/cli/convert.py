"""`st-m3se convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from st_m3se.scores.convert import DESTINATIONS, SOURCES
from st_m3se.scores.convert import convert as convert_scores

__all__ = ["convert"]


class OnErrorChoice(str, Enum):
    """What to do with a bad line."""

    RAISE = "raise"
    SKIP = "skip"


class IdsChoice(str, Enum):
    """What the ids become."""

    KEEP = "keep"
    STR = "str"
    INT = "int"


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A file of teacher scores, plain, gz or zst; or a store.")
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="A name without a suffix makes a store; .run, .jsonl (PyLate), .csv and .tsv (MarginMSE), with .gz "
            "or .zst behind it, make a file.",
        ),
    ],
    source_format: Annotated[
        str | None,
        typer.Option("--from", metavar="FORMAT", help=f"Format of IN, if not recognised: {', '.join(SOURCES)}."),
    ] = None,
    destination_format: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="FORMAT", help=f"Format of OUT, if its name does not say: {', '.join(DESTINATIONS)}."
        ),
    ] = None,
    on_error: Annotated[
        OnErrorChoice, typer.Option("--on-error", help="Stop at the first bad line, or skip bad lines and count them.")
    ] = OnErrorChoice.RAISE,
    ids: Annotated[
        IdsChoice, typer.Option("--ids", help="Keep the ids as they are (text formats: str), or make them str or int.")
    ] = IdsChoice.KEEP,
    scores: Annotated[
        Path | None, typer.Option("--scores", help="The score pickle, or a store of it, beside a hard-negatives file.")
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option("--qrels", help="The positives, TREC or BEIR, to write MarginMSE pairs.")
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="COLUMN=NAME", help="A table's name for query_id, document_id, score, ..."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The teacher's name, for the store's manifest.")
    ] = None,
    tag: Annotated[
        str | None, typer.Option("--tag", help="Of a TREC run. Default: the name of OUT without its endings.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert teacher scores from any known format to a store or another format.

    For example: st-m3se convert kd.jsonl scores makes a store, and st-m3se convert scores kd.run.gz a TREC run.

    The format of IN is recognised by its content. OUT appears whole or not at all.
    """
    columns = {}
    for option in column or []:
        name, equals, value = option.partition("=")
        if not equals or name not in ("query_id", "document_id", "score", "document_ids", "scores"):
            raise typer.BadParameter(f"expected COLUMN=NAME, got {option!r}.", param_hint="--column")
        columns[name] = value
    done = convert_scores(
        source,
        destination,
        source_format=source_format,
        destination_format=destination_format,
        on_error="skip" if on_error is OnErrorChoice.SKIP else "raise",
        id_type=None if ids is IdsChoice.KEEP else "int" if ids is IdsChoice.INT else "str",
        scores=scores,
        qrels=qrels,
        columns=columns,
        manifest=None if teacher is None else {"teacher": teacher},
        tag=tag,
        overwrite=overwrite,
    )
    typer.echo(f"read {source} as {done.source_format}: {done.queries:,} queries, {done.scores:,} scores")
    typer.echo(f"wrote {destination} as {done.destination_format}{''.join(f', with {name}' for name in done.files)}")
    for note in done.notes:
        typer.echo(f"note: {note}")
    for message in done.messages:
        typer.echo(message, err=True)
    if done.skipped:
        more = f", of which {len(done.messages)} are shown" if done.skipped > len(done.messages) else ""
        typer.echo(f"skipped {done.skipped:,} bad entries{more}", err=True)
