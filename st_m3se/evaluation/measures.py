"""Measures of a ranking, per query, with the values that trec_eval gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from st_m3se.extras import require
from st_m3se.scores.errors import FormatError
from st_m3se.scores.judgements import check_judgements, is_own_document
from st_m3se.scores.rows import Id, ScoredList

if TYPE_CHECKING:
    from ir_measures import Measure

__all__ = ["DEFAULT_MEASURES", "parse_measures", "per_query"]

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100", "R@1000", "AP")
"""BEIR's main measure, MS MARCO's, and what a re-ranker can reach."""

BLOCK_QUERIES = 1_000  # evaluated together: some hundred megabytes at 1,000 documents each


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """The measures of ir_measures by these names.

    They are written ``NAME@CUTOFF`` or ``NAME(parameter=value)@CUTOFF``: ``nDCG@10``, ``RR@10`` (also ``MRR@10``),
    ``R@100`` (``Recall@100``), ``AP`` (``MAP``), ``P@5``, ``Success@1``, ``Rprec``, ``Judged@10`` and more.

    Binary measures take a grade of 1 for relevant. Where judgements say otherwise, ``rel`` is the lowest grade that
    is: TREC's deep learning tracks report passages with ``RR(rel=2)@10``, ``R(rel=2)@1000`` and ``AP(rel=2)``, since
    their grade 1 means "on the subject and no answer". nDCG takes the grades as they are.

    Raises:
        ValueError: If there is no such measure, or nothing that is installed computes it.
        ImportError: If the extra ``eval`` is not installed.
    """
    ir_measures = require("ir_measures", "eval")
    if isinstance(names, str) or not names:
        raise ValueError(f'measures must be a list such as ["nDCG@10", "RR@10"], got {names!r}.')
    return [_parse(ir_measures, name) for name in names]


def per_query(
    run: Iterable[ScoredList],
    qrels: Mapping[Any, Mapping[Any, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    exclude_same_id: bool = True,
    query_ids: Sequence[Id] | None = None,
) -> dict[str, np.ndarray]:
    """Each measure for each query.

    The values are those of trec_eval on the same run. It compares scores as float32, and puts equal ones in falling
    order of the document's id, whatever the order of the file. ir_measures computes some measures with other programs,
    which do neither (RR@10 among them): they all get the order that trec_eval would make.

    The run is read once, a thousand queries at a time.

    Args:
        run: The ranked lists, in any order, with their documents in any order: a store, or any rows. Ids that are
            integers are taken as their decimal text. Queries that are not asked for are passed over.
        qrels: Query id to document id to grade, an integer. Ids that are integers are taken as their decimal text. A
            document that is not judged counts as not relevant.
        measures: Names, see :func:`parse_measures`.
        exclude_same_id: Leave out the result that has the query's own id, as BEIR does by default: where queries are
            documents too (ArguAna, Quora) a query would find itself. A document that is judged for the query stays,
            which BEIR drops too. Mind it where the ids are mere numbers and document 7 has nothing to do with query 7;
            trec_eval knows no such rule.
        query_ids: Which queries, in which order. None is all of ``qrels`` in their order.

    Returns:
        The name of each measure, as given, to float64 ``[queries]``. A query that the run does not have counts 0, as
        with trec_eval's option ``-c``, and so does one without a relevant document.

    Raises:
        FormatError: If a query has two rows, a document stands twice in a list, a score is not finite, or a grade is
            no integer.
        ValueError: If a measure is unknown, or a query has no judgement.
    """
    ir_measures = require("ir_measures", "eval")
    parsed = parse_measures(measures)
    names: dict[Measure, list[str]] = {}
    for name, measure in zip(measures, parsed, strict=True):
        names.setdefault(measure, []).append(name)
    qrels = check_judgements(qrels)
    wanted = tuple(qrels if query_ids is None else map(str, query_ids))
    places = {query: place for place, query in enumerate(wanted)}
    if len(places) < len(wanted):
        raise ValueError("a query stands twice in query_ids.")
    if unjudged := [query for query in wanted if query not in qrels]:
        raise ValueError(f"{len(unjudged)} queries have no judgement, first {unjudged[0]!r:.80}.")
    values = {
        name: np.full(len(wanted), measure.DEFAULT, dtype=np.float64) for measure in names for name in names[measure]
    }

    def evaluate(block: Mapping[str, Mapping[str, float]]) -> None:
        judged = {query: _grades(qrels[query]) for query in block if qrels[query]}
        if not judged:
            return
        rankings = {query: block[query] for query in judged}
        for found in ir_measures.evaluator(parsed, judged).iter_calc(rankings):
            for name in names[found.measure]:
                values[name][places[found.query_id]] = found.value

    seen: set[str] = set()
    block: dict[str, dict[str, float]] = {}
    for row in run:
        query = str(row.query_id)
        if query not in places:
            continue
        if query in seen:
            raise FormatError(f"query {query!r:.80} has two rows in the run.")
        seen.add(query)
        block[query] = _ranking(query, row, qrels[query] if exclude_same_id else None)
        if len(block) == BLOCK_QUERIES:
            evaluate(block)
            block = {}
    evaluate(block)
    return values


def _ranking(query: str, row: ScoredList, judged: Mapping[str, int] | None) -> dict[str, float]:
    """The documents in trec_eval's order, with scores that say the same to whoever sorts them again.

    With what is ``judged``, the query's own document is left out.
    """
    documents = [str(document) for document in row.document_ids]
    with np.errstate(over="ignore"):
        scores = np.asarray(row.scores, dtype=np.float32)
    if len(documents) != len(scores):
        raise FormatError(f"query {query!r:.80} has {len(documents)} documents and {len(scores)} scores.")
    if not np.isfinite(scores).all():
        raise FormatError(f"query {query!r:.80} has a score that is not a finite float32: its place is undefined.")
    if len(set(documents)) < len(documents):
        raise FormatError(f"a document stands twice in the list of query {query!r:.80}.")
    order: Iterable[int] = range(len(documents))
    if not (scores[1:] < scores[:-1]).all():
        values = scores.tolist()
        order = sorted(order, key=lambda place: (values[place], documents[place]), reverse=True)
    ranked = [
        document
        for document in map(documents.__getitem__, order)
        if judged is None or not is_own_document(query, document, judged)
    ]
    return {document: float(len(ranked) - rank) for rank, document in enumerate(ranked)}


def _grades(judged: Mapping[str, int]) -> dict[str, int]:
    """The grades of a query; 0 where all are below, for which trec_eval would use memory that is not its own."""
    if max(judged.values()) < 0:
        return dict.fromkeys(judged, 0)
    return dict(judged)


def _parse(ir_measures: Any, name: str) -> Measure:
    try:
        parsed: Any = ir_measures.parse_measure(name)
        parsed.validate_params()
    except (NameError, ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        known = ", ".join(sorted(known for known in ir_measures.measures.registry if known.isascii()))
        raise ValueError(
            f"{name!r} is not a measure of ir_measures ({error}). Write NAME@CUTOFF or NAME(rel=2)@CUTOFF; the names "
            f"are {known}."
        ) from error
    measure: Measure = parsed
    pipeline = ir_measures.DefaultPipeline
    if not pipeline.supports(measure):
        able = [provider.install_instructions() for provider in pipeline.providers if provider.supports(measure)]
        remedy = f" One of these would: {'; '.join(filter(None, able))}." if any(able) else ""
        raise ValueError(f"nothing that is installed computes {name}.{remedy}")
    return measure
