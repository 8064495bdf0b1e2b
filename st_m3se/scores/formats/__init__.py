"""Readers and writers of the formats in which teacher scores are published, one function each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from st_m3se.core.reading import IdType, OnError, Reading, TextSink, text_id
from st_m3se.core.scored_list import ScoredList
from st_m3se.scores.formats.jsonl import read_colbert, read_hard_negatives
from st_m3se.scores.formats.layouts import (
    read_flagembedding,
    read_margins,
    read_rank_llm,
    read_rankify,
    read_table,
    read_tevatron,
    read_tuples,
)
from st_m3se.scores.formats.pickled import read_score_pickle
from st_m3se.scores.formats.sniffing import sniff
from st_m3se.scores.formats.tables import read_csv
from st_m3se.scores.formats.trec import read_ranking, read_run
from st_m3se.scores.formats.tsv import read_gpl, read_marginmse, read_marginmse_text
from st_m3se.scores.formats.writing import WRITERS, write_csv, write_marginmse, write_pylate, write_run

__all__ = [
    "READERS",
    "WRITERS",
    "IdType",
    "OnError",
    "Reading",
    "TextSink",
    "read_colbert",
    "read_csv",
    "read_flagembedding",
    "read_gpl",
    "read_hard_negatives",
    "read_marginmse",
    "read_marginmse_text",
    "read_margins",
    "read_rank_llm",
    "read_rankify",
    "read_ranking",
    "read_run",
    "read_score_pickle",
    "read_table",
    "read_tevatron",
    "read_tuples",
    "sniff",
    "text_id",
    "write_csv",
    "write_marginmse",
    "write_pylate",
    "write_run",
]

READERS: dict[str, Callable[..., Iterator[ScoredList]]] = {
    "marginmse": read_marginmse,
    "marginmse-text": read_marginmse_text,
    "gpl": read_gpl,
    "hard-negatives": read_hard_negatives,
    "score-pickle": read_score_pickle,
    "flagembedding": read_flagembedding,
    "pylate": read_table,
    "tevatron": read_tevatron,
    "colbert": read_colbert,
    "trec": read_run,
    "ranking": read_ranking,
    "csv": read_csv,
    "parquet": read_table,
    "margins": read_margins,
    "tuples": read_tuples,
    "rank-llm": read_rank_llm,
    "rankify": read_rankify,
}
