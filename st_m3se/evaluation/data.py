"""Evaluation sets: queries, corpus and judgements, with or without a run to re-rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from st_m3se.collection import absent_documents, absent_queries, text_findings
from st_m3se.evaluation.candidate_runs import (
    candidates_digest,
    is_passage_run,
    open_candidates,
    texts_of_passage_run,
)
from st_m3se.evaluation.download import BEIR_SETS, default_cache, download_set
from st_m3se.scores.errors import FormatError
from st_m3se.scores.findings import Finding, found, refuse
from st_m3se.scores.judgements import Judgements, check_judgements, read_judgements
from st_m3se.scores.store import TeacherScores
from st_m3se.text_sources import SHARD, choose_file, parquet_of_split
from st_m3se.texts import Texts

__all__ = ["EvaluationSet", "Finding", "open_set", "qrels_of", "qrels_set"]

PACKED = ("", ".gz", ".zst")


@dataclass(frozen=True)
class EvaluationSet:
    """What systems are evaluated on. Open one with :func:`open_set` or :func:`qrels_set`. All ids are str.

    Attributes:
        name: For tables.
        split: "test", "dev", ...
        queries: Exactly the evaluated queries, in the order of ``query_ids``; None for a set of ids only.
        corpus: The documents; None for a set of ids only.
        qrels: The evaluated queries' judgements: query id to document id to grade; above 0 is relevant.
        candidates: The run to re-rank, of evaluated queries only, best first; or None.
        findings: What was unusual, and what was done about it.
    """

    name: str
    split: str
    queries: Texts | None
    corpus: Texts | None
    qrels: Judgements
    candidates: TeacherScores | None = None
    findings: tuple[Finding, ...] = ()

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
    """Open a BEIR folder, or a BEIR set by its name, which is downloaded once.

    A folder has

    - documents: ``corpus.jsonl`` as BEIR, ``corpus.tsv`` or ``collection.tsv`` as MS MARCO, plain, gz or zst;
      ``corpus.parquet``; or a folder ``corpus/`` of Parquet files as on the hub (BeIR, NanoBEIR);
    - queries likewise: ``queries.jsonl``, ``queries.tsv``, ``queries.{split}.tsv``, ...;
    - judgements: ``qrels/{split}.tsv`` as BEIR, four columns as TREC in ``qrels/{split}.txt``, ``qrels.{split}.tsv``,
      ``qrels.txt`` and the like, or Parquet files ``qrels/{split}-*.parquet``.

    Documents are held on disk, see :class:`~st_m3se.texts.Texts`; memory holds the ids of the documents, the queries
    and the judgements. What is not as it should be is dealt with as BEIR's loader and trec_eval do, where these
    define it, and every such thing is a :class:`Finding`:

    - an empty document or query is kept, as the empty text;
    - of an id that repeats, the last text counts, in the place of the first; of a pair that is judged
      twice, the last grade;
    - a judged query that has no text is not evaluated (BEIR's loader stops);
    - a judged document that is not in the corpus stays in the judgements: if it is relevant, recall, AP and
      the ideal DCG count it, and no system can find it;
    - a query without a relevant document counts 0 in every measure, and so does one without candidates;
    - query ids that are document ids too: noted, since the rule ``exclude_same_id`` acts on them.

    What cannot be read at all (a line that is not JSON, a document without an id or text, a grade that is not an
    integer) is an error in any mode.

    Args:
        source: The folder; or a name such as "scifact" or "cqadupstack/android", see
            :func:`~st_m3se.evaluation.download.download_set`. A folder of that name goes first.
        name: For tables; None is the folder's name.
        split: "test", "dev" or "train". BEIR reports MS MARCO on "dev". A copy that has only one other split, as
            NanoBEIR's "train", is opened with that one, which is a finding too.
        run: A run to re-rank, see :func:`qrels_set`. None is retrieval from the whole corpus.
        qrels: Judgements from elsewhere: a file, or a mapping.
        strict: Refuse a set with findings, except those that are mere notes (another split, shared ids, a run
            without scores or with other queries).
        cache_dir: For downloads and for copies that Arrow can map. None is beside the datasets library's cache.

    Raises:
        FormatError: If something is missing or cannot be read, with ``file:line``; in strict mode, with the first ids
            of each finding.
    """
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    folder = Path(source)
    if not folder.exists():
        if str(source) not in BEIR_SETS and str(source).split("/")[0] not in BEIR_SETS:
            raise FormatError(
                f"there is no such folder, and no BEIR set of this name; those are {', '.join(BEIR_SETS)}.",
                file=str(source),
            )
        folder, name = download_set(str(source), cache), name or str(source)
    elif not folder.is_dir():
        raise FormatError("this is a file: name the folder that holds corpus, queries and qrels.", file=str(source))
    notes: list[Finding] = []
    if qrels is None:
        qrels, used = qrels_of(folder, split)
        if used != split:
            effect = f"the copy has no split {split!r} but one other, which is used"
            split, notes = used, found("another split", [used], effect)
    return _assemble(
        name or folder.resolve().name,
        split,
        qrels,
        choose_file(folder, "queries", split),
        choose_file(folder, "corpus", split),
        run,
        strict,
        cache,
        notes,
    )


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

    With judgements alone it is a set of ids, on which given runs are measured: TREC DL19 and DL20 without MS MARCO's
    passages, for instance. With a run and texts it is a re-ranking task, the form in which the M3SE paper reports MS
    MARCO dev, DL19, DL20 and NQ. Judgements and findings as in :func:`open_set`.

    Example:
        >>> qrels_set(  # doctest: +SKIP
        ...     "2019qrels-pass.txt", name="dl19", run="msmarco-passagetest2019-top1000.tsv"
        ... )

    Args:
        qrels: A file (TREC, BEIR's TSV, Parquet) or a mapping, query id to document id to grade. DL19 and DL20: a
            binary measure should ask for the grade 2, such as ``RR(rel=2)@10``, see
            :func:`~st_m3se.evaluation.measures.parse_measures`.
        name: For tables.
        split: For the report.
        run: The candidates: a TREC run; MS MARCO's ``qid pid rank``; its ``top1000`` files, ``qid pid query passage``,
            whose texts are used unless ``queries`` or ``corpus`` are given; or a store, as ``find_candidates``
            writes it.
        queries: Whatever :meth:`Texts.open <st_m3se.texts.Texts.open>` takes, such as ``queries.dev.small.tsv``.
        corpus: Likewise, such as ``collection.tsv``.
        strict: See :func:`open_set`.
        cache_dir: See :func:`open_set`.

    Raises:
        FormatError: As :func:`open_set` does.
    """
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    from_run: set[str] = set()
    if is_passage_run(run) and (queries is None or corpus is None):
        asked, passages = texts_of_passage_run(Path(str(run)), cache)
        from_run = {kind for kind, texts in (("queries", queries), ("corpus", corpus)) if texts is None}
        queries, corpus = asked if queries is None else queries, passages if corpus is None else corpus
    return _assemble(name, split, qrels, queries, corpus, run, strict, cache, [], from_run)


def _assemble(
    name: str,
    split: str,
    qrels: str | Path | Mapping[str, Mapping[str, int]],
    queries: Any,
    corpus: Any,
    run: str | Path | TeacherScores | None,
    strict: bool,
    cache: Path,
    findings: list[Finding],
    from_run: Collection[str] = (),
) -> EvaluationSet:
    """Open the parts; ``from_run`` says which of "queries" and "corpus" are no more than what the run names."""
    if isinstance(qrels, Mapping):
        judged = check_judgements(qrels)
    else:
        read, unusual = read_judgements(qrels)
        judged, findings = check_judgements(read), findings + unusual
    asked: Texts | None = None
    documents: Texts | None = None
    candidates: TeacherScores | None = None
    if queries is not None:
        asked, judged, unusual = _open_queries(queries, judged, "queries" in from_run, cache)
        findings += unusual
    if corpus is not None:
        documents, unusual = _open_corpus(corpus, judged, "corpus" in from_run, cache)
        findings += unusual
    findings += found(
        "queries without a relevant document",
        [query for query, grades in judged.items() if not any(grade > 0 for grade in grades.values())],
        "they count 0 in every measure, as with trec_eval and BEIR",
    )
    if strict:  # before a run of millions of lines is read
        refuse(name, findings)
    if run is not None:
        candidates, unusual = open_candidates(run, tuple(judged), documents, cache)
        findings += unusual
        if strict:
            refuse(name, findings)
    return EvaluationSet(name, split, asked, documents, judged, candidates, tuple(findings))


def _open_queries(
    source: Any, judged: Judgements, from_run: bool, cache: Path
) -> tuple[Texts, Judgements, list[Finding]]:
    """The judged queries' texts, the judgements of those that have one, and what is unusual."""
    queries = Texts.open(source, "queries", id_type="str", duplicates="last", cache_dir=cache)
    absent = set(absent_queries(judged, queries))
    present = [query for query in judged if query not in absent]
    texts = dict(zip(present, queries.take(present), strict=True))
    findings = text_findings(queries, texts)
    if from_run:  # a query that the run has nothing for: its text is not known, nor needed, and it counts 0
        texts = {query: texts.get(query, "") for query in judged}
    else:
        effect = "these queries are not evaluated: there is no text to search with"
        findings += found("judgements of absent queries", [query for query in judged if query in absent], effect)
    return Texts.open(texts, "queries"), {query: judged[query] for query in texts}, findings


def _open_corpus(source: Any, judged: Judgements, from_run: bool, cache: Path) -> tuple[Texts, list[Finding]]:
    """The documents, and what is unusual about them and about the judgements of them."""
    corpus = Texts.open(source, "corpus", id_type="str", duplicates="last", cache_dir=cache)
    missing = absent_documents(judged, corpus, "recall, AP and the ideal DCG count these, and no system can find them")
    shared = [query for query, row in zip(judged, corpus.find(list(judged)), strict=True) if row >= 0]
    itself = sum(query in judged[query] for query in shared)
    findings = [
        *text_findings(corpus),
        *(finding._replace(kind="judged documents outside the run") if from_run else finding for finding in missing),
        *found(
            "query ids that are document ids",
            shared,
            "with exclude_same_id, BEIR's rule, that document is left out of its query's results"
            + (f"; {itself} of them are judged for their query and stay" if itself else ""),
        ),
    ]
    return corpus, findings


SPLITS = ("train", "dev", "validation", "test")
"""What may be another split of a copy that has only one; any other name is a slip."""


def qrels_of(folder: Path, split: str) -> tuple[Path, str]:
    """The judgements of a split, and the split's name: another one only where a hub copy has no other."""
    inside = folder / "qrels"
    names = [inside / f"{split}{ending}" for ending in (".tsv", ".txt", ".trec", ".qrels", ".jsonl")]
    names += [folder / f"qrels.{split}{ending}" for ending in (".tsv", ".txt", ".small.tsv")]
    names += [folder / f"qrels{ending}" for ending in (".tsv", ".txt")]
    for name in names:
        for packed in PACKED:
            if (file := name.with_name(name.name + packed)).is_file():
                return file, split
    shards: dict[str, list[Path]] = {}
    for file in sorted(inside.glob("*.parquet")):
        shards.setdefault(SHARD.sub("", file.stem), []).append(file)
    if split in shards or (len(shards) == 1 and split in SPLITS):
        used = split if split in shards else next(iter(shards))
        return (inside if len(shards) == 1 else parquet_of_split(inside, used)), used
    there = {SHARD.sub("", file.name.split(".")[0]) for file in inside.glob("*.*")}
    there |= {file.name.split(".")[1] for file in folder.glob("qrels.*.*")}
    raise FormatError(
        f"the folder has no judgements for the split {split!r}, such as qrels/{split}.tsv"
        + (f"; there are {', '.join(sorted(there))}. Choose one: split=..." if there else ", and no others."),
        file=str(folder),
    )
