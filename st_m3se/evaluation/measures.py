"""Measures of a ranking, per query, with the values that trec_eval gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.extras import require
from st_m3se.core.ids import Id
from st_m3se.core.scored_list import ScoredList
from st_m3se.data.qrels import check_judgements, is_own_document

if TYPE_CHECKING:
    from ir_measures import Measure

__all__ = ["DEFAULT_MEASURES", "check_grades", "parse_measures", "per_query"]

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100", "R@1000", "AP")
"""BEIR's main measure, MS MARCO's, and what a re-ranker can reach."""

MOST_GRADE = {"ERR": 4, "exp-log2": 30}
"""ERR's probabilities are shares of 2^4, as in TREC's gdeval.pl; beyond 30 a gain is no number to compare."""

BLOCK_QUERIES = 1_000  # evaluated together: some hundred megabytes at 1,000 documents each


def parse_measures(names: Sequence[str]) -> list[Measure]:
    """The measures of ir_measures by these names.

    ``NAME@CUTOFF`` or ``NAME(parameter=value)@CUTOFF``: ``nDCG@10``, ``RR@10`` (also ``MRR@10``), ``R@100``, ``AP``,
    ``P@5``, ``Success@1``, ``Rprec``, ``Judged@10`` and more. Binary measures take a grade of 1 for relevant; ``rel``
    sets another lowest grade, as TREC's deep learning tracks need: ``RR(rel=2)@10``, ``AP(rel=2)``.

    Raises:
        ValueError: If there is no such measure, or nothing that is installed computes it.
        ImportError: If the extra ``eval`` is not installed.
    """
    ir_measures = require("ir_measures", "eval")
    if isinstance(names, str) or not names:
        raise ValueError(f'measures must be a list such as ["nDCG@10", "RR@10"], got {names!r}.')
    return [_parse(ir_measures, name) for name in names]


def check_grades(measures: Sequence[str], qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse measures that these judgements do not suit, before hours of work.

    Raises:
        ValueError: Naming the measure, what it takes and what there is.
    """
    highest = max((grade for grades in qrels.values() for grade in grades.values()), default=0)
    for name, measure in zip(measures, parse_measures(measures), strict=True):
        kind = "exp-log2" if measure.params.get("dcg") == "exp-log2" else str(measure.NAME)
        most = MOST_GRADE.get(kind, highest)
        if highest > most:
            raise ValueError(
                f"{name} takes grades up to {most}, and these judgements go up to {highest}: its gain is 2^grade. "
                "Leave the measure out, or map the grades."
            )


def per_query(
    run: Iterable[ScoredList],
    qrels: Mapping[Any, Mapping[Any, int]],
    measures: Sequence[str] = DEFAULT_MEASURES,
    *,
    exclude_same_id: bool = True,
    query_ids: Sequence[Id] | None = None,
) -> dict[str, np.ndarray]:
    """Each measure for each query, with trec_eval's values on the same run.

    trec_eval compares scores as float32, and puts equal ones in falling order of the document's id. ir_measures
    computes some measures with other programs, which do neither (RR@10 among them): all get the order that trec_eval
    would make.

    Args:
        run: The ranked lists in any order, read once: a store, or any rows. Ids that are integers are taken as their
            decimal text. Queries that are not asked for are passed over.
        qrels: Query id to document id to grade, an integer. A document that is not judged counts as not relevant.
        measures: Names, see :func:`parse_measures`.
        exclude_same_id: Leave out the result that has the query's own id, as BEIR does by default, where queries are
            documents too (ArguAna, Quora). A document that is judged for the query stays, which BEIR drops too. Mind it
            where ids are mere numbers; trec_eval knows no such rule.
        query_ids: Which queries, in which order. None is all of ``qrels`` in their order.

    Returns:
        The name of each measure, as given, to float64 ``[queries]``. A query that the run does not have counts 0, as
        with trec_eval's option ``-c``, and so does one without a relevant document.

    Raises:
        FormatError: If a query has two rows, a document stands twice in a list, a score is not finite, or a grade is no
            integer.
        ValueError: If a measure is unknown or does not suit the grades, or a query has no judgement.
    """
    ir_measures = require("ir_measures", "eval")
    parsed = parse_measures(measures)
    names: dict[Measure, list[str]] = {}
    for name, measure in zip(measures, parsed, strict=True):
        names.setdefault(measure, []).append(name)
    qrels = check_judgements(qrels)
    check_grades(measures, qrels)
    wanted = tuple(qrels if query_ids is None else map(str, query_ids))
    places = {query: place for place, query in enumerate(wanted)}
    if len(places) < len(wanted):
        raise ValueError("a query stands twice in query_ids.")
    if unjudged := [query for query in wanted if query not in qrels]:
        raise ValueError(f"{len(unjudged)} queries have no judgement, first {unjudged[0]!r:.80}.")
    values = {
        name: np.full(len(wanted), measure.DEFAULT, dtype=np.float64) for measure in names for name in names[measure]
    }

    own = {measure: compute for measure in names if (compute := _own(measure)) is not None}
    theirs = [measure for measure in names if measure not in own]

    def evaluate(block: Mapping[str, Mapping[str, float]]) -> None:
        judged = {query: _grades(qrels[query]) for query in block if qrels[query]}
        if not judged:
            return
        rankings = {query: block[query] for query in judged}
        for measure, compute in own.items():
            for query, ranking in rankings.items():
                for name in names[measure]:
                    values[name][places[query]] = compute(list(ranking), judged[query])
        if not theirs:
            return
        for found in ir_measures.evaluator(theirs, judged).iter_calc(rankings):
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


