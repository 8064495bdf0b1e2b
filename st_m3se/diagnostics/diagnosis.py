"""One look at several scorers over the same lists, and the folder in which it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file, read_checked_json, write_checked_json
from st_m3se.core.findings import report
from st_m3se.core.markdown import cell
from st_m3se.core.shape import check_shape
from st_m3se.data.collection import open_texts
from st_m3se.data.texts import Texts
from st_m3se.diagnostics.gap import ClosedShare, closed_share
from st_m3se.diagnostics.lists import JudgedLists
from st_m3se.diagnostics.scoring import describe_scorer, folder_names, score_lists
from st_m3se.diagnostics.separation import NUMBERS, Estimate, Separation, measure_separation
from st_m3se.evaluation.measures import parse_measures
from st_m3se.evaluation.provenance import provenance
from st_m3se.evaluation.systems import ReRanker, check_model
from st_m3se.scores.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from datasets import Dataset

    from st_m3se.diagnostics.scoring import Scorer

__all__ = ["DIAGNOSIS", "Diagnosis", "diagnose"]

DIAGNOSIS = "diagnosis.json"
FORMAT = 1
DIGITS = 7  # of the curves: more than a figure shows
SHAPE = {
    "data": {"name": str, "queries": int, "positives": int, "negatives": int, "left_out": {str: int}, "notes": [str]},
    "settings": {"n_resamples": int, "confidence": float},
    "scorers": {str: {"description": {}, "spread": float, "numbers": {str: [float]}, "curves": {str: [float]}}},
    "provenance": {},
}
CURVES = ("x", "positives", "negatives", "margin_x", "margin_density")
CSV_FILES = {
    "score_densities.csv": {"score": "x", "positives_density": "positives", "negatives_density": "negatives"},
    "margins.csv": {"normalised_margin": "margin_x", "density": "margin_density"},
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` finds; :meth:`save` and :meth:`load` keep it as JSON and CSV.

    Attributes:
        data: "name", "queries", "positives", "negatives", "left_out", "notes".
        settings: "n_resamples", "confidence", "seed".
        scorers: By name, in the order in which they were given.
        descriptions: By name, what is known of the scorer: teacher, revision, max_length, dtype ...
        gap: How much of the teacher's lead the student has closed, where it was asked for.
        provenance: Date, versions, machine and command.
    """

    data: dict[str, Any]
    settings: dict[str, Any]
    scorers: dict[str, Separation]
    descriptions: dict[str, dict[str, Any]]
    gap: ClosedShare | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The numbers, a row each: scorer, number, value, low, high."""
        rows = [
            (name, number, *separation.numbers[number])
            for name, separation in self.scorers.items()
            for number in NUMBERS
        ]
        return pd.DataFrame(rows, columns=["scorer", "number", "value", "low", "high"])

    def save(self, folder: str | Path) -> None:
        """Write ``diagnosis.json``, and its numbers and curves as CSV beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        curves = {
            name: {curve: _rounded(getattr(separation, curve)) for curve in CURVES}
            for name, separation in self.scorers.items()
        }
        scorers = {
            name: {
                "description": self.descriptions[name],
                "spread": separation.spread,
                "numbers": {number: list(found) for number, found in separation.numbers.items()},
                "curves": curves[name],
            }
            for name, separation in self.scorers.items()
        }
        content = {
            "format": FORMAT,
            "provenance": self.provenance,
            "data": self.data,
            "settings": self.settings,
            "gap": None if self.gap is None else asdict(self.gap),
            "scorers": scorers,
        }
        write_checked_json(folder / DIAGNOSIS, content)
        write_csv(folder / "numbers.csv", self.to_frame())
        for file, columns in CSV_FILES.items():
            parts = [
                pd.DataFrame({"scorer": name, **{title: found[curve] for title, curve in columns.items()}})
                for name, found in curves.items()
            ]
            write_csv(folder / file, pd.concat(parts))

    @classmethod
    def load(cls, folder: str | Path) -> Diagnosis:
        """Read what :meth:`save` has written.

        Raises:
            FormatError: If there is none, one of another version, or it was damaged.
        """
        path = Path(folder) / DIAGNOSIS
        if not path.is_file():
            raise FormatError("there is no such file. `st-m3se diagnose` makes one.", file=str(path))
        try:
            content = read_checked_json(path, required=False)
            if content.get("format") != FORMAT:
                raise FormatError(
                    f"the diagnosis has format {content.get('format')!r:.80} and this program reads {FORMAT}: another "
                    "version of st-m3se wrote it. Make it again.",
                    file=str(path),
                )
            check_shape(content, SHAPE, "")
            scorers = {
                name: Separation(
                    {number: Estimate(*scorer["numbers"][number]) for number in NUMBERS},
                    scorer["spread"],
                    *(np.array(scorer["curves"][curve], dtype=np.float64) for curve in CURVES),
                )
                for name, scorer in content["scorers"].items()
            }
            gap = None if content["gap"] is None else ClosedShare.of(content["gap"])
        except FormatError as error:
            raise FormatError(error.message, file=str(path)) from None
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise FormatError(
                f"this is not a diagnosis as st-m3se diagnose writes it: {error!r:.200}. Make it again.", file=str(path)
            ) from error
        descriptions = {name: scorer["description"] for name, scorer in content["scorers"].items()}
        return cls(content["data"], content["settings"], scorers, descriptions, gap, content["provenance"])


