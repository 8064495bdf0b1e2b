"""`st-m3se candidates`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pyarrow.compute as pc
import typer

from st_m3se.cli import options
from st_m3se.cli.options import check_texts

__all__ = ["candidates"]


def candidates(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make: a store, one row per query.")],
    data: options.Data = None,
    queries: options.Queries = None,
    corpus: options.Corpus = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="bm25, or the name or folder of a bi-encoder, sparse or multi-vector encoder. Repeat it to merge "
            "several by reciprocal rank fusion. Without it: bm25.",
        ),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Documents per query, at most.")] = 50,
    split: Annotated[str | None, typer.Option(help="Only the queries judged in qrels/SPLIT.tsv of --data.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Only the queries judged in this file, TREC or BEIR.")] = None,
    include_positives: Annotated[
        bool,
        typer.Option(
            "--include-positives",
            help="Put positives of --split or --qrels that were not found at the end of the list.",
        ),
    ] = False,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Leave out the pairs of a qrels file, or the documents of a file with an id on each line. Repeatable.",
        ),
    ] = None,
    exclude_same_id: Annotated[
        bool,
        typer.Option("--exclude-same-id", help="Leave out the document with the query's own id, unless it is judged."),
    ] = False,
    stemmer: Annotated[str, typer.Option(help="Snowball stemmer for bm25: english, german, ..., or none.")] = "english",
    stopwords: Annotated[str, typer.Option(help="Stop words for bm25: english, german, ..., or none.")] = "english",
    tokens: options.Tokens = "words",
    batch_size: options.BatchSize = 32,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    ids: options.Ids = "keep",
    strict: options.Strict = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Find candidate documents for each query, for a teacher to score.

    For example: st-m3se candidates --data scifact --split train --include-positives run

    OUT opens as teacher scores do, and st-m3se convert writes it as a TREC run. Its scores are those of the search:
    BM25 scores, the model's similarity, or with several sources their reciprocal rank fusion. Equal scores stand in
    the order of the corpus. The source bm25 needs the extra named candidates.
    """
    check_texts(data, queries, corpus)
    if split is not None and (data is None or qrels is not None):
        raise typer.BadParameter("--split names a file of --data; without --data, or for another file, use --qrels.")
    if include_positives and split is None and qrels is None:
        raise typer.BadParameter("--include-positives needs --split or --qrels: they say which documents those are.")

    from st_m3se.core.findings import report
    from st_m3se.data.collection import Collection
    from st_m3se.retrieval.bm25 import BM25
    from st_m3se.retrieval.candidates import find_candidates
    from st_m3se.retrieval.exclusions import read_exclusions

    sources = source or ["bm25"]
    bm25 = BM25(
        stopwords=None if stopwords == "none" else stopwords,
        stemmer=None if stemmer == "none" else stemmer,
        tokens=tokens,
    )
    if "bm25" not in sources and bm25 != BM25():
        raise typer.BadParameter(
            "--stemmer, --stopwords and --tokens are for bm25: add --source bm25, or leave them out."
        )
    id_type = None if ids == "keep" else ids
    opened = Collection.open(
        data, split, queries=queries, corpus=corpus, qrels=qrels, id_type=id_type, judged_only=True
    )
    (asked, documents), judged = opened.texts, opened.qrels
    if judged is not None:
        typer.echo(f"{len(judged):,} queries are judged in {qrels or f'{data}, split {opened.split}'}")
    report("candidates", opened.findings, strict=strict)
    pairs, banned = read_exclusions(exclude or [], asked, documents)
    made = find_candidates(
        asked,
        documents,
        [bm25 if name == "bm25" else name for name in sources],
        output,
        depth=depth,
        positives=judged if include_positives else None,
        judged=judged,
        exclude=pairs,
        exclude_documents=banned,
        exclude_same_id=exclude_same_id,
        device=device,
        trust_remote_code=trust_remote_code,
        batch_size=batch_size,
        strict=strict,
        overwrite=overwrite,
    )
    lengths = [count for table in made.tables() for count in pc.list_value_length(table["document_ids"]).to_pylist()]
    typer.echo(f"wrote {output}: {len(lengths):,} queries, {sum(lengths):,} candidates")
    if empty := lengths.count(0):
        typer.echo(f"note: {empty:,} queries have no candidate")
