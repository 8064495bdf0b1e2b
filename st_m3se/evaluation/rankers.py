"""How BM25, re-rankers and given runs put the documents of a set in order."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from st_m3se.core.files import scratch_folder
from st_m3se.core.findings import Finding, found
from st_m3se.core.scored_list import ScoredList
from st_m3se.evaluation.candidate_runs import open_candidates
from st_m3se.evaluation.systems import Encoder, GivenRun, ReRanker
from st_m3se.evaluation.tasks import Ranker, Task, best_first, ids_of, score_pairs
from st_m3se.retrieval.bm25 import BM25, search_bm25
from st_m3se.retrieval.candidates import find_candidates
from st_m3se.retrieval.sources import Job, Pairs
from st_m3se.retrieval.teacher import as_teacher
from st_m3se.scores.formats.records import parts_of
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["LexicalRanker", "RunReader", "SecondStage", "load_ranker"]


def load_ranker(source: BM25 | Encoder | ReRanker | GivenRun, name: str, device: str | None) -> Ranker:
    """Load what a system needs."""
    if isinstance(source, BM25):
        return LexicalRanker(source)
    if isinstance(source, Encoder):
        from st_m3se.evaluation.encoders import EncoderRanker

        return EncoderRanker(source, name, device)
    if isinstance(source, ReRanker):
        return SecondStage(source, name, device)
    return RunReader(source, name)


class LexicalRanker:
    """BM25; of given candidates, their scores with the statistics of the whole corpus."""

    kind = "bm25"

    def __init__(self, settings: BM25) -> None:
        self._settings = settings
        self.description: dict[str, Any] = settings.description

    def inputs(self, task: Task) -> dict[str, Any]:
        """The search's settings."""
        return task.search_settings

    def rank(self, task: Task) -> None:
        """Search, or score the candidates."""
        queries, corpus = task.texts
        with task.timed("search"):
            if task.evaluation_set.candidates is None:
                find_candidates(
                    queries,
                    corpus,
                    [self._settings],
                    task.output,
                    depth=task.depth,
                    judged=task.evaluation_set.qrels,
                    exclude_same_id=task.exclude_same_id,
                    show_progress_bar=task.show_progress_bar,
                    overwrite=True,
                )
                return
            lists = {str(row.query_id): list(row.document_ids) for row in task.evaluation_set.candidates}
            wanted = Pairs.of(lists, queries, corpus, "candidates")
            nothing = Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
            everywhere = np.zeros(len(corpus), dtype=bool)
            job = Job(queries, corpus, 1, nothing, everywhere, wanted, 1, 1, task.show_progress_bar)
            scores = search_bm25(self._settings, job).wanted
            task.write(_in_order(job, scores), self.description)


def _in_order(job: Job, scores: np.ndarray) -> Iterator[ScoredList]:
    """The wanted documents of each query, best first, equal ones in the order of the corpus."""
    ids = ids_of(job.corpus)
    for place, query in enumerate(job.queries):
        pairs = job.wanted.range(place)
        order = np.argsort(-scores[pairs], kind="stable")
        documents = ids.take(pa.array(job.wanted.documents[pairs][order])).to_pylist()
        yield ScoredList(query, documents, scores[pairs][order].tolist())


