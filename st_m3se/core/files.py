"""Files and folders that appear whole or not at all, and that show when they were damaged since."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import xxhash
from filelock import FileLock, Timeout

from st_m3se.core.errors import FormatError

__all__ = [
    "atomic_file",
    "cache_key",
    "checked_json",
    "damage",
    "digest",
    "place_folder",
    "read_checked_json",
    "replace_folder",
    "scratch_folder",
    "seal",
    "sealed_bytes",
    "sweep",
    "sweep_folder",
    "sync",
    "whole_folder",
    "with_checksum",
    "write_checked_json",
]

BLOCK = 1 << 20
CHECKSUM = "checksum"  # the key of a JSON file's own
LOCK = ".lock"
REPLACED = "replaced"
SEAL = b"st-m3se1"  # the seal: these 8 bytes, the length of the content (8 bytes), its XXH3 (16 bytes)
SEAL_BYTES = 32
_REPLACING = Lock()  # between threads; processes come in each other's way and try again
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux


# Whole or not at all.


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, for what shall become ``path``; removed when the block ends.

    A lock says that its process lives. What processes that were killed left of the same ``path`` is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        lock = FileLock(folder / LOCK, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:  # another process took the folder for a leftover before it had its lock
            continue
        except (OSError, NotImplementedError):  # a file system without locks, where nothing is swept either
            if folder.is_dir():
                break
            continue
        if (folder / LOCK).exists():
            break
        lock.release()
    try:
        yield folder
    finally:
        _remove_locked(folder, lock)


def _remove_locked(folder: Path, lock: FileLock) -> None:
    """Remove a folder while its lock is held: between a release and a removal another could begin to use it."""
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
    if os.name == "nt":  # which removes no file that is open
        shutil.rmtree(folder, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove the temporary folders of ``path`` whose processes are gone."""
    start = f".{path.name}."
    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if not (entry.name.startswith(start) and entry.name.endswith(".tmp") and entry.is_dir()):
            continue
        lock = FileLock(entry / LOCK, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError, NotImplementedError):
            continue
        try:
            if (entry / REPLACED).exists() and not os.path.lexists(path):  # killed between the two renames
                with suppress(OSError):
                    (entry / REPLACED).rename(path)
        finally:
            _remove_locked(entry, lock)


def sweep_folder(folder: Path) -> None:
    """:func:`sweep` whatever is in a folder, of which nothing may be made again."""
    for name in {entry.name[1:].rsplit(".", 2)[0] for entry in folder.glob(".*.tmp")}:
        sweep(folder / name)


@contextmanager
def atomic_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A place beside ``path`` for a file that takes its name when the block ends well, and is removed otherwise.

    Raises:
        FileExistsError: If ``path`` exists and ``overwrite`` is False.
    """
    path = Path(path)
    exists = f"{path} exists. Choose another name, or overwrite=True to replace it."
    if path.exists() and not overwrite:
        sweep(path)
        raise FileExistsError(exists)
    with scratch_folder(path) as folder:
        temporary = folder / "part"  # not the name: whoever looks for files of its kind would find it
        yield temporary
        sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            try:
                os.link(temporary, path)  # which does not replace what another process made meanwhile
            except FileExistsError:
                raise FileExistsError(exists) from None
            except OSError:  # a file system without hard links
                temporary.replace(path)
        sync(path.parent)


def place_folder(folder: Path, path: Path) -> bool:
    """Give a finished folder its name. Where the name is taken, nothing happens.

    Returns:
        Whether it was free.
    """
    try:
        folder.rename(path)
    except OSError as error:
        # A name that was taken may be free again by now: what the system said counts, where it says it.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not os.path.lexists(path):
            raise
        return False
    sync(path.parent)
    return True


def replace_folder(folder: Path, path: Path) -> None:
    """Give a finished folder, in a scratch folder of ``path``, the place of another; the old one lands in the scratch.

    At every moment ``path`` is the old folder or the new one, where the system can exchange two names (Linux).
    Elsewhere it is missing for a moment; if a process is killed then, the next one puts the old folder back.
    """
    for attempt in range(1_000):  # as often as others may come first
        if _exchange(folder, path):
            break
        with _REPLACING:
            with suppress(FileNotFoundError):
                path.rename(folder.parent / REPLACED)
            if place_folder(folder, path):
                break
        shutil.rmtree(folder.parent / REPLACED, ignore_errors=True)
        time.sleep(random.uniform(0, min(0.001 * (attempt + 1), 0.05)))  # others are at it: not all at once
    else:
        raise FileExistsError(f"{path} is replaced by other processes over and over. Try again.")
    sync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def whole_folder(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder that is there whole or not at all, in the place of what is there."""
    with scratch_folder(folder) as scratch:
        made = scratch / folder.name
        make(made)
        for file in made.rglob("*"):
            sync(file)
        if not place_folder(made, folder):
            replace_folder(made, folder)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and orders its renames itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Damage.


