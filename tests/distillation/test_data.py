"""Who is held out: from folders with every set of judgements, and from broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_fixtures import make_beir

from st_m3se.core.errors import FormatError
from st_m3se.distillation.data import SPLITS, open_data, split_by_hash


def sizes(folder: Path) -> tuple[int, ...]:
    """Queries by split, after a check that they are disjoint."""
    data = open_data(folder)
    parts = [set(data.qrels[split]) for split in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts))
    return tuple(map(len, parts))


def unjudged(folder: Path, count: int) -> None:
    with (folder / "queries.jsonl").open("a") as file:
        for number in range(count):
            file.write(json.dumps({"_id": f"u{number}", "text": f"a question {number}"}) + "\n")


def test_given_splits_are_kept(tmp_path: Path) -> None:
    assert sizes(make_beir(tmp_path / "all")) == (16, 16, 16)


@pytest.mark.parametrize("splits", [("test",), ("train",), ("dev", "test")])
def test_judgements_without_train_or_test_are_split(tmp_path: Path, splits: tuple[str, ...]) -> None:
    folder = make_beir(tmp_path / "beir", splits=splits)
    found = sizes(folder)
    assert sum(found) == 48
    assert all(found)
    data = open_data(folder)
    assert "split by a hash" in data.notes[-1]
    assert all(data.judged(split) for split in SPLITS)


def test_queries_made_of_one_document_stay_together() -> None:
    """Prevents what is held out from being given away by the other queries of its document."""
    made = {f"generated-{number}": {f"d{number // 3}": 1} for number in range(300)}
    parts = split_by_hash({**made, "own": {"d0": 1}}, dev=0.3, test=0.3)
    documents = [{next(iter(parts[split][q])) for q in parts[split] if q != "own"} for split in SPLITS]
    assert all(documents)
    assert sum(map(len, documents)) == 100


def test_train_queries_are_held_out_for_dev(tmp_path: Path) -> None:
    train, dev, test = sizes(make_beir(tmp_path / "beir", splits=("train", "test")))
    assert test == 24
    assert train + dev == 24
    assert 0 < dev < train


def test_queries_that_nobody_judged_are_the_training_queries(tmp_path: Path) -> None:
    """Prevents the few judgements that there are from being trained away."""
    folder = make_beir(tmp_path / "beir", splits=("test",))
    unjudged(folder, 60)
    data = open_data(folder)
    assert data.sizes["train"] == 60
    assert data.sizes["dev"] + data.sizes["test"] == 48
    assert not data.judged("train")
    assert data.judged("dev")
    assert "the teacher is their only label" in data.notes[-1]


def test_unjudged_queries_beside_judged_ones_are_trained_on_if_asked(tmp_path: Path) -> None:
    folder = make_beir(tmp_path / "beir")
    unjudged(folder, 60)
    data = open_data(folder)
    assert data.sizes == {"train": 16, "dev": 16, "test": 16}
    assert sorted(data.unjudged) == sorted(f"u{number}" for number in range(60))
    judged = set(data.qrels["train"])
    data.train_on_unjudged()
    assert data.sizes == {"train": 76, "dev": 16, "test": 16}
    data.cut({"train": 20})
    assert judged < set(data.qrels["train"]), "judged ones are kept first"
    assert data.sizes["train"] == 20


def test_without_any_judgements_queries_are_held_out_all_the_same(tmp_path: Path) -> None:
    folder = make_beir(tmp_path / "beir", splits=())
    assert sum(found := sizes(folder)) == 48
    assert all(found)
    assert not any(open_data(folder).judged(split) for split in SPLITS)


def test_a_test_query_is_no_training_query(tmp_path: Path) -> None:
    folder = make_beir(tmp_path / "beir")
    test = (folder / "qrels" / "test.tsv").read_text()
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write(test.split("\n", 1)[1])
    assert sizes(folder) == (16, 16, 16)
    assert "16 train queries are also dev or test queries" in open_data(folder).notes[-1]


def test_what_is_absent_is_left_out_and_noted(tmp_path: Path) -> None:
    folder = make_beir(tmp_path / "beir")
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("nobody\td00\t1\nq00\tnothing\t1\n")
    notes = " ".join(open_data(folder).notes)
    assert "1 judged test queries have no text, such as 'nobody'" in notes
    assert "1 relevant documents of test queries are not in the corpus, such as 'nothing'" in notes


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("queries.jsonl", None, "queries"),
        ("corpus.jsonl", "{broken\n", r"corpus\.jsonl:1"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq00 d00 1\n", r"test\.tsv:2"),
    ],
)
def test_broken_folders(file: str, content: str | None, words: str, tmp_path: Path) -> None:
    folder = make_beir(tmp_path / "beir")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(FormatError, match=words):
        open_data(folder)


def test_no_relevant_document_at_all_and_no_folder(tmp_path: Path) -> None:
    folder = make_beir(tmp_path / "beir")
    for path in (folder / "qrels").iterdir():
        path.write_text("query-id\tcorpus-id\tscore\nq00\td00\t0\n")
    with pytest.raises(FormatError, match="no query has a relevant document"):
        open_data(folder)
    with pytest.raises(FormatError, match="no such folder, and no BEIR set of this name"):
        open_data(tmp_path / "nowhere")
