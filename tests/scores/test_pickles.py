"""A score pickle is read without being run."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from st_m3se.core.errors import FormatError
from st_m3se.core.reading import Reading
from st_m3se.scores import TeacherScores, convert, sniff
from st_m3se.scores.formats.pickled import read_score_pickle

SCORES = {7: {1: 9.5, 2: -1.25, 300: 1e10}, 2**40: {2**33: 0.125}, -5: {1: 3}}


def read(path: Path, content: bytes) -> dict[object, dict[object, float]]:
    path.write_bytes(content)
    rows = read_score_pickle(Reading(path))
    return {row.query_id: dict(zip(row.document_ids, row.scores, strict=True)) for row in rows}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(tmp_path: Path, protocol: int) -> None:
    assert read(tmp_path / "x", pickle.dumps(SCORES, protocol)) == SCORES
    assert sniff(tmp_path / "x") == "score-pickle"
    names = {f"q{n}é": {f"d{m}": n + m / 2 for m in range(3)} for n in range(2500)}
    assert read(tmp_path / "x", pickle.dumps(names, protocol)) == names


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numpy_scalars_are_numbers(tmp_path: Path, protocol: int, kind: type) -> None:
    """What a teacher's predict returns, and most such files hold."""
    scores = {np.int64(q): {np.int32(d): kind(q + d / 4) for d in range(3)} for q in range(3)}
    assert read(tmp_path / "x", pickle.dumps(scores, protocol)) == scores


def test_shared_values_and_memo(tmp_path: Path) -> None:
    name = "a document"
    scores = {"q1": {name: 1.0}, "q2": {name: 2.0, "q1": 3.0}}
    assert read(tmp_path / "x", pickle.dumps(scores)) == scores
    inner = {"d": 1.0}
    with pytest.raises(FormatError, match="share one object"):
        read(tmp_path / "x", _two_batches(inner))


def _two_batches(inner: dict[str, float]) -> bytes:
    scores: dict[str, dict[str, float]] = {f"q{n}": {"d": float(n)} for n in range(1000)}
    return pickle.dumps({"first": inner, **scores, "last": inner})


class Attack:
    """Unpickles to a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["root", "query", "score", "list"])
def test_a_malicious_pickle_is_refused_without_running(tmp_path: Path, protocol: int, place: str) -> None:
    """The pickle makes a file when it is loaded; reading it here must not."""
    proof = tmp_path / "proof"
    attack = Attack(Path.touch, proof)
    value = {"root": attack, "query": {1: attack}, "score": {1: {2: attack}}, "list": {1: [attack]}}[place]
    content = pickle.dumps(value, protocol)
    with pytest.raises(FormatError, match="refused"):
        read(tmp_path / "x", content)
    with pytest.raises(FormatError):
        convert(tmp_path / "x", tmp_path / "store", source_format="score-pickle", on_error="skip")
    assert not proof.exists()
    assert not (tmp_path / "store").exists()
    pickle.loads(content)
    assert proof.exists(), "the attack does nothing, so that this test proves nothing"


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch proof'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cst_m3se.scores.formats.pickled\n_call\n)R.",
        b"\x80\x02cnumpy\ndtype\n(cnumpy\ndtype\nX\x02\x00\x00\x00O8tR.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.",
        b"\x80\x02P1\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x05\x97.",
    ],
)
def test_hand_made_attacks(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError):
        read(tmp_path / "x", content)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62),  # a text of four exabytes
        b"\x80\x04]r" + struct.pack("<I", 2**32 - 1) + b".",  # a place far out in the memo
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1),
        b"I" + b"9" * 10_000 + b"\n.",
        b"}q\x00h\x00h\x00s.",  # a dict that holds itself
    ],
)
def test_bombs_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FormatError):
        read(tmp_path / "x", content)


@pytest.mark.parametrize("value", [[1], {1: 2.0}, {1: [2.0]}, "x", {1: {2: None}}, {1: {2: True}}, {(1,): {2: 1.0}}])
def test_other_content_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(FormatError):
        read(tmp_path / "x", pickle.dumps(value))


def test_a_large_pickle_streams(tmp_path: Path) -> None:
    """Rows come out before the end of the file is read."""
    content = pickle.dumps({query: {query + d: float(d) for d in range(10)} for query in range(5000)})
    (tmp_path / "x").write_bytes(content[:-1000])
    rows = read_score_pickle(Reading(tmp_path / "x"))
    assert next(rows).query_id == 0
    with pytest.raises(FormatError, match="not a whole pickle"):
        list(rows)
    (tmp_path / "x").write_bytes(content)
    convert(tmp_path / "x", tmp_path / "store")
    assert len(TeacherScores.open(tmp_path / "store")) == 5000
