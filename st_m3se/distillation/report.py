"""One page about a distillation: what came of it, why, what it cost, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from st_m3se.core.errors import FormatError
from st_m3se.core.files import read_checked_json
from st_m3se.data.texts import Texts
from st_m3se.diagnostics.gap import percent
from st_m3se.diagnostics.lists import JudgedLists
from st_m3se.diagnostics.plots import plot_margins
from st_m3se.diagnostics.separation import NUMBERS, Estimate, measure_separation
from st_m3se.distillation.data import DistillationData, open_data
from st_m3se.distillation.lists import AFTER, BEFORE, CONTROL, ENSEMBLE, JUDGES, TEACHER
from st_m3se.distillation.results import P_EXPLAINED, p_text, ranked_by
from st_m3se.evaluation.plots import COLOURS, WIDTH, Plot, new_figure, style, tidy
from st_m3se.evaluation.report import data_uri, write_page
from st_m3se.evaluation.tables import NOTHING, provenance_rows
from st_m3se.scores.teacher_scores import TeacherScores

__all__ = ["write_report"]

EXAMPLES = 5  # won, and as many lost
SHOWN = 600  # letters of a text
SEPARATION = ("auc_per_query", "overlap", "margin_mean")
MARKERS = "os^Dv"
STEPS = {
    "queries": "write queries",
    "candidates": "search with BM25 and guide",
    "teacher": "score with the teacher",
    "mean": "average the scores",
    "training": "train",
    "run": "search with the student",
    "student": "score with the student",
}


def write_report(output: str | Path, data: DistillationData | None = None) -> Path:
    """Write ``report.html`` into the folder of a finished distillation, from what lies there.

    Args:
        output: The folder, with ``results.json`` and the stages.
        data: The texts. None opens what the distillation was made from; where that has gone, ids stand for texts.

    Returns:
        The page. Without matplotlib (extra ``plot``) it has no plots.

    Raises:
        FileNotFoundError: If the distillation has not finished.
    """
    output = Path(output)
    file = output / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{output} has no results.json: the distillation has not finished. Run it again.")
    results = read_checked_json(file, required=False)
    data = data or _data(output, results)
    stores = _stores(output, results)
    margins = _margins(results, stores)
    return write_page(
        output / "report.html",
        "distillation.html",
        package="st_m3se.distillation",
        title=f"{_short(results['config']['student'])} distilled on {results['data']}",
        results=results,
        story=_story(results),
        systems=_systems(results),
        p_explained=P_EXPLAINED,
        seeds=_seeds(results),
        trainings=_trainings(results),
        curve=_curve(results),
        margins=margins,
        examples=_examples(results, stores, data),
        texts=data is not None,
        costs=_costs(results),
        settings=_settings(output, results),
        config=(output / "config.toml").read_text(encoding="utf-8"),
        data_uri=data_uri,
    )


def _data(output: Path, results: Mapping[str, Any]) -> DistillationData | None:
    stage = results["stages"].get("queries")
    try:
        return open_data(output / stage if stage else str(results["config"]["data"]))
    except (FormatError, OSError):  # moved since
        return None


def _stores(output: Path, results: Mapping[str, Any]) -> dict[str, TeacherScores]:
    """What each system found for the test queries; of several seeds the one that became the model, or its like."""
    stages = results["stages"]
    seed = results["model_from"].rsplit("-", 1)[0].rsplit("seed", 1)[-1]
    several = len(results["config"]["teacher"]) > 1
    folders = {
        "BM25": ("candidates", "bm25"),
        BEFORE: ("run-before", "run") if "run-before" in stages else ("candidates", "guide"),
        CONTROL: (f"run-control-seed{seed}", "run"),
        AFTER: (f"run-student-seed{seed}", "run"),
        TEACHER: ("mean-test", "teachers") if several else ("teacher-test", "teacher-1"),
        ENSEMBLE: ("mean-test", "with-guide"),
    }
    return {
        name: TeacherScores.open(output / stages[stage] / folder)
        for name, (stage, folder) in folders.items()
        if stage in stages
    }


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0:+.3f}"  # never -0.000


def _story(results: Mapping[str, Any]) -> list[str]:
    """The outcome in sentences."""
    measure = next(iter(results["systems"][AFTER]))
    before, after, teacher = (results["systems"][name][measure] for name in (BEFORE, AFTER, results["taught_by"]))
    test = results["against_student_after"][BEFORE][measure]
    if results["kept_start"]:
        return [
            "Training made the student worse on held-out queries, so the model is the student as it came, unchanged. A "
            "lower learning rate, more training queries or another teacher may help."
        ]
    sure = "" if test["holm_p"] <= 0.05 else "; so few queries cannot tell that from chance"
    closed = results["lead_closed"][measure]
    told = [
        f"{measure} on {results['queries']['test']:,} test queries: {before:.3f} before, {after:.3f} after "
        f"({_signed(test['difference'])}, Holm-corrected p {p_text(test['holm_p'])}{sure}). The teacher"
        f"{'' if results['taught_by'] == TEACHER else ' averaged with the student'} reaches {teacher:.3f}"
        + (f", of whose lead {percent(closed)} is closed." if closed is not None else ".")
    ]
    return [*told, *filter(None, [JUDGES[results["judged_by"]]])]


def _systems(results: Mapping[str, Any]) -> pd.DataFrame:
    measures = list(results["systems"][AFTER])
    rows = []
    for name, means in results["systems"].items():
        against = results["against_student_after"].get(name)
        row = [name, ranked_by(name)]
        for measure in measures:
            seeds = [seed[measure] for seed in results["seeds"].get(name, [])]
            row.append(f"{means[measure]:.3f}" + (f" ± {np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else ""))
            if against is None:
                row += [NOTHING] * 3
            else:
                low, high = against[measure]["interval"]
                difference, p = against[measure]["difference"], against[measure]["holm_p"]
                row += [_signed(difference), f"[{_signed(low)}, {_signed(high)}]", p_text(p)]
        rows.append(tuple(row))
    heads = [part for measure in measures for part in (measure, "student after is better by", "interval", "p")]
    return pd.DataFrame(rows, columns=["system", "ranks", *heads])


def _seeds(results: Mapping[str, Any]) -> pd.DataFrame:
    measures = list(results["systems"][AFTER])
    rows = [
        (name, str(training["seed"]), *(f"{seed[measure]:.3f}" for measure in measures))
        for name, seeds in results["seeds"].items()
        for training, seed in zip(results["trainings"][name], seeds, strict=True)
    ]
    return pd.DataFrame(rows, columns=["system", "seed", *measures])


def _trainings(results: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for name, trainings in results["trainings"].items():
        for training in trainings:
            before = training["curve"][0]["value"] if training["curve"] else None
            kept = "the start" if training["kept"] == 0 else f"{training['kept']:,}"
            row = (f"{training['lists']:,}", f"{training['steps']:,}", kept, _dev(before))
            chosen = " (the model)" if training["folder"] == results["model_from"] else ""
            last = (f"{training['start_weight']:.0%}", _dev(training["value"]), f"{training['seconds']:,.0f}")
            rows.append((name + chosen, str(training["seed"]), *row, *last))
    columns = ("system", "seed", "lists", "steps", "kept step", "dev before", "start's share", "dev after", "seconds")
    return pd.DataFrame(rows, columns=list(columns))


def _dev(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _curve(results: Mapping[str, Any]) -> Plot | None:
    """nDCG@10 on dev queries during the trainings, with the teacher's."""
    curves = {name: [each["curve"] for each in found if each["curve"]] for name, found in results["trainings"].items()}
    if not any(curves.values()):
        return None
    try:
        context = style()
    except ImportError:
        return None
    with context:
        figure = new_figure(WIDTH * 0.75, 3.8)
        axes = figure.add_subplot()
        told = []
        for place, (name, seeds) in enumerate(sorted(curves.items())):
            for number, points in enumerate(seeds):
                axes.plot(
                    [100 * point["share"] for point in points],
                    [point["value"] for point in points],
                    color=COLOURS[place],
                    marker=MARKERS[place],
                    linestyle="-" if name == AFTER else "--",
                    alpha=1 if number == 0 else 0.5,
                    label=name if number == 0 else None,
                )
                told.append(f"{name}: {', '.join(format(point['value'], '.3f') for point in points)}")
        teacher = results["check_on_dev"].get("nDCG@10", {}).get(results["taught_by"])
        if teacher is not None:
            axes.axhline(
                teacher, linestyle=":", color="black", label=f"{results['taught_by']}, re-ranking each query's own"
            )
            told.append(f"{results['taught_by']}: {teacher:.3f}")
        axes.set(xlabel="% of training", ylabel="nDCG@10 on dev queries")
        tidy(axes)
        axes.legend(frameon=False)
    caption = (
        "Each line is a training; 0 % is the student as it comes. The student searches the candidates of all dev "
        "queries at once, which is harder than what the teacher does: re-ranking those of one. The model is the "
        "longest-trained state that dev cannot tell from the best, averaged with the start where that does no harm."
    )
    return Plot("curve", caption, "nDCG@10 on dev queries. " + "; ".join(told), figure)


