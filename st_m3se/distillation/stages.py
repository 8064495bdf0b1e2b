"""Stages on disk: each folder says what it was made from, holds whole files, and is made once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from st_m3se.core.files import (
    atomic_file,
    digest,
    read_checked_json,
    sweep_folder,
    whole_folder,
    write_checked_json,
)
from st_m3se.retrieval.fingerprint import content_hash

__all__ = [
    "claim",
    "identity",
    "last_checkpoint",
    "rank",
    "read_result",
    "save_model",
    "stage",
    "stage_folder",
    "write_text",
]

MADE_FROM, FINISHED = "made_from.json", "finished.json"
STATE = "trainer_state.json"
POLL_SECONDS = 0.2


def rank() -> int:
    """The number of this process under ``accelerate launch`` or ``torchrun``; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def stage(
    output: Path,
    name: str,
    made_from: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any]],
    *,
    shared: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Path, dict[str, Any]]:
    """Make a stage, or read what an earlier run, or the first process of this one, has made.

    The folder is ``name-HASH`` of all that its content depends on, so that another teacher or option has another
    folder, and what was made before stays as it is. ``made_from.json`` holds these settings, ``finished.json``, the
    last file to appear, what ``make`` returned and the seconds of the run that finished it.

    Args:
        output: Where stages lie.
        name: The stage's.
        made_from: All that its content depends on, as JSON holds it.
        make: Makes the content in the folder, or goes on with it; returns what is to be known of it.
        shared: Whether all processes make it together. Else the first one does, and the others wait.
        say: Told how the settings differ from those of a stage of the same name that is there.

    Returns:
        The folder, and what ``make`` returned.
    """
    settings: dict[str, Any] = json.loads(json.dumps(made_from))
    folder = stage_folder(output, name, settings)
    file, first = folder / FINISHED, rank() == 0
    if (known := read_result(file)) is not None:
        return folder, known
    if first:
        sweep_folder(folder)
    if first and not (folder / MADE_FROM).is_file():
        if differing := _differing(output, name, settings):
            say(f"  made anew: not as before are {', '.join(differing)}")
        folder.mkdir(parents=True, exist_ok=True)
        write_checked_json(folder / MADE_FROM, settings)
    if first or shared:
        start = time.perf_counter()
        result = make(folder)
        if first:
            write_checked_json(file, {**result, "seconds": round(time.perf_counter() - start, 3)})
    while (known := read_result(file)) is None:
        time.sleep(POLL_SECONDS)
    return folder, known


def stage_folder(output: Path, name: str, made_from: Mapping[str, Any]) -> Path:
    """Where a stage lies."""
    return output / f"{name}-{content_hash(json.loads(json.dumps(made_from)))[:8]}"


def _differing(output: Path, name: str, settings: Mapping[str, Any]) -> list[str]:
    """In what the stage of the same name that is most like it differs."""
    found = []
    for file in output.glob(f"{name}-*/{MADE_FROM}"):
        other = read_result(file) or {}
        found.append(sorted(key for key in {*other, *settings} if other.get(key) != settings.get(key)))
    return min(found, key=len, default=[])


def claim(folder: Path, settings: Mapping[str, Any], *, beside: Sequence[str] = ()) -> None:
    """Write down what a folder is made from, before anything is made in it.

    Args:
        folder: The folder; made if it is not there.
        settings: All that its content depends on, as JSON holds it.
        beside: What may lie there already.

    Raises:
        ValueError: If the folder was begun with something else, or does not say with what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep_folder(folder)
    file, now = folder / MADE_FROM, json.loads(json.dumps(settings))
    if not file.is_file():
        if any(entry.name not in beside and not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ValueError(
                f"{folder} has files in it that are not ours (there is no {MADE_FROM}): it is left alone. Name another "
                "output."
            )
        write_checked_json(file, now)
        return
    known = read_result(file) or {}
    if differing := sorted(key for key in {*known, *now} if known.get(key) != now.get(key)):
        raise ValueError(f"{folder} was made with other settings ({', '.join(differing)}). Name another output.")


def identity(name: str) -> Any:
    """What tells a model from another one: its name, and of a folder the checksums of its files."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "README.md")
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


def read_result(file: Path) -> dict[str, Any] | None:
    """What a finished stage has written, or None.

    Raises:
        ValueError: If it was damaged since.
    """
    if not file.is_file():
        return None
    try:
        return read_checked_json(file, required=False)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Remove {file.parent}, and it is made anew.") from None


def write_text(file: Path, text: str) -> None:
    """Write a file whole, in the place of what is there."""
    with atomic_file(file, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_model(model: Any, folder: Path) -> None:
    """Save a model, whole or not at all."""
    whole_folder(folder, lambda path: model.save_pretrained(str(path)))


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a training; one that a kill cut short, which would stop every later try, is removed.

    The trainer writes its own state last.
    """
    found: dict[int, Path] = {}
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            step = int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"])
        except (OSError, ValueError, LookupError, TypeError):
            step = -1
        if checkpoint.name == f"checkpoint-{step}":
            found[step] = checkpoint
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return str(found[max(found)]) if found else None
