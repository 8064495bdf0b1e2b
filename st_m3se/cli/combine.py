"""`st-m3se combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from st_m3se.cli import options
from st_m3se.scores.combine import Aggregation, Calibration, Missing
from st_m3se.scores.combine import combine as combine_stores

__all__ = ["combine"]


def combine(
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE", help="Two or more stores; of one, log-rank or logit.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the new store.")],
    calibration: Annotated[
        Calibration,
        typer.Option(
            help="Bring each query's scores to a common scale: mean 0 and deviation 1, 0 to 1, ranks from 0 to 1, "
            "or not at all. log-rank and logit make scores of an order and of probabilities, and take one store, too.",
        ),
    ] = "z-norm",
    aggregation: Annotated[
        Aggregation, typer.Option(help="The mean, median or lowest of a document's scores.")
    ] = "mean",
    spread: Annotated[
        float | None,
        typer.Option(
            help="For z-norm: what one standard deviation becomes. Without it the first store's mean deviation, so "
            "that margins keep its units; 1 gives plain z-scores.",
        ),
    ] = None,
    missing: Annotated[
        Missing,
        typer.Option(help="Stop at a query or document that a store lacks, or drop it and count."),
    ] = "raise",
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Drop documents whose calibrated scores have a standard deviation over the teachers above X.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Combine several teachers' scores of the same documents into a new store.

    For example: st-m3se combine scores-minilm scores-bge scores-both, or st-m3se combine ranking scores --calibration
    log-rank.

    OUT gets the queries and documents in the order of the first store, and appears whole or not at all.
    """
    combined = combine_stores(
        stores,
        output,
        calibration=calibration,
        aggregation=aggregation,
        spread=spread,
        missing=missing,
        max_disagreement=max_disagreement,
        overwrite=overwrite,
        show_progress_bar=True,
    )
    source, parents = combined.manifest["source"], combined.manifest["parents"]
    typer.echo(f"combined {', '.join(parent['name'] for parent in parents)}: {aggregation} after {calibration}")
    for parent in parents:
        if any(parent["unused"].values()):
            typer.echo(
                f"left out of {parent['name']}, as not in every store: {parent['unused']['queries']:,} queries, and "
                f"{parent['unused']['scores']:,} scores of the others"
            )
    typer.echo(f"mean disagreement {source['mean_disagreement']:.3f}, in calibrated units")
    dropped = source["dropped"]
    if max_disagreement is not None:
        typer.echo(f"dropped {dropped['scores']:,} scores with a disagreement above {max_disagreement:g}")
    if dropped["queries"]:
        typer.echo(f"dropped {dropped['queries']:,} queries, which have no document left")
    typer.echo(f"wrote {output}: {combined.manifest['queries']:,} queries, {combined.manifest['scores']:,} scores")
