from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from damage import damaged

from st_m3se.core import files
from st_m3se.core.files import (
    atomic_file,
    checked_json,
    damage,
    place_folder,
    read_checked_json,
    replace_folder,
    scratch_folder,
    seal,
    sweep,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from st_m3se.core.files import atomic_file, scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def start(path: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a scratch folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    path = tmp_path / "store"
    process, folder = start(path)
    other = tmp_path / ".other.abc.tmp"
    other.mkdir()
    try:
        with atomic_file(path) as temporary:
            temporary.write_text("whole")
        assert (folder / "half").exists()
    finally:
        process.kill()
        process.wait()
    assert folder.exists()
    sweep(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [other.name, "store"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "store"
    for turn in range(3):
        with scratch_folder(path) as scratch:
            new = scratch / "store"
            new.mkdir()
            (new / "content").write_text(str(turn))
            if not place_folder(new, path):
                replace_folder(new, path)
        assert (path / "content").read_text() == str(turn)
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_a_kill_between_two_renames_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged the old folder is away for a moment; it must not be lost."""
    scratch = tmp_path / ".store.abc.tmp"
    (scratch / "replaced").mkdir(parents=True)
    (scratch / "replaced" / "content").write_text("old")
    sweep(tmp_path / "store")
    assert (tmp_path / "store" / "content").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("exchange", [True, False])
def test_many_replace_one_folder(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All succeed, whoever looks sees a whole folder wherever names can be exchanged, and nothing is left."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "store"
    errors: list[BaseException] = []
    seen: list[bool] = []
    done = threading.Event()

    def write(number: int) -> None:
        try:
            for _ in range(10):
                with scratch_folder(path) as scratch:
                    new = scratch / "store"
                    new.mkdir()
                    (new / "content").write_text(str(number))
                    if not place_folder(new, path):
                        replace_folder(new, path)
        except BaseException as error:
            errors.append(error)

    def look() -> None:
        while not done.is_set():
            seen.append((path / "content").exists())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    with scratch_folder(path) as scratch:
        (scratch / "store").mkdir()
        (scratch / "store" / "content").write_text("first")
        assert place_folder(scratch / "store", path)
    looking = threading.Thread(target=look)
    for thread in [looking, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    looking.join()
    assert errors == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]
    if exchange and sys.platform == "linux":
        assert all(seen)


def test_a_file_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"

    def write() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("mine")
            path.write_text("another's")

    with pytest.raises(FileExistsError, match=r"run\.trec exists"):
        write()
    assert path.read_text() == "another's"
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text("mine")
    assert path.read_text() == "mine"
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.trec"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_seal_shows_any_damage(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 8)
    seal(path, "here")
    assert damage(path, "here") is None
    assert damage(path, "there") is not None, "as good a file from elsewhere is another one"
    for content in [*damaged(path.read_bytes(), 200), b"", path.read_bytes() + b"\0"]:
        path.write_bytes(content)
        assert damage(path, "here") is not None
    assert "cannot be read" in str(damage(tmp_path / "missing", "here"))


def test_checked_json_shows_any_damage(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    content = {"name": "Übung \U0001f600", "numbers": [1, 2.5, None], "seven": {7: (True, "x")}}
    path.write_text(checked_json(content), encoding="utf-8")
    assert read_checked_json(path) == {**content, "seven": {"7": [True, "x"]}}
    whole = path.read_bytes()
    for changed in damaged(whole, 200):
        path.write_bytes(changed)
        try:
            assert read_checked_json(path) == {**content, "seven": {"7": [True, "x"]}}, "but for white space"
        except ValueError:
            continue
    for text in ("[1]", "{}", "[" * 100_000, '{"name": 1, "checksum": null}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"no JSON|should be a JSON object|has no checksum"):
            read_checked_json(path)
