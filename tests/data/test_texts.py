"""Texts by id, from every source that users have, against plain dictionaries."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from damage import damaged
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from st_m3se.core.errors import FormatError
from st_m3se.core.ids import SortedIds
from st_m3se.data.texts import Texts

DOCUMENTS = {"d10": "Ten.", "d9": "", "é": "Grüße, Ägypten", "7": "seven", "d1": "one\ttab"}
INTEGERS = {7: "seven", -3: "minus three", 2**63 - 1: "big", 0: ""}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(texts: dict[Any, str], key: str = "_id") -> bytes:
    lines = [json.dumps({key: text_id, "text": text}, ensure_ascii=False) for text_id, text in texts.items()]
    return "\n".join(lines).encode() + b"\n"


def write_jsonl(folder: Path, texts: dict[Any, str]) -> Path:
    (folder / "corpus.jsonl").write_bytes(jsonl(texts))
    return folder / "corpus.jsonl"


def write_packed(folder: Path, texts: dict[Any, str], suffix: str) -> Path:
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    path = folder / f"corpus.jsonl{suffix}"
    path.write_bytes(pack(jsonl(texts, "document_id")))
    return path


def write_parquet(folder: Path, texts: dict[Any, str], files: int = 1) -> Path:
    ids, values = list(texts), list(texts.values())
    target = folder / "corpus"
    target.mkdir()
    for file in range(files):
        part = slice(file * len(ids) // files, (file + 1) * len(ids) // files)
        pq.write_table(pa.table({"passage": values[part], "pid": ids[part]}), target / f"part-{file}.parquet")
    return target if files > 1 else target / "part-0.parquet"


def to_dataset(texts: dict[Any, str]) -> Dataset:
    return Dataset.from_dict({"text": list(texts.values()), "id": list(texts)})


def shuffled_twice(texts: dict[Any, str]) -> Dataset:
    """A dataset whose rows stand in another order in its table."""
    order = list(range(len(texts)))[::-1]
    turned = to_dataset({list(texts)[place]: list(texts.values())[place] for place in order})
    return turned.select(order)


SOURCES: dict[str, Callable[[Path, dict[Any, str]], Any]] = {
    "mapping": lambda folder, texts: texts,
    "mapping of BEIR": lambda folder, texts: {key: {"text": value} for key, value in texts.items()},
    "texts": lambda folder, texts: Texts.open(texts),
    "dataset": lambda folder, texts: to_dataset(texts),
    "selected dataset": lambda folder, texts: shuffled_twice(texts),
    "dataset on disk": lambda folder, texts: Dataset.from_parquet(
        str(write_parquet(folder, texts)), cache_dir=str(folder)
    ),
    "jsonl": write_jsonl,
    "path as str": lambda folder, texts: str(write_jsonl(folder, texts)),
    "folder": lambda folder, texts: write_jsonl(folder, texts).parent,
    "gz": lambda folder, texts: write_packed(folder, texts, ".gz"),
    "gz folder": lambda folder, texts: write_packed(folder, texts, ".gz").parent,
    "zst": lambda folder, texts: write_packed(folder, texts, ".zst"),
    "parquet": write_parquet,
    "parquet folder": lambda folder, texts: write_parquet(folder, texts, files=2),
    "folder of a parquet folder": lambda folder, texts: write_parquet(folder, texts, files=2).parent,
}


@pytest.mark.parametrize("texts", [DOCUMENTS, INTEGERS], ids=["str", "int"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_texts(tmp_path: Path, source: str, texts: dict[Any, str]) -> None:
    """Prevents a source that loses order, empty texts, blanks or the type of ids; all have one fingerprint."""
    opened = Texts.open(SOURCES[source](tmp_path, texts))
    assert len(opened) == len(texts)
    assert list(opened.items()) == list(texts.items())
    assert opened.ids.to_pylist() == list(texts)
    assert {key: opened[key] for key in texts} == texts
    ids = [list(texts)[place] for place in (2, 0, 2, 3, 1)]
    assert opened.take(ids) == [texts[key] for key in ids]
    assert opened.take([]) == []
    for size in (1, 2, 100):
        batches = list(opened.batches(size))
        assert [len(keys) for keys, _ in batches[:-1]] == [size] * (len(batches) - 1)
        assert {key: text for keys, values in batches for key, text in zip(keys, values, strict=True)} == texts
    assert opened.fingerprint == Texts.open(texts).fingerprint
    assert opened.id_type == ("int" if 7 in texts else "str")
    again = pickle.loads(pickle.dumps(opened))
    assert dict(again) == texts
    assert again.fingerprint == opened.fingerprint


@pytest.mark.parametrize("absent", ["d2", "", 7, None, "\ud800", 7.0, True, np.int64(7), ("d1",)])
def test_an_unknown_id_is_a_key_error(absent: Any) -> None:
    opened = Texts.open(DOCUMENTS)
    assert absent not in opened
    with pytest.raises(KeyError):
        opened[absent]
    assert opened.get(absent, "nothing") == "nothing"


def test_missing_ids_are_named_and_counted() -> None:
    with pytest.raises(
        FormatError,
        match=r"2 of 3 ids are not in the corpus \(a mapping of 5 texts\), first 'd2'\. "
        r"Give the corpus that they are from, or leave them out\.$",
    ):
        Texts.open(DOCUMENTS).take(["d1", "d2", "\ud800"])
    with pytest.raises(FormatError, match=r"first 7\. It is int and the corpus has '7' \(str\): .*id_type=\"int\""):
        Texts.open(DOCUMENTS).take(["d1", 7])
    with pytest.raises(
        FormatError, match=r"1 of 1 ids are not in the queries .* It is str and the queries has 7 \(int"
    ):
        Texts.open(INTEGERS, "queries").take(["7"])
    with pytest.raises(FormatError, match=r"first 36893488147419103232\. Give .* leave them out\.$"):
        Texts.open(INTEGERS).take([2**65])


def test_a_title_goes_in_front_as_beir_does_it(tmp_path: Path) -> None:
    rows = [("a", "Title", "text "), ("b", "", "  text"), ("c", None, "text"), ("d", "Title", ""), ("e", "", "")]
    expected = {"a": "Title text", "b": "text", "c": "text", "d": "Title", "e": ""}
    records = [{"_id": key, "title": title, "text": text} for key, title, text in rows]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "corpus.parquet")
    mapping = {key: {"title": title, "text": text} for key, title, text in rows}
    for source in (tmp_path, tmp_path / "corpus.parquet", Dataset.from_list(records), mapping):
        assert dict(Texts.open(source)) == expected
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": " as it is "}')
    assert dict(Texts.open(tmp_path, "queries")) == {"q": " as it is "}


def test_tsv_as_ms_marco_has_it(tmp_path: Path) -> None:
    path = tmp_path / "collection.tsv"
    path.write_bytes(b'0\tThe first.\r\n\n8\t\n7\tquoted "text"\n')
    assert dict(Texts.open(path)) == {"0": "The first.", "8": "", "7": 'quoted "text"'}
    assert dict(Texts.open(path, id_type="int")) == {0: "The first.", 8: "", 7: 'quoted "text"'}
    path.write_bytes(b"qid\tquery\n3\twhat\n")
    assert dict(Texts.open(path, "queries")) == {"3": "what"}
    path.write_bytes(b"03\twhat\n")
    with pytest.raises(FormatError, match=r"collection.tsv:1: .*'03' is not an integer"):
        Texts.open(path, id_type="int")


@pytest.mark.parametrize("source", ["mapping", "dataset", "jsonl", "parquet"])
def test_ids_are_converted_where_nothing_is_lost(tmp_path: Path, source: str) -> None:
    numbers = {"7": "seven", "-3": "minus three"}
    given = SOURCES[source](tmp_path, numbers)
    assert dict(Texts.open(given, id_type="int")) == {7: "seven", -3: "minus three"}
    assert dict(Texts.open(given, id_type="str")) == numbers
    with pytest.raises(FormatError, match="not an integer"):
        Texts.open({"7.0": "seven"}, id_type="int")
    with pytest.raises(FormatError, match="Open its source with id_type"):
        Texts.open(Texts.open(numbers), id_type="int")


BAD_FILES = {
    "no JSON": ("c.jsonl", b'{"_id": "1", "text": "a"}\n\n{"_id": \n', r"c.jsonl:3: this is not JSON"),
    "no object": ("c.jsonl", b"[1]\n", r"c.jsonl:1: expected a JSON object"),
    "no id": ("c.jsonl", b'{"text": "a"}\n', r"c.jsonl:1: expected one id among .*_id.* the columns are \['text'\]"),
    "no text": ("c.jsonl", b'{"_id": "1", "body": "a"}\n', r"c.jsonl:1: expected one text among"),
    "two ids": ("c.jsonl", b'{"pid": 1, "qid": 2, "text": "a"}\n', r"c.jsonl:1: .* got \['qid', 'pid'\]"),
    "null text": ("c.jsonl", b'{"_id": "1", "text": null}\n', r"c.jsonl:1: text must be a text, got None"),
    "text a number": ("c.jsonl", b'{"_id": "1", "text": 4}\n', r"c.jsonl:1: text must be a text, got 4"),
    "title a list": ("c.jsonl", b'{"_id": "1", "title": [], "text": ""}\n', r"c.jsonl:1: the title must be a text"),
    "id a float": ("c.jsonl", b'{"_id": 1.0, "text": "a"}\n', r"c.jsonl:1: document id must be a string or an int"),
    "empty id": ("c.jsonl", b'{"_id": "", "text": "a"}\n', r"c.jsonl:1: document id is empty"),
    "both types": ("c.jsonl", b'{"_id": 1, "text": "a"}\n{"_id": "2", "text": "b"}\n', r"c.jsonl:2: .*is str, but"),
    "surrogate": ("c.jsonl", b'{"_id": "1", "text": "\\ud800"}\n', r"c.jsonl:1: .*surrogate"),
    "not UTF-8": ("c.jsonl", b'{"_id": "1", "text": "\xff"}\n', r"c.jsonl:1: this is not UTF-8"),
    "twice": (
        "c.jsonl",
        b'\n{"id": "1", "text": "a"}\n\n{"id": "1", "text": "b"}',
        r"c.jsonl:4: the id '1' stands here",
    ),
    "empty": ("c.jsonl", b"\n \n", r"c.jsonl: the file holds no texts"),
    "damaged": ("c.jsonl.gz", gzip.compress(b'{"_id": "1", "text": "a"}\n' * 9)[:-9], r"c.jsonl.gz"),
    "three fields": ("c.tsv", b"1\ta\n2\tb\tc\n", r"c.tsv:2: expected `id<TAB>text`, got 3 fields"),
    "one field": ("c.tsv", b"text\n", r"c.tsv:1: expected `id<TAB>text`, got 1 field"),
    "TSV twice": ("c.tsv", b"id\ttext\n1\ta\n2\tb\n1\tc\n", r"c.tsv:4: the id '1' stands here for the second time"),
    "no Parquet": ("c.parquet", b"PAR1", r"c.parquet: this is not a readable Parquet file"),
    "unknown": ("c.docx", b"x", r"c.docx: the name does not say what it is"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_an_error_with_its_place(tmp_path: Path, case: str) -> None:
    """Prevents half a corpus in the cache, which the next run would take for the whole."""
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    for _ in range(2):
        with pytest.raises(FormatError, match=message):
            Texts.open(tmp_path / name, cache_dir=tmp_path / "own")
    assert not list(tmp_path.glob("own/*"))


def test_bad_parquet_rows_have_a_place(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["1", "2"], "text": ["a", None]}), tmp_path / "c.parquet")
    with pytest.raises(FormatError, match=r"c.parquet:2: text must be a text, got None"):
        Texts.open(tmp_path / "c.parquet")
    folder = write_parquet(tmp_path, {"1": "a", "2": "b"}, files=2)
    pq.write_table(pa.table({"id": ["3", "2"], "text": ["a", "b"]}), folder / "part-2.parquet")
    with pytest.raises(FormatError, match=r"part-2.parquet:2: the id '2' stands here for the second time"):
        Texts.open(folder)
    pq.write_table(pa.table({"id": ["3"], "body": ["a"]}), folder / "part-2.parquet")
    with pytest.raises(
        FormatError, match=r"part-2.parquet: expected one text among .* the columns are \['id', 'body'\]"
    ):
        Texts.open(folder)


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        Texts.open(tmp_path / "lost.jsonl")
    with pytest.raises(FormatError, match=r"the folder has no queries: expected queries\.jsonl"):
        Texts.open(tmp_path, "queries")
    with pytest.raises(FormatError, match="the mapping of corpus is empty"):
        Texts.open({})
    with pytest.raises(FormatError, match=r"corpus, id 'd1': the text must be a text, got 4"):
        Texts.open({"d1": 4})
    with pytest.raises(FormatError, match=r"corpus, id 'd1': expected a text, or a mapping with `text`"):
        Texts.open({"d1": {"title": "x"}})
    with pytest.raises(FormatError, match=r"corpus, id 2: .*is int, but those before were str"):
        Texts.open({"d1": "x", 2: "y"})
    with pytest.raises(TypeError, match="Of a DatasetDict choose a split"):
        Texts.open(DatasetDict(train=to_dataset(DOCUMENTS)))
    with pytest.raises(TypeError, match="load it without streaming"):
        Texts.open(to_dataset(DOCUMENTS).to_iterable_dataset())
    with pytest.raises(FormatError, match=r"the id 'd1' stands twice in the corpus, the second time in row 3"):
        Texts.open(Dataset.from_dict({"id": ["d1", "d2", "d1"], "text": ["a", "b", "c"]}))
    with pytest.raises(FormatError, match=r"1 of 2 rows of the corpus have no text"):
        Texts.open(Dataset.from_dict({"id": ["d1", "d2"], "text": ["a", None]}))
    with pytest.raises(FormatError, match=r"ids must be strings or integers and the texts strings, got double"):
        Texts.open(Dataset.from_dict({"id": [1.0], "text": ["a"]}))
    with pytest.raises(ValueError, match="size must be at least 1"):
        next(Texts.open(DOCUMENTS).batches(0))


def test_the_cache_is_used_and_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents stale texts after an edit, and a second reading of 8.8 million lines."""
    path = write_jsonl(tmp_path, {"a": "old"})
    own = tmp_path / "own"
    assert dict(Texts.open(path, cache_dir=own)) == {"a": "old"}
    assert len(list(own.iterdir())) == 1
    opened = Texts.open(path, cache_dir=own)
    with monkeypatch.context() as patch:
        patch.setattr("st_m3se.data.text_files.read_texts", lambda *_: pytest.fail("the file was read again"))
        assert dict(Texts.open(path, cache_dir=own)) == {"a": "old"}
    path.write_bytes(jsonl({"a": "new text"}))
    assert dict(Texts.open(path, cache_dir=own)) == {"a": "new text"}
    assert dict(opened) == {"a": "old"}