def _own(measure: Measure) -> Callable[[list[str], Mapping[str, int]], float] | None:
    """How a measure is computed here, of which ir_measures' provider fails or is wrong on ordinary input; else None.

    ir_measures 0.4.3: gdeval.pl (ERR, nDCG with dcg="exp-log2") takes digits alone as query ids, from "a-7" and "b-7"
    makes one query, and rounds to 5 places; Judged divides by 0 for an empty list, and Accuracy for one without a
    document that is not relevant. The formulas are theirs.
    """
    cutoff = measure.params.get("cutoff")
    if measure.NAME == "ERR":
        return lambda ranked, judged: _err([judged.get(document, 0) for document in ranked[:cutoff]])
    if measure.NAME == "nDCG" and measure.params.get("dcg") == "exp-log2":
        if measure.params.keys() - {"cutoff", "dcg"}:
            return None
        return lambda ranked, judged: _exponential_ndcg(ranked, judged, cutoff)
    if measure.NAME == "Judged":
        return lambda ranked, judged: (
            sum(document in judged for document in ranked[:cutoff]) / max(1, len(ranked[:cutoff]))
        )
    if measure.NAME == "Accuracy":
        least = measure.params.get("rel", 1)
        return lambda ranked, judged: _accuracy([judged.get(document, 0) >= least for document in ranked[:cutoff]])
    return None


def _err(grades: Sequence[int]) -> float:
    """Chapelle, Metzler, Zhang and Grinspan, CIKM 2009: the mean of 1 / rank at which a user stops."""
    value, looks_on = 0.0, 1.0
    for rank, grade in enumerate(grades, start=1):
        stops = math.ldexp(2.0 ** max(grade, 0) - 1, -MOST_GRADE["ERR"])
        value += looks_on * stops / rank
        looks_on *= 1 - stops
    return value


def _exponential_ndcg(ranked: Sequence[str], judged: Mapping[str, int], cutoff: int | None) -> float:
    """Burges et al., ICML 2005: gains of 2^grade - 1."""

    def dcg(grades: Sequence[int]) -> float:
        return sum((2.0 ** max(grade, 0) - 1) / math.log2(rank + 2) for rank, grade in enumerate(grades[:cutoff]))

    ideal = dcg(sorted(judged.values(), reverse=True))
    return dcg([judged.get(document, 0) for document in ranked]) / ideal if ideal else 0.0


def _accuracy(relevant: Sequence[bool]) -> float:
    """The share of pairs of a relevant and another document that are in order; 1 if all are relevant, 0 if none is."""
    others, wrong = 0, 0
    for flag in relevant:
        wrong += others * flag
        others += not flag
    if not any(relevant):
        return 0.0
    return 1.0 - wrong / (others * sum(relevant)) if others else 1.0


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
    cutoff = measure.params.get("cutoff")
    if cutoff is not None and (isinstance(cutoff, bool) or not isinstance(cutoff, int) or cutoff < 1):
        raise ValueError(f"the cut-off of {name} must be an integer of at least 1, got {cutoff!r}.")
    gains = measure.params.get("gains") or {}
    if not all(type(value) is int for pair in gains.items() for value in pair):
        raise ValueError(
            f"the gains of {name} must be integers, grade to gain, since trec_eval takes nothing else: scale all of "
            "them, which leaves nDCG as it is."
        )
    if _own(measure) is not None:
        return measure
    pipeline = ir_measures.DefaultPipeline
    if not pipeline.supports(measure):
        able = [provider.install_instructions() for provider in pipeline.providers if provider.supports(measure)]
        remedy = f" One of these would: {'; '.join(filter(None, able))}." if any(able) else ""
        raise ValueError(f"nothing that is installed computes {name}.{remedy}")
    return measure
