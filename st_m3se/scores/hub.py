"""Stores as dataset repositories of the Hugging Face Hub, and published sets as stores."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.files import cache_key, checked_json, digest, scratch_folder
from st_m3se.core.ids import short
from st_m3se.core.markdown import markdown
from st_m3se.core.records import UNREADABLE
from st_m3se.data.text_files import default_cache
from st_m3se.scores.convert import convert
from st_m3se.scores.shard import Shard
from st_m3se.scores.store import ScoredLists
from st_m3se.scores.writer import MANIFEST, MANIFEST_FIELDS, identity

__all__ = ["CARD", "LIBRARY", "open_repository", "save_for_hub"]

CARD = "README.md"
TEXTS = ("queries.jsonl", "corpus.jsonl", "qrels/*.tsv")
LIBRARY = "st-m3se"
CONVERTED = 2  # part of every converted set's name in the cache: raise it when readers change
NAME = re.compile(r"[\w./ +-]+")
TYPES = ("query_id_type", "document_id_type")


def save_for_hub(store: ScoredLists, folder: str | Path, *, repo_id: str, license: str | None = None) -> None:
    """Lay a store out as a dataset repository in a new folder: what :meth:`TeacherScores.push_to_hub` uploads.

    Shards become ``data/train-00000-of-00002.parquet`` and so on, by which the datasets library knows a split even
    without the card: hard links where the file system has them, and copies otherwise.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = Path(folder)
    if not len(store):
        raise ValueError("the store is empty; there is nothing to publish.")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty.")
    validate_repo_id(repo_id)
    with scratch_folder(folder / "store") as scratch:
        # A store as it was written has a list of its shards; a selection, or a set without a manifest, has none, and a
        # store of an older version lacks their checksums.
        facts_of = store.manifest.get("shards") or []
        as_written = bool(facts_of) and all("xxh3" in facts for facts in facts_of)
        whole = store if as_written else store.save(scratch / "store")
        whole.verify()
        whole.check_paths()
        manifest = {**whole.manifest, "shards": [], "files": []}
        (folder / "data").mkdir()
        for number, (file, facts) in enumerate(zip(whole.files, whole.manifest["shards"], strict=True)):
            name = f"data/train-{number:05d}-of-{len(whole.files):05d}.parquet"
            _link(file, folder / name)
            manifest["shards"].append({**facts, "file": name})
        home = whole.home
        texts = [path.relative_to(home) for pattern in TEXTS for path in sorted(home.glob(pattern))]
        known = {facts["file"]: facts for facts in whole.manifest.get("files") or ()}
        for path in texts:
            _check_text(home, path, known)
            _link(home / path, folder / path)
            manifest["files"].append({"file": path.as_posix(), **identity(folder / path)})
    (folder / MANIFEST).write_text(checked_json(manifest), encoding="utf-8")
    (folder / CARD).write_text(_card(manifest, texts, repo_id, license), encoding="utf-8")


def _check_text(home: Path, path: Path, known: Mapping[str, Any]) -> None:
    """Refuse to publish a file that only a link brings into the store, or that was changed since it was written."""
    facts = known.get(path.as_posix())
    if facts is not None and digest(home / path) != facts["xxh3"]:
        raise FormatError(
            "the file was changed since the store was written; it is not published.", file=str(home / path)
        )
    if facts is None and home.resolve() not in (home / path).resolve().parents:
        raise FormatError(
            f"this is a symbolic link to {(home / path).resolve()}, outside the store, and would be published with it. "
            "Put a copy of the file in its place, or remove the link.",
            file=str(home / path),
        )