def test_a_damaged_copy_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents other texts, and the end of the process: Arrow follows a mapped file's offsets wherever they lead."""
    texts = {f"d{row}": f"text {row}" * (row % 5) for row in range(200)}
    path, own = write_jsonl(tmp_path, texts), tmp_path / "own"
    Texts.open(path, cache_dir=own)
    (copy,) = own.iterdir()
    whole = copy.read_bytes()
    for content in [*damaged(whole, 60), b""]:
        copy.write_bytes(content)
        caplog.clear()
        assert dict(Texts.open(path, cache_dir=own)) == texts
        assert f"{copy}, the copy of {path} in the cache, is damaged" in caplog.text
        assert copy.read_bytes() == whole
    assert list(own.iterdir()) == [copy]


def test_the_fingerprint_sees_every_change() -> None:
    texts = {"a": "one", "b": "two"}
    others = [
        {"b": "two", "a": "one"},
        {"a": "on", "b": "etwo"},
        {"a": "one", "b": "two", "c": ""},
        {"ab": "one", "b": "two"},
        {"a": "onetwo", "b": ""},
        {1: "one", 2: "two"},
    ]
    fingerprints = [Texts.open(value).fingerprint for value in (texts, *others)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(value) == 32 for value in fingerprints)


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, DOCUMENTS)
    code = "from st_m3se.data.texts import Texts; "
    code += f"print(Texts.open({str(path)!r}, cache_dir={str(tmp_path)!r}).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == Texts.open(DOCUMENTS).fingerprint


