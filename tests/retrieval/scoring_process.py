"""Processes that score with a stub teacher and can be killed: a server that forks one for each line it reads.

Forking saves the second of imports that would otherwise be most of a process's life. A line is JSON with "folder" and
optionally "rank" and "world", "sleep" (seconds of each teacher call), "shard" (queries in
one), "events" (kill yourself at that many file events in
the folder). The answer is the pid, and after a line "wait PID" how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from st_m3se import score_candidates
from st_m3se.scores import TeacherScores

QUERIES, DOCUMENTS, SHARD = 60, 40, 5
queries = {f"q{place}": f"query {place}" for place in range(QUERIES)}
corpus = {place: f"document {place}" for place in range(DOCUMENTS)}
candidates = {
    query_id: [(place * 7 + step * 3) % DOCUMENTS for step in range(place % 6)]
    for place, query_id in enumerate(queries)
}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir", "shutil.rmtree"}


def stub_score(pair: tuple[str, str]) -> float:
    """A number that depends on both texts."""
    return zlib.crc32("\t".join(pair).encode()) / 2**28 - 8.0


def run(folder: Path, sleep: float = 0.0, shard: int = SHARD, **ignored: Any) -> TeacherScores:
    """Score everything; each call of the teacher leaves a line with its shard in the log beside the folder."""
    log = os.open(folder.parent / f"{folder.name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def teacher(pairs: list[tuple[str, str]]) -> list[float]:
        os.write(log, f"{int(pairs[0][0].split()[1]) // shard}\n".encode())
        time.sleep(sleep)
        return [stub_score(pair) for pair in pairs]

    return score_candidates(
        teacher, candidates, queries, corpus, folder, shard_queries=shard, name="stub", show_progress_bar=False
    )


def kill_at(event: int, folder: Path) -> None:
    """End this process as SIGKILL does at its ``event``-th file event in the folder."""
    seen = 0

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in FILE_EVENTS and any(str(folder) in str(value) for value in arguments):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def child(options: dict[str, Any]) -> None:
    folder = Path(options.pop("folder"))
    if "world" in options:
        os.environ.update(RANK=str(options.pop("rank")), WORLD_SIZE=str(options.pop("world")))
    if "events" in options:
        kill_at(options["events"], folder)
    run(folder, **options)


def serve() -> None:
    with tempfile.TemporaryDirectory() as folder:  # what is imported on first use is then there for all children
        run(Path(folder) / "store")
    for line in sys.stdin:
        if line.startswith("wait "):
            print(os.waitstatus_to_exitcode(os.waitpid(int(line.split()[1]), 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(json.loads(line))
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
