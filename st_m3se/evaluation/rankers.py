"""The systems of an evaluation, loaded: BM25, encoders, re-rankers and runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from st_m3se.core.files import digest, scratch_folder
from st_m3se.core.findings import Finding, found
from st_m3se.core.ids import Id
from st_m3se.core.records import parts_of
from st_m3se.core.scored_list import ScoredList
from st_m3se.data.texts import Texts
from st_m3se.evaluation.candidate_runs import open_candidates
from st_m3se.evaluation.rankings import Ranker, Ranking
from st_m3se.evaluation.systems import Encoder, GivenRun, ReRanker
from st_m3se.retrieval.bm25 import BM25
from st_m3se.retrieval.candidates import find_candidates
from st_m3se.retrieval.embeddings import embed_corpus
from st_m3se.retrieval.fingerprint import model_fingerprint
from st_m3se.retrieval.models import embed_documents, embed_queries, encoder_kind, take_rows
from st_m3se.retrieval.scoring import as_teacher
from st_m3se.retrieval.search import SearchResult, search
from st_m3se.retrieval.sources import Pairs
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["bm25_scores", "load_ranker", "pair_scorer", "ranked_lists"]

PAIRS = 4_096  # compared together


def load_ranker(source: BM25 | Encoder | ReRanker | GivenRun, name: str, device: str | None) -> Ranker:
    """Load what a system needs."""
    if isinstance(source, BM25):
        return LexicalRanker(source)
    if isinstance(source, Encoder):
        return EncoderRanker(source, name, device)
    if isinstance(source, ReRanker):
        return SecondStage(source, name, device)
    return RunReader(source, name)


class LexicalRanker(Ranker):
    """BM25; of given candidates, their scores with the statistics of the whole corpus."""

    kind = "bm25"

    def __init__(self, source: BM25) -> None:
        self._source, self.description = source, source.description

    def rank(self, ranking: Ranking) -> None:
        """Search, or score the candidates."""
        queries, corpus = ranking.evaluation_set.texts
        options: dict[str, Any] = {"show_progress_bar": ranking.show_progress_bar}
        with ranking.timed("search"):
            if ranking.evaluation_set.candidates is None:
                options |= {"judged": ranking.evaluation_set.qrels, "exclude_same_id": ranking.exclude_same_id}
                options |= {"depth": ranking.depth, "overwrite": True}
                find_candidates(queries, corpus, [self._source], ranking.store, **options)
                return
            lists = {row.query_id: row.document_ids for row in ranking.evaluation_set.candidates}
            scored = bm25_scores(self._source, lists, queries, corpus, ranking.folder / "scores", **options)
            ranking.write(map(best_first, scored), self.description)


def bm25_scores(
    source: BM25,
    lists: Mapping[Any, Sequence[Id]],
    queries: Texts,
    corpus: Texts,
    place: Path,
    *,
    show_progress_bar: bool = True,
) -> Iterator[ScoredList]:
    """BM25 scores of given documents, with the statistics of the whole corpus: 0 where no word matches.

    ``lists`` are query id to document ids, all of which have texts; a temporary folder is made beside ``place``.
    """
    asked = Texts.open(dict(zip(lists, queries.take(list(lists)), strict=True)), "queries")
    wanted = {query: dict.fromkeys(documents, 1) for query, documents in lists.items()}
    with scratch_folder(place) as scratch:
        known = find_candidates(
            asked, corpus, [source], scratch / "run", depth=1, positives=wanted, show_progress_bar=show_progress_bar
        )
        for query, documents in lists.items():
            scores = dict(zip(known[query].document_ids, known[query].scores, strict=True))
            yield ScoredList(query, list(documents), [scores[document] for document in documents])


class EncoderRanker(Ranker):
    """Exact search with embeddings that stay on disk; of given candidates, their similarities to the query."""

    def __init__(self, source: Encoder, name: str, device: str | None) -> None:
        model = self._model = source.load(device)
        self.kind = encoder_kind(model)
        self.description = {
            "model": str(source.model) if isinstance(source.model, (str, Path)) else name,
            "revision": getattr(model.config, "_commit_hash", None) or source.revision,
            "fingerprint": model_fingerprint(model),
            "similarity": str(model.similarity_fn_name),
            "max_length": getattr(model, "max_seq_length", None),
            "prompts": dict(model.prompts),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }

    def rank(self, ranking: Ranking) -> None:
        """Search, or score the candidates."""
        if ranking.evaluation_set.candidates is not None:
            label = f"{self.description['model']}, {self.description['fingerprint']}"
            scorer = pair_scorer(self._model, ranking.batch_size)
            scored = ranking.score(scorer, ranking.evaluation_set.candidates, "encode and compare", name=label)
            ranking.write(map(best_first, scored), self.description)
            return
        queries, corpus = ranking.evaluation_set.texts
        options: dict[str, Any] = {"batch_size": ranking.batch_size, "show_progress_bar": ranking.show_progress_bar}
        embeddings = embed_corpus(self._model, corpus, ranking.cache_dir, **options)
        ranking.seconds["encode corpus"] = embeddings.seconds
        with ranking.timed("encode queries"):
            encoded = embed_queries(self._model, [text for _, texts in queries.batches() for text in texts], **options)
        same = Pairs.of_same_ids(queries, corpus, ranking.evaluation_set.qrels)
        with ranking.timed("search"):
            result = search(
                encoded,
                embeddings,
                ranking.depth,
                similarity=str(self._model.similarity_fn_name),
                excluded=(same.queries, same.documents) if ranking.exclude_same_id else None,
            )
        ranking.write(ranked_lists(queries, corpus, result), self.description)


def ranked_lists(queries: Texts, corpus: Texts, found: SearchResult) -> Iterator[ScoredList]:
    """What a search has found for each of the queries, with the documents' ids as text."""
    ids = corpus.ids.cast(pa.large_string()).combine_chunks()
    for query, rows, scores in zip(queries, found.rows, found.scores, strict=True):
        yield ScoredList(query, ids.take(pa.array(rows[rows >= 0])).to_pylist(), scores[rows >= 0].tolist())


