"""From candidates to training lists: what each query's teacher is asked, and what its student is shown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from st_m3se.core.scored_list import ScoredList
from st_m3se.data.texts import Texts
from st_m3se.distillation.data import DistillationData, Qrels
from st_m3se.evaluation.data import EvaluationSet
from st_m3se.evaluation.evaluators import RetrievalEvaluator
from st_m3se.evaluation.measures import per_query
from st_m3se.retrieval.bm25 import BM25
from st_m3se.retrieval.candidates import find_candidates
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.training.dataset import build_distillation_dataset

__all__ = [
    "AFTER",
    "BEFORE",
    "BM25_CANDIDATES",
    "BY_GENERATION",
    "BY_JUDGEMENTS",
    "BY_TEACHER",
    "CONTROL",
    "ENSEMBLE",
    "JUDGES",
    "MEASURES",
    "TEACHER",
    "Candidates",
    "Run",
    "dev_evaluator",
    "first_choices",
    "interleave",
    "measure",
    "run_of",
    "search",
    "training_epochs",
    "training_lists",
    "training_qrels",
]

Run = dict[str, dict[str, float]]
"""Query id to document id to score."""

BEFORE, CONTROL, AFTER = "student before", "student without a teacher", "student after"
TEACHER, ENSEMBLE = "teacher", "teacher + student"
"""What the systems of a distillation are called."""

JUDGES = {
    "judgements": "",
    "the teacher's first choice": (
        "Nobody has judged these queries: relevant is the document that the teacher likes best, so that this is how "
        "far the student agrees with the teacher, and not how good either is."
    ),
    "generated queries": (
        "These queries were made from documents, and kept where the teacher ranks theirs first: relevant is that "
        "document, which favours the teacher. Some 50 judged queries of users would tell how good both are."
    ),
}
"""By what a document is relevant to a test query, and what that means for the figures."""

BY_JUDGEMENTS, BY_TEACHER, BY_GENERATION = JUDGES
MEASURES = ("nDCG@10", "RR@10")
DEPTH = 100
BM25_CANDIDATES = 20  # at least so many the guide scores, too


def run_of(store: TeacherScores, queries: Iterable[str]) -> Run:
    """A store's lists of some queries; measures sort by score themselves."""
    return {
        str(row.query_id): {str(d): score for d, score in zip(row.document_ids, row.scores, strict=True)}
        for row in store.select(queries)
    }


def measure(run: Run, qrels: Qrels, *, exclude_same_id: bool = False) -> dict[str, np.ndarray]:
    """Each of :data:`MEASURES` for each query, in the order of ``qrels``; a query without results counts 0."""
    rows = (ScoredList(query, list(listed), list(listed.values())) for query, listed in run.items())
    return per_query(rows, qrels, MEASURES, exclude_same_id=exclude_same_id, query_ids=list(qrels))