def diagnose(
    scorers: Mapping[str, Scorer],
    candidates: TeacherScores | Mapping[Any, Sequence[Any]] | str | Path,
    qrels: Mapping[Any, Mapping[Any, int]],
    output: str | Path,
    *,
    queries: Texts | Mapping[Any, Any] | Dataset | str | Path | None = None,
    corpus: Texts | Mapping[Any, Any] | Dataset | str | Path | None = None,
    name: str = "",
    notes: Sequence[str] = (),
    gap: tuple[str, str, str] | None = None,
    measure: str = "RR@10",
    min_relevance: int = 1,
    exclude_same_id: bool = True,
    max_queries: int | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    show_progress_bar: bool = True,
    **options: Any,
) -> Diagnosis:
    """Score the same lists with several scorers, and measure how each separates positives from negatives.

    ``output`` gets a store of each scorer's scores in ``scores/``, the judgements of the lists in ``qrels.tsv``, and
    what :meth:`Diagnosis.save` writes; :func:`~st_m3se.diagnostics.report.write_report` draws the figures. A call that
    was killed goes on where it was when it is repeated.

    Args:
        scorers: By the name that figures give them: "bm25" or :class:`~st_m3se.BM25`; a CrossEncoder or
            SentenceTransformer, or the name or path of one; a function of (query, document) pairs; or a store.
            Documents that one of the stores has not scored are left out for all.
        candidates: Whose documents are scored: a store or its path, whose scores are ignored, or query id to document
            ids. Without their relevant documents the lists say nothing: ``find_candidates(..., positives=qrels)``.
        qrels: Query id to document id to relevance.
        output: The folder.
        queries: The texts of the queries, whatever :meth:`Texts.open` takes. Stores need none.
        corpus: The documents, likewise.
        name: What the data are, for titles.
        notes: What is to be known of the data, for the report.
        gap: Three of the scorers, (student before, student after, teacher): see
            :func:`~st_m3se.diagnostics.closed_share`.
        measure: What the lead is measured in, re-ranking the lists; any name of ir_measures.
        min_relevance: See :meth:`JudgedLists.of`, as for the next two.
        exclude_same_id: Leave out the document that has the query's own id, unless it is judged for it.
        max_queries: Look at so many queries, drawn at random; None is all.
        n_resamples: Bootstrap draws for the intervals.
        confidence: What share of them an interval holds.
        seed: For the draws.
        show_progress_bar: Show progress.
        options: For models, see :func:`~st_m3se.diagnostics.scoring.score_lists`.

    Raises:
        FormatError: If ids are of different types, a text is missing, or no list has a positive and a negative.
        ValueError: If a model or measure does not exist, or a folder of ``scores/`` was begun with another model or
            other lists.
    """
    output = Path(output)
    if not scorers:
        raise ValueError("there is no scorer to look at.")
    if gap is not None:
        if unknown := [scorer for scorer in gap if scorer not in scorers]:
            raise ValueError(f"gap names {unknown[0]!r}, and the scorers are {list(scorers)}.")
        parse_measures([measure])
    folder_names(scorers)
    for scorer in scorers.values():
        if isinstance(scorer, (str, Path)) and scorer != "bm25":
            check_model(ReRanker(scorer, revision=options.get("revision")))
    if isinstance(candidates, (str, Path)):
        candidates = TeacherScores.open(candidates)
    ready = {scorer: store for scorer, store in scorers.items() if isinstance(store, TeacherScores)}
    lists = JudgedLists.of(
        candidates,
        qrels,
        scored_by=ready,
        min_relevance=min_relevance,
        exclude_same_id=exclude_same_id,
        max_queries=max_queries,
        seed=seed,
    )
    asked, documents = _opened(queries, "queries"), _opened(corpus, "corpus")
    output.mkdir(parents=True, exist_ok=True)
    stores = score_lists(
        lists, scorers, asked, documents, output / "scores", show_progress_bar=show_progress_bar, **options
    )
    judged = [(query, document, 1) for query, relevant in lists.qrels().items() for document in relevant]
    with atomic_file(output / "qrels.tsv", overwrite=True) as temporary:
        columns = ["query-id", "corpus-id", "score"]
        pd.DataFrame(judged, columns=columns).to_csv(temporary, sep="\t", index=False, lineterminator="\n")
    statistics: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence, "seed": seed}
    found = Diagnosis(
        {
            "name": name,
            "queries": len(lists),
            "positives": int(lists.positives.sum()),
            "negatives": int((~lists.positives).sum()),
            "left_out": lists.left_out,
            "notes": list(notes),
        },
        statistics,
        measure_separation(lists, {scorer: lists.scores(store) for scorer, store in stores.items()}, **statistics),
        {scorer: describe_scorer(store) for scorer, store in stores.items()},
        None if gap is None else closed_share(lists, stores, gap, measure=measure, **statistics),
        provenance(options.get("device"), seed=seed),
    )
    found.save(output)
    return found


def _opened(source: Any, name: str) -> Texts | None:
    if source is None:
        return None
    texts, findings = open_texts(source, name)
    report("diagnose", findings)
    return texts


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def write_csv(path: Path, frame: pd.DataFrame, float_format: str | None = None) -> None:
    """Write a table, whole, in the place of what is there; no text in it is a formula to a spreadsheet."""
    frame = frame.apply(lambda column: column if is_numeric_dtype(column) else column.map(str).map(cell))
    with atomic_file(path, overwrite=True) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", float_format=float_format)