def pair_scorer(model: Any, batch_size: int) -> Callable[[list[tuple[str, str]]], np.ndarray]:
    """A function of (query, document) pairs that gives the model's similarities; it encodes each distinct text once."""
    import torch

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        columns = []
        for place, embed in enumerate((embed_queries, embed_documents)):
            texts = [pair[place] for pair in pairs]
            places = {text: row for row, text in enumerate(dict.fromkeys(texts))}
            columns.append((embed(model, list(places), batch_size=batch_size), [places[text] for text in texts]))
        scores = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(pairs), PAIRS):
            left, right = (take_rows(embeddings, rows[start : start + PAIRS]) for embeddings, rows in columns)
            with torch.inference_mode():
                scores.append(model.similarity_pairwise(left, right).float().cpu().numpy())
        return np.concatenate(scores)

    return score


class SecondStage(Ranker):
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
        self.description = {
            "model": known["teacher"],
            **{key: known[key] for key in ("revision", "weights", "max_length", "dtype", "prompt", "backend")},
            **({} if source.label is None else {"label": source.label}),
            "first_stage": source.first_stage,
            "depth": source.depth,
        }

    def inputs(self, ranking: Ranking) -> dict[str, Any]:
        """Nothing: the first stage has its own."""
        return {}

    def rank(self, ranking: Ranking) -> None:
        """Score the first documents, and put the others below them."""
        first = ranking.evaluation_set.candidates
        if ranking.first is not None:
            first = TeacherScores.open(ranking.first.store)
        if first is None:
            raise ValueError(f"{ranking.evaluation_set.name} has no ranking to re-rank.")
        depth = self._source.depth
        top = TeacherScores.from_rows(
            (row._replace(document_ids=row.document_ids[:depth], scores=row.scores[:depth]) for row in first),
            ranking.folder / "first-stage",
            overwrite=True,
        )
        ranking.findings += self._findings(ranking, top)
        scored = ranking.score(self._model, top, "re-rank", **self._options)
        ranking.write((_re_ranked(*rows) for rows in zip(first, scored, strict=True)), self.description)

    def _findings(self, ranking: Ranking, top: TeacherScores) -> list[Finding]:
        """What a reader of the table would not see: that it is no cross-encoder, and what it was never shown."""
        findings: list[Finding] = []
        if callable(getattr(self._model, "encode_query", None)):
            effect = "its scores are similarities of embeddings; to re-rank with a teacher, name a cross-encoder"
            findings += found(f"{self._name}: re-ranks with a bi-encoder", [self.description["model"]], effect)
        if self._source.first_stage is None:  # all systems rank the same candidates
            return findings
        shown = {str(row.query_id): set(map(str, row.document_ids)) for row in top}
        judged = ranking.evaluation_set.qrels.items()
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


class RunReader(Ranker):
    """A ranking from a file, or the one that a set comes with."""

    kind = "run"

    def __init__(self, source: GivenRun, name: str) -> None:
        self._source, self._name = source, name
        self.description = {"file": None if source.path is None else Path(source.path).name}

    def inputs(self, ranking: Ranking) -> dict[str, Any]:
        """The contents of the file; a run that the set comes with is part of the set."""
        if self._source.path is None:
            return {}
        files = parts_of(self._source.file(ranking.evaluation_set.name))
        return {"contents": " ".join(map(digest, files))}

    def rank(self, ranking: Ranking) -> None:
        """Copy the lists of the evaluated queries, with all of their documents, best first."""
        if self._source.path is None:
            if ranking.evaluation_set.candidates is None:
                raise ValueError(f"the set {ranking.evaluation_set.name} comes with no run.")
            ranking.write(map(best_first, ranking.evaluation_set.candidates), self.description)
            return
        with scratch_folder(ranking.folder / "given-run") as scratch:
            # Documents that the corpus lacks stay: trec_eval counts them too, as not relevant.
            run, findings = open_candidates(
                self._source.file(ranking.evaluation_set.name), ranking.evaluation_set.query_ids, None, scratch
            )
            ranking.findings += [finding._replace(kind=f"{self._name}: {finding.kind}") for finding in findings]
            ranking.write(run, self.description)


def best_first(row: ScoredList) -> ScoredList:
    """A list by falling score, equal scores in their order."""
    order = np.argsort(-np.asarray(row.scores, dtype=np.float32), kind="stable").tolist()
    return row._replace(
        document_ids=[row.document_ids[place] for place in order], scores=[row.scores[place] for place in order]
    )
