"""What keeps the folders of `reproduce_paper.py` honest: each says what it was made from, and holds whole files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrieval_data import UsageError

from st_m3se.core.files import (
    atomic_file,
    digest,
    place_folder,
    read_checked_json,
    replace_folder,
    scratch_folder,
    sweep_folder,
    sync,
    write_checked_json,
)

__all__ = ["claim", "identity", "last_checkpoint", "read_result", "save_model", "write_text"]

MADE_FROM = "made_from.json"
STATE = "trainer_state.json"


def claim(folder: Path, settings: Mapping[str, Any], *, beside: Sequence[str] = ()) -> None:
    """Write down what a folder is made from, before anything is made in it.

    Args:
        folder: The folder; made if it is not there.
        settings: All that its content depends on, as JSON holds it.
        beside: What may lie there already.

    Raises:
        UsageError: If the folder was begun with something else, or does not say with what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep_folder(folder)
    file, now = folder / MADE_FROM, json.loads(json.dumps(settings))
    if not file.is_file():
        if any(entry.name not in beside and not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UsageError(f"{folder} does not say what it was made from (no {MADE_FROM}). Name another --output.")
        write_checked_json(file, now)
        return
    try:
        known = read_checked_json(file)
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}). Remove {folder}, and it is made anew.") from None
    if differing := sorted(key for key in {*known, *now} if known.get(key) != now.get(key)):
        raise UsageError(
            f"{folder}: this training was done with other settings ({', '.join(differing)}). Name another --output."
        )


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
        UsageError: If it was damaged since.
    """
    if not file.is_file():
        return None
    try:
        return read_checked_json(file, required=False)
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}). Remove {file.parent}, and it is made anew.") from None


def write_text(file: Path, text: str) -> None:
    """Write a file whole, in the place of what is there."""
    with atomic_file(file, overwrite=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_model(model: Any, folder: Path) -> None:
    """Save a model so that its folder is there whole or not at all."""
    with scratch_folder(folder) as scratch:
        saved = scratch / folder.name
        model.save_pretrained(str(saved))
        for file in saved.rglob("*"):
            sync(file)
        if not place_folder(saved, folder):
            replace_folder(saved, folder)


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
