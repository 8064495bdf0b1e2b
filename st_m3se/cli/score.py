"""`st-m3se score`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from st_m3se.cli import options
from st_m3se.cli.options import check_texts

__all__ = ["score"]


def score(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The folder of the store. If it holds an unfinished run of the same command, that goes on. Several "
            "teachers make a store each, OUT/NAME.",
        ),
    ],
    teacher: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A cross-encoder, or a dense, sparse or multi-vector encoder, by its name on the hub or its path. "
            "Repeat it for several.",
        ),
    ],
    candidates: Annotated[
        Path,
        typer.Option(metavar="STORE", help="The documents to score for each query: a store, scores ignored."),
    ],
    data: options.Data = None,
    queries: options.Queries = None,
    corpus: options.Corpus = None,
    max_length: options.MaxLength = None,
    dtype: options.Dtype = "auto",
    prompt: Annotated[str | None, typer.Option(help="Text in front of each query. Default: the model's own.")] = None,
    batch_tokens: options.BatchTokens = None,
    shard_queries: Annotated[
        int | None,
        typer.Option(min=1, help="Queries in a shard. Default: what makes 256 shards, but of 1,024 to 65,536 pairs."),
    ] = None,
    device: options.Device = None,
    backend: options.BackendOption = "torch",
    revision: Annotated[str | None, typer.Option(help="The teacher's branch, tag or commit.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    label: options.Label = None,
    strict: options.Strict = False,
) -> None:
    """Score each query's candidates with a teacher, into a store of raw logits.

    For example: st-m3se score --teacher cross-encoder/ms-marco-MiniLM-L6-v2 --candidates run --data scifact scores

    The run may be stopped or killed at any moment: the same command again goes on, and seconds of work are lost. With
    another teacher, precision or input it is refused.

    Several processes share the work, on one machine or on a shared file system: `accelerate launch -m st_m3se score
    ...`, torchrun, or the same command started twice.
    """
    check_texts(data, queries, corpus)
    names = {name.rstrip("/").rsplit("/", 1)[-1]: name for name in teacher}
    if len(names) < len(teacher):
        raise typer.BadParameter(
            "two of the teachers end in the same name, which would be the folder of both.", param_hint="--teacher"
        )
    from st_m3se.retrieval.scoring import score_candidates

    settings: dict[str, Any] = {
        "max_length": max_length,
        "dtype": None if dtype == "auto" else dtype,
        "prompt": prompt,
        "batch_tokens": batch_tokens,
        "shard_queries": shard_queries,
        "device": device,
        "backend": backend,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "label": label,
        "strict": strict,
    }
    inputs = candidates, data or queries, data or corpus, output
    try:
        if len(teacher) == 1:
            stores = {"": score_candidates(teacher[0], *inputs, **settings)}
        else:
            stores = score_candidates(names, *inputs, **settings)
    except KeyboardInterrupt as stop:
        typer.echo(str(stop) or "stopped before anything was scored.", err=True)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") != "0":
        return
    for name, store in stores.items():
        manifest = store.manifest
        how = manifest["dtype"] or manifest["source"]["backend"]
        typer.echo(
            f"wrote {output / name}: {manifest['queries']:,} queries, {manifest['scores']:,} scores of "
            f"{manifest['teacher']} ({how}, max length {manifest['max_length']})"
        )
