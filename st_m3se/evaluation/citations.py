"""What the measures and tests of a report are, and where they come from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = ["citations"]

MEASURES = {
    "nDCG": "normalised discounted cumulative gain: the gains (grades) of the ranking, each divided by log2(rank + 1), "
    "over those of the best possible ranking. Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR "
    "techniques, ACM Transactions on Information Systems 20(4), 2002.",
    "RR": "reciprocal rank: 1 / rank of the first relevant document, 0 without one; its mean is the MRR. Voorhees, The "
    "TREC-8 question answering track report, TREC 1999.",
    "AP": "average precision: the precision at the rank of each relevant document, over the number of relevant ones; "
    "its mean is the MAP. Buckley and Voorhees, Evaluating evaluation measure stability, SIGIR 2000.",
    "R": "recall: the share of the relevant documents that were found.",
    "P": "precision: the share of the ranking that is relevant.",
    "Success": "1 where the ranking has a relevant document, else 0.",
    "Judged": "the share of the ranking that was judged at all.",
    "Rprec": "the precision at the rank that equals the number of relevant documents.",
    "RBP": "rank-biased precision. Moffat and Zobel, Rank-biased precision for measurement of retrieval effectiveness, "
    "ACM Transactions on Information Systems 27(1), 2008.",
    "ERR": "expected reciprocal rank. Chapelle, Metzler, Zhang and Grinspan, Expected reciprocal rank for graded "
    "relevance, CIKM 2009.",
    "Bpref": "preference-based measure for incomplete judgements. Buckley and Voorhees, Retrieval evaluation with "
    "incomplete information, SIGIR 2004.",
}
COMPUTED = (
    "Values are computed with ir_measures: MacAvaney, Macdonald and Ounis, Streamlining evaluation with ir-measures, "
    "ECIR 2022."
)
TESTS = (
    (
        "Randomisation test",
        "Smucker, Allan and Carterette, A comparison of statistical significance tests for information retrieval "
        "evaluation, CIKM 2007.",
    ),
    (
        "Holm's correction",
        "Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6(2), 1979.",
    ),
)
BOOTSTRAP = (
    "Bootstrap intervals",
    "Sakai, Evaluating evaluation metrics based on the bootstrap, SIGIR 2006; Efron and Tibshirani, An introduction to "
    "the bootstrap, 1993.",
)
BEIR = (
    "Sets and averages as BEIR has them",
    "Thakur, Reimers, Rücklé, Srivastava and Gurevych, BEIR: a heterogeneous benchmark for zero-shot evaluation of "
    "information retrieval models, NeurIPS Datasets and Benchmarks 2021. Cite each set's own paper too.",
)


def citations(results: Results) -> list[tuple[str, str]]:
    """For each measure, and for what else was used: what it is, and the work to cite. No addresses, only titles."""
    found = []
    for measure in results.measures:
        name = re.match(r"\w*", measure)
        definition = MEASURES.get(name[0] if name else "", "as ir_measures defines it.")
        cutoff = re.search(r"@(\d+)$", measure)
        depth = (
            f"Of the first {int(cutoff[1]):,} documents" if cutoff else f"Of the {results.settings['depth']:,} found"
        )
        grade = re.search(r"rel=(\d+)", measure)
        relevant = f"; relevant: grade {grade[1]} or more" if grade else ""
        found.append((measure, f"{definition} {depth}{relevant}."))
    found.append(("Measures", COMPUTED))
    if len(results.tests):
        found += TESTS
    return [*found, BOOTSTRAP, BEIR]
