"""Teacher scores: the store that people open, select from, describe and publish."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_m3se.core.files import scratch_folder
from st_m3se.scores.describe import ScoreSummary, describe
from st_m3se.scores.hub import CARD, LIBRARY, open_repository, save_for_hub
from st_m3se.scores.store import ScoredLists

__all__ = ["TeacherScores"]


class TeacherScores(ScoredLists):
    """The scores that a teacher gave to each query's candidate documents.

    A store is a folder of Parquet shards with the columns ``query_id``, ``document_ids`` (list) and ``scores`` (list
    of float32), and a ``manifest.json`` that says where they come from. Parquet files of this layout without a
    manifest, such as the published MS MARCO distillation sets, open just as well. Ids are str or int and stay so.
    Opening reads the manifest and the files' ends; rows are decoded when they are asked for.

    A damaged store gives an error and no wrong scores: the manifest holds its own checksum and that of each shard. The
    content of a shard is compared when it is first read (a second for 10 GB, or what the disk takes). What was opened
    stays open, even if another process replaces the store meanwhile.

    Open one with :meth:`open`, make one with :meth:`from_rows`, :class:`TeacherScoresWriter` or
    :func:`~st_m3se.scores.convert`. Iterating gives :class:`ScoredList` rows; ``scores[query_id]`` looks one up.

    Attributes:
        manifest: The content of ``manifest.json``; unknown values are None.
    """

    def describe(
        self,
        qrels: Mapping[Any, Mapping[Any, int]] | None = None,
        *,
        bins: int = 20,
        show_progress_bar: bool = False,
    ) -> ScoreSummary:
        """Histograms of scores and margins, list lengths, and with ``qrels`` the coverage of the positives."""
        return describe(self, qrels, bins=bins, show_progress_bar=show_progress_bar)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        license: str | None = None,
        exist_ok: bool = False,
        replace_dataset_card: bool = False,
        commit_message: str = "Upload teacher scores",
        revision: str | None = None,
        create_pr: bool = False,
        token: bool | str | None = None,
    ) -> str:
        """Publish the store as a dataset repository of the Hugging Face Hub, and return the address of the commit.

        :meth:`from_hub` and ``datasets.load_dataset(repo_id, split="train")`` both read it. Texts and positives that
        lie beside the shards (``queries.jsonl``, ``corpus.jsonl``, ``qrels/``) go along: mind their licence. A
        selection or concatenation is written out first, without them.

        Args:
            repo_id: "user/name" or "organization/name"; made if it does not exist.
            private: Make a new repository private. None is the organization's default.
            license: For the card, such as "apache-2.0".
            exist_ok: Replace the scores in a repository that exists already.
            replace_dataset_card: Replace its ``README.md`` as well, which is kept otherwise.
            commit_message: Of the commit.
            revision: The branch, made if it does not exist.
            create_pr: Open a pull request instead of writing to the branch.
            token: Of the account; None takes the one of ``hf auth login``.
        """
        from huggingface_hub import HfApi

        with scratch_folder(Path(tempfile.gettempdir()) / "st-m3se-upload") as scratch:
            folder = scratch / "repository"
            save_for_hub(self, folder, repo_id=repo_id, license=license)  # first: what fails here has changed nothing
            api = HfApi(token=token, library_name=LIBRARY)
            # With the user's name in front, if it was left out.
            place: dict[str, Any] = {"repo_type": "dataset"}
            repo_id = api.create_repo(repo_id, **place, private=private, exist_ok=exist_ok or create_pr).repo_id
            if revision is not None:
                api.create_branch(repo_id, **place, branch=revision, exist_ok=True)
            keep_card = not replace_dataset_card and api.file_exists(repo_id, CARD, **place, revision=revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                **place,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=[CARD] if keep_card else None,
                delete_patterns=["data/*.parquet"],  # an older version may have had more shards
            )
        return str(commit.commit_url)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        config_name: str | None = None,
        *,
        split: str = "train",
        data_dir: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: bool | str | None = None,
    ) -> TeacherScores:
        """Download a store, or a set in any layout that :func:`~st_m3se.scores.convert` reads, and open it.

        What has the columns of a store is opened in the hub's cache; another layout becomes a store beside it, once.

        Args:
            repo_id: The dataset repository, or a local folder of the same layout.
            config_name: The configuration ("subset") with the scores, where there are several, such as "train" of
                "lightonai/ms-marco-en-bge".
            split: The split of the configuration.
            data_dir: The folder of the Parquet files, for a repository whose card does not name them. The hub's own
                copy of a set in another format is ``revision="refs/convert/parquet", data_dir="CONFIG/SPLIT"``.
            revision: A branch, tag or commit.
            cache_dir: Instead of the hub's cache.
            token: For a private repository; None takes the one of ``hf auth login``.

        Raises:
            FormatError: If the repository holds no such configuration or split, or no teacher scores in Parquet.
        """
        store = open_repository(repo_id, config_name, split, data_dir, revision, cache_dir, token)
        return cls(store._shards, store.manifest)
