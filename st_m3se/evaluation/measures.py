"""Measures of a ranking, per query, with the values that trec_eval gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from st_m3se.scores.rows import ScoredList

if TYPE_CHECKING:
    from ir_measures import Measure

__all__ = ["DEFAULT_MEASURES", "parse_measures", "per_query"]

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100", "R@1000", "AP")


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """The measures of ir_measures by these names.

    Raises:
        ValueError: If there is no such measure, or nothing here computes it.
        ImportError: If the extra ``eval`` is not installed.
    """
    raise NotImplementedError


def per_query(
    run: Iterable[ScoredList],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    exclude_same_id: bool = True,
    query_ids: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Each measure for each query: measure name (as given) to float64 ``[queries]``.

    Args:
        run: The ranked lists, in any order, of documents in any order: a store, or any rows of it.
        qrels: Query id to document id to grade, all str.
        measures: Names as ir_measures writes them.
        exclude_same_id: BEIR's rule: a document with the query's own id is no result.
        query_ids: Which queries, in which order; None is all of ``qrels`` in their order. One that the run
            does not have counts 0.
    """
    raise NotImplementedError
