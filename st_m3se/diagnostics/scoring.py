"""The scores of the same lists by any scorer, each as a store in the output folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from st_m3se.data.texts import Texts
from st_m3se.diagnostics.lists import JudgedLists
from st_m3se.evaluation.rankers import bm25_scores
from st_m3se.retrieval.bm25 import BM25
from st_m3se.retrieval.scoring import as_teacher, score_candidates
from st_m3se.scores.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    Scorer: TypeAlias = (
        TeacherScores | BM25 | CrossEncoder | SentenceTransformer | Callable[[list[tuple[str, str]]], Any] | str | Path
    )

__all__ = ["describe_scorer", "folder_names", "score_lists"]

KEPT = ("teacher", "revision", "max_length", "dtype", "activation", "source")  # of the manifest of a store


def score_lists(
    lists: JudgedLists,
    scorers: Mapping[str, Scorer],
    queries: Texts | None,
    corpus: Texts | None,
    output: Path,
    *,
    show_progress_bar: bool = True,
    **options: Any,
) -> dict[str, TeacherScores]:
    """Score every document of the lists with every scorer; gives the stores by name.

    Models go through :func:`~st_m3se.score_candidates`: raw logits, and what was killed goes on with the same call.
    BM25 scores, and those that are taken from a store, are written anew.

    Args:
        lists: What to score.
        scorers: By name: a store; "bm25" or :class:`~st_m3se.BM25`; or whatever ``score_candidates`` takes as a
            teacher.
        queries: Their texts; needed by all but stores.
        corpus: The documents, likewise.
        output: The folder in which each scorer gets a folder of its name.
        show_progress_bar: Show progress.
        options: For ``score_candidates``, of models: ``max_length``, ``dtype``, ``batch_tokens``, ``device``, ...
    """
    stores = {}
    folders = folder_names(scorers)
    of_models = {key: value for key, value in options.items() if key not in ("shard_queries", "strict")}
    for name, scorer in scorers.items():  # what cannot score is told before others have worked for hours
        if _is_model(scorer) and len(scorers) > 1:
            as_teacher(scorer, name=name, **{} if _is_function(scorer) else of_models)
    # Models first: one that was begun with other lists is refused before anything is replaced.
    for name in sorted(scorers, key=lambda name: not _is_model(scorers[name])):
        scorer, place = scorers[name], output / folders[name]
        if isinstance(scorer, TeacherScores):
            scored = zip(lists.split(lists.document_ids), lists.split(lists.scores(scorer).tolist()), strict=True)
            rows = ((query, documents, own) for (query, documents), (_, own) in scored)
            manifest = {field: scorer.manifest.get(field) for field in KEPT}
            stores[name] = TeacherScores.from_rows(rows, place, manifest=manifest, overwrite=True)
            continue
        if queries is None or corpus is None:
            raise ValueError(f"the scorer {name} reads texts: give queries and corpus, or a store of its scores.")
        if isinstance(scorer, BM25) or scorer == "bm25":
            source = scorer if isinstance(scorer, BM25) else BM25()
            found = bm25_scores(source, lists.by_query(), queries, corpus, place, show_progress_bar=show_progress_bar)
            manifest = {"teacher": "bm25", "source": {"candidates": [source.description]}}
            stores[name] = TeacherScores.from_rows(found, place, manifest=manifest, overwrite=True)
            continue
        given = {} if _is_function(scorer) else options
        stores[name] = score_candidates(
            scorer,
            lists.by_query(),
            queries,
            corpus,
            place,
            name=None if isinstance(scorer, (str, Path)) else name,
            show_progress_bar=show_progress_bar,
            **given,
        )
    return {name: stores[name] for name in scorers}


def folder_names(names: Mapping[str, Any]) -> dict[str, str]:
    """A name for each scorer that a file system takes.

    Raises:
        ValueError: If two scorers would share a folder.
    """
    folders = {name: re.sub(r"[^\w.+-]+", "_", name).strip("._") or "scorer" for name in names}
    taken: dict[str, str] = {}
    for name, folder in folders.items():
        if (other := taken.setdefault(folder.lower(), name)) != name:
            raise ValueError(f"the scorers {other!r} and {name!r} would share the folder {folder!r}. Rename one.")
    return folders


def describe_scorer(store: TeacherScores) -> dict[str, Any]:
    """What a report says of the scorer behind a store."""
    known = {field: store.manifest.get(field) for field in ("teacher", "revision", "max_length", "dtype", "activation")}
    return {field: value for field, value in known.items() if value is not None}


def _is_model(scorer: Any) -> bool:
    return not isinstance(scorer, (TeacherScores, BM25)) and scorer != "bm25"


def _is_function(scorer: Any) -> bool:
    return not isinstance(scorer, (str, Path)) and not hasattr(scorer, "preprocess")  # the models' own