def _margins(results: Mapping[str, Any], stores: Mapping[str, TeacherScores]) -> dict[str, Any] | None:
    """How far each system puts relevant documents before the others, among the candidates that the teacher scored."""
    names = [name for name in (BEFORE, CONTROL, AFTER, results["taught_by"]) if name in stores]
    candidates = stores[TEACHER]
    try:
        lists = JudgedLists.of(
            candidates.select(results["query_ids"]),
            results["relevant"],
            scored_by={name: stores[name] for name in names},
            exclude_same_id=results["config"]["exclude_same_id"],
        )
        found = measure_separation(lists, {name: lists.scores(stores[name]) for name in names})
    except (FormatError, ValueError) as error:
        return {"missing": str(error)}
    rows = [
        (name, *(part for number in SEPARATION for part in _split(each.numbers[number])))
        for name, each in found.items()
    ]
    heads = [part for number in SEPARATION for part in (NUMBERS[number], "interval")]
    try:
        plot = Plot(
            "margins",
            "A relevant document's score minus another's of the same query, divided by the scorer's mean range of "
            "scores in a list. What is left of 0 is in the wrong order.",
            "Densities of the normalised margins of " + ", ".join(names),
            plot_margins(found),
        )
    except ImportError:
        plot = None
    return {
        "about": f"{len(lists):,} queries, {int(lists.positives.sum()):,} relevant and "
        f"{int((~lists.positives).sum()):,} other candidates, the same for each.",
        "left_out": [f"{count:,} {what}" for what, count in lists.left_out.items()],
        "listing": pd.DataFrame(rows, columns=["scorer", *heads]),
        "plot": plot,
    }