class SecondStage:
    """A cross-encoder, or a function of pairs, over the first documents of another ranking."""

    kind = "re-ranker"

    def __init__(self, source: ReRanker, name: str, device: str | None) -> None:
        self._source, self._name = source, name
        self._options: dict[str, Any] = {
            "max_length": source.max_length,
            "dtype": source.dtype,
            "prompt": source.prompt,
            "batch_tokens": source.batch_tokens,
            "label": source.label,
        }
        model: Any = source.model
        if isinstance(model, (str, Path)):
            from st_m3se.retrieval.teacher_models import load

            self._options["name"] = str(model)
            model = load(
                model,
                backend=source.backend,
                device=device,
                revision=source.revision,
                trust_remote_code=source.trust_remote_code,
            )
        elif source.revision is not None or source.backend != "torch":
            raise ValueError("backend and revision are for a re-ranker by name or folder; this one is loaded already.")
        elif hasattr(model, "to"):
            self._options["device"] = device
        else:
            self._options["name"] = name  # there is nothing else to tell one function from another
        self._model = model
        known = as_teacher(model, **self._options).settings
        self.description: dict[str, Any] = {
            "model": known["teacher"],
            **{key: known[key] for key in ("revision", "weights", "max_length", "dtype", "prompt", "backend")},
            **({} if source.label is None else {"label": source.label}),
            "first_stage": source.first_stage,
            "depth": source.depth,
        }

    def inputs(self, task: Task) -> dict[str, Any]:
        """Nothing: the first stage has its own."""
        return {}

    def rank(self, task: Task) -> None:
        """Score the first documents, and put the others below them."""
        first = task.evaluation_set.candidates if self._source.first_stage is None else task.first
        if first is None:
            raise ValueError(f"{task.evaluation_set.name} has no ranking to re-rank.")
        depth = self._source.depth
        top = TeacherScores.from_rows(
            (row._replace(document_ids=row.document_ids[:depth], scores=row.scores[:depth]) for row in first),
            task.folder / "first-stage",
            overwrite=True,
        )
        task.findings += self._findings(task, top)
        scored = score_pairs(self._model, task, top, "re-rank", **self._options)
        task.write((_re_ranked(*rows) for rows in zip(first, scored, strict=True)), self.description)

    def _findings(self, task: Task, top: TeacherScores) -> list[Finding]:
        """What a reader of the table would not see: that it is no cross-encoder, and what it was never shown."""
        findings: list[Finding] = []
        if callable(getattr(self._model, "encode_query", None)):
            effect = "its scores are similarities of embeddings; to re-rank with a teacher, name a cross-encoder"
            findings += found(f"{self._name}: re-ranks with a bi-encoder", [self.description["model"]], effect)
        if self._source.first_stage is None:  # all systems rank the same candidates
            return findings
        shown = {str(row.query_id): set(map(str, row.document_ids)) for row in top}
        judged = task.evaluation_set.qrels.items()
        relevant = [(query, document) for query, grades in judged for document, grade in grades.items() if grade > 0]
        missed = [f"{query} {document}" for query, document in relevant if document not in shown.get(query, ())]
        effect = (
            f"the first {self._source.depth:,} documents of {self._source.first_stage} hold "
            f"{1 - len(missed) / max(len(relevant), 1):.0%} of the relevant ones, and it cannot find the others, as a "
            "system that searches the whole corpus can. For a fair comparison re-rank the same documents with both"
        )
        return findings + found(f"{self._name}: relevant documents that it was not shown", missed, effect)


def _re_ranked(first: ScoredList, scored: ScoredList) -> ScoredList:
    """The scored documents best first, and below them the rest of the first stage in its order."""
    best = best_first(scored)
    rest = list(first.document_ids[len(best.scores) :])
    if not rest:
        return best
    last = float(best.scores[-1])
    step = max(1.0, abs(last) * 2**-20)  # so that neighbours differ in float32 too
    below = [last - step * place for place in range(1, len(rest) + 1)]
    return best._replace(document_ids=[*best.document_ids, *rest], scores=[*best.scores, *below])


class RunReader:
    """A ranking from a file, or the one that a set comes with."""

    kind = "run"

    def __init__(self, source: GivenRun, name: str) -> None:
        self._path, self._name = None if source.path is None else str(source.path), name
        self.description: dict[str, Any] = {"file": None if self._path is None else Path(self._path).name}

    def inputs(self, task: Task) -> dict[str, Any]:
        """The contents of the file; a run that the set comes with is part of the set."""
        if self._path is None:
            return {}
        path = self._file(task)
        digest = blake2b(digest_size=16)
        for file in parts_of(path):
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return {"contents": digest.hexdigest()}

    def rank(self, task: Task) -> None:
        """Copy the lists of the evaluated queries, with all of their documents, best first."""
        if self._path is None:
            if task.evaluation_set.candidates is None:
                raise ValueError(f"the set {task.evaluation_set.name} comes with no run.")
            task.write(map(best_first, task.evaluation_set.candidates), self.description)
            return
        with scratch_folder(task.folder / "given-run") as scratch:
            # Documents that the corpus lacks stay: trec_eval counts them too, as not relevant.
            run, findings = open_candidates(self._file(task), task.evaluation_set.query_ids, None, scratch)
            task.findings += [finding._replace(kind=f"{self._name}: {finding.kind}") for finding in findings]
            task.write(run, self.description)

    def _file(self, task: Task) -> Path:
        return Path(str(self._path).replace("{set}", task.evaluation_set.name))