def test_many_texts_over_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents an error at the border of two record batches, and a fingerprint that depends on where they are."""
    rng = random.Random(0)
    texts = {f"d{rng.randrange(10**9)}_{row}": "x" * rng.randrange(20) for row in range(1000)}
    whole = Texts.open(texts)
    for module in ("data.texts", "data.text_files"):
        monkeypatch.setattr(f"st_m3se.{module}.GROUP_TEXTS", 64)
    monkeypatch.setattr("st_m3se.data.text_files.GROUP_CHARACTERS", 300)
    opened = Texts.open(write_jsonl(tmp_path, texts))
    assert opened.ids.num_chunks > 15
    ids = rng.choices(list(texts), k=500)
    assert opened.take(ids) == [texts[key] for key in ids]
    assert list(opened.items()) == list(texts.items())
    assert opened.fingerprint == whole.fingerprint


ANY_ID = st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(), st.sampled_from(["a", "a\0", "", 0, 2**63]))


@given(
    st.one_of(
        st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), unique=True),
        st.lists(st.integers(-(2**63), 2**63 - 1), unique=True),
    ),
    st.lists(ANY_ID),
)
def test_sorted_ids_find_what_a_dict_finds(ids: list[Any], wanted: list[Any]) -> None:
    column = pa.chunked_array([pa.array(ids, pa.int64() if ids and isinstance(ids[0], int) else pa.string())])
    index = SortedIds(column)
    known = {(type(value), value): row for row, value in enumerate(ids)}
    wanted = wanted + ids[::-1]
    expected = [known.get((type(value), value), -1) for value in wanted]
    assert index.find_all(wanted).tolist() == expected
    assert [-1 if (row := index.find(value)) is None else row for value in wanted] == expected
    assert index.first_duplicate() is None
    if ids:
        twice = pa.chunked_array([*column.chunks, column.chunks[0][-1:]])
        assert SortedIds(twice).first_duplicate() == (ids[-1], len(ids))


# Texts that are less than perfect, for evaluation.

REPEATED = [("a", "old"), ("b", "two"), ("a", "new"), ("c", ""), ("c", "three"), ("b", "two")]


def write_repeated(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": text_id, "text": text}) + "\n" for text_id, text in REPEATED))
    return path


def test_the_last_text_of_an_id_that_repeats_stands_in_the_place_of_the_first(tmp_path: Path) -> None:
    """As in the dictionary that BEIR's loader makes; and the strict way still refuses the same file."""
    path = write_repeated(tmp_path)
    for _ in range(2):  # from the file, and from the cache
        texts = Texts.open(path, duplicates="last")
        assert list(texts.items()) == list(dict(REPEATED).items())
        assert texts.repeated == ["a", "b", "c"]
        assert pickle.loads(pickle.dumps(texts)).repeated == texts.repeated
        with pytest.raises(FormatError, match=r"corpus\.jsonl:3: the id 'a' stands here for the second time"):
            Texts.open(path)
    whole = write_jsonl(tmp_path, DOCUMENTS)
    texts = Texts.open(whole, duplicates="last")
    assert dict(texts) == DOCUMENTS
    assert texts.repeated == []
    assert len(list((tmp_path / "cache").rglob("corpus-*.arrow"))) == 2
    assert Texts.open(whole).fingerprint == texts.fingerprint


