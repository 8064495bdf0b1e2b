"""Queries, documents and judgements opened together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from st_m3se import Collection, FormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, texts in {"queries": {"q1": "red", "q2": "blue", "q3": ""}, "corpus": {"d1": "a", "d2": ""}}.items():
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td1\t1\nq9\td1\t1\n")
    return tmp_path


def kinds(found: Collection) -> list[str]:
    return [finding.kind for finding in found.findings]


def test_a_folder_is_opened_with_the_judgements_of_a_split(folder: Path) -> None:
    whole = Collection.open(folder, "train")
    assert (whole.name, whole.split, whole.qrels) == (folder.name, "train", {"q2": {"d1": 1}, "q9": {"d1": 1}})
    assert [len(texts) for texts in whole.texts] == [3, 2]
    assert kinds(whole) == ["empty queries", "empty documents"]
    judged = Collection.open(folder, "train", judged_only=True)
    assert (list(judged.texts[0]), judged.qrels) == (["q2"], {"q2": {"d1": 1}})
    assert kinds(judged) == ["judgements of absent queries", "empty documents"]  # what is empty is not judged
    assert Collection.open(judged) is judged
    assert Collection.open(folder).qrels is None


def test_files_and_mappings_stand_in_for_a_folder(folder: Path) -> None:
    found = Collection.open(
        queries={1: "red"}, corpus=folder / "corpus.jsonl", qrels={1: {"d1": 2}}, name="mine", judged_only=True
    )
    assert (found.name, found.split, found.qrels, list(found.texts[0])) == ("mine", None, {1: {"d1": 2}}, [1])


def test_what_cannot_be_opened_says_what_to_name(folder: Path) -> None:
    with pytest.raises(ValueError, match="name a folder with data, or files with queries and corpus"):
        Collection.open()
    with pytest.raises(ValueError, match="name either data, or both queries and corpus"):
        Collection.open(folder, queries=folder)
    with pytest.raises(ValueError, match="or both queries and corpus"):
        _ = Collection.open(queries=folder).texts
    with pytest.raises(FormatError, match="no such folder, and no BEIR set of this name"):
        Collection.open(folder / "lost")
    with pytest.raises(FormatError, match=r"no judgements for the split 'dev'.*there are train"):
        Collection.open(folder, "dev")