def _split(estimate: Estimate) -> list[str]:
    return str(estimate).split(" ", 1)


def _examples(
    results: Mapping[str, Any], stores: Mapping[str, TeacherScores], data: DistillationData | None
) -> dict[str, list[dict[str, Any]]]:
    """The queries that the training won most on, and lost most, with what stands where before and after."""
    measure = next(iter(results["systems"][AFTER]))
    before, after = (np.array(results["per_query"][name][measure]) for name in (BEFORE, AFTER))
    order = np.argsort(before - after, kind="stable")
    chosen = {
        "won": [place for place in order[:EXAMPLES] if after[place] > before[place]],
        "lost": [place for place in order[::-1][:EXAMPLES] if after[place] < before[place]],
    }
    return {
        title: [
            {
                "figures": f"{measure} {before[place]:.3f} before, {after[place]:.3f} after",
                **_example(results["query_ids"][place], results, stores, data),
            }
            for place in places
        ]
        for title, places in chosen.items()
    }


def _example(
    query: str, results: Mapping[str, Any], stores: Mapping[str, TeacherScores], data: DistillationData | None
) -> dict[str, Any]:
    ranked = {
        name: [
            str(d)
            for _, d in sorted(
                zip(stores[name][query].scores, stores[name][query].document_ids, strict=True),
                key=lambda pair: -pair[0],
            )
        ]
        if query in stores[name]
        else []
        for name in (BEFORE, AFTER, results["taught_by"])
    }
    relevant = results["relevant"][query]
    places = {name: {document: place for place, document in enumerate(found, 1)} for name, found in ranked.items()}
    # Of several relevant documents, the one that the student ranks best, before or after.
    best = min(relevant, key=lambda d: min(places[name].get(d, len(ranked[name]) + 1) for name in (BEFORE, AFTER)))
    firsts: dict[str, list[str]] = {}
    for name in (BEFORE, AFTER):
        if ranked[name]:
            firsts.setdefault(ranked[name][0], []).append(name)
    return {
        "query": _text(None if data is None else data.queries, query),
        "id": query,
        "relevant": _text(None if data is None else data.corpus, best),
        "of": len(relevant),
        "ranks": [(name, f"rank {found[best]}" if best in found else "not found") for name, found in places.items()],
        "firsts": [
            (" and ".join(names), _text(None if data is None else data.corpus, document))
            for document, names in firsts.items()
            if document not in relevant
        ],
    }


def _text(texts: Texts | None, text_id: str) -> str:
    if texts is None or text_id not in texts:
        return str(text_id)
    text = " ".join(texts[text_id].split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _costs(results: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for name, seconds in results["seconds"].items():
        what = STEPS.get(name.split("-")[0], "")
        rate = ""
        if name == "teacher-train" and results["teacher_pairs_per_second"]:
            rate = f"{results['teacher_pairs']:,} pairs, {results['teacher_pairs_per_second']:,.0f} a second"
        if name.startswith("run-student") and results["student_queries_per_second"]:
            rate = f"encodes {results['student_queries_per_second']:,.0f} queries a second"
        rows.append((name, what, f"{seconds:,.1f}", rate or NOTHING))
    total = sum(results["seconds"].values())
    return pd.DataFrame([*rows, ("all", "", f"{total:,.1f}", NOTHING)], columns=["stage", "what", "seconds", "rate"])


def _settings(output: Path, results: Mapping[str, Any]) -> pd.DataFrame:
    """Versions, and what tells the data from other data."""
    made = read_checked_json(output / results["stages"]["candidates"] / "made_from.json", required=False)
    digests = [(f"{name} (digest)", str(made[name])) for name in ("corpus", "queries", "qrels") if name in made]
    return pd.DataFrame([*provenance_rows(results["provenance"]), *digests], columns=["what", "value"])
