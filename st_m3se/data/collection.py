"""Queries, documents and judgements that belong together, and what is unusual about them.

Evaluation, candidates, teacher scoring and training go on with what is unusual in the same way, which is that of BEIR's
loader and trec_eval, and say so; ``strict`` refuses it everywhere.
"""

from __future__ import annotations

from collections.abc import Collection as IdCollection
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from st_m3se.core.errors import FormatError
from st_m3se.core.findings import EXAMPLES, Finding, found
from st_m3se.core.ids import Id
from st_m3se.core.reading import IdType
from st_m3se.data.download import BEIR_SETS, download_set
from st_m3se.data.qrels import read_judgements
from st_m3se.data.text_files import PACKED, SHARD, choose_file, parquet_of_split, parquet_splits
from st_m3se.data.texts import Texts

__all__ = [
    "Collection",
    "absent_documents",
    "absent_queries",
    "open_texts",
    "qrels_file",
    "qrels_files",
    "text_findings",
]

SPLITS = ("train", "dev", "validation", "test")
"""What may be another split of a copy that has only one; any other name is a slip."""


@dataclass(frozen=True)
class Collection:
    """Queries, documents and judgements that belong together.

    Attributes:
        name: Of the folder, for tables and messages.
        split: Whose judgements these are; None without judgements of a split.
        queries: Their texts; None for a set of ids only.
        corpus: The documents' texts, likewise.
        qrels: Query id to document id to grade, above 0 is relevant; None without judgements.
        findings: What was unusual, and what was done about it.
    """

    name: str
    split: str | None
    queries: Texts | None
    corpus: Texts | None
    qrels: Mapping[Any, Mapping[Any, int]] | None
    findings: tuple[Finding, ...] = ()

    @classmethod
    def open(
        cls,
        source: Collection | str | Path | None = None,
        split: str | None = None,
        *,
        name: str | None = None,
        queries: Any = None,
        corpus: Any = None,
        qrels: str | Path | Mapping[Any, Mapping[Any, int]] | None = None,
        id_type: IdType | None = None,
        judged_only: bool = False,
        cache_dir: str | Path | None = None,
    ) -> Collection:
        """Open a BEIR folder, a BEIR set by its name, which is downloaded once, or files.

        A folder has

        - documents: ``corpus.jsonl`` as BEIR, ``corpus.tsv`` or ``collection.tsv`` as MS MARCO, plain, gz or zst;
          ``corpus.parquet``; or a folder ``corpus/`` of Parquet files as on the hub (BeIR, NanoBEIR);
        - queries likewise: ``queries.jsonl``, ``queries.tsv``, ``queries.{split}.tsv``, ...;
        - judgements: ``qrels/{split}.tsv`` as BEIR, four columns as TREC in ``qrels/{split}.txt``,
          ``qrels.{split}.tsv``, ``qrels.txt`` and the like, or Parquet files ``qrels/{split}-*.parquet``.

        Texts stay on disk, see :class:`~st_m3se.data.texts.Texts`; memory holds ids and judgements. Of an id that
        repeats, or a pair that is judged twice, the last one counts; empty texts are kept.

        Args:
            source: The folder; or a name such as "scifact" or "cqadupstack/android", see
                :func:`~st_m3se.data.download.download_set`. A Collection comes back as it is. None where ``queries``
                and ``corpus`` are given.
            split: Whose judgements are read: "train", "dev" or "test". A copy that has only one other split, as
                NanoBEIR's "train", is opened with that one, which is a finding. None reads no judgements.
            name: For tables; None is the folder's name.
            queries: Instead of a folder, whatever :meth:`Texts.open <st_m3se.data.texts.Texts.open>` takes.
            corpus: Likewise.
            qrels: Judgements from elsewhere: a file, or a mapping.
            id_type: "str" or "int" converts the texts' ids. None leaves them; judgements follow.
            judged_only: Keep the judged queries alone; judgements of queries without a text are left out.
            cache_dir: For downloads and for copies that Arrow can map. None is beside the datasets library's cache.

        Raises:
            FormatError: If something is missing or cannot be read, with ``file:line``.
            ValueError: If nothing is named, or a folder and files are.
        """
        if isinstance(source, Collection):
            return source
        if source is None and queries is None and corpus is None and qrels is None:
            raise ValueError("there is nothing to open: name a folder with data, or files with queries and corpus.")
        if source is not None and not (queries is None and corpus is None):
            raise ValueError("a folder has its own queries and corpus: name either data, or both queries and corpus.")
        findings: list[Finding] = []
        if source is not None:
            folder = _folder(source, cache_dir)
            name = name or (folder.resolve().name if Path(source).is_dir() else str(source))
            if qrels is None and split is not None:
                qrels, used = qrels_file(folder, split)
                effect = f"the copy has no split {split!r} but one other, which is used"
                findings += found("another split", [used] if used != split else [], effect)
                split = used
            queries, corpus = choose_file(folder, "queries", split), choose_file(folder, "corpus", split)
        asked, of_queries = _optional(queries, "queries", id_type, cache_dir)
        documents, of_corpus = _optional(corpus, "corpus", id_type, cache_dir)
        judged = qrels
        if isinstance(judged, (str, Path)):
            types = {"query_ids": "str" if asked is None else asked.id_type}
            types["document_ids"] = "str" if documents is None else documents.id_type
            judged, unusual = read_judgements(judged, **types)
            findings += unusual
        if asked is not None and judged_only and judged is not None:
            whole, absent = asked, absent_queries(judged, asked)
            left_out = set(absent)
            judged = {query: judged[query] for query in judged if query not in left_out}
            asked = Texts.open(dict(zip(judged, whole.take(list(judged)), strict=True)), "queries")
            effect = "these queries are left out: there is no text to search with"
            of_queries = [] if isinstance(queries, Texts) else text_findings(whole, asked)
            of_queries += found("judgements of absent queries", absent, effect)
        return cls(name or "data", split, asked, documents, judged, (*findings, *of_queries, *of_corpus))

    @property
    def texts(self) -> tuple[Texts, Texts]:
        """Queries and corpus.

        Raises:
            ValueError: If one is not there.
        """
        if self.queries is None or self.corpus is None:
            raise ValueError("name a folder with data, or both queries and corpus.")
        return self.queries, self.corpus


