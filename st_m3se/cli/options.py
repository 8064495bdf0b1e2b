"""Options that several commands share, and the check of those that name texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from st_m3se.core.reading import IdType
from st_m3se.retrieval.teacher import Backend, Precision

__all__ = [
    "BackendOption",
    "BatchSize",
    "BatchTokens",
    "Corpus",
    "Data",
    "Device",
    "Dtype",
    "Ids",
    "Label",
    "MaxLength",
    "Overwrite",
    "Qrels",
    "Queries",
    "Strict",
    "Tokens",
    "TrustRemoteCode",
    "check_texts",
    "split_name",
]

Data = Annotated[
    Path | None, typer.Option(help="A BEIR folder: corpus.jsonl, queries.jsonl and, for --split, qrels/SPLIT.tsv.")
]
Queries = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Queries: jsonl (_id, text) or TSV (id, text), plain, gz or zst; or Parquet."),
]
Corpus = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Documents: jsonl (_id, title, text), TSV or Parquet likewise.")
]
Qrels = Annotated[Path | None, typer.Option(metavar="FILE", help="Judgements, TREC or BEIR.")]
Ids = Annotated[
    Literal["keep", IdType], typer.Option(help="Keep the ids as they are (text formats: str), or make them str or int.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse empty texts, ids that repeat, absent documents and so on.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu. Default: a GPU, where there is one.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts that a model encodes at once.")]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a batch with its padding. Default: 32,768 on a GPU, 1,024 on a CPU. Lower it when memory runs "
        "out.",
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens that models read; the rest is cut off. Default: each model's own.")
]
Dtype = Annotated[
    Literal["auto", Precision],
    typer.Option(
        help="Auto is bfloat16 (or float16) on a GPU, float32 on a CPU; encoders that search stay as they come. int8 "
        "is for cross-encoders on CPUs: about twice as fast as float32, orders nearly the same."
    ),
]
BackendOption = Annotated[Backend, typer.Option(help="What runs the models.")]
Label = Annotated[
    int | None, typer.Option(min=0, help="Of a cross-encoder with several labels, the one that is the score.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let models by name run code of their own.")]
Tokens = Annotated[
    str, typer.Option(help="What bm25 takes for words: words, or bigrams for Chinese, Japanese, Korean.")
]


def check_texts(data: object, queries: Path | None, corpus: Path | None, *, needed: bool = True) -> None:
    """Refuse options that name texts twice, by half or, where they are ``needed``, not at all."""
    files = [file is not None for file in (queries, corpus)]
    if any(files) != all(files) or (any(files) if data is not None else needed and not all(files)):
        raise typer.BadParameter("name either a folder with --data, or files with both --queries and --corpus.")


def split_name(given: str, names: str = r"[\w.+@-]+") -> tuple[str | None, str]:
    """``NAME=VALUE``, where ``names`` says what a name looks like; a path that holds "=" is a path."""
    name, equals, value = given.partition("=")
    return (name, value) if equals and re.fullmatch(names, name) and not Path(given).exists() else (None, given)
