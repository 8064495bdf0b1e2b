"""The ranking of a set's documents by a system, made once, kept in a folder, and never taken for another one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from st_m3se.core.errors import FormatError
from st_m3se.core.files import digest, read_checked_json, sweep_folder, write_checked_json
from st_m3se.core.findings import Finding
from st_m3se.core.scored_list import ScoredList
from st_m3se.evaluation.data import EvaluationSet
from st_m3se.retrieval.scoring import score_candidates
from st_m3se.scores.formats.runs import write_run
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import MANIFEST

__all__ = ["Ranker", "Ranking", "make_ranking"]

logger = logging.getLogger(__name__)

MADE_WITH = "system.json"
RUN = "run.trec"
LOCK = ".lock"


@dataclass
class Ranking:
    """One system's ranking of one set, and the folder that keeps it.

    Attributes:
        evaluation_set: The set.
        folder: The system's folder for this set; the ranking goes to ``folder / "run"``.
        depth: Documents per query, at most, where the corpus is searched.
        exclude_same_id: Whether the document with the query's own id is no result, unless it is judged for the query.
        batch_size: Texts that an encoder encodes at once.
        cache_dir: Where embeddings of a corpus are kept.
        show_progress_bar: Show progress.
        first: The first stage's ranking, for a re-ranker.
        seconds: What took how long; without a step that an earlier process did in part.
        findings: What was unusual.
        made_with: All that it depends on, as ``system.json`` keeps it.
    """

    evaluation_set: EvaluationSet
    folder: Path
    depth: int
    exclude_same_id: bool
    batch_size: int
    cache_dir: Path
    show_progress_bar: bool
    first: Ranking | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    made_with: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """Where the ranked lists are."""
        return self.folder / "run"

    def write(self, rows: Iterable[ScoredList], description: dict[str, Any]) -> None:
        """Write the ranked lists."""
        TeacherScores.from_rows(rows, self.store, manifest={"source": description}, overwrite=True)

    def score(self, model: Any, candidates: TeacherScores, step: str, **options: Any) -> TeacherScores:
        """Score candidates, going on where an earlier process ended; see :func:`~st_m3se.score_candidates`."""
        folder = self.folder / "scores"
        begun = folder.exists()
        with self.timed(step):
            scored: TeacherScores = score_candidates(
                model,
                candidates,
                *self.evaluation_set.texts,
                folder,
                show_progress_bar=self.show_progress_bar,
                **options,
            )
        if begun:
            del self.seconds[step]
        return scored

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the seconds of a step."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


def make_ranking(ranker: Ranker, ranking: Ranking, name: str) -> None:
    """Make a ranking, unless it is there; and fill in its seconds, findings and what it was made with.

    Args:
        ranker: The system.
        ranking: The set, and the folder.
        name: The system's name, the tag of the TREC run.

    Raises:
        ValueError: If the ranking that is there was made with something else; the message says with what.
        FileExistsError: If the folder holds something else.
    """
    now = {"system": ranker.description, "set": ranking.evaluation_set.fingerprint, **ranker.inputs(ranking)}
    if ranking.first is not None:
        now["first_stage"] = ranking.first.made_with
    ranking.made_with = json.loads(json.dumps(now))
    path, run = ranking.folder / MADE_WITH, ranking.folder / RUN
    ranking.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(ranking.folder / LOCK):  # whoever makes the same ranking in another process finishes it first
        sweep_folder(ranking.folder)
        if path.is_file():
            begun = _read(path)
            if differences := _differences(begun["settings"], ranking.made_with):
                raise ValueError(
                    f"{ranking.folder} holds a ranking that was made with something else: {'; '.join(differences)}. Go "
                    "on with what it was made with, choose another output or another name, or delete that folder to "
                    "make the ranking anew."
                )
            if "seconds" in begun and _is_there(ranking, begun):
                if run.is_file() and begun.get("trec") not in (None, digest(run)):
                    logger.warning(f"{run} was changed after it was written. It is written anew.")
                    run.unlink()
                _write_run(ranking, name)
                ranking.seconds = begun["seconds"]
                ranking.findings = [
                    Finding(kind, count, tuple(examples), effect) for kind, count, examples, effect in begun["findings"]
                ]
                return
        elif any(entry.name != LOCK for entry in ranking.folder.iterdir()):
            raise FileExistsError(
                f"{ranking.folder} exists and holds no ranking (it has no {MADE_WITH}); it is left alone. Choose "
                "another output."
            )
        write_checked_json(path, {"settings": ranking.made_with})
        ranker.rank(ranking)
        run.unlink(missing_ok=True)  # of a ranking that is lost
        _write_run(ranking, name)
        content = {
            "settings": ranking.made_with,
            "seconds": ranking.seconds,
            "findings": ranking.findings,
            "manifest": digest(ranking.store / MANIFEST),
            "trec": digest(run) if run.is_file() else None,
        }
        write_checked_json(path, content)


def _is_there(ranking: Ranking, begun: Mapping[str, Any]) -> bool:
    """Whether the ranked lists are there, undamaged."""
    if not (ranking.store / MANIFEST).is_file():
        return False
    try:
        TeacherScores.open(ranking.store).verify()
        if begun.get("manifest") not in (None, digest(ranking.store / MANIFEST)):
            raise FormatError("it is another ranking than the one that was made here.", file=str(ranking.store))
    except FormatError as error:
        logger.warning(f"{ranking.store} is damaged, and the ranking is made anew: {error}")
        return False
    return True


def _write_run(ranking: Ranking, name: str) -> None:
    """The ranking as a TREC run, unless it is there."""
    path = ranking.folder / RUN
    if path.is_file():
        return
    try:
        write_run(TeacherScores.open(ranking.store), path, tag=name)
    except FormatError as error:  # an id with a blank, which TREC's format cannot hold and everything else can
        logger.warning(f"{path} is not written: {error}")


def _read(path: Path) -> dict[str, Any]:
    try:
        begun = read_checked_json(path, required=False)  # older ones have no checksum
        if not isinstance(begun["settings"], dict) or not isinstance(begun.get("seconds", {}), dict):
            raise TypeError("settings and seconds should be objects")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"this does not describe a ranking: {error!r}. Delete the folder, and the ranking is made again.",
            file=str(path),
        ) from None
    return begun


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], owner: str = "") -> list[str]:
    identity = next((name for name in ("fingerprint", "weights") if begun.get(name) and name in now), None)
    same = identity is not None and begun[identity] == now[identity]
    found = {}
    for name in dict.fromkeys([*begun, *now]):
        before, after = begun.get(name), now.get(name)
        if before == after or (same and name in ("model", "revision")):  # a folder may be moved, a branch renamed
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found[name] = "; ".join(_differences(before, after, f"{owner}{name}."))
        else:
            found[name] = f"{owner}{name} was {before!r} and is {after!r}"
    if len(found) > 1:
        found.pop("fingerprint", None)  # it only follows from the others
    return [text for text in found.values() if text]


class Ranker:
    """A system that is loaded.

    Attributes:
        kind: "bm25", "bi-encoder", "sparse encoder", "multi-vector encoder", "re-ranker" or "run".
        description: All that its rankings depend on, as JSON holds it.
    """

    kind: str
    description: dict[str, Any]

    def inputs(self, ranking: Ranking) -> dict[str, Any]:
        """What else a ranking depends on, besides the description and the set: of a search its settings."""
        if ranking.evaluation_set.candidates is not None:
            return {}
        return {"depth": ranking.depth, "exclude_same_id": ranking.exclude_same_id}

    def rank(self, ranking: Ranking) -> None:
        """Write the ranked lists of the set's queries."""
        raise NotImplementedError
