"""Downloads from a real server on this machine, through beir's own function."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from st_m3se.core.errors import FormatError
from st_m3se.data import download
from st_m3se.data.download import BEIR_SETS, BEIR_URL, download_set
from st_m3se.evaluation import open_set

pytest.importorskip("beir.util", reason='downloads need pip install -e ".[test]"')

CORPUS = '{"_id": "d1", "title": "One", "text": "first"}\n{"_id": "d2", "title": "", "text": "second"}\n'
QUERIES = '{"_id": "q1", "text": "which"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td2\t1\n"


def archive(*folders: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for folder in folders:
            file.writestr(f"{folder}/corpus.jsonl", CORPUS)
            file.writestr(f"{folder}/queries.jsonl", QUERIES)
            file.writestr(f"{folder}/qrels/test.tsv", QRELS)
    return packed.getvalue()


class Server:
    """Serves a folder, counts the requests, and may cut its answers short."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.cut = folder, 0, False
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                path = folder / self.path.lstrip("/")
                if outer.cut and path.is_file():
                    content = path.read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                else:
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}/{{}}.zip"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.close()


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """Put an archive on the server, with its MD5 as the published one."""

    def put(name: str, content: bytes) -> None:
        (server.folder / f"{name}.zip").write_bytes(content)
        monkeypatch.setitem(BEIR_SETS, name, hashlib.md5(content).hexdigest())

    monkeypatch.setattr(download, "BEIR_URL", server.url)
    return put


def nothing_is_left(cache: Path, name: str) -> bool:
    return {path.name for path in cache.iterdir()} <= {f".{name}.lock"}


def test_a_set_is_downloaded_once(tmp_path: Path, server: Server, publish: Callable[[str, bytes], None]) -> None:
    content = archive("scifact")
    publish("scifact", content)
    cache = tmp_path / "cache"
    folder = download_set("scifact", cache, url=server.url)
    assert folder == cache / "scifact"
    assert (folder / "corpus.jsonl").read_text() == CORPUS
    assert (folder / "qrels" / "test.tsv").read_text() == QRELS
    record = json.loads((cache / "scifact.json").read_text())
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["files"]["queries.jsonl"] == hashlib.sha256(QUERIES.encode()).hexdigest()
    assert record["url"] == server.url.format("scifact")
    assert download_set("scifact", cache, url=server.url) == folder
    assert server.requests == 1
    assert {path.name for path in cache.iterdir()} == {"scifact", "scifact.json", ".scifact.lock"}


def test_a_set_opens_by_its_name(
    tmp_path: Path, server: Server, publish: Callable[[str, bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("scifact", archive("scifact"))
    monkeypatch.setattr("st_m3se.data.collection.download_set", functools.partial(download_set, url=server.url))
    opened = open_set("scifact", cache_dir=tmp_path / "cache")
    assert opened.name == "scifact"
    assert opened.qrels == {"q1": {"d2": 1}}
    assert dict(opened.corpus or {}) == {"d1": "One first", "d2": "second"}


def test_a_part_of_cqadupstack(tmp_path: Path, server: Server, publish: Callable[[str, bytes], None]) -> None:
    """Prevents the archive of twelve sets from passing for one."""
    publish("cqadupstack", archive("cqadupstack/android", "cqadupstack/english"))
    cache = tmp_path / "cache"
    assert download_set("cqadupstack/english", cache, url=server.url) == cache / "cqadupstack" / "english"
    assert download_set("cqadupstack/android", cache, url=server.url) == cache / "cqadupstack" / "android"
    assert server.requests == 1
    with pytest.raises(FormatError, match="It consists of parts: cqadupstack/android, cqadupstack/english"):
        download_set("cqadupstack", cache, url=server.url)
    (cache / "cqadupstack" / "english" / "corpus.jsonl").write_text(CORPUS + CORPUS)
    download_set("cqadupstack/android", cache, url=server.url)
    with pytest.raises(FormatError, match="was changed since it was downloaded"):
        download_set("cqadupstack/english", cache, url=server.url)


def test_another_archive_than_the_published_one_is_refused(
    tmp_path: Path, server: Server, publish: Callable[[str, bytes], None]
) -> None:
    """Prevents numbers on a set that is not the one of the papers."""
    publish("scifact", archive("scifact"))
    (server.folder / "scifact.zip").write_bytes(archive("scifact", "more"))
    cache = tmp_path / "cache"
    with pytest.raises(FormatError, match=r"has the MD5 \w{32}, and the published one has \w{32}"):
        download_set("scifact", cache, url=server.url)
    assert nothing_is_left(cache, "scifact")


def test_an_error_page_is_not_an_archive(tmp_path: Path, server: Server, publish: Callable[[str, bytes], None]) -> None:
    """beir saves whatever the server says: a 404 page would stay in the cache as the archive."""
    cache = tmp_path / "cache"
    with pytest.raises(FormatError, match=r"is not a zip archive.*by hand"):
        download_set("nfcorpus", cache, url=server.url)
    assert nothing_is_left(cache, "nfcorpus")
    publish("nfcorpus", archive("nfcorpus"))
    assert download_set("nfcorpus", cache, url=server.url).is_dir()


def test_half_a_download_is_no_set(tmp_path: Path, server: Server, publish: Callable[[str, bytes], None]) -> None:
    publish("scifact", archive("scifact"))
    cache = tmp_path / "cache"
    server.cut = True
    with pytest.raises((ConnectionError, FormatError), match="by hand"):
        download_set("scifact", cache, url=server.url)
    assert nothing_is_left(cache, "scifact")
    server.cut = False
    assert download_set("scifact", cache, url=server.url).is_dir()


def test_no_server_is_a_connection_error(tmp_path: Path, server: Server) -> None:
    server.close()
    with pytest.raises(ConnectionError, match=r"cannot be downloaded.*by hand, and give the folder instead"):
        download_set("scifact", tmp_path / "cache", url=server.url)


def test_what_changed_in_the_cache_is_noticed(
    tmp_path: Path, server: Server, publish: Callable[[str, bytes], None]
) -> None:
    publish("scifact", archive("scifact"))
    cache = tmp_path / "cache"
    folder = download_set("scifact", cache, url=server.url)
    (folder / "qrels" / "test.tsv").write_text(QRELS.replace("d2", "d1"))  # of the same size
    with pytest.raises(FormatError, match=r"test\.tsv: the file was changed.*scifact\.json.*downloaded again"):
        download_set("scifact", cache, url=server.url)
    (cache / "scifact.json").unlink()
    with pytest.raises(FormatError, match=r"no scifact\.json with its checksums"):
        download_set("scifact", cache, url=server.url)


def test_unknown_names_say_what_there_is(tmp_path: Path) -> None:
    for function in (download_set, open_set):
        with pytest.raises(ValueError, match=r"scifake.*trec-covid, nfcorpus"):
            function("scifake", cache_dir=tmp_path)


def test_the_published_checksums_are_those_of_beirs_readme() -> None:
    """The wheel of beir carries its README, with a table of the archives and their MD5."""
    from importlib import metadata

    readme = metadata.metadata("beir").get_payload() or metadata.metadata("beir")["Description"]
    if "md5" not in str(readme):
        pytest.skip("this version of beir has no table of checksums")
    for name, checksum in BEIR_SETS.items():
        (line,) = [line for line in str(readme).splitlines() if f"``{name}``" in line and ".zip" in line]
        assert checksum in line
        assert BEIR_URL.format(name) in line


def test_a_missing_beir_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['beir'] = None\n"
        "from st_m3se.data.download import download_set\n"
        f"download_set('scifact', {str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "st-m3se[eval]"' in done.stderr