def _optional(
    source: Any, name: str, id_type: IdType | None, cache_dir: str | Path | None
) -> tuple[Texts | None, list[Finding]]:
    return (None, []) if source is None else open_texts(source, name, id_type=id_type, cache_dir=cache_dir)


def _folder(source: str | Path, cache_dir: str | Path | None) -> Path:
    """The folder that is named, or that of a BEIR set by its name, downloaded if need be."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FormatError("this is a file: name the folder that holds corpus, queries and qrels.", file=str(source))
    if str(source).split("/")[0] not in BEIR_SETS:
        raise FormatError(
            f"there is no such folder, and no BEIR set of this name; those are {', '.join(BEIR_SETS)}.",
            file=str(source),
        )
    return download_set(str(source), cache_dir)


def open_texts(
    source: Any, name: str, *, id_type: IdType | None = None, cache_dir: str | Path | None = None
) -> tuple[Texts, list[Finding]]:
    """Open texts, and what is unusual about them; of an id that repeats in a file the last text counts.

    Of :class:`~st_m3se.data.texts.Texts`, which are open, nothing is said again.
    """
    texts = Texts.open(source, name, id_type=id_type, duplicates="last", cache_dir=cache_dir)
    return texts, [] if isinstance(source, Texts) else text_findings(texts)


def text_findings(texts: Texts, among: IdCollection[Id] | None = None) -> list[Finding]:
    """Ids that repeat, and texts that are empty; ``among`` only these ids."""
    what = "queries" if texts.name == "queries" else "documents"
    effect = "searched as the empty text" if what == "queries" else "indexed as the empty text"
    repeated = [text_id for text_id in texts.repeated if among is None or text_id in among]
    rows = texts.blank()
    blank = [texts.ids[row].as_py() for row in rows[: EXAMPLES if among is None else None].tolist()]
    blank = [text_id for text_id in blank if among is None or text_id in among]
    count = len(rows) if among is None else len(blank)
    return [
        *found(f"{what} whose id repeats", repeated, "the last text counts, as in BEIR"),
        *found(f"empty {what}", blank, f"kept, as in BEIR: {effect}", count),
    ]


def absent_queries(judged: Mapping[Any, Any], queries: Texts) -> list[Id]:
    """The judged queries that have no text.

    Raises:
        FormatError: If none has one.
    """
    there = queries.find(list(judged)) >= 0
    absent = [query for query, known in zip(judged, there.tolist(), strict=True) if not known]
    if len(absent) == len(judged):
        example = next(iter(judged), None)
        raise FormatError(
            f"none of the {len(judged)} judged queries, such as {example!r:.80}, is among {queries!r}, "
            f"such as {next(iter(queries), None)!r:.80}: queries and judgements belong to different sets."
        )
    return absent


def absent_documents(judged: Mapping[Any, Mapping[Any, int]], corpus: Texts, effect: str) -> list[Finding]:
    """Judged documents that the corpus does not have; ``effect`` goes on after "N of them are relevant: "."""
    pairs = [(query, document, grade) for query, grades in judged.items() for document, grade in grades.items()]
    missing = [pairs[place] for place in (corpus.find([pair[1] for pair in pairs]) < 0).nonzero()[0].tolist()]
    relevant = sum(grade > 0 for _, _, grade in missing)
    return found(
        "judgements of absent documents",
        [f"{query} {document}" for query, document, _ in missing],
        f"{relevant} of them are relevant: {effect}",
    )


def qrels_file(folder: Path, split: str) -> tuple[Path, str]:
    """The judgements of a split, and the split's name: another one only where a hub copy has no other."""
    inside = folder / "qrels"
    names = [inside / f"{split}{ending}" for ending in (".tsv", ".txt", ".trec", ".qrels", ".jsonl")]
    names += [folder / f"qrels.{split}{ending}" for ending in (".tsv", ".txt", ".small.tsv")]
    names += [folder / f"qrels{ending}" for ending in (".tsv", ".txt")]
    for name in names:
        for packed in PACKED:
            if (file := name.with_name(name.name + packed)).is_file():
                return file, split
    shards = parquet_splits(inside)
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


def qrels_files(folder: Path) -> dict[str, Path]:
    """The files of judgements by split; one that stands for every split is the test split's."""
    found: dict[str, Path] = {}
    splits = ("train", "dev", "test")
    for split in reversed(splits):
        try:
            path, used = qrels_file(folder, split)
        except FormatError:
            continue
        if path not in found.values():
            found[used] = path
    return {split: found[split] for split in splits if split in found}
