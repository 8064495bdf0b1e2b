from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from st_m3se.core.errors import FormatError
from st_m3se.core.files import checked_json
from st_m3se.scores import ScoredList, TeacherScores, TeacherScoresWriter, convert
from st_m3se.scores import writer as writer_module

ROWS = [("q2", ["d1", "d2", "d3"], [3.5, -1.25, 0.5]), ("q10", ["d9"], [2.0]), ("q1", [], [])]


def plain(store: TeacherScores) -> list[tuple[object, list[object], list[float]]]:
    return [(row.query_id, list(row.document_ids), list(row.scores)) for row in store]


@pytest.fixture
def store(tmp_path: Path) -> TeacherScores:
    return TeacherScores.from_rows(ROWS, tmp_path / "store")


def test_rows_come_back_in_order(store: TeacherScores) -> None:
    assert len(store) == 3
    assert plain(store) == ROWS
    assert store["q10"] == ScoredList("q10", ["d9"], [2.0])
    assert "q1" in store
    assert store["q1"].document_ids == []


@pytest.mark.parametrize("absent", ["q3", "", "zz", "\ud800", 2, None, 2.0, True])
def test_an_unknown_query_is_a_key_error(store: TeacherScores, absent: object) -> None:
    assert absent not in store
    with pytest.raises(KeyError):
        store[absent]  # type: ignore[index]


def test_integer_ids_stay_integers(tmp_path: Path) -> None:
    """Prevents "7" and 7 from becoming one query, and ids from losing digits in a float."""
    big = 2**63 - 1
    store = TeacherScores.from_rows([(7, [big, -3], [1.0, 2.0]), (-1, [1], [0.0])], tmp_path / "store")
    assert plain(store) == [(7, [big, -3], [1.0, 2.0]), (-1, [1], [0.0])]
    assert "7" not in store
    assert True not in store
    assert 2**70 not in store
    assert store.manifest["query_id_type"] == "int"


def test_numpy_rows_are_taken(tmp_path: Path) -> None:
    store = TeacherScores.from_rows([(np.int64(3), np.array([5, 4]), np.array([0.1, 0.2]))], tmp_path / "store")
    assert plain(store) == [(3, [5, 4], [float(np.float32(0.1)), float(np.float32(0.2))])]


ids = st.one_of(
    st.just(st.text(min_size=1).filter(lambda text: text.isprintable() or "\n" in text)),
    st.just(st.integers(-(2**63), 2**63 - 1)),
)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[object, list[object], list[float]]]:
    query, document = draw(ids), draw(ids)
    rows = []
    for query_id in draw(st.lists(query, unique=True, max_size=6)):
        documents = draw(st.lists(document, unique=True, max_size=5))
        rows.append((query_id, documents, draw(st.lists(floats, min_size=len(documents), max_size=len(documents)))))
    return rows


@settings(max_examples=60, deadline=None)
@given(rows=tables(), shard_scores=st.integers(1, 10), group=st.integers(1, 6))
def test_any_rows_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple], shard_scores: int, group: int
) -> None:
    """Whatever the ids and however they fall into shards and groups, look-up, selection and copy agree."""
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "GROUP_SCORES", group)
        with TeacherScoresWriter(folder / "store", shard_scores=shard_scores) as writer:
            for row in rows:
                writer.write(*row)
    store = TeacherScores.open(folder / "store")
    store.validate()
    assert plain(store) == rows
    assert store.query_ids().to_pylist() == [row[0] for row in rows]
    for row in rows:
        assert store[row[0]] == ScoredList(*row)
    chosen = rows[::-2]
    selected = store.select([row[0] for row in chosen])
    assert plain(selected) == chosen
    assert plain(selected.save(folder / "copy")) == chosen


def test_select_and_concatenate(store: TeacherScores, tmp_path: Path) -> None:
    other = TeacherScores.from_rows([("a", ["d1"], [1.0])], tmp_path / "other", manifest={"teacher": "t"})
    both = TeacherScores.concatenate([store.select(["q10", "q2"]), other])
    assert [row.query_id for row in both] == ["q10", "q2", "a"]
    assert both["a"].scores == [1.0]
    assert "q1" not in both
    assert both.manifest["teacher"] is None
    assert [row.query_id for row in both.select(["a", "q10"])] == ["a", "q10"]
    with pytest.raises(KeyError, match="q1"):
        both.select(["q1"])
    with pytest.raises(FormatError, match="'q10' is in two"):
        TeacherScores.concatenate([store, both])
    numbers = TeacherScores.from_rows([(1, ["d"], [1.0])], tmp_path / "numbers")
    with pytest.raises(FormatError, match="strings in one part and integers"):
        TeacherScores.concatenate([store, numbers])


