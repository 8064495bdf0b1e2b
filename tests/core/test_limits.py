"""Small files that stand for large ones, against lowered limits."""

from __future__ import annotations

import gzip
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_m3se.core import reading as reading_module
from st_m3se.core.errors import FormatError
from st_m3se.core.limits import HELD, LINE, RATIO, VALUES, Limit
from st_m3se.core.reading import Reading
from st_m3se.core.records import records
from st_m3se.data.texts import Texts
from st_m3se.scores import TeacherScores
from st_m3se.scores.formats import FORMATS


def read(name: str, path: Path) -> list[object]:
    return list(FORMATS[name].read(Reading(path)))


def line(documents: int) -> str:
    return json.dumps({"query_id": 1, "document_ids": list(range(documents)), "scores": [0.5] * documents}) + "\n"


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, value in ((LINE, 1_000), (VALUES, 20), (RATIO, 10), (HELD, 4_000)):
        monkeypatch.setenv(limit.variable, str(value))
    monkeypatch.setattr(reading_module, "UNCOUNTED", 2_000)


def big(path: Path, kind: str) -> str:
    """Write a file beyond a limit, and return the format."""
    if kind == "line":
        path.write_text(" " * 1_200 + line(2))
    elif kind == "values":
        path.write_text(line(21))
    elif kind == "packed":
        path.write_bytes(gzip.compress(b"\n" * 5_000))
    elif kind == "rows of a query":
        path.write_text("q Q0 d 1 0.5 t\n" * 30)
        return "trec"
    elif kind == "text of a pickle":
        path.write_bytes(pickle.dumps({"q" * 2_000: {"d": 1.0}}))
    elif kind == "list in a pickle":
        path.write_bytes(pickle.dumps({1: [0.5] * 200}))
    elif kind == "memo of a pickle":
        path.write_bytes(pickle.dumps({"q": {f"d{n}": 1.0 for n in range(200)}}))
    else:
        lists = pa.ListArray.from_arrays(pa.array([0, 30], pa.int32()), pa.array(np.zeros(30, np.int64)))
        scores = pa.ListArray.from_arrays(pa.array([0, 30], pa.int32()), pa.array(np.zeros(30, np.float32)))
        pq.write_table(pa.table({"query_id": ["q"], "document_ids": lists, "scores": scores}), path)
        return "parquet"
    return "score-pickle" if "pickle" in kind else "pylate"


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("line", LINE),
        ("values", VALUES),
        ("packed", RATIO),
        ("rows of a query", VALUES),
        ("text of a pickle", LINE),
        ("list in a pickle", HELD),
        ("memo of a pickle", HELD),
        ("list in Parquet", VALUES),
    ],
)
def test_what_is_beyond_a_limit_is_named_and_can_be_allowed(
    kind: str, limit: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = big(tmp_path / "x", kind)
    with pytest.raises(FormatError, match=rf"x.*the limit is [\d,]+ .* set the environment variable {limit.variable} "):
        read(name, tmp_path / "x")
    for each in (LINE, VALUES, RATIO, HELD):
        monkeypatch.setenv(each.variable, "1000000")
    try:
        read(name, tmp_path / "x")
    except FormatError as error:
        assert "the limit is" not in str(error)  # noqa: PT017 - some of them are nothing but large


@pytest.mark.parametrize("text", ["many", "-1", "0", "1e9"])
def test_a_limit_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LINE.variable, text)
    with pytest.raises(ValueError, match=r"ST_M3SE_MAX_LINE must be a number of bytes"):
        _ = LINE.value


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("column", ["document_ids", "scores", "text"])
def test_groups_that_a_few_bytes_stand_for_are_not_decoded(
    column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is looked at before anything is unpacked: in the file's end, and in the dictionary of a text."""
    monkeypatch.setattr("st_m3se.core.records.EXPANSION", 1)
    path = tmp_path / "x.parquet"
    if column == "text":
        pq.write_table(pa.table({"_id": [f"d{n}" for n in range(100)], "text": ["x" * 500] * 100}), path)
        with pytest.raises(FormatError, match=r"x\.parquet.*the texts of text take [\d,]+ bytes.*ST_M3SE_MAX_HELD"):
            Texts.open(path, cache_dir=tmp_path / "cache")
        return
    lists = pa.ListArray.from_arrays(pa.array([0, 900], pa.int32()), pa.array(np.zeros(900, np.int64)))
    scores = pa.ListArray.from_arrays(pa.array([0, 900], pa.int32()), pa.array(np.zeros(900, np.float32)))
    pq.write_table(pa.table({"query_id": ["q"], "document_ids": lists, "scores": scores}), path)
    for use in (lambda: read("parquet", path), lambda: TeacherScores.open(path)):
        with pytest.raises(FormatError, match=r"x\.parquet.*900 values of .* bytes.*ST_M3SE_MAX_VALUES"):
            use()


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize(
    ("compression", "limit", "message"),
    [("zstd", LINE, "bytes packed"), ("lz4", LINE, "bytes packed"), (None, VALUES, "values")],
)
def test_arrow_batches_that_a_few_bytes_stand_for_are_not_decoded(
    file: bool, compression: str | None, limit: Limit, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns of nulls have no bytes at all; a packed buffer says how large it is before it is unpacked."""
    table = pa.table({"query_id": pa.array(np.zeros(2_000, np.int64)) if compression else pa.nulls(9_000)})
    make, options = pa.ipc.new_file if file else pa.ipc.new_stream, pa.ipc.IpcWriteOptions(compression=compression)
    with make(str(tmp_path / "x.arrow"), table.schema, options=options) as writer:
        writer.write_table(table)
    with monkeypatch.context() as patch:
        patch.delenv(LINE.variable)
        patch.delenv(VALUES.variable)
        assert list(records(Reading(tmp_path / "x.arrow")))[-1] == (len(table), table.to_pylist()[-1])
    monkeypatch.setattr("st_m3se.core.records.EXPANSION", 1)
    if compression:
        monkeypatch.setenv(VALUES.variable, "10000")
    monkeypatch.setattr("pyarrow.ipc.open_stream", lambda _: pytest.fail("a batch could be decoded"))
    with pytest.raises(FormatError, match=rf"x\.arrow.*{message}.*{limit.variable}"):
        list(records(Reading(tmp_path / "x.arrow")))


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["x" * 500] * 20, pa.string_view()), "the texts of query_id take 10,000 bytes"),
        (pa.array(["x" * 500] * 20).dictionary_encode(), "the texts of query_id take 10,000 bytes"),
        (pa.RunEndEncodedArray.from_arrays(pa.array([20], pa.int32()), pa.array(["x"])), "which is not read"),
        (pa.array([[0] * 30], pa.list_(pa.int64(), 30)), "query_id has a list of 30 values"),
    ],
    ids=["view", "dictionary", "runs", "fixed size"],
)
def test_arrow_values_that_share_what_they_hold_are_bounded(values: pa.Array, message: str, tmp_path: Path) -> None:
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), pa.schema({"query_id": values.type})) as writer:
        writer.write_batch(pa.record_batch({"query_id": values}))
    with pytest.raises(FormatError, match=message):
        list(records(Reading(tmp_path / "x.arrow")))


def nested(depth: int) -> object:
    value: object = (1,)
    for _ in range(depth):
        value = (value, value)
    return value


@pytest.mark.parametrize("place", ["key", "query", "score"])
def test_tuples_that_share_their_parts_are_refused(place: str, tmp_path: Path) -> None:
    """Compared, hashed or printed, 60 of them would be 2 ** 60."""
    shared = {"key": {1: {nested(12): 1.0}}, "query": {nested(12): {1: 1.0}}, "score": {1: {2: nested(12)}}}[place]
    (tmp_path / "x").write_bytes(pickle.dumps(shared))
    with pytest.raises(FormatError, match="tuple of tuples"):
        read("score-pickle", tmp_path / "x")


@pytest.mark.parametrize("reverse", [True, False])
def test_a_long_chain_of_margins_takes_no_longer_than_its_lines(reverse: bool, tmp_path: Path) -> None:
    lines = [f"q\tp{n}\tn{n}\t1.0\nq\tp{n + 1}\tn{n}\t2.0" for n in range(10_000)]
    first = lines.pop(0)
    (tmp_path / "x").write_text("\n".join([first, *(reversed(lines) if reverse else lines)]) + "\n")
    started = time.process_time()
    (row,) = read("gpl", tmp_path / "x")
    assert time.process_time() - started < 5
    scores = dict(zip(row.document_ids, row.scores, strict=True))
    assert scores["p10000"] == 10_000
    assert scores["n9999"] == 9_998