def open_repository(
    repo_id: str,
    config_name: str | None,
    split: str,
    data_dir: str | None,
    revision: str | None,
    cache_dir: str | Path | None,
    token: bool | str | None,
) -> ScoredLists:
    """The store that a repository holds; see :meth:`TeacherScores.from_hub`."""

    def fetch(patterns: Sequence[str]) -> Path:
        if Path(repo_id).is_dir():
            return Path(repo_id)
        from huggingface_hub import snapshot_download

        options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
        return Path(
            snapshot_download(
                repo_id, repo_type="dataset", allow_patterns=list(patterns), library_name=LIBRARY, **options
            )
        )

    if config_name is not None and data_dir is not None:
        raise ValueError(f"config_name={config_name!r} and data_dir={data_dir!r} both say where the files are.")
    folder = fetch([CARD, MANIFEST])
    if config_name is None and data_dir is None and (folder / MANIFEST).is_file():
        return ScoredLists.open(fetch([CARD, MANIFEST, "data/*.parquet", "*.parquet", *TEXTS]))
    if data_dir is not None:
        patterns = [f"{data_dir.strip('/')}/*.parquet"]
    else:
        with errors_in(repo_id):
            patterns = _patterns(folder / CARD, config_name, split)
    folder = fetch(patterns)
    # By the rule that the download follows: * crosses folders.
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = [folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not files:
        raise FormatError(f"the repository has no file that matches {' or '.join(patterns)}.", file=repo_id)
    if others := [file for file in files if file.suffix != ".parquet"]:
        raise FormatError(
            f"the scores are in {others[0].name}, not in Parquet. Convert the file, which is here: "
            f"st-m3se convert {others[0]} OUT; or load the hub's own Parquet copy: "
            f'revision="refs/convert/parquet", data_dir="{config_name or "default"}/{split}".',
            file=repo_id,
        )
    manifest: dict[str, Any] = dict.fromkeys(MANIFEST_FIELDS)
    manifest["source"] = {
        "repository": repo_id if folder != Path(repo_id) else folder.resolve().name,
        "config_name": config_name,
        "data_dir": data_dir,
        "split": split,
        # The cache names a snapshot by its commit.
        "revision": folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision,
    }
    try:
        if all(_is_store(file) for file in files):
            store = ScoredLists([Shard(file) for file in files], manifest)
            if store.repeated_query() is None:
                return store
        return _converted(files, manifest, cache_dir)
    except FormatError as error:
        raise FormatError(error.message, file=repo_id) from None


def _is_store(file: Path) -> bool:
    """Whether the columns are those of a store, without positives beside them."""
    with errors_in(file, UNREADABLE, "this is not a readable Parquet file"):
        schema = pq.read_schema(file)
    types = {name: schema.field(name).type for name in schema.names}
    lists = all(pa.types.is_list(types.get(name, pa.null())) for name in ("document_ids", "scores"))
    return lists and "query_id" in types and "positive_ids" not in types


def _converted(files: Sequence[Path], manifest: dict[str, Any], cache_dir: str | Path | None) -> ScoredLists:
    """Files of another layout as a store in the cache, made once; positives and texts are kept beside the scores."""
    cache = default_cache("hub") if cache_dir is None else Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"scores-{cache_key([CONVERTED], files)}"
    with FileLock(cache / f"{target.name}.lock"):
        if (store := ScoredLists.open_cached(target)) is not None:
            return store
        with scratch_folder(target) as folder:
            for number, file in enumerate(files):
                _link(file, folder / f"part-{number:05}.parquet")
            convert(folder, target, manifest={"source": manifest["source"]}, overwrite=True)
    return ScoredLists.open(target)


def _patterns(card: Path, config_name: str | None, split: str) -> list[str]:
    """The files of a split of a configuration, as the YAML head of the dataset card names them."""
    configs = _configurations(card)
    if not configs:
        if config_name is not None:
            raise FormatError(
                f"the card of the repository names no configurations, so there is no {config_name!r}. Say where its "
                "Parquet files are with data_dir."
            )
        return ["*.parquet"]
    if config_name is None:
        defaults = [name for name, config in configs.items() if config.get("default") or name == "default"]
        config_name = next(iter(defaults or configs)) if defaults or len(configs) == 1 else None
    if config_name not in configs:
        raise FormatError(
            f"the repository has the configurations {sorted(configs)!r:.300}; "
            + ("choose the one with the scores: config_name=..." if config_name is None else f"not {config_name!r}.")
        )
    chosen = configs[config_name]
    prefix = f"{chosen['data_dir'].strip('/')}/" if chosen.get("data_dir") else ""
    entries = _listed(chosen.get("data_files") or "*.parquet")
    splits = {entry["split"]: entry["path"] for entry in entries if isinstance(entry, dict)}
    if splits and split not in splits:
        raise FormatError(f"{config_name!r} has the splits {sorted(splits)}, not {split!r}.")
    # `**/` is any folders, or none; a `*` of the download's patterns is that already.
    return [prefix + path.replace("**/", "*") for path in (_listed(splits[split]) if splits else entries)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _configurations(card: Path) -> dict[str, dict[str, Any]]:
    """The configurations that the card of a repository names, each with the texts that say where its files are.

    Raises:
        FormatError: If its YAML is damaged, or says something else.
    """
    import yaml
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return {}
    try:
        data = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict()
        configs = {config.get("config_name", "default"): dict(config) for config in data.get("configs") or []}
        for name, config in configs.items():
            entries = _listed(config.get("data_files") or [])
            named = [(entry["split"], entry["path"]) if isinstance(entry, dict) else ("", entry) for entry in entries]
            texts = [name, config.get("data_dir") or "", *(split for split, _ in named)]
            texts += [text for _, path in named for text in _listed(path)]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"the configuration {short(name)} with {short(entries)}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise FormatError(
            f"the card of the repository does not say where its files are: {error!r:.200}. Say it yourself: "
            "data_dir=..., the folder of the Parquet files."
        ) from None
    return configs


def _card(manifest: dict[str, Any], texts: Sequence[Path], repo_id: str, license: str | None) -> str:
    """The dataset card: YAML for the hub and the datasets library, and what the manifest says for people."""
    from huggingface_hub import DatasetCardData

    # The texts get no configurations: the datasets library reads all of a repository as one format.
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    data = DatasetCardData(
        license=license,
        task_categories=["text-ranking"],
        tags=["knowledge-distillation", "teacher-scores", "sentence-transformers", LIBRARY],
        configs=configs,
    )
    facts = {field: manifest[field] for field in MANIFEST_FIELDS if manifest.get(field) is not None}
    facts = {"queries": f"{manifest['queries']:,}", "scores": f"{manifest['scores']:,}", **facts}
    rows = [
        f"| {name.replace('_', ' ')} | "
        f"{markdown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))} |"
        for name, value in facts.items()
    ]
    types = {name: manifest[name] if manifest[name] in ("str", "int") else "unknown" for name in TYPES}
    meaning = (
        "Only the differences between a query's scores mean anything; they have no common zero."
        if manifest.get("scale") == "margin"
        else "Higher is more relevant."
    )
    named = ", ".join(f"`{name}`" if NAME.fullmatch(name) else markdown(name) for name in map(Path.as_posix, texts))
    beside = f"\n\nBeside them, in the layout of BEIR: {named}." if texts else ""
    return f"""---
{data.to_yaml()}
---

# {markdown(repo_id.split("/")[-1])}

The scores that a teacher gave to each query's candidate documents, for distillation into a smaller model. Each row is a
query: `query_id` ({types["query_id_type"]}), `document_ids` (list of {types["document_id_type"]}) and `scores`
(list of float32), as many. {meaning}{beside}

| | |
|---|---|
{chr(10).join(rows)}

```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}", split="train")
```

```python
from st_m3se.scores import TeacherScores  # pip install st-m3se

scores = TeacherScores.from_hub("{repo_id}")
```
"""


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # the hub's cache holds links to its files
    except OSError:
        shutil.copyfile(source, target)
