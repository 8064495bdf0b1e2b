"""A run to re-rank, from any form it is published in: one list of known documents for each evaluated query."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.files import cache_key, checked_json, digest, read_checked_json, sweep, whole_folder
from st_m3se.core.findings import EXAMPLES, Finding, found
from st_m3se.core.reading import INTEGER, Reading, open_binary
from st_m3se.core.records import parts_of
from st_m3se.core.scored_list import ScoredList, is_score
from st_m3se.data.texts import Texts
from st_m3se.scores.convert import read_rows
from st_m3se.scores.formats import sniff
from st_m3se.scores.formats.format import HEAD, head_lines
from st_m3se.scores.formats.grouping import Pair, TextStore, group_pairs
from st_m3se.scores.formats.runs import is_ranking
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import MANIFEST, UNFINISHED, TeacherScoresWriter

__all__ = ["candidates_digest", "is_passage_run", "open_candidates", "texts_of_passage_run"]

logger = logging.getLogger(__name__)

CACHE_VERSION = 3  # part of every name in the cache: raise it when what is kept there changes
PASSAGES = "passages"
EXPECTED = (
    "Expected `query Q0 document rank score tag`, with tabs `qid pid rank`, `qid pid rank score` or `qid pid query "
    "passage`, or another file that `st-m3se convert` reads; where it cannot tell, convert it with --from and take the "
    "store."
)
ASIDE = "left out: there is nothing to evaluate them with"
NO_TEXT = "left out: there is no text to score"
FILES = "files.json"  # what a folder of texts in the cache holds, and its checksums
UNSCORED = "the run is there to be re-ranked: by itself it would put documents in the order of their ids"


def open_candidates(
    run: str | Path | TeacherScores, query_ids: Sequence[str], corpus: Texts | None, cache_dir: Path
) -> tuple[TeacherScores, list[Finding]]:
    """Open a run to re-rank, as a store in the cache, and what was unusual about it.

    The store has the evaluated queries only, ids as text, best first, equal scores in the order of the source, without
    documents that the corpus does not have. As long as source, queries and corpus stay the same, it is made once.

    Args:
        run: A TREC run; ``qid pid rank``, with or without a score, with tabs; MS MARCO's ``qid pid query passage`` with
            tabs, which has no scores; any other file that :func:`~st_m3se.scores.convert` reads; or a store.
        query_ids: The evaluated queries.
        corpus: The documents that exist; None lets all pass.
        cache_dir: Where to keep the store.

    Raises:
        FormatError: If it is none of these, or has nothing for any of the queries.
    """
    store = _as_store(run)
    files = store.files if store is not None else parts_of(Path(str(run)))
    chosen = "" if store is None else blake2b("\n".join(map(str, store.query_ids().to_pylist())).encode()).hexdigest()
    settings = [CACHE_VERSION, chosen, list(query_ids), None if corpus is None else corpus.fingerprint]
    target = cache_dir / f"candidates-{cache_key(settings, files)}"
    candidates = TeacherScores.open_cached(target)
    if candidates is None:
        rows = iter(store) if store is not None else _read(Path(str(run)))
        _write(rows, str(run), query_ids, corpus, target)
        candidates = TeacherScores.open(target)
    if not len(candidates):
        raise FormatError(
            f"the run has no document for any of the {len(query_ids)} evaluated queries, such as {query_ids[0]!r:.80}: "
            "its ids are others.",
            file=str(run) if store is None else None,
        )
    findings = [
        Finding(kind, count, tuple(examples), effect)
        for kind, count, examples, effect in candidates.manifest["source"]["findings"]
    ]
    there = set(candidates.query_ids().to_pylist())
    if missing := [query for query in query_ids if query not in there]:
        findings += found("queries without candidates", missing, "they count 0 in every measure")
    return candidates, findings


def candidates_digest(candidates: TeacherScores) -> str:
    """A hash of the lists of :func:`open_candidates`, equal wherever they came from."""
    return str(candidates.manifest["inputs"]["candidates"])


def is_passage_run(run: Any) -> bool:
    """Whether it is MS MARCO's ``qid<TAB>pid<TAB>query<TAB>passage``, which brings its own texts."""
    return (
        isinstance(run, (str, Path)) and Path(run).is_file() and _as_store(run) is None and _kind(Path(run)) == PASSAGES
    )


def texts_of_passage_run(run: Path, cache_dir: Path) -> tuple[Path, Path]:
    """The queries and passages of such a run, as two jsonl files in the cache."""
    folder = cache_dir / f"passages-{cache_key([CACHE_VERSION], [run])}"
    names = ("queries.jsonl", "corpus.jsonl")
    sweep(folder)
    if not _intact(folder, names):
        with closing(TextStore()) as store:
            for fields in Reading(run).parsed(_passage):
                store.query(fields[0], fields[2])
                store.document(fields[1], fields[3])

            def write(part: Path) -> None:
                part.mkdir()
                store.write(part)
                (part / FILES).write_text(checked_json({name: digest(part / name) for name in names}), encoding="utf-8")

            whole_folder(folder, write)
    return folder / names[0], folder / names[1]