def interleave(first: Run, second: Run, qrels: Qrels, size: int, with_relevant: bool) -> dict[str, list[str]]:
    """Candidates, the best of both runs in turn, ``size`` in all.

    For training the best relevant documents come first, half of the pool at most, and no other relevant one is taken:
    where a query has many, negatives are what its list would lack.
    """
    pools = {}
    for query, relevant in qrels.items():
        graded = sorted(relevant, key=lambda document: -relevant[document]) if with_relevant else []
        turns = chain.from_iterable(zip_longest(first.get(query, {}), second.get(query, {})))
        others = (document for document in turns if document is not None and document not in graded)
        pools[query] = list(dict.fromkeys(chain(graded[: max(1, size // 2)], others)))[:size]
    return {query: pool for query, pool in pools.items() if pool}


def search(
    source: Any,
    data: DistillationData,
    queries: Iterable[str],
    folder: Path,
    *,
    wanted: Mapping[str, Mapping[str, int]] | None = None,
    exclude_same_id: bool = False,
    show: bool = True,
) -> TeacherScores:
    """The best documents of the whole corpus for these queries, and the scores of ``wanted`` ones, as a store."""
    asked = list(queries)
    texts = dict(zip(asked, data.queries.take(asked), strict=True))
    judged = {query: relevant for split in data.qrels.values() for query, relevant in split.items()}
    return find_candidates(
        texts,
        data.corpus,
        [source],
        folder,
        depth=DEPTH,
        positives=wanted,
        judged=judged if exclude_same_id else None,
        exclude_same_id=exclude_same_id,
        show_progress_bar=show,
        overwrite=True,
    )


class Candidates:
    """What BM25 and the guide find for every query.

    Args:
        data: Texts and judgements.
        bm25: The store of BM25's lists.
        guide: That of the guide, which has scored BM25's best and the relevant documents as well.
        judged: Whether judgements of training queries may be used.
    """

    def __init__(self, data: DistillationData, bm25: TeacherScores, guide: TeacherScores, judged: bool) -> None:
        self.data, self.judged, self.guide = data, judged, guide
        asked = [query for split in data.qrels.values() for query in split]
        self.lexical, self.dense = run_of(bm25, asked), run_of(guide, asked)

    @staticmethod
    def find(
        data: DistillationData,
        guide: Any,
        folder: Path,
        *,
        pool: int = BM25_CANDIDATES,
        listed: Run | None = None,
        exclude_same_id: bool = False,
        tokens: str = "words",
        show: bool = True,
    ) -> None:
        """Make both stores, ``bm25`` and ``guide``, in a folder.

        The guide scores what is ``listed`` as well, and all of BM25's that may get into a pool of at most ``pool``.
        """
        asked = [query for split in data.qrels.values() for query in split]
        bm25 = search(BM25(tokens=tokens), data, asked, folder / "bm25", exclude_same_id=exclude_same_id, show=show)
        # One pass of the guide over the corpus gives its candidates, and its score of everything that needs one.
        wanted: Qrels = {
            query: dict.fromkeys(list(listed)[: max(BM25_CANDIDATES, pool)], 1)
            for query, listed in run_of(bm25, asked).items()
        }
        judged = (item for split in data.qrels.values() for item in split.items())
        for query, documents in chain[tuple[str, Collection[str]]](judged, (listed or {}).items()):
            wanted[query] = {**wanted.get(query, {}), **dict.fromkeys(documents, 1)}
        name = folder / "guide"
        search(guide, data, asked, name, wanted=wanted, exclude_same_id=exclude_same_id, show=show)

    @classmethod
    def open(cls, data: DistillationData, folder: Path, judged: bool) -> Candidates:
        """Those that :meth:`find` has found."""
        return cls(data, TeacherScores.open(folder / "bm25"), TeacherScores.open(folder / "guide"), judged)

    def searched(self, query: str) -> set[str]:
        """The documents that a search found for a query; the guide has scored more than it found."""
        dense = self.dense.get(query, {})
        return {*self.lexical.get(query, {}), *sorted(dense, key=dense.__getitem__, reverse=True)[:DEPTH]}

    def pools(self, split: str, size: int) -> dict[str, list[str]]:
        """Candidates of a split's queries, BM25's and the guide's in turn; for training the relevant ones first."""
        with_relevant = split == "train" and self.judged
        return interleave(self.lexical, self.dense, self.data.qrels[split], size, with_relevant)


def first_choices(scores: TeacherScores, queries: Iterable[str]) -> Qrels:
    """Of each query that has scores, the document that the teacher likes best: what stands for a judgement."""
    found = run_of(scores, queries)
    return {query: {max(listed, key=listed.__getitem__): 1} for query, listed in found.items() if listed}


def training_qrels(taught: TeacherScores, candidates: Candidates, *, teacher: bool = True) -> Qrels:
    """The positives of the training queries: what was judged, and for the others the teacher's first choice.

    Args:
        taught: The scores to teach.
        candidates: Where they are from.
        teacher: False for the control, which knows none: where some queries have judgements it has these queries alone,
            and where none has, the search's best candidate is the positive.
    """
    train = {query: relevant for query, relevant in candidates.data.qrels["train"].items() if query in taught}
    known = {q: dict.fromkeys(relevant, 1) for q, relevant in train.items() if relevant and candidates.judged}
    if teacher:
        return known | first_choices(taught, (query for query in train if query not in known))
    return known or {query: {pool[0]: 1} for query, pool in candidates.pools("train", 1).items() if query in train}


def training_epochs(epochs: float, candidates: Candidates, *, teacher: bool = True) -> float:
    """Epochs that take as many steps as ``epochs`` over all training queries.

    They differ for the control where only some queries have judgements: these are all it has, so it passes over them
    more often. See :func:`training_qrels`.
    """
    relevant = candidates.data.qrels["train"].values()
    return epochs if teacher or not candidates.judged else epochs * (len(relevant) / sum(map(bool, relevant)))


def training_lists(
    taught: TeacherScores,
    candidates: Candidates,
    *,
    list_size: int,
    false_negatives: str,
    margin: float = 0.0,
    seed: int,
    teacher: bool = True,
) -> Dataset:
    """The training dataset.

    Args:
        taught: The scores to teach.
        candidates: Where they are from.
        list_size: Documents per list.
        false_negatives: What becomes of negatives that the teacher scores above a known relevant document: "leave-out",
            "relabel" or "keep".
        margin: So much lower counts as above, too.
        seed: For the draws.
        teacher: False for the control, which knows none: it is not taught what the teacher relabels; see
            :func:`training_qrels`.

    Raises:
        ValueError: If no query has a positive and a negative.
    """
    data, judged = candidates.data, candidates.judged
    qrels = training_qrels(taught, candidates, teacher=teacher)
    return build_distillation_dataset(
        taught.select(qrels),
        data.queries,
        data.corpus,
        qrels,
        list_size=list_size,
        absolute_margin=margin if judged and false_negatives != "keep" else None,
        relabel=judged and teacher and false_negatives == "relabel",
        seed=seed,
    )


def dev_evaluator(data: DistillationData, qrels: Qrels, teacher: Run) -> RetrievalEvaluator:
    """Measures a student on dev queries during training, over the documents that the teacher ranked for them.

    The whole corpus would take longer than the training; these are its hardest documents. A query's are searched
    among those of all queries, and not re-ranked alone, as the teacher does it.
    """
    listed = {document for query in qrels for document in teacher.get(query, {})}
    listed |= {document for relevant in qrels.values() for document in relevant}
    documents, queries = sorted(listed), list(qrels)
    kept = EvaluationSet(
        name="dev",
        split="dev",
        queries=Texts.open(dict(zip(queries, data.queries.take(queries), strict=True)), "queries"),
        corpus=Texts.open(dict(zip(documents, data.corpus.take(documents), strict=True)), "corpus"),
        qrels=qrels,
    )
    return RetrievalEvaluator(kept, measures=MEASURES[:1], depth=10, exclude_same_id=False, write_csv=False)
