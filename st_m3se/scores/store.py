"""Scored lists on disk: one row per query, looked up without loading."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from st_m3se.core.errors import FormatError
from st_m3se.core.files import digest, read_checked_json, sweep
from st_m3se.core.ids import Id, SortedIds
from st_m3se.core.ragged import offsets
from st_m3se.core.scored_list import ScoredList
from st_m3se.scores.shard import COLUMNS, Shard, check_complete, problems
from st_m3se.scores.writer import MANIFEST, MANIFEST_FIELDS, SHARD_NAME, UNFINISHED, VERSION, TeacherScoresWriter

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

__all__ = ["ScoredLists"]

logger = logging.getLogger(__name__)

REPLACED_MEANWHILE = 100  # times that opening begins again, because another process replaced the store


class ScoredLists:
    """Each query's documents with a score of each, whoever gave it: what is said of all stores.

    People use :class:`~st_m3se.scores.TeacherScores`, which is this with ways to describe and to publish it.
    """

    def __init__(self, shards: Sequence[Shard], manifest: Mapping[str, Any], rows: np.ndarray | None = None) -> None:
        self._shards, self.manifest = tuple(shards), dict(manifest)
        for name, *kinds in zip(("query", "document"), *(shard.id_types for shard in shards), strict=True):
            if len(set(kinds)) > 1:
                raise FormatError(
                    f"the {name} ids are strings in one part and integers in another: they would never match."
                )
        self._groups = [(shard, group) for shard in self._shards for group in range(len(shard.starts) - 1)]
        self._starts = offsets([shard.starts[group + 1] - shard.starts[group] for shard, group in self._groups])
        self._rows = rows  # which rows of the shards, in which order; None is all of them
        self._index: SortedIds | None = None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store: a folder with a manifest, a folder of Parquet files, or one Parquet file.

        Raises:
            FormatError: If it is none of these, comes from a later version, or a shard is missing or damaged.
        """
        path = Path(path)
        for attempt in range(REPLACED_MEANWHILE):
            before = _stamp(path / MANIFEST)
            try:
                store = cls._open(path)
            except FormatError:
                if _stamp(path / MANIFEST) == before or attempt + 1 == REPLACED_MEANWHILE:
                    raise
            else:
                if _stamp(path / MANIFEST) == before:
                    return store
        raise FormatError("other processes replace the store over and over. Try again.", file=str(path))

    @classmethod
    def open_cached(cls, path: Path) -> Self | None:
        """Open a store that a cache keeps, if it is there and undamaged, which a warning says if it is not.

        Where None comes back, a writer with ``overwrite=True`` can make it anew.
        """
        sweep(path)
        if not path.exists():
            return None
        try:
            if not (path / MANIFEST).is_file():
                raise FormatError("it has no manifest.")
            store = cls.open(path)
            store.verify()
        except FormatError as error:
            logger.warning(f"{path}, scores in the cache, is damaged: {error} It is made anew.")
            if not (path / MANIFEST).is_file():  # which the writer, rightly, would not replace
                shutil.rmtree(path, ignore_errors=True)
            return None
        return store

    @classmethod
    def _open(cls, path: Path) -> Self:
        manifest: dict[str, Any] = dict.fromkeys(MANIFEST_FIELDS)
        if (path / MANIFEST).is_file():
            manifest = _read_manifest(path / MANIFEST)
            shards = [Shard(path / facts["file"], facts) for facts in manifest["shards"]]
            store = cls(shards, manifest)
            _compare(store, shards, path / MANIFEST)
            return store
        if (path / UNFINISHED).is_file():
            raise FormatError(
                "scoring into this store is not finished. Run the same command again: it goes on where it ended.",
                file=str(path),
            )
        if path.is_dir():
            files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
            if not files:
                raise FormatError(f"the folder has neither a {MANIFEST} nor Parquet files.", file=str(path))
            if files[0].name == SHARD_NAME.format(0):
                logger.warning(
                    f"{path} looks like a store that has lost its {MANIFEST}: whether its shards are all there, and "
                    "undamaged, is not known."
                )
        elif path.is_file():
            files = [path]
        else:
            raise FormatError("there is no such file or folder.", file=str(path))
        return cls([Shard(file) for file in files], manifest)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[tuple[Id, Sequence[Id], Any]] | Iterable[ScoredList],
        path: str | Path,
        *,
        manifest: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Write rows of (query_id, document_ids, scores) to ``path``, streaming, and open the result."""
        with TeacherScoresWriter(path, manifest=manifest, overwrite=overwrite) as writer:
            for row in rows:
                writer.write(row[0], row[1], row[2])
        return cls.open(path)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Self:
        """Write these rows, of a selection or concatenation for instance, as a store of their own, and open it."""
        return type(self).from_rows(self, path, manifest=self._facts(), overwrite=overwrite)

    def _facts(self) -> dict[str, Any]:
        """What the manifest says of the scores, without counts."""
        return {field: self.manifest.get(field) for field in MANIFEST_FIELDS}

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        return f"ScoredLists({len(self)} queries, teacher={self.manifest.get('teacher')!r})"

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order as Arrow tables, one for each stretch that is decoded together."""
        if self._rows is None:
            for shard, group in self._groups:
                yield shard.table(group)
            return
        groups, start = np.searchsorted(self._starts, self._rows, side="right") - 1, 0
        for stop in [*(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]:
            if start < stop:
                shard, group = self._groups[groups[start]]
                yield shard.table(group).take(pa.array(self._rows[start:stop] - self._starts[groups[start]]))
            start = stop

    def __iter__(self) -> Iterator[ScoredList]:
        for table in self.tables():
            check_complete(table)
            columns = (table.column(name).to_pylist() for name in COLUMNS)
            for query_id, documents, scores in zip(*columns, strict=True):
                yield ScoredList(query_id, documents, scores)

    def __getitem__(self, query_id: Id) -> ScoredList:
        """The list of one query.

        Raises:
            KeyError: If the store has no such query; "7" and 7 are two.
        """
        row = self._sorted().find(query_id)
        if row is None:
            raise KeyError(query_id)
        row = row if self._rows is None else int(self._rows[row])
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        shard, group = self._groups[place]
        return shard.row(group, row - int(self._starts[place]))

    def __contains__(self, query_id: object) -> bool:
        return self._sorted().find(query_id) is not None

    @property
    def files(self) -> list[Path]:
        """The Parquet files that hold the rows."""
        return [shard.path for shard in self._shards]

    @property
    def home(self) -> Path:
        """The folder with the manifest, the texts and judgements."""
        folder = self._shards[0].path.parent if self._shards else Path()
        return folder.parent if folder.name == "data" and not (folder / MANIFEST).is_file() else folder

    @property
    def id_types(self) -> tuple[type, type]:
        """The types of the query ids and of the document ids: str or int."""
        query, document = (int if pa.types.is_integer(kind) else str for kind in self._types())
        return query, document

    def _types(self) -> tuple[pa.DataType, pa.DataType]:
        return self._shards[0].id_types if self._shards else (pa.int64(), pa.int64())

    def query_ids(self) -> pa.ChunkedArray:
        """The query ids in order, as Arrow holds them."""
        ids = pa.chunked_array(
            [chunk for shard in self._shards for chunk in shard.query_ids().chunks], self._types()[0]
        )
        return ids if self._rows is None else ids.take(pa.array(self._rows))

    def select(self, query_ids: Iterable[Id]) -> Self:
        """The store of these queries in this order; nothing is copied.

        Raises:
            KeyError: If one is not in the store.
        """
        wanted = list(query_ids)
        rows = self._sorted().find_all(wanted)
        if len(absent := np.flatnonzero(rows < 0)):
            raise KeyError(wanted[absent[0]])
        return type(self)(self._shards, self._facts(), rows if self._rows is None else self._rows[rows])

    @classmethod
    def concatenate(cls, stores: Sequence[ScoredLists]) -> Self:
        """One store of the queries of several; nothing is copied. What their manifests do not agree on is None.

        Raises:
            FormatError: If their ids are of different types, or a query is in two of them.
        """
        if not stores:
            raise ValueError("concatenate needs at least one store.")
        shards = [shard for store in stores for shard in store._shards]
        before = offsets([store._starts[-1] for store in stores])
        rows = [
            (np.arange(len(store)) if store._rows is None else store._rows) + start
            for store, start in zip(stores, before[:-1], strict=True)
        ]
        facts = [store._facts() for store in stores]
        agreed = {
            field: value if all(each[field] == value for each in facts) else None for field, value in facts[0].items()
        }
        joined = cls(shards, agreed, np.concatenate(rows))
        if (twice := joined.repeated_query()) is not None:
            raise FormatError(f"query {twice!r:.80} is in two of the stores. Select from one of them first.")
        return joined

    def verify(self) -> None:
        """Read all shards once, without decoding a row; FormatError if one is not what its checksum says."""
        for shard in self._shards:
            shard.verify()

    def check_paths(self) -> None:
        """FormatError if the store was replaced since it was opened, for those who read its :attr:`files`."""
        for shard in self._shards:
            shard.check_path()

    def validate(self) -> None:
        """Read everything once and check it: the checksums of all files, and each row.

        Raises:
            FormatError: Naming a file that was changed; or the first ten of what is wrong with the rows.
        """
        self.verify()
        for facts in self.manifest.get("files") or ():
            path = self.home / facts["file"]
            if not path.is_file() or digest(path) != facts["xxh3"]:
                raise FormatError(
                    "the file was changed, or removed, since the store was written. Restore it from a copy.",
                    file=str(path),
                )
        twice = self.repeated_query()
        found = [] if twice is None else [f"query {twice!r:.80} has two rows"]
        for table in self.tables():
            found += problems(table)
            if len(found) >= 10:
                break
        if found:
            raise FormatError(f"the store is not valid: {'; '.join(found[:10])}.")

    def to_dataset(self) -> Dataset:
        """A ``datasets.Dataset`` of these rows, which Arrow maps into memory from the datasets library's cache."""
        from datasets import Dataset

        if self._rows is None and self._shards:
            self.verify()
            self.check_paths()
            dataset = Dataset.from_parquet([str(shard.path) for shard in self._shards])
            return dataset.select_columns(COLUMNS)
        tables = list(self.tables())
        return Dataset(pa.concat_tables(tables)) if tables else Dataset.from_dict({name: [] for name in COLUMNS})

    def _sorted(self) -> SortedIds:
        if self._index is None:
            ids = self.query_ids()
            if ids.null_count:
                raise FormatError(f"the store is not valid: {ids.null_count} rows have no query id.")
            self._index = SortedIds(ids)
        return self._index

    def repeated_query(self) -> Id | None:
        """A query that has two rows, if there is one."""
        twice = self._sorted().first_duplicate()
        return None if twice is None else twice[0]


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when another file takes the name."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        version = json.loads(path.read_text(encoding="utf-8"))["version"]
        if type(version) is int and version > VERSION:
            raise FormatError(
                f"the store has version {version}, which a newer st-m3se wrote: this one reads up to version "
                f"{VERSION}. Update st-m3se.",
                file=str(path),
            )
        if version not in (1, VERSION) or type(version) is not int:
            raise ValueError(f"no st-m3se wrote a store of version {version!r:.80}")
        manifest = read_checked_json(path, required=version > 1)
        _check_shards(manifest["shards"], checksums=version > 1)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"this is not the manifest of a store, or it was changed after it was written: {error!r:.200}. Restore it "
            "from a copy. Without it the shards open as well, as they are: whether they are all, and undamaged, is "
            "then not known.",
            file=str(path),
        ) from None
    if version == 1:
        logger.warning(
            f"{path.parent} was written by an older version and has no checksums, so damage would go unnoticed. A copy "
            f"has them: st-m3se convert {path.parent} NEW"
        )
    return manifest