def digest(path: Path) -> str:
    """The XXH3 hash of a file, 32 hexadecimal digits: some 10 GB a second. It finds damage, not malice."""
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size).hex()


def cache_key(settings: Sequence[Any], files: Iterable[Path]) -> str:
    """A name for what is made of files with these settings, until their paths, sizes or times change.

    Raises:
        FormatError: If one is not there.
    """
    stamps = []
    for file in files:
        if not file.is_file():
            raise FormatError("there is no such file.", file=str(file))
        stamps.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    return blake2b(json.dumps([*settings, stamps]).encode(), digest_size=12).hexdigest()


def _digest(file: BinaryIO, size: int, place: str = "") -> bytes:
    whole = xxhash.xxh3_128(place.encode())
    while size > 0 and (block := file.read(min(BLOCK, size))):
        whole.update(block)
        size -= len(block)
    return whole.digest()


def seal(path: Path, place: str) -> None:
    """Put a checksum behind the content of a file. NumPy, zip and Arrow do not read that far.

    Args:
        path: The file.
        place: What the file is; the same content elsewhere has another checksum.
    """
    size = path.stat().st_size
    with path.open("r+b") as file:
        mark = SEAL + size.to_bytes(8, "little") + _digest(file, size, place)
        file.seek(0, os.SEEK_END)
        file.write(mark)


def sealed_bytes(path: Path) -> int:
    """The length of the content of a sealed file, without the seal."""
    return path.stat().st_size - SEAL_BYTES


def damage(path: Path, place: str) -> str | None:
    """What is wrong with a sealed file of a place, or None: all of it is read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - SEAL_BYTES
            if size < 0:
                return "it is cut off"
            file.seek(size)
            mark = file.read(SEAL_BYTES)
            if mark[:16] != SEAL + size.to_bytes(8, "little"):
                return "it is cut off, or its end was changed"
            file.seek(0)
            return None if _digest(file, size, place) == mark[16:] else "its content is not what was written there"
    except OSError as error:
        return f"it cannot be read ({error})"


def checked_json(content: Mapping[str, Any]) -> str:
    """A mapping as the text of a JSON file, with a checksum of the rest under "checksum"."""
    return json.dumps(with_checksum(content), indent=2, ensure_ascii=False) + "\n"


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with a checksum of the rest under "checksum"."""
    content = {name: value for name, value in content.items() if name != CHECKSUM}
    return {**content, CHECKSUM: _checksum(content)}


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write :func:`checked_json` in the place of what is there, in one step."""
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(checked_json(content), encoding="utf-8")


def read_checked_json(
    path: Path, *, required: bool = True, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """Read what :func:`checked_json` wrote, without the checksum.

    Args:
        path: The file.
        required: Refuse a file without a checksum.
        pairs_hook: Makes an object of its keys and values.

    Raises:
        ValueError: If it is no JSON object, has no checksum, or was changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs_hook)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it should be a JSON object and is a {type(content).__name__}")
    known = content.pop(CHECKSUM, None)
    if known is None and not required:
        return content
    if known != _checksum(content):
        raise ValueError(
            f"it was changed after it was written (if on purpose, remove the line {CHECKSUM!r})"
            if not required
            else "it was changed after it was written"
            if known
            else "it has no checksum"
        )
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    # As it will be read: keys that are numbers become texts, tuples become lists.
    plain = json.loads(json.dumps(content))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode()))
