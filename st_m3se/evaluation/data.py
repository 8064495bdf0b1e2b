"""Evaluation sets: queries, corpus and judgements, with or without a run to re-rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from st_m3se.core.findings import Finding, found, refuse
from st_m3se.data.collection import Collection, absent_documents
from st_m3se.data.qrels import Judgements, check_judgements, read_judgements
from st_m3se.data.text_files import default_cache
from st_m3se.data.texts import Texts
from st_m3se.evaluation.candidate_runs import (
    candidates_digest,
    is_passage_run,
    open_candidates,
    texts_of_passage_run,
)
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["EvaluationSet", "Finding", "open_set", "qrels_set"]


@dataclass(frozen=True)
class EvaluationSet(Collection):
    """What systems are evaluated on. Open one with :func:`open_set` or :func:`qrels_set`. All ids are str.

    Attributes:
        name: For tables.
        split: "test", "dev", ...
        queries: Exactly the evaluated queries, in the order of ``query_ids``; None for a set of ids only.
        corpus: The documents; None for a set of ids only.
        qrels: The evaluated queries' judgements: query id to document id to grade; above 0 is relevant.
        findings: What was unusual, and what was done about it.
        candidates: The run to re-rank, of evaluated queries only, best first; or None.
    """

    split: str
    qrels: Judgements
    candidates: TeacherScores | None = None

    def __repr__(self) -> str:
        documents = "ids only" if self.corpus is None else f"{len(self.corpus)} documents"
        return f"EvaluationSet({self.name} {self.split}, {self.form}, {len(self.qrels)} queries, {documents})"

    @property
    def query_ids(self) -> tuple[str, ...]:
        """The evaluated queries, in the order of the judgements.

        Those that are judged and, where there are texts, have one. A query without a relevant document is among them
        and counts 0, as with trec_eval and BEIR.
        """
        return tuple(self.qrels)

    @property
    def form(self) -> Literal["retrieval", "re-ranking"]:
        """Whether the corpus is searched, or given candidates are put in order."""
        return "retrieval" if self.candidates is None else "re-ranking"

    @property
    def judgements(self) -> int:
        """How many pairs are judged."""
        return sum(len(grades) for grades in self.qrels.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of queries, corpus, judgements and candidates: 32 hexadecimal digits, equal wherever they lie."""
        whole = blake2b(digest_size=16)
        for texts in (self.queries, self.corpus):
            whole.update(b"-" if texts is None else texts.fingerprint.encode())
        whole.update(b"-" if self.candidates is None else candidates_digest(self.candidates).encode())
        for query, grades in self.qrels.items():
            whole.update(repr((query, sorted(grades.items()))).encode())
        return whole.hexdigest()


def open_set(
    source: str | Path,
    *,
    name: str | None = None,
    split: str = "test",
    run: str | Path | TeacherScores | None = None,
    qrels: str | Path | Mapping[str, Mapping[str, int]] | None = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
) -> EvaluationSet:
    """Open a BEIR folder, or a BEIR set by its name, to evaluate systems on.

    What a folder holds says :meth:`Collection.open <st_m3se.data.collection.Collection.open>`. What is unusual is dealt
    with as BEIR's loader and trec_eval do, where these define it, and each such thing is a :class:`Finding`: empty
    texts are kept; the last text of an id and the last grade of a pair count; judged queries without a text are left
    out; judged documents that the corpus lacks stay in the judgements; a query without a relevant document or without
    candidates counts 0 in every measure.

    Args:
        source: The folder; or a name such as "scifact" or "cqadupstack/android", see
            :func:`~st_m3se.data.download.download_set`. A folder of that name goes first.
        name: For tables; None is the folder's name.
        split: "test", "dev" or "train". BEIR reports MS MARCO on "dev". A copy that has only one other split, as
            NanoBEIR's "train", is opened with that one, which is a finding too.
        run: A run to re-rank, see :func:`qrels_set`. None is retrieval from the whole corpus.
        qrels: Judgements from elsewhere: a file, or a mapping.
        strict: Refuse a set with findings, except mere notes (another split, shared ids, a run without scores or with
            other queries).
        cache_dir: For downloads and for copies that Arrow can map. None is beside the datasets library's cache.

    Raises:
        FormatError: If something is missing or cannot be read, with ``file:line``; in strict mode, with the first ids
            of each finding.
    """
    cache = default_cache("evaluation") if cache_dir is None else Path(cache_dir)
    qrels = check_judgements(qrels) if isinstance(qrels, Mapping) else qrels
    opened = Collection.open(source, split, name=name, qrels=qrels, id_type="str", judged_only=True, cache_dir=cache)
    return _evaluated(opened, run, strict, cache)