def test_many_repeated_ids_of_integers(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [(rng.randrange(9_000), str(number)) for number in range(40_000)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": text_id, "text": text}) + "\n" for text_id, text in rows))
    texts = Texts.open(path, duplicates="last")
    assert list(texts.items()) == list(dict(rows).items())
    assert texts.id_type == "int"
    counts = Counter(text_id for text_id, _ in rows)
    assert set(texts.repeated) == {text_id for text_id, count in counts.items() if count > 1}


def test_blank_texts_are_found() -> None:
    values = ["x", "", " ", "\u2003\n", " x", "\u00a0", "0", "é" * 100, " " * 100]
    texts = Texts.open({f"d{place}": text for place, text in enumerate(values)})
    assert texts.blank().tolist() == [place for place, text in enumerate(values) if not text or text.isspace()]
    sliced = Dataset.from_dict({"id": [str(place) for place in range(9)], "text": values}).select(range(3, 9))
    assert Texts.open(sliced).blank().tolist() == [0, 2, 5]
    assert Texts.open({"d": "x"}).blank().tolist() == []


def test_rows_are_found_where_there_are_any(tmp_path: Path) -> None:
    texts = Texts.open(write_jsonl(tmp_path, DOCUMENTS))
    assert texts.find(["7", "absent", "d10", 7]).tolist() == [3, -1, 0, -1]
