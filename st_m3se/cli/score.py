"""`st-m3se score`."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["score"]


class DtypeChoice(str, Enum):
    """The precision of the teacher."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class BackendChoice(str, Enum):
    """What runs the teacher."""

    TORCH = "torch"
    ONNX = "onnx"
    OPENVINO = "openvino"


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
            "--teacher",
            metavar="NAME",
            help="A cross-encoder, or a dense, sparse or multi-vector encoder, by its name on the hub or its path. "
            "Repeat it for several.",
        ),
    ],
    candidates: Annotated[
        Path,
        typer.Option(
            "--candidates", metavar="STORE", help="The documents to score for each query: a store, scores ignored."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help="A BEIR folder with the texts: queries.jsonl and corpus.jsonl.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option("--queries", metavar="FILE", help="Texts of the queries: BEIR jsonl, Parquet, TSV, a folder."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", metavar="FILE", help="Texts of the documents, likewise.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=1, help="Tokens of a pair; longer ones are truncated. Default: the model's."),
    ] = None,
    dtype: Annotated[
        DtypeChoice,
        typer.Option(
            "--dtype",
            help="Auto is bfloat16 (or float16) on a GPU, float32 on a CPU. int8 is for CPUs: about twice "
            "as fast as float32, orders nearly the same.",
        ),
    ] = DtypeChoice.AUTO,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Text in front of each query. Default: the model's own prompt.")
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--batch-tokens",
            min=1,
            help="Tokens of a batch with its padding. Default: 32,768 on a GPU, 1,024 on a CPU. Lower it when memory "
            "runs out.",
        ),
    ] = None,
    shard_queries: Annotated[
        int | None,
        typer.Option(
            "--shard-queries",
            min=1,
            help="Queries in a shard. Default: what makes 256 shards, but of 1,024 to 65,536 pairs.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Such as cuda:1 or cpu. Default: a GPU, where there is one.")
    ] = None,
    backend: Annotated[BackendChoice, typer.Option("--backend", help="What runs the teacher.")] = BackendChoice.TORCH,
    revision: Annotated[str | None, typer.Option("--revision", help="The teacher's branch, tag or commit.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the teacher run code of its own from the hub.")
    ] = False,
    label: Annotated[
        int | None,
        typer.Option("--label", min=0, help="Of a cross-encoder with several labels, the one that is the score."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse empty texts and ids that repeat.")] = False,
) -> None:
    """Score each query's candidates with a teacher, into a store of raw logits.

    For example: st-m3se score --teacher cross-encoder/ms-marco-MiniLM-L6-v2 --candidates run --data scifact scores

    The run may be stopped or killed at any moment: the same command again goes on, and seconds of work are lost. With
    another teacher, precision or input it is refused.

    Several processes share the work, on one machine or on a shared file system: `accelerate launch -m st_m3se score
    ...`, torchrun, or the same command started twice.
    """
    if (data is None) == (queries is None and corpus is None) or (queries is None) != (corpus is None):
        raise typer.BadParameter("name either a folder with --data, or files with both --queries and --corpus.")
    names = {name.rstrip("/").rsplit("/", 1)[-1]: name for name in teacher}
    if len(names) < len(teacher):
        raise typer.BadParameter(
            "two of the teachers end in the same name, which would be the folder of both.", param_hint="--teacher"
        )
    from st_m3se.retrieval.scoring import score_candidates

    options: dict[str, Any] = {
        "max_length": max_length,
        "dtype": None if dtype is DtypeChoice.AUTO else dtype.value,
        "prompt": prompt,
        "batch_tokens": batch_tokens,
        "shard_queries": shard_queries,
        "device": device,
        "backend": backend.value,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "label": label,
        "strict": strict,
    }
    inputs = candidates, data or queries, data or corpus, output
    try:
        if len(teacher) == 1:
            stores = {"": score_candidates(teacher[0], *inputs, **options)}
        else:
            stores = score_candidates(names, *inputs, **options)
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
