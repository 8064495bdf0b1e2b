"""Processes that are killed while they score, and processes that score together."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from retrieval import scoring_process
from st_m3se.core.errors import FormatError
from st_m3se.scores import TeacherScores

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks the processes that it kills")

KILLS = 32


class Server:
    """The process that forks those that score."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(scoring_process.__file__).parents[1]), *sys.path])
        self._process = subprocess.Popen(
            [sys.executable, scoring_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, folder: Path, **options: Any) -> int:
        return self._ask(json.dumps({"folder": str(folder), **options}))

    def wait(self, pid: int) -> int:
        return self._ask(f"wait {pid}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "store"
    scoring_process.run(folder)
    return folder


def assert_same(folder: Path, unbroken: Path) -> None:
    """The finished store is the one of the unbroken run, file by file, and nothing else is left in the folder."""
    store = TeacherScores.open(folder)
    store.validate()
    for row in store:
        texts = [
            (scoring_process.queries[str(row.query_id)], scoring_process.corpus[int(document)])
            for document in row.document_ids
        ]
        assert list(row.document_ids) == scoring_process.candidates[str(row.query_id)]
        assert list(row.scores) == pytest.approx([scoring_process.stub_score(pair) for pair in texts])
    assert [row.query_id for row in store] == list(scoring_process.queries)
    names = sorted(path.name for path in unbroken.iterdir())
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == names
    for name in names:
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name


def done(folder: Path) -> set[int]:
    return {int(path.stem) for path in (folder / "parts").glob("*.parquet")}


def log(folder: Path) -> list[int]:
    path = folder.parent / f"{folder.name}.log"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.slow
def test_thirty_two_kills_at_random_moments(tmp_path: Path, server: Server, unbroken: Path) -> None:
    """Prevents the loss of days: what stands on the disk is never scored again, and never wrong or doubled."""
    rng = random.Random(0)
    started = time.monotonic()
    assert server.wait(server.start(tmp_path / "timed", sleep=0.01)) == 0
    usual = time.monotonic() - started
    folder, kills, finished = tmp_path / "0", 0, 0
    unfinished = 0
    while kills < KILLS:
        before, lines = done(folder), len(log(folder))
        pid = server.start(folder, sleep=0.01)
        time.sleep(rng.uniform(0.0, 0.4 * usual))
        os.kill(pid, signal.SIGKILL)
        code = server.wait(pid)
        assert not before & set(log(folder)[lines:]), "a shard was scored that was on the disk already"
        if code == 0:  # it was faster
            assert_same(folder, unbroken)
            finished += 1
            folder = tmp_path / str(finished)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        if folder.exists() and not (folder / "manifest.json").exists():
            unfinished += 1
            with pytest.raises(FormatError, match=r"not finished|neither a manifest"):
                TeacherScores.open(folder)
        elif folder.exists():
            TeacherScores.open(folder).validate()
    assert server.wait(server.start(folder)) == 0
    assert_same(folder, unbroken)
    assert unfinished >= KILLS // 2, "the kills came too early or too late to say anything"
    scored = Counter(log(folder))
    assert sum(scored.values()) - len(scored) <= 3 * kills  # being scored, and being prepared or saved


@pytest.mark.slow
def test_a_kill_at_each_file_event(tmp_path: Path, server: Server) -> None:
    """Moments that random kills hardly meet: between a rename and the next, in the middle of joining the parts."""
    unbroken = tmp_path / "unbroken"
    scoring_process.run(unbroken, shard=20)
    event, code = 0, -signal.SIGKILL
    while code != 0:
        event += 1
        folder = tmp_path / str(event)
        code = server.wait(server.start(folder, shard=20, events=event))
        assert code in (0, -signal.SIGKILL)
        before, lines = done(folder), len(log(folder))
        assert server.wait(server.start(folder, shard=20)) == 0
        assert not before & set(log(folder)[lines:])
        assert_same(folder, unbroken)
    assert event > 50


def test_two_processes_share_the_shards(tmp_path: Path, server: Server, unbroken: Path) -> None:
    """As a launcher starts them, and as two shells do: each shard is scored once."""
    for name, ranks in (("launched", [{"rank": 0, "world": 2}, {"rank": 1, "world": 2}]), ("by-hand", [{}, {}])):
        folder = tmp_path / name
        pids = [server.start(folder, sleep=0.02, **rank) for rank in ranks]
        assert [server.wait(pid) for pid in pids] == [0, 0]
        assert_same(folder, unbroken)
        assert sorted(log(folder)) == list(range(scoring_process.QUERIES // scoring_process.SHARD))


def test_a_dead_process_leaves_its_shards_to_the_other(tmp_path: Path, server: Server, unbroken: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        first, second = (server.start(folder, sleep=0.02, rank=rank, world=2) for rank in range(2))
        time.sleep(0.03 + 0.03 * attempt)
        os.kill(second, signal.SIGKILL)
        assert server.wait(second) == -signal.SIGKILL
        assert server.wait(first) == 0
        assert_same(folder, unbroken)
