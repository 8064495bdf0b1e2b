"""Damaged files: whatever happens to the bytes, a reader gives rows or a FormatError."""

from __future__ import annotations

import gzip
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from scores.score_samples import SAMPLES
from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.data.qrels import read_qrels
from st_m3se.scores import convert, sniff
from st_m3se.scores.formats import FORMATS

COUNT = 10_000
TOKENS = [
    *(b"\t", b"\n", b"\r", b" ", b"\x00", b"\xff", b"\xed\xa0\x80", b'"', b",", b";", b"[", b"]", b"{", b"}", b":"),
    *(b"-", b".", b"e9", b"1e999", b"nan", b"inf", b"null", b"true", b"[]", b"{}", b'""', b"9" * 20, b"9" * 5000),
    *(b"\\ud800", b"\xef\xbb\xbf", b"0x1", b"1_0", b"[" * 2000, b"R", b"c", b"cos\nsystem\n", b"\x93", b"0", b"\x8d"),
]
QRELS = b"query-id\tcorpus-id\tscore\n7\td1\t1\n5\td4\t2\n"


class Damaged:
    """One file that is filled again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, content: bytes) -> Path:
        self.path.write_bytes(content)
        return self.path


@pytest.fixture
def damaged() -> Iterator[Damaged]:
    memory = Path("/dev/shm")  # 10,000 files on a journalling disk take minutes, in memory seconds
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Damaged(Path(folder) / "damaged")


def mutate(content: bytes, source: random.Random) -> bytes:
    """One to four bits of damage."""
    data = bytearray(content)
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data) + 1)
        end = min(len(data), place + source.randint(1, 8))
        kind = source.randrange(7)
        if kind == 0 and place < len(data):
            data[place] = source.randrange(256)
        elif kind == 1:
            del data[place:end]
        elif kind == 2:
            data[place:place] = source.choice(TOKENS)
        elif kind == 3:
            data[place:end] = source.choice(TOKENS)
        elif kind == 4:
            del data[place:]
        elif kind == 5:
            start = source.randrange(len(data) + 1)
            data[place:place] = data[start : start + source.randint(1, 40)]
        else:
            lines = bytes(data).split(b"\n")
            source.shuffle(lines)
            data = bytearray(b"\n".join(lines))
    return bytes(data)


def read(name: str, path: Path, source: random.Random) -> int:
    """Rows read; each must be whole."""
    count = 0
    reading = Reading(
        path, on_error=source.choice(["raise", "skip"]), id_type=source.choice([None, None, "str", "int"])
    )
    for row in FORMATS[name].read(reading):
        assert len(row.document_ids) == len(row.scores) == len(set(row.document_ids))
        assert all(math.isfinite(score) for score in row.scores)
        assert {type(value) for value in (row.query_id, *row.document_ids)} <= {int, str}
        count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_every_failure_is_a_format_error(damaged: Damaged, name: str) -> None:
    source = random.Random(f"{name} 1")
    good = bad = 0
    for _ in range(COUNT):
        path = damaged.fill(mutate(SAMPLES[name], source))
        try:
            good += read(name, path, source) > 0
        except FormatError as error:
            assert str(path) in str(error)  # noqa: PT017 - the loop counts both outcomes
            bad += 1
    # Neither all refused nor all taken, or the damage would prove nothing.
    assert good > COUNT // 100
    assert bad > COUNT // 10


@pytest.mark.slow
def test_damaged_qrels_and_unknown_files(damaged: Damaged) -> None:
    source = random.Random(2)
    names = sorted(SAMPLES)
    for turn in range(COUNT):
        path = damaged.fill(mutate(QRELS, source))
        with suppress(FormatError):
            read_qrels(path, id_type=source.choice(["str", "int"]))
        path = damaged.fill(mutate(SAMPLES[names[turn % len(names)]], source))
        with suppress(FormatError):
            assert sniff(path) in FORMATS


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_damaged_packing(damaged: Damaged, pack: Callable[[bytes], bytes]) -> None:
    source = random.Random(3)
    for turn in range(1500):
        name = sorted(SAMPLES)[turn % len(SAMPLES)]
        path = damaged.fill(mutate(pack(SAMPLES[name]), source))
        with suppress(FormatError):
            read(name, path, source)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    source = random.Random(4)
    path = tmp_path / "damaged"
    outcomes = set()
    for turn in range(300):
        name = sorted(SAMPLES)[turn % len(SAMPLES)]
        path.write_bytes(mutate(SAMPLES[name], source))
        out = tmp_path / ("out" if turn % 2 else "out.jsonl.gz")
        try:
            convert(path, out, source_format=name, overwrite=True)
            outcomes.add("written")
        except FormatError:
            outcomes.add("refused")
        assert {entry.name for entry in tmp_path.iterdir()} <= {"damaged", "out", "out.jsonl.gz"}
    assert outcomes == {"written", "refused"}