def qrels_set(
    qrels: str | Path | Mapping[str, Mapping[str, int]],
    *,
    name: str,
    split: str = "test",
    run: str | Path | TeacherScores | None = None,
    queries: Any = None,
    corpus: Any = None,
    strict: bool = False,
    cache_dir: str | Path | None = None,
) -> EvaluationSet:
    """A set from its parts: judgements, a run to re-rank, and where there are any, texts.

    With judgements alone it is a set of ids, on which given runs are measured. With a run and texts it is a re-ranking
    task, the form in which the M3SE paper reports MS MARCO dev, DL19, DL20 and NQ.

    Args:
        qrels: A file (TREC, BEIR's TSV, Parquet) or a mapping, query id to document id to grade. For DL19 and DL20 a
            binary measure should ask for the grade 2, such as ``RR(rel=2)@10``.
        name: For tables.
        split: For the report.
        run: The candidates: a TREC run; MS MARCO's ``qid pid rank``; its ``top1000`` files, ``qid pid query passage``,
            whose texts are used unless ``queries`` or ``corpus`` are given; or a store.
        queries: Whatever :meth:`Texts.open <st_m3se.data.texts.Texts.open>` takes, such as ``queries.dev.small.tsv``.
        corpus: Likewise, such as ``collection.tsv``.
        strict: See :func:`open_set`.
        cache_dir: See :func:`open_set`.

    Raises:
        FormatError: As :func:`open_set` does.
    """
    cache = default_cache("evaluation") if cache_dir is None else Path(cache_dir)
    findings: list[Finding] = []
    from_run = False
    if isinstance(qrels, Mapping):
        judged = check_judgements(qrels)
    else:
        read, findings = read_judgements(qrels)
        judged = check_judgements(read)
    if is_passage_run(run) and (queries is None or corpus is None):
        asked, passages = texts_of_passage_run(Path(str(run)), cache)
        if queries is None:  # a query that the run has nothing for: its text is not known, nor needed, and it counts 0
            known = Texts.open(asked, "queries", id_type="str", cache_dir=cache)
            texts = dict.fromkeys(judged, "") | {query: known[query] for query in judged if query in known}
            queries = Texts.open(texts, "queries")
        from_run = corpus is None
        corpus = passages if from_run else corpus
    opened = Collection.open(
        None,
        split,
        name=name,
        queries=queries,
        corpus=corpus,
        qrels=judged,
        id_type="str",
        judged_only=True,
        cache_dir=cache,
    )
    return _evaluated(replace(opened, findings=(*findings, *opened.findings)), run, strict, cache, from_run)


def _evaluated(
    opened: Collection, run: str | Path | TeacherScores | None, strict: bool, cache: Path, from_run: bool = False
) -> EvaluationSet:
    """The set to evaluate on, with what is unusual; ``from_run`` says that the corpus is the run's documents."""
    judged, findings = check_judgements(opened.qrels or {}), list(opened.findings)
    if (corpus := opened.corpus) is not None:
        effect = "recall, AP and the ideal DCG count these, and no system can find them"
        missing = absent_documents(judged, corpus, effect)
        kind = "judged documents outside the run"
        findings += [finding._replace(kind=kind) if from_run else finding for finding in missing]
        shared = [query for query, row in zip(judged, corpus.find(list(judged)), strict=True) if row >= 0]
        itself = sum(query in judged[query] for query in shared)
        findings += found(
            "query ids that are document ids",
            shared,
            "with exclude_same_id, BEIR's rule, that document is left out of its query's results"
            + (f"; {itself} of them are judged for their query and stay" if itself else ""),
        )
    findings += found(
        "queries without a relevant document",
        [query for query, grades in judged.items() if not any(grade > 0 for grade in grades.values())],
        "they count 0 in every measure, as with trec_eval and BEIR",
    )
    if strict:  # before a run of millions of lines is read
        refuse(opened.name, findings)
    candidates: TeacherScores | None = None
    if run is not None:
        candidates, unusual = open_candidates(run, tuple(judged), opened.corpus, cache)
        findings += unusual
        if strict:
            refuse(opened.name, findings)
    return EvaluationSet(
        opened.name, str(opened.split), opened.queries, opened.corpus, judged, tuple(findings), candidates
    )
