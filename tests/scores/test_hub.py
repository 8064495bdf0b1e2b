"""Only the hub's two network calls are replaced, by a folder on this disk that behaves as a repository does."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from st_m3se.core.errors import FormatError
from st_m3se.core.files import checked_json
from st_m3se.scores import TeacherScores, TeacherScoresWriter
from st_m3se.scores import convert as convert_scores
from st_m3se.scores.hub import save_for_hub

ROWS = [("q2", ["d1", "d2", "d3"], [3.5, -1.25, 0.5]), ("q10", ["d9"], [2.0]), ("q1", ["d1"], [4.0])]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def plain(rows: Any) -> list[tuple[object, list[object], list[float]]]:
    return [(row.query_id, list(row.document_ids), list(row.scores)) for row in rows]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def store(tmp_path: Path) -> TeacherScores:
    """Two shards and a manifest."""
    manifest = {"teacher": "my/cross-encoder", "max_length": 512, "source": {"file": "a|b.tsv"}}
    with TeacherScoresWriter(tmp_path / "store", manifest=manifest, shard_scores=1) as writer:
        writer.write(*ROWS[0])
        writer._flush(writer.folder)  # rows are buffered: end the first shard here
        for row in ROWS[1:]:
            writer.write(*row)
    store = TeacherScores.open(tmp_path / "store")
    assert len(store.files) == 2
    return store


class Hub:
    """Repositories as folders: an upload adds files and deletes by pattern, a download copies what matches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, *, exist_ok: bool, **options: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", options))
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", options))

    def file_exists(self, repo_id: str, name: str, *, repo_type: str, revision: str | None) -> bool:
        assert repo_type == "dataset"
        return (self.folder / repo_id / name).is_file()

    def upload_folder(
        self, *, repo_id: str, folder_path: str, ignore_patterns: Any, delete_patterns: list[str], **options: Any
    ) -> SimpleNamespace:
        self.calls.append(("upload_folder", options))
        target = self.folder / repo_id
        for path in list(target.rglob("*")):
            if path.is_file() and any(fnmatch(path.relative_to(target).as_posix(), one) for one in delete_patterns):
                path.unlink()
        shutil.copytree(
            folder_path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*(ignore_patterns or []))
        )
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}")

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append(("snapshot_download", options))
        source, target = self.folder / repo_id, self.folder / "cache" / COMMIT
        target.mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        return str(target)

    def options(self, call: str) -> dict[str, Any]:
        return next(options for name, options in self.calls if name == call)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token, library_name: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_the_folder_is_a_dataset_and_a_store(store: TeacherScores, tmp_path: Path) -> None:
    save_for_hub(store, tmp_path / "repository", repo_id="me/scores", license="apache-2.0")
    names = sorted(path.relative_to(tmp_path / "repository").as_posix() for path in tmp_path.glob("repository/**/*"))
    shards = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert names == ["README.md", "data", *shards, "manifest.json"]
    for opened in (TeacherScores.open(tmp_path / "repository"), TeacherScores.from_hub(str(tmp_path / "repository"))):
        assert plain(opened) == ROWS
        assert {**opened.manifest, "shards": None} == {**store.manifest, "shards": None}
        opened.validate()
    dataset = load_dataset(str(tmp_path / "repository"), split="train")
    assert dataset.column_names == ["query_id", "document_ids", "scores"]
    assert [tuple(row.values()) for row in dataset] == ROWS
    (tmp_path / "repository" / "README.md").unlink()  # a card of the user's own may have no configurations
    assert len(load_dataset(str(tmp_path / "repository"), split="train")) == 3