def _check_shards(shards: list[dict[str, Any]], *, checksums: bool) -> None:
    fields: dict[str, type] = {"file": str, "queries": int}
    fields |= {"scores": int, "bytes": int, "xxh3": str} if checksums else {}
    for facts in shards:
        if wrong := [name for name, kind in fields.items() if not isinstance(facts[name], kind)]:
            raise ValueError(f"a shard without its {', '.join(wrong)}")
        name = Path(facts["file"]).name
        if facts["file"] not in (name, f"data/{name}"):  # data/ as on the hub
            raise ValueError("a shard outside the folder")


def _compare(store: ScoredLists, shards: Sequence[Shard], path: Path) -> None:
    """Refuse shards that are not those of the manifest, as far as can be seen without reading them."""
    found: dict[str, Any] = {"queries": len(store)}
    if all("scores" in shard.facts for shard in shards):
        found["scores"] = sum(shard.facts["scores"] for shard in shards)
    if shards:
        found |= zip(("query_id_type", "document_id_type"), (kind.__name__ for kind in store.id_types), strict=True)
    for name, value in found.items():
        if store.manifest.get(name, value) not in (value, None if isinstance(value, str) else value):
            raise FormatError(
                f"the {name} of the shards is {value} and the manifest says {store.manifest[name]}: one is missing, "
                "was changed after it was written, or belongs to another store.",
                file=str(path),
            )
