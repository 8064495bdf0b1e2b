"""What is taught, from candidates to training lists: every stage is a store in the output folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset
from measures import Run, run_of
from retrieval_data import Qrels, RetrievalData, UsageError
from sentence_transformers import CrossEncoder, SentenceTransformer

from st_m3se import BM25, RetrievalEvaluator, build_distillation_dataset, find_candidates, score_candidates
from st_m3se.data.texts import Texts
from st_m3se.evaluation import EvaluationSet
from st_m3se.scores import TeacherScores, combine

Teacher = CrossEncoder | Callable[[list[tuple[str, str]]], Any]

DEPTH = 100
BM25_CANDIDATES = 20  # the guide scores these, too


def interleave(first: Run, second: Run, qrels: Qrels, size: int, with_relevant: bool) -> dict[str, list[str]]:
    """Candidate pools, the best of both runs in turn, ``size`` in all.

    For training the best relevant documents come first, half of the pool at most, and no other relevant one is taken:
    where a query has many, negatives are what its list would lack.
    """
    pools = {}
    for query, relevant in qrels.items():
        graded = sorted(relevant, key=lambda document: -relevant[document]) if with_relevant else []
        turns = chain.from_iterable(zip_longest(first.get(query, {}), second.get(query, {})))
        others = (document for document in turns if document is not None and document not in graded)
        pools[query] = list(dict.fromkeys(chain(graded[: max(1, size // 2)], others)))[:size]
    return pools


class Lessons:
    """The stages for one data set: candidates, teacher scores, ensembles with the guide, training lists.

    Args:
        data: Texts and judgements.
        folder: Where the stores go.
        guide: The bi-encoder that finds dense candidates and joins the ensemble.
        ready: Teacher scores that are there already.
        judged: Whether training queries have judgements. False: nobody knows what is relevant to them, the candidates
            are those of the search alone, and the teacher's best one is the positive.
    """

    def __init__(
        self,
        data: RetrievalData,
        folder: Path,
        guide: SentenceTransformer,
        ready: TeacherScores | None,
        judged: bool = True,
    ) -> None:
        """Find the candidates of all queries, by BM25 and by the guide."""
        self.judged = judged
        self.data, self.folder, self.ready = data, folder, ready
        self.corpus = Texts.open(data.corpus)
        self.queries = Texts.open(data.queries, "queries")
        self.pairs_per_second = 0.0
        asked = [query for split in data.qrels.values() for query in split]
        lexical = self.search(BM25(), asked, "bm25")
        self.lexical = run_of(lexical, asked)
        # One pass of the guide over the corpus gives its candidates, and its score of everything that needs one.
        wanted = {query: dict.fromkeys(list(listed)[:BM25_CANDIDATES], 1) for query, listed in self.lexical.items()}
        for split in data.qrels.values():
            for query, relevant in split.items():
                wanted[query] = {**wanted[query], **dict.fromkeys(relevant, 1)}
        for query, listed in run_of(ready, (q for q in asked if q in ready)).items() if ready is not None else ():
            wanted[query] = {**wanted[query], **dict.fromkeys(listed, 1)}
        self.guided = self.search(guide, asked, "guide", wanted)
        self.dense = run_of(self.guided, asked)

    def search(
        self, source: BM25 | SentenceTransformer, queries: Sequence[str], name: str, wanted: Qrels | None = None
    ) -> TeacherScores:
        """The best documents of the whole corpus for these queries, and the scores of ``wanted`` ones."""
        texts = dict(zip(queries, self.queries.take(queries), strict=True))
        folder = self.folder / "candidates" / name
        return find_candidates(
            texts, self.corpus, [source], folder, depth=DEPTH, positives=wanted, show_progress_bar=True, overwrite=True
        )

    def pools(self, split: str, size: int) -> dict[str, list[str]]:
        """Candidates of a split's queries, BM25's and the guide's in turn; for training the relevant ones first."""
        return interleave(
            self.lexical, self.dense, self.data.qrels[split], size, with_relevant=split == "train" and self.judged
        )

    def scored(self, split: str, size: int, teacher: Callable[[], Teacher], name: str, **options: Any) -> TeacherScores:
        """The split's teacher scores: ready ones, and those that the teacher gives now, or gave before.

        Args:
            split: "train", "dev" or "test".
            size: Candidates per query that the teacher scores.
            teacher: Loads it; called only if there is something to score.
            name: The teacher and all that its scores depend on.
            options: For ``score_candidates``.
        """
        ready = [query for query in self.data.qrels[split] if self.ready is not None and query in self.ready]
        parts = [self.ready.select(ready)] if self.ready is not None and ready else []
        known = set(ready)
        pools = {query: pool for query, pool in self.pools(split, size).items() if query not in known}
        if pools:
            # In a folder of its own for all that the scores depend on: another teacher or pool is another run.
            key = repr((name, options.get("max_length"), self.corpus.fingerprint, self.queries.fingerprint, pools))
            folder = self.folder / "teacher_scores" / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
            fresh, start = not folder.exists(), time.perf_counter()
            parts.append(
                score_candidates(
                    teacher(), pools, self.queries, self.corpus, folder, name=name, shard_queries=64, **options
                )
            )
            if fresh:
                speed = sum(map(len, pools.values())) / (time.perf_counter() - start)
                self.pairs_per_second = max(self.pairs_per_second, speed)
        return parts[0] if len(parts) == 1 else TeacherScores.concatenate(parts)

    def with_guide(self, scores: TeacherScores, split: str) -> TeacherScores:
        """The ensemble: the mean of teacher's and guide's per-query z-scores, in the teacher's units."""
        folder = self.folder / "teacher_scores" / f"{split}-with-guide"
        return combine([scores, self.guided], folder, missing="drop", overwrite=True)

    def training_lists(
        self, taught: TeacherScores, list_size: int, keep_above: bool, seed: int, teacher: bool = True
    ) -> Dataset:
        """The training dataset.

        Args:
            taught: The scores to teach.
            list_size: Documents per list.
            keep_above: Keep negatives that the teacher scores above a known relevant document.
            seed: For the draws.
            teacher: Without judgements, whether the positive is the teacher's best candidate, or the search's: the
                control knows no teacher.
        """
        qrels: Qrels | None = {
            query: dict.fromkeys(relevant, 1) for query, relevant in self.data.qrels["train"].items()
        }
        margin = None if keep_above or not self.judged else 0.0
        if not self.judged:
            first = {query: pool[0] for query, pool in self.pools("train", 1).items()}
            qrels = None if teacher else {query: {document: 1} for query, document in first.items()}
        try:
            return build_distillation_dataset(
                taught, self.queries, self.corpus, qrels, list_size=list_size, absolute_margin=margin, seed=seed
            )
        except ValueError as error:
            raise UsageError(
                "Expected at least one training query whose relevant document and one negative have teacher scores, "
                f"got none: {error} Check that the ids of --scores are those of --data, and that qrels name documents "
                "of the corpus."
            ) from error

    def dev_evaluator(self, scores: TeacherScores) -> RetrievalEvaluator:
        """Measures a student on the dev queries during training, over the documents that the teacher ranked for them.

        The whole corpus would take longer than the training; these are its hardest documents, and the teacher's own
        figure is over them too.
        """
        qrels = {query: self.data.qrels["dev"][query] for query in run_of(scores, self.data.qrels["dev"])}
        listed = {document for run in run_of(scores, qrels).values() for document in run}
        listed |= {document for relevant in qrels.values() for document in relevant}
        kept = EvaluationSet(
            name="dev",
            split="dev",
            queries=Texts.open({query: self.data.queries[query] for query in qrels}, "queries"),
            corpus=Texts.open({document: self.data.corpus[document] for document in sorted(listed)}, "corpus"),
            qrels=qrels,
        )
        return RetrievalEvaluator(kept, measures=["nDCG@10"], depth=10, exclude_same_id=False, write_csv=False)