def test_the_card_says_what_the_manifest_says(store: TeacherScores, tmp_path: Path) -> None:
    save_for_hub(store, tmp_path / "repository", repo_id="me/scores", license="apache-2.0")
    card = huggingface_hub.DatasetCard.load(tmp_path / "repository" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "knowledge-distillation" in card.data.tags
    for line in ("| teacher | my/cross-encoder |", "| max length | 512 |", "| queries | 3 |", "| scores | 5 |"):
        assert line in card.text.splitlines()
    assert "a\\|b.tsv" in card.text
    assert 'load_dataset("me/scores", split="train")' in card.text
    assert 'TeacherScores.from_hub("me/scores")' in card.text
    assert "`query_id` (str)" in card.text
    assert "revision" not in card.text  # what is not known is not said


def test_texts_and_positives_go_along(tmp_path: Path) -> None:
    """Ids that were made for texts mean nothing to anybody without the texts."""
    (tmp_path / "pairs.tsv").write_text("9.5\t-1.25\twhat is it\tthis is it\tthat is not\n")
    convert_scores(tmp_path / "pairs.tsv", tmp_path / "store")
    (tmp_path / "store" / "notes.txt").write_text("private")
    save_for_hub(TeacherScores.open(tmp_path / "store"), tmp_path / "repository", repo_id="me/scores")
    repository = tmp_path / "repository"
    assert not (repository / "notes.txt").exists()
    assert (repository / "corpus.jsonl").read_bytes() == (tmp_path / "store" / "corpus.jsonl").read_bytes()
    assert (repository / "qrels" / "train.tsv").read_bytes().count(b"\n") == 2
    assert "`queries.jsonl`, `corpus.jsonl`, `qrels/train.tsv`" in (repository / "README.md").read_text()
    scores = load_dataset(str(repository), split="train")[0]  # one format a repository: these must not disturb it
    assert {json.loads(line)["_id"] for line in (repository / "corpus.jsonl").open()} == set(scores["document_ids"])
    again = TeacherScores.from_hub(str(repository))
    save_for_hub(again, tmp_path / "again", repo_id="me/scores")
    assert (tmp_path / "again" / "corpus.jsonl").is_file()


def test_selections_and_sets_without_a_manifest_are_written_first(store: TeacherScores, tmp_path: Path) -> None:
    save_for_hub(store.select(["q1", "q2"]), tmp_path / "repository", repo_id="me/scores")
    opened = TeacherScores.open(tmp_path / "repository")
    assert plain(opened) == [ROWS[2], ROWS[0]]
    assert (opened.manifest["teacher"], opened.manifest["queries"]) == ("my/cross-encoder", 2)
    assert sorted(path.name for path in (tmp_path / "repository").iterdir()) == ["README.md", "data", "manifest.json"]
    files = TeacherScores.open(store.files[0])
    save_for_hub(files, tmp_path / "other", repo_id="me/scores")
    assert plain(TeacherScores.open(tmp_path / "other")) == ROWS[:1]


def test_what_cannot_be_published_is_refused(store: TeacherScores, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="not empty"):
        save_for_hub(store, tmp_path, repo_id="me/scores")
    with pytest.raises(ValueError, match="empty"):
        save_for_hub(TeacherScores.from_rows([], tmp_path / "empty"), tmp_path / "new", repo_id="me/scores")


def test_push_and_load(store: TeacherScores, hub: Hub) -> None:
    url = store.push_to_hub("scores", private=True, revision="v1", token="secret", commit_message="Add scores")
    assert url == f"https://hub/me/scores/commit/{COMMIT}"
    assert hub.options("create_repo") == {"repo_type": "dataset", "private": True}
    assert hub.options("create_branch") == {"repo_type": "dataset", "branch": "v1", "exist_ok": True}
    uploaded = hub.options("upload_folder")
    assert (uploaded["repo_type"], uploaded["revision"], uploaded["create_pr"]) == ("dataset", "v1", False)
    assert uploaded["commit_message"] == "Add scores"
    loaded = TeacherScores.from_hub("me/scores", revision="v1", token="secret")
    assert plain(loaded) == ROWS
    assert loaded.manifest["teacher"] == "my/cross-encoder"
    asked = hub.options("snapshot_download")
    assert (asked["repo_type"], asked["revision"], asked["token"]) == ("dataset", "v1", "secret")


def test_a_push_replaces_scores_only_when_asked(store: TeacherScores, hub: Hub) -> None:
    """Prevents a second push from leaving shards of the first, and from overwriting a card that people wrote."""
    store.push_to_hub("me/scores")
    card = hub.folder / "me" / "scores" / "README.md"
    card.write_text("What we know of these scores.\n")
    with pytest.raises(FileExistsError):
        store.push_to_hub("me/scores")
    store.select(["q10"]).push_to_hub("me/scores", exist_ok=True)
    assert plain(TeacherScores.from_hub("me/scores")) == [ROWS[1]]
    assert card.read_text() == "What we know of these scores.\n"
    assert [path.name for path in sorted(card.parent.glob("data/*"))] == ["train-00000-of-00001.parquet"]
    store.push_to_hub("me/scores", exist_ok=True, replace_dataset_card=True)
    assert "| teacher |" in card.read_text()


def publish(folder: Path, name: str, rows: list[tuple]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "query_id": [row[0] for row in rows],
        "document_ids": [row[1] for row in rows],
        "scores": pa.array([row[2] for row in rows], pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(columns), folder / name)


HEAD = """---
dataset_info:
  - config_name: train
    features:
      - name: query_id
        dtype: string
configs:
  - config_name: queries
    data_files:
      - split: train
        path: english_queries.train.parquet
  - config_name: train
    data_files:
      - split: train
        path: dataset.parquet
  - config_name: folders
    data_files:
      - split: train
        path: [parts/**/one.parquet, parts/two-*]
      - split: test
        path: parts/test.parquet
  - config_name: plain
    data_dir: plain
  - config_name: lines
    data_files: lines/*.jsonl
---
# a set
"""


@pytest.fixture
def published(hub: Hub) -> Path:
    """A repository with several configurations, laid out as those of the MS MARCO distillation sets are."""
    folder = hub.folder / "they" / "kd"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(HEAD)
    pq.write_table(pa.table({"query_id": ["1"], "text": ["what"]}), folder / "english_queries.train.parquet")
    publish(folder, "dataset.parquet", ROWS)
    publish(folder, "parts/a/b/one.parquet", ROWS[:1])
    publish(folder, "parts/two-0.parquet", ROWS[1:])
    publish(folder, "parts/test.parquet", [("t", ["d"], [1.0])])
    publish(folder, "plain/x.parquet", ROWS[2:])
    (folder / "lines").mkdir()
    (folder / "lines" / "a.jsonl").write_text("{}\n")
    return folder


def test_a_published_set_loads_by_its_configuration(published: Path, hub: Hub) -> None:
    scores = TeacherScores.from_hub("they/kd", "train")
    assert plain(scores) == ROWS
    assert scores["q10"].scores == [2.0]
    assert scores.manifest["source"] == {
        "repository": "they/kd",
        "config_name": "train",
        "data_dir": None,
        "split": "train",
        "revision": COMMIT,
    }
    downloaded = hub.folder / "cache" / COMMIT
    assert not (downloaded / "english_queries.train.parquet").exists()  # the other configurations stay where they are
    assert plain(TeacherScores.from_hub(str(published), "train")) == ROWS
    save_for_hub(scores, hub.folder / "mine", repo_id="me/kd")
    assert plain(TeacherScores.open(hub.folder / "mine")) == ROWS


def test_splits_folders_and_patterns(published: Path) -> None:
    assert plain(TeacherScores.from_hub("they/kd", "folders")) == ROWS
    assert [row.query_id for row in TeacherScores.from_hub("they/kd", "folders", split="test")] == ["t"]
    assert plain(TeacherScores.from_hub("they/kd", "plain")) == ROWS[2:]
    assert plain(TeacherScores.from_hub("they/kd", data_dir="plain")) == ROWS[2:]
    expected = load_dataset(str(published), "folders", split="train")
    assert sorted(expected["query_id"]) == sorted(row[0] for row in ROWS)


def test_what_a_repository_does_not_hold_is_said(published: Path) -> None:
    for arguments, message in [
        ((), r"has the configurations \['folders', 'lines', .*choose the one with the scores"),
        (("trian",), r"\['folders', .*not 'trian'"),
        (("lines",), r"in a\.jsonl, not in Parquet\. Convert the file, which is here: st-m3se convert .*a\.jsonl OUT"),
        (("queries",), r"they/kd: expected one column for document_id .*got \['query_id', 'text'\]"),
    ]:
        with pytest.raises(FormatError, match=message):
            TeacherScores.from_hub("they/kd", *arguments)
    with pytest.raises(FormatError, match=r"splits \['test', 'train'\], not 'dev'"):
        TeacherScores.from_hub("they/kd", "folders", split="dev")
    with pytest.raises(FormatError, match=r"no file that matches nowhere/\*\.parquet"):
        TeacherScores.from_hub("they/kd", data_dir="nowhere")
    with pytest.raises(ValueError, match="both say"):
        TeacherScores.from_hub("they/kd", "train", data_dir="plain")
    (published / "README.md").unlink()
    with pytest.raises(FormatError, match=r"names no configurations.*data_dir"):
        TeacherScores.from_hub(str(published), "train")


def test_a_repository_with_one_configuration_needs_no_name(published: Path) -> None:
    for head in (
        "---\nconfigs:\n- config_name: kd\n  data_files: dataset.parquet\n---\n",
        "---\nconfigs:\n- config_name: kd\n  data_files: [dataset.parquet]\n  default: true\n- config_name: b\n---\n",
        "---\nconfigs:\n- config_name: b\n- config_name: default\n  data_files: dataset.parquet\n---\n",
    ):
        (published / "README.md").write_text(head)
        assert plain(TeacherScores.from_hub(str(published))) == ROWS
    only = published.parent / "only"
    publish(only, "data/train-00000-of-00001.parquet", ROWS)
    assert plain(TeacherScores.from_hub("they/only")) == ROWS


@pytest.mark.parametrize(
    "head",
    [
        "configs: 3",
        "configs: [3]",
        "configs: [{config_name: 3}]",
        "configs: [{config_name: a, data_files: 3}]",
        "configs: [{config_name: a, data_files: [{split: train}]}]",
        "configs: [{config_name: a, data_files: [{split: train, path: 3}]}]",
        "configs: [{config_name: a, data_dir: 3}]",
        "configs: {a: b}",
        "a: [",
        "&a [*a]",
    ],
)
def test_a_damaged_card_is_refused(head: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(FormatError, match=r"card of the repository does not say|no file that matches"):
        TeacherScores.from_hub(str(tmp_path))


def test_foreign_names_stay_text_in_the_card(tmp_path: Path) -> None:
    hostile = "a|b <script>alert(1)</script>\n# Heading [x](y)"
    store = TeacherScores.from_rows(ROWS, tmp_path / "store", manifest={"teacher": hostile, "source": {"run": hostile}})
    save_for_hub(store, tmp_path / "repository", repo_id="me/scores")
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "<script" not in card.replace("\\<script", "")
    assert "\n# Heading" not in card
    with pytest.raises(ValueError, match="Repo id"):
        save_for_hub(store, tmp_path / "other", repo_id='me/a"b\n# x')


def test_a_link_out_of_the_store_is_not_published(tmp_path: Path) -> None:
    """Prevents the upload of a file that has nothing to do with the scores."""
    store = TeacherScores.from_rows(ROWS, tmp_path / "store")
    (tmp_path / "private.txt").write_text("private")
    (tmp_path / "store" / "corpus.jsonl").symlink_to(tmp_path / "private.txt")
    with pytest.raises(FormatError, match=r"corpus\.jsonl.*symbolic link to .*private\.txt"):
        save_for_hub(store, tmp_path / "repository", repo_id="me/scores")


def test_a_manifest_reaches_only_into_its_own_folder(store: TeacherScores, tmp_path: Path) -> None:
    save_for_hub(store, tmp_path / "repository", repo_id="me/scores")
    path = tmp_path / "repository" / "manifest.json"
    good = json.loads(path.read_text())
    for file in ("data/../../x.parquet", "/data/x.parquet", "data/data/x.parquet", "other/x.parquet"):
        path.write_text(checked_json({**good, "shards": [{**good["shards"][0], "file": file}]}))
        with pytest.raises(FormatError, match="outside the folder"):
            TeacherScores.open(tmp_path / "repository")
