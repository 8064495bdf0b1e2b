"""`st-m3se convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_m3se.cli import options
from st_m3se.core.reading import OnError
from st_m3se.scores.convert import DESTINATIONS, SOURCES
from st_m3se.scores.convert import convert as convert_scores

__all__ = ["convert"]


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
        OnError, typer.Option(help="Stop at the first bad line, or skip bad lines and count them.")
    ] = "raise",
    ids: options.Ids = "keep",
    scores: Annotated[
        Path | None, typer.Option(help="The score pickle, or a store of it, beside a hard-negatives file.")
    ] = None,
    qrels: Annotated[Path | None, typer.Option(help="The positives, TREC or BEIR, to write MarginMSE pairs.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=NAME", help="A table's name for query_id, document_id, score, ..."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="The teacher's name, for the store's manifest.")] = None,
    tag: Annotated[
        str | None, typer.Option(help="Of a TREC run. Default: the name of OUT without its endings.")
    ] = None,
    overwrite: options.Overwrite = False,
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
        on_error=on_error,
        id_type=None if ids == "keep" else ids,
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
