"""What a ranking on disk was made with, so that it is made once, and never taken for another one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from st_m3se.core.errors import FormatError
from st_m3se.core.files import digest, read_checked_json, sweep_folder, write_checked_json
from st_m3se.evaluation.tasks import Ranker, Task
from st_m3se.scores.formats.writing import write_run
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import MANIFEST

__all__ = ["make_ranking"]

logger = logging.getLogger(__name__)

RECORD = "system.json"
RUN = "run.trec"
LOCK = ".lock"


def make_ranking(ranker: Ranker, task: Task, name: str, first: Mapping[str, Any]) -> dict[str, Any]:
    """Make one ranking, unless it is there.

    Args:
        ranker: The system.
        task: The set, and the folder.
        name: The system's name, the tag of the TREC run.
        first: The settings of the first stage, of a re-ranker.

    Returns:
        Its record: "settings", "seconds" and "findings".

    Raises:
        ValueError: If the ranking that is there was made with something else; the message says with what.
        FileExistsError: If the folder holds something else.
    """
    now = {"system": ranker.description, "set": task.evaluation_set.fingerprint, **ranker.inputs(task)}
    if first:
        now["first_stage"] = dict(first)
    record: dict[str, Any] = {"settings": json.loads(json.dumps(now))}
    path = task.folder / RECORD
    task.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(task.folder / LOCK):  # whoever makes the same ranking in another process finishes it first
        sweep_folder(task.folder)
        if path.is_file():
            begun = _read(path)
            _compare(task.folder, begun["settings"], record["settings"])
            if "seconds" in begun and _is_there(task, begun):
                run = task.folder / RUN
                if run.is_file() and begun.get("trec") not in (None, digest(run)):
                    logger.warning(f"{run} was changed after it was written. It is written anew.")
                    run.unlink()
                _write_run(task, name)
                return begun
        elif any(entry.name != LOCK for entry in task.folder.iterdir()):
            raise FileExistsError(
                f"{task.folder} exists and holds no ranking (it has no {RECORD}); it is left alone. Choose another "
                "output."
            )
        write_checked_json(path, record)
        ranker.rank(task)
        (task.folder / RUN).unlink(missing_ok=True)  # of a ranking that is lost
        _write_run(task, name)
        run = task.folder / RUN
        record |= {
            "seconds": task.seconds,
            "findings": task.findings,
            "manifest": digest(task.output / MANIFEST),
            "trec": digest(run) if run.is_file() else None,
        }
        write_checked_json(path, record)
    return record


def _is_there(task: Task, record: Mapping[str, Any]) -> bool:
    """Whether the ranking is there, undamaged."""
    if not (task.output / MANIFEST).is_file():
        return False
    try:
        TeacherScores.open(task.output).verify()
        if record.get("manifest") not in (None, digest(task.output / MANIFEST)):
            raise FormatError("it is another ranking than the one that was made here.", file=str(task.output))
    except FormatError as error:
        logger.warning(f"{task.output} is damaged, and the ranking is made anew: {error}")
        return False
    return True


def _write_run(task: Task, name: str) -> None:
    """The ranking as a TREC run, unless it is there."""
    path = task.folder / RUN
    if path.is_file():
        return
    try:
        write_run(TeacherScores.open(task.output), path, tag=name)
    except FormatError as error:  # an id with a blank, which TREC's format cannot hold and everything else can
        logger.warning(f"{path} is not written: {error}")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = read_checked_json(path, required=False)  # older ones have no checksum
        if not isinstance(record["settings"], dict) or not isinstance(record.get("seconds", {}), dict):
            raise TypeError("settings and seconds should be objects")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"this does not describe a ranking: {error!r}. Delete the folder, and the ranking is made again.",
            file=str(path),
        ) from None
    return dict(record)


def _compare(folder: Path, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differences := _differences(begun, now):
        raise ValueError(
            f"{folder} holds a ranking that was made with something else: {'; '.join(differences)}. Go on with what it "
            "was made with, choose another output or another name, or delete that folder to make the ranking anew."
        )


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], owner: str = "") -> list[str]:
    identity = next((name for name in ("fingerprint", "weights") if begun.get(name) and name in now), None)
    same = identity is not None and begun[identity] == now[identity]
    found = {}
    for name in dict.fromkeys([*begun, *now]):
        before, after = begun.get(name), now.get(name)
        if before == after or (same and name in ("model", "revision")):  # a folder may be moved, a branch renamed
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found[name] = "; ".join(_differences(before, after, f"{owner}{name}."))
        else:
            found[name] = f"{owner}{name} was {before!r} and is {after!r}"
    if len(found) > 1:
        found.pop("fingerprint", None)  # it only follows from the others
    return [text for text in found.values() if text]
