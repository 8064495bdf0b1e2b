"""BEIR sets by name: downloaded through beir, checked, and kept."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from filelock import FileLock

from st_m3se.core.errors import FormatError
from st_m3se.core.extras import require
from st_m3se.core.files import read_checked_json, scratch_folder, write_checked_json
from st_m3se.data.text_files import default_cache

__all__ = ["BEIR_SETS", "BEIR_URL", "download_set"]

BEIR_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/{}.zip"

BEIR_SETS = {
    "msmarco": "444067daf65d982533ea17ebd59501e4",
    "trec-covid": "ce62140cb23feb9becf6270d0d1fe6d1",
    "nfcorpus": "a89dba18a62ef92f7d323ec890a0d38d",
    "nq": "d4d3d2e48787a744b6f6e691ff534307",
    "hotpotqa": "f412724f78b0d91183a0e86805e16114",
    "fiqa": "17918ed23cd04fb15047f73e6c3bd9d9",
    "arguana": "8ad3e3c2a5867cdced806d6503f29b99",
    "webis-touche2020": "46f650ba5a527fc69e0a6521c5a23563",
    "cqadupstack": "4e41456d7df8ee7760a7f866133bda78",
    "quora": "18fb154900ba42a600f84b839c173167",
    "dbpedia-entity": "c2a39eb420a3164af735795df012ac2c",
    "scidocs": "38121350fc3a4d2f48850f6aff52e4a9",
    "fever": "5a818580227bfb4b35bb6fa46d9b6c03",
    "climate-fever": "8b66f0a9126c521bae2bde127b4dc99d",
    "scifact": "5f7d1de60b170fc8027bb7898e2efca1",
}
"""The public sets, and the MD5 of each archive as beir 2.2.0's README gives it."""

CHUNK = 1 << 20


def download_set(name: str, cache_dir: str | Path | None = None, *, url: str = BEIR_URL) -> Path:
    """The folder of a BEIR set, downloaded unless it is there already.

    beir's own functions fetch and unpack the archive, in a temporary folder; between the two it is checked against the
    published MD5, since they would take half a download, or the page of a server's error, for the set. The SHA-256 of
    every file is kept in ``NAME.json`` beside the folder, and checked on each later call.

    Args:
        name: One of :data:`BEIR_SETS`; a part of CQADupStack is "cqadupstack/android". BEIR's other four sets are not
            public: build their folders by beir's instructions.
        cache_dir: Where to keep it. None is in the cache of the datasets library.
        url: Where archives are, with ``{}`` for the name: of a mirror, for instance.

    Raises:
        ValueError: If there is no such set.
        FormatError: If what came is not the published archive, or a file changed since.
        ConnectionError: If it cannot be downloaded.
    """
    archive, _, part = name.partition("/")
    if archive not in BEIR_SETS:
        raise ValueError(f"there is no BEIR set {name!r} to download; there are {', '.join(BEIR_SETS)}.")
    cache = default_cache("evaluation") if cache_dir is None else Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    folder, record = cache / archive, cache / f"{archive}.json"
    with FileLock(cache / f".{archive}.lock"):
        fresh = not folder.is_dir()
        if fresh:
            _fetch(archive, url.format(archive), folder, record)
    found = folder / part
    if not (found / "corpus.jsonl").is_file():
        parts = sorted(file.parent.name for file in folder.glob("*/corpus.jsonl"))
        raise FormatError(
            f"{name} has no corpus.jsonl."
            + (f" It consists of parts: {', '.join(f'{archive}/{one}' for one in parts)}." if parts else ""),
            file=str(found),
        )
    if not fresh:
        _verify(folder, record, part)
    return found


def _fetch(archive: str, url: str, folder: Path, record: Path) -> None:
    util = require("beir.util", "eval")
    requests = require("requests", "eval")
    by_hand = f"Download and unzip {url} by hand, and give the folder instead of the name."
    with scratch_folder(folder) as temporary:
        packed, unzipped = temporary / f"{archive}.zip", temporary / archive
        try:
            util.download_url(url, str(packed))
        except requests.RequestException as error:
            raise ConnectionError(f"{url} cannot be downloaded: {error}. {by_hand}") from error
        if not is_zipfile(packed):
            raise FormatError(f"what {url} gave is not a zip archive. {by_hand}")
        md5 = _digest(packed, "md5")
        if md5 != BEIR_SETS[archive]:
            raise FormatError(
                f"the archive from {url} has the MD5 {md5}, and the published one has {BEIR_SETS[archive]}: it is "
                "damaged, or another version. To use it nevertheless, unzip it yourself and give its folder."
            )
        util.unzip(str(packed), str(temporary))  # only what is known: an archive may unpack to anything
        if not unzipped.is_dir():
            raise FormatError(f"the archive from {url} has no folder {archive}.")
        files = sorted(file for file in unzipped.rglob("*") if file.is_file())
        content: dict[str, Any] = {
            "url": url,
            "downloaded": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "md5": md5,
            "sha256": _digest(packed, "sha256"),
            "files": {file.relative_to(unzipped).as_posix(): _digest(file, "sha256") for file in files},
        }
        write_checked_json(record, content)  # first, so that no folder is without its record
        unzipped.rename(folder)


def _verify(folder: Path, record: Path, part: str) -> None:
    remedy = f"Remove {folder} and {record.name} beside it, and it is downloaded again; or give the folder by its path."
    if not record.is_file():
        raise FormatError(
            f"there is a folder of this name, and no {record.name} with its checksums. {remedy}", file=str(folder)
        )
    try:
        files = dict(read_checked_json(record, required=False)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"the checksums are damaged ({error!r:.100}). {remedy}", file=str(record)) from None
    for name, expected in files.items():
        if part and not name.startswith(f"{part}/"):
            continue
        file = folder / name
        if not file.is_file() or _digest(file, "sha256") != expected:
            raise FormatError(f"the file was changed since it was downloaded. {remedy}", file=str(file))


def _digest(file: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