def _intact(folder: Path, names: Sequence[str]) -> bool:
    """Whether the files of a folder in the cache are there, and what was written."""
    if not folder.exists():
        return False
    try:
        if all(read_checked_json(folder / FILES)[name] == digest(folder / name) for name in names):
            return True
        why = "its content is not what was written"
    except (OSError, ValueError, KeyError) as error:
        why = repr(error)
    logger.warning(f"{folder} in the cache is damaged: {why}. It is made anew.")
    return False


def _as_store(run: str | Path | TeacherScores) -> TeacherScores | None:
    if isinstance(run, TeacherScores):
        return run
    path = Path(run)
    if not path.is_dir():
        return None
    try:
        return TeacherScores.open(path)
    except FormatError:
        if (path / MANIFEST).is_file() or (path / UNFINISHED).is_file():
            raise
        return None  # a folder of parts in another layout is read as a file is


# Readers.


def _kind(path: Path) -> str:
    """What a run is: "passages" for MS MARCO's top1000, or a format that is converted.

    Raises:
        FormatError: If it is none, or could be two.
    """
    try:
        head = b""
        if not path.is_dir():
            with open_binary(path) as file:
                head = file.read(HEAD)
        if head and not head.startswith(b"PAR1"):
            with suppress(FormatError, UnicodeDecodeError):
                rows = [line.split("\t") for line in head_lines(head)]
                if is_ranking(rows) or _is_ranks(rows):  # GPL's margins, which these could be by form, are no run
                    return "ranking"
                if 2 * sum(len(row) == 4 and not is_score(row[3]) for row in rows) > len(rows):
                    return PASSAGES
        kind = sniff(path)
    except FormatError as error:
        raise FormatError(f"this is no run: {error.message} {EXPECTED}", file=str(path)) from None
    if kind == "gpl":
        raise FormatError(
            "this could be a ranking (query, document, rank, score), texts, or GPL's margins, which are no run. "
            f"{EXPECTED}",
            file=str(path),
        )
    return kind


def _is_ranks(rows: Sequence[Sequence[str]]) -> bool:
    """Whether these are lines of ``qid pid rank`` in any order, and no judgements: no rank twice for a query."""
    if not all(len(row) == 3 and INTEGER.fullmatch(row[2]) and len(row[2]) < 9 for row in rows):
        return False
    return len({(row[0], row[2]) for row in rows}) == len(rows)


def _read(path: Path) -> Iterator[ScoredList]:
    reading = Reading(path, id_type="str")
    kind = _kind(path)
    if kind != PASSAGES:
        yield from read_rows(reading, kind)
        return

    def pair(line: str, number: int) -> Pair:
        query, document, _, _ = _passage(line, number)
        return Pair(reading.query_id(query), reading.document_id(document), None, 0.0, False, number)

    yield from group_pairs(reading.parsed(pair), reading)


def _passage(line: str, number: int) -> list[str]:
    fields = line.split("\t")
    if len(fields) != 4:
        raise FormatError(
            f"expected `qid<TAB>pid<TAB>query<TAB>passage` as on the first line, got {len(fields)} fields."
        )
    return fields


# Into the cache.


def _write(
    rows: Iterable[ScoredList], source: str, query_ids: Sequence[str], corpus: Texts | None, target: Path
) -> None:
    wanted = set(query_ids)
    others: list[str] = []
    unknown: list[str] = []
    unknown_count = 0
    unscored: list[str] = []
    digests: dict[str, bytes] = {}
    manifest: dict[str, Any] = {"source": {"run": source}, "inputs": {}}
    try:
        with TeacherScoresWriter(target, manifest=manifest, overwrite=target.exists()) as writer:
            for row in rows:
                query = str(row.query_id)
                if query not in wanted:
                    others.append(query)
                    continue
                documents = np.array([str(document) for document in row.document_ids], dtype=object)
                scores = np.asarray(row.scores, dtype=np.float32)
                if corpus is not None and len(documents):
                    there = corpus.find(documents.tolist()) >= 0
                    unknown_count += len(documents) - int(there.sum())
                    unknown += [f"{query} {document}" for document in documents[~there][: EXAMPLES - len(unknown)]]
                    documents, scores = documents[there], scores[there]
                if not len(documents):
                    continue
                if len(scores) > 1 and not scores.any():
                    unscored.append(query)
                order = np.argsort(-scores, kind="stable")
                ranked = documents[order].tolist()
                writer.write(query, ranked, scores[order])
                digests[query] = blake2b("\n".join(ranked).encode(), digest_size=16).digest()
            whole = blake2b(digest_size=16)
            for query in query_ids:
                whole.update(query.encode() + b"\n" + digests.get(query, b""))
            findings = [
                *found("candidates of queries that are not evaluated", others, ASIDE),
                *found("candidates absent from the corpus", unknown, NO_TEXT, unknown_count),
                *found("candidates without scores", unscored, UNSCORED),
            ]
            # The writer's copy is a shallow one: what comes to light while it writes still goes in here.
            manifest["source"]["findings"] = findings
            manifest["inputs"]["candidates"] = whole.hexdigest()
    except OSError:  # another process was faster with the same rows
        if not (target / MANIFEST).is_file():
            raise