def test_the_dataset_holds_the_same_rows(store: TeacherScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = store.to_dataset()
    assert dataset.column_names == ["query_id", "document_ids", "scores"]
    assert [tuple(row.values()) for row in dataset] == ROWS
    assert store.select(["q10"]).to_dataset()[0]["document_ids"] == ["d9"]


def test_the_manifest_says_what_is_known(tmp_path: Path) -> None:
    TeacherScores.from_rows(ROWS, tmp_path / "store", manifest={"teacher": "cross", "max_length": 512})
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert (manifest["teacher"], manifest["max_length"], manifest["revision"]) == ("cross", 512, None)
    assert (manifest["queries"], manifest["scores"]) == (3, 4)
    assert (manifest["query_id_type"], manifest["document_id_type"]) == ("str", "str")
    with pytest.raises(ValueError, match="no field"):
        TeacherScoresWriter(tmp_path / "other", manifest={"techer": "x"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("q", ["d"], [1.0, 2.0]), "1 documents and 2 scores"),
        (("q", ["d"], [math.nan]), "finite"),
        (("q", ["d"], [1e39]), "finite"),
        (("q", ["d"], ["x"]), "not numbers"),
        (("q", ["d"], [[1.0]]), "flat list"),
        ((7, ["d"], [1.0]), "query ids of this store are str, got int"),
        (("q", [3], [1.0]), "document ids of this store are str, got int"),
        (("q", ["d", 3], [1.0, 2.0]), "of one type"),
        (("q", [2.5], [1.0]), "string or an integer"),
        ((True, ["d"], [1.0]), "string or an integer"),
        (("", ["d"], [1.0]), "empty"),
        (("\ud800", ["d"], [1.0]), "surrogate"),
    ],
)
def test_a_bad_row_leaves_nothing_behind(tmp_path: Path, row: tuple, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        TeacherScores.from_rows([*ROWS, row], tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_source_leaves_the_old_store(tmp_path: Path) -> None:
    """Prevents an interrupted rewrite from costing the scores that were there."""
    TeacherScores.from_rows(ROWS, tmp_path / "store")

    def rows() -> object:
        yield ("new", ["d"], [1.0])
        raise KeyboardInterrupt

    with pytest.raises(FileExistsError):
        TeacherScores.from_rows(ROWS, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        TeacherScores.from_rows(rows(), tmp_path / "store", overwrite=True)  # type: ignore[arg-type]
    assert plain(TeacherScores.open(tmp_path / "store")) == ROWS
    TeacherScores.from_rows(ROWS[:1], tmp_path / "store", overwrite=True)
    assert plain(TeacherScores.open(tmp_path / "store")) == ROWS[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a store"):
        TeacherScoresWriter(tmp_path / "thesis", overwrite=True)


def test_the_writer_needs_its_with_block(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="with"):
        TeacherScoresWriter(tmp_path / "store").write("q", ["d"], [1.0])


def test_a_published_set_without_a_manifest_opens(tmp_path: Path) -> None:
    """int32 ids, doubles, large lists and further columns, as they are on the hub."""
    table = pa.table(
        {
            "query_id": pa.array([3, 1], pa.int32()),
            "text": ["a", "b"],
            "scores": pa.array([[0.5, 1.5], [2.5]], pa.large_list(pa.float64())),
            "document_ids": pa.array([["x", "y"], ["z"]], pa.list_(pa.large_string())),
        }
    )
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "hub" / "data" / "train-00000.parquet")
    for path in (tmp_path / "hub", tmp_path / "hub" / "data" / "train-00000.parquet"):
        store = TeacherScores.open(path)
        assert plain(store) == [(3, ["x", "y"], [0.5, 1.5]), (1, ["z"], [2.5])]
        assert store[1].document_ids == ["z"]


def test_what_is_no_store_is_refused(store: TeacherScores, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        TeacherScores.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="neither"):
        TeacherScores.open(tmp_path / "empty")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(FormatError, match=r"not a readable Parquet file.*st-m3se convert .* STORE"):
        TeacherScores.open(tmp_path / "text")
    manifest = tmp_path / "store" / "manifest.json"
    good = json.loads(manifest.read_text())
    for change, message in [
        ({"version": 99}, "version 99, which a newer st-m3se wrote.*Update"),
        ({"version": 0}, "no st-m3se wrote a store of version 0"),
        ({"shards": [{**good["shards"][0], "file": "../x.parquet"}]}, "outside"),
        ({"shards": 3}, "not the manifest"),
        ({"shards": [{**good["shards"][0], "queries": 5}]}, "was changed"),
        ({"shards": [{**good["shards"][0], "file": "lost.parquet"}]}, "lost.parquet.*it is not there"),
        ({"shards": []}, "queries of the shards is 0 and the manifest says 3: one is missing"),
        ({"document_id_type": "int"}, "document_id_type of the shards is str.*belongs to another store"),
    ]:
        manifest.write_text(checked_json({**good, **change}))
        with pytest.raises(FormatError, match=message):
            TeacherScores.open(tmp_path / "store")
    manifest.write_text("{")
    with pytest.raises(FormatError, match=r"manifest\.json"):
        TeacherScores.open(tmp_path / "store")


@pytest.mark.parametrize("ids", [str, int])
def test_damage_is_an_error_and_never_other_scores(ids: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a store, in all the ways that disks and copies have; a shard of another teacher as well."""
    monkeypatch.setattr(writer_module, "GROUP_SCORES", 100)
    random = np.random.default_rng(0)
    rows = [(ids(query), [ids(place) for place in range(20)], random.normal(size=20)) for query in range(60)]
    others = [(query, documents, random.normal(size=20)) for query, documents, _ in rows]
    for name, content in (("store", rows), ("other", others)):
        with TeacherScoresWriter(tmp_path / name, shard_scores=500) as writer:
            for row in content:
                writer.write(*row)
    expected = plain(TeacherScores.open(tmp_path / "store"))
    files = sorted((tmp_path / "store").iterdir())
    assert len(files) == 4
    errors = 0
    for path in files:
        whole = path.read_bytes()
        changes: list[bytes | None] = [*damaged(whole, 60), (tmp_path / "other" / path.name).read_bytes(), None]
        if path.suffix == ".parquet":
            changes.append(files[(files[1] == path and 2) or 1].read_bytes())
        for content in changes:
            if content is None and path.name == "manifest.json":
                continue  # a folder of Parquet files like any other
            path.unlink() if content is None else path.write_bytes(content)
            try:
                store = TeacherScores.open(tmp_path / "store")
                assert store[expected[-1][0]].scores == expected[-1][2]
                assert plain(store) == expected
            except FormatError as error:
                assert str(tmp_path / "store") in str(error)  # noqa: PT017 - the loop counts
                errors += 1
            path.write_bytes(whole)
    assert errors > 240, "a changed blank in the manifest does no harm; all else does"
    TeacherScores.open(tmp_path / "store").validate()


def test_without_the_manifest_pages_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random = np.random.default_rng(0)
    TeacherScores.from_rows(
        [(query, list(range(50)), random.normal(size=50)) for query in range(20)], tmp_path / "store"
    )
    (tmp_path / "store" / "manifest.json").unlink()
    store = TeacherScores.open(tmp_path / "store")
    store.validate()
    expected = plain(store)
    assert "has lost its manifest.json" in caplog.text
    shard = tmp_path / "store" / "scores-00000.parquet"
    whole = shard.read_bytes()
    errors = 0
    for place in random.integers(4, len(whole) - 1_500, size=60).tolist():  # not in the file's end
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert plain(TeacherScores.open(tmp_path / "store")) == expected
        except FormatError:
            errors += 1
    assert errors > 50


def test_a_footer_with_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """The name stands in the schema, and again where the column's values are."""
    path = tmp_path / "x.parquet"
    TeacherScores.from_rows([(1, [1], [0.5])], tmp_path / "store").files[0].rename(path)
    start, end = path.read_bytes().rsplit(b"query_id", 1)
    path.write_bytes(start + b"\xf6uery_id" + end)
    with pytest.raises(FormatError, match=r"x\.parquet.*not a readable Parquet file"):
        TeacherScores.open(path)


def test_texts_beside_the_shards_are_validated(tmp_path: Path) -> None:
    with TeacherScoresWriter(tmp_path / "store") as writer:
        writer.write("q", ["d"], [1.0])
        (writer.folder / "qrels").mkdir()
        (writer.folder / "qrels" / "train.tsv").write_text("q\td\t1\n")
    TeacherScores.open(tmp_path / "store").validate()
    (tmp_path / "store" / "qrels" / "train.tsv").write_text("q\td\t0\n")
    with pytest.raises(FormatError, match=r"train\.tsv: the file was changed"):
        TeacherScores.open(tmp_path / "store").validate()


def test_a_store_of_the_first_version_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has no checksums, which is said."""
    store = TeacherScores.from_rows(ROWS, tmp_path / "store")
    fields = ("file", "queries", "scores", "bytes")
    facts = [{name: shard[name] for name in fields} for shard in store.manifest["shards"]]
    old = {**store.manifest, "version": 1, "shards": facts}
    del old["files"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(old))
    opened = TeacherScores.open(tmp_path / "store")
    opened.validate()
    assert plain(opened) == ROWS
    assert "has no checksums" in caplog.text
    assert "st-m3se convert" in caplog.text
    assert opened.save(tmp_path / "copy").manifest["version"] == 2


def test_what_was_opened_stays_though_the_store_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the rows of one store under the queries of another."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    store = TeacherScores.from_rows(ROWS, tmp_path / "store")
    packed = pickle.dumps(store)
    assert plain(pickle.loads(packed)) == ROWS
    new = [("q2", ["e1", "e2", "e3"], [0.0, 1.0, 2.0]), ("q10", ["e9"], [1.0]), ("q1", [], [])]
    TeacherScores.from_rows(new, tmp_path / "store", overwrite=True)
    assert plain(store) == ROWS
    assert store["q10"].document_ids == ["d9"]
    for by_name in (store.to_dataset, lambda: pickle.loads(packed), store.check_paths):
        with pytest.raises(FormatError, match="replaced since it was opened"):
            by_name()
    assert plain(TeacherScores.open(tmp_path / "store")) == new


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the store is missing for a moment")
def test_eight_processes_replace_one_store(tmp_path: Path) -> None:
    """Writers all succeed, readers always find one of the stores whole, and nothing else is left."""
    code = f"""
import sys
from st_m3se.scores import TeacherScores
number = int(sys.argv[1])
for turn in range(15):
    if number < 6:
        rows = [(query, [number], [number]) for query in range(50)]
        TeacherScores.from_rows(rows, {str(tmp_path / "store")!r}, overwrite=True)
    for _ in range(3):
        rows = list(TeacherScores.open({str(tmp_path / "store")!r}))
        assert len(rows) == 50 and {{(*row.document_ids, *row.scores) for row in rows}} == {{
            (*rows[0].document_ids, *rows[0].scores)
        }}
"""
    TeacherScores.from_rows([(query, [9], [9]) for query in range(50)], tmp_path / "store")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], stderr=subprocess.PIPE) for number in range(8)
    ]
    assert [process.communicate()[1].decode()[-2000:] for process in processes] == [""] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_threads_share_a_store(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "GROUP_SCORES", 4)
        rows = [(query, [query, query + 1], [query, query]) for query in range(200)]
        store = TeacherScores.from_rows(rows, tmp_path / "store")

    def look(seed: int) -> None:
        for query in np.random.default_rng(seed).permutation(200).tolist():
            assert store[query].document_ids == [query, query + 1]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(look, range(16)))


def test_validate_finds_what_is_wrong(store: TeacherScores, tmp_path: Path) -> None:
    store.validate()
    table = pa.table(
        {
            "query_id": ["a", "b", "c", "a"],
            "document_ids": [["d", "e", "d"], ["d"], ["d"], ["f"]],
            "scores": pa.array([[1, 2, 3], [math.nan], [1, 2], [4]], pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(FormatError) as caught:
        TeacherScores.open(tmp_path / "bad.parquet").validate()
    message = str(caught.value)
    for part in (
        "query 'a' has two rows",
        "document 'd' stands twice in the list of query 'a'",
        "query 'b' has the score nan",
        "query 'c' has 1 documents and 2 scores",
    ):
        assert part in message


def test_validate_finds_what_is_missing(tmp_path: Path) -> None:
    table = pa.table(
        {
            "query_id": ["a", "b"],
            "document_ids": pa.array([None, ["d", None]], pa.list_(pa.string())),
            "scores": pa.array([None, [1, 2]], pa.list_(pa.float32())),
        }
    )
    pq.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(FormatError, match=r"1 rows have no list; 1 document ids are missing"):
        TeacherScores.open(tmp_path / "bad.parquet").validate()


@pytest.mark.parametrize(
    "column",
    [
        {"query_id": pa.array(["a", None])},
        {"document_ids": pa.array([["d"], None])},
        {"document_ids": pa.array([["d"], [None]], pa.list_(pa.string()))},
        {"scores": pa.array([[1.0], None])},
        {"scores": pa.array([[1.0], [None]], pa.list_(pa.float32()))},
    ],
)
def test_gaps_are_no_rows(column: dict[str, pa.Array], tmp_path: Path) -> None:
    """Prevents None among ids and scores, and errors of other libraries far from the file."""
    whole = {"query_id": pa.array(["a", "b"]), "document_ids": pa.array([["d"], ["e"]]), "scores": [[1.0], [2.0]]}
    pq.write_table(pa.table({**whole, **column}), tmp_path / "x.parquet")
    store = TeacherScores.open(tmp_path / "x.parquet")
    for use in (
        lambda: list(store),
        lambda: store["b"],
        store.validate,
        lambda: convert(tmp_path / "x.parquet", tmp_path / "out"),
        lambda: convert(tmp_path / "x.parquet", tmp_path / "out", source_format="store"),
    ):
        with pytest.raises(FormatError, match=r"gap|no query id|no list|missing|nan|must be|must be a"):
            use()
    store.describe({"a": {"d": 1}, "b": {"e": 1}})


def test_describe_counts_margins_and_positives(store: TeacherScores) -> None:
    summary = store.describe(bins=5)
    assert (summary.queries, summary.scores) == (3, 4)
    assert summary.list_lengths == {"min": 0, "mean": 4 / 3, "max": 3}
    assert summary.score_histogram is not None
    assert sum(summary.score_histogram.counts) == 4
    assert summary.score_histogram.mean == pytest.approx((3.5 - 1.25 + 0.5 + 2.0) / 4)
    assert summary.margin_histogram is not None  # the best of q2 against its two others
    assert summary.margin_histogram.mean == pytest.approx(((3.5 + 1.25) + (3.5 - 0.5)) / 2)
    assert summary.warnings == []

    summary = store.describe({"q2": {"d2": 1, "d3": 2, "d1": 0, "lost": 1}, "elsewhere": {"d1": 1}})
    assert (summary.positives, summary.covered) == (3, 2)
    assert summary.margin_histogram is not None
    assert summary.margin_histogram.mean == pytest.approx(((-1.25 - 3.5) + (0.5 - 3.5)) / 2)
    assert "positives with a score: 2 of 3 (66.7%)" in str(summary)


def test_describe_warns_of_a_sigmoid(tmp_path: Path) -> None:
    squeezed = TeacherScores.from_rows([("q", ["a", "b"], [0.999, 0.001])], tmp_path / "squeezed")
    assert "sigmoid" in squeezed.describe().warnings[0]
    run = {"source": {"candidates": [{"name": "bm25"}], "merged_by": "reciprocal rank fusion, k = 60"}}
    cosines = {"activation": "cosine similarity"}
    for name, manifest in {"run": run, "ensemble": {"scale": "margin"}, "cosines": cosines}.items():
        store = TeacherScores.from_rows([("q", ["a", "b"], [0.03, 0.01])], tmp_path / name, manifest=manifest)
        assert store.describe().warnings == [], "such scores lie in [0, 1] by nature"
    assert "strings" in squeezed.describe({"q": {1: 1}}).warnings[1]
    empty = TeacherScores.from_rows([], tmp_path / "empty")
    assert len(empty) == 0
    assert "q" not in empty
    assert empty.describe().score_histogram is None
    empty.validate()


def test_opening_reads_little(tmp_path: Path) -> None:
    """A fresh interpreter opens two million scores without growing by their size (16 MB), and without torch."""
    documents = np.arange(200)
    with TeacherScoresWriter(tmp_path / "store") as writer:
        for query in range(10_000):
            writer.write(query, documents, np.full(200, query, dtype=np.float32))
    code = f"""
import sys
from st_m3se.scores import TeacherScores
import pyarrow as pa
store = TeacherScores.open({str(tmp_path / "store")!r})
assert len(store) == 10_000 and pa.total_allocated_bytes() < 1_000_000
assert store[777].scores == [777.0] * 200
assert pa.total_allocated_bytes() < 4_000_000
assert not {{"torch", "datasets", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
