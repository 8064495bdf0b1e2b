"""From sets and systems to results: each ranking is made once and kept."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from st_m3se.core.extras import require
from st_m3se.core.findings import Finding, found
from st_m3se.data.qrels import is_own_document
from st_m3se.evaluation.data import EvaluationSet, open_set
from st_m3se.evaluation.measures import DEFAULT_MEASURES, check_grades, parse_measures, per_query
from st_m3se.evaluation.provenance import provenance
from st_m3se.evaluation.rankers import load_ranker
from st_m3se.evaluation.rankings import Ranking, make_ranking
from st_m3se.evaluation.report import Section, write_report
from st_m3se.evaluation.results import EvaluatedSet, Results, Values
from st_m3se.evaluation.systems import NAME, Encoder, GivenRun, ReRanker, System, check_model, systems_of
from st_m3se.retrieval.bm25 import BM25
from st_m3se.scores.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from st_m3se.evaluation.systems import Model

__all__ = ["evaluate"]

RESERVED = ("embeddings", "plots")  # other folders of the output


def evaluate(
    sets: EvaluationSet | str | Path | Sequence[EvaluationSet | str | Path],
    systems: BM25 | Encoder | ReRanker | GivenRun | Model | Mapping[str, Any] | Sequence[Any],
    output: str | Path,
    *,
    measures: Sequence[str] | None = None,
    depth: int = 1000,
    exclude_same_id: bool = True,
    strict: bool = False,
    confidence: float = 0.95,
    baseline: str | None = None,
    batch_size: int = 32,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    plots: bool = True,
    sections: Sequence[Section] = (),
    show_progress_bar: bool = True,
) -> Results:
    """Evaluate systems on sets, and write a report.

    ``output/SET/SYSTEM`` keeps each ranking: ``run``, a store; ``run.trec``, the same for other tools; and
    ``system.json``, what it was made with and how long that took. The same call again makes only what is missing, so a
    run that was killed goes on. A ranking that was made with another model, set or depth is refused; ``device``,
    ``batch_size`` and the measures may change. Where a set comes with a run, encoders and BM25 put its documents in
    order and search nothing.

    Args:
        sets: Opened sets, or the folders or names that :func:`~st_m3se.evaluation.open_set` takes, with their test
            split.
        systems: A mapping from a name to a system, or to several models that are seeds of one system; or a list. A
            system is "bm25" or :class:`~st_m3se.BM25`; an encoder, its name or folder, or an :class:`Encoder` with
            options; a :class:`ReRanker`; a :class:`GivenRun`; or "candidates", the run that a set comes with.
        output: The folder.
        measures: Names as ir_measures writes them, the headline first. None is nDCG@10, RR@10, R@100, R@1000 and AP, as
            far as ``depth`` reaches.
        depth: Documents per query that a search finds. A given run keeps all of its own.
        exclude_same_id: BEIR's rule: the document with the query's own id is no result, unless it is judged for it.
        strict: Refuse a set with anything unusual, where a set is opened here.
        confidence: Of the intervals; 1 - confidence is the level of the tests.
        baseline: A system that each other one is tested against. None tests all pairs.
        batch_size: Texts that an encoder encodes at once.
        device: Where models run, such as "cuda:1" or "cpu". None is what there is.
        cache_dir: Where embeddings of a corpus are kept. None is ``output/embeddings``.
        plots: Draw plots for the report, which needs matplotlib.
        sections: More sections for the page, such as :func:`~st_m3se.diagnostics.html_section` of a diagnosis.
        show_progress_bar: Show progress.

    Returns:
        The results, which ``output/results.json`` holds as well.

    Raises:
        FormatError: If a set or a run is not what it should be.
        ValueError: If a ranking in ``output`` was made with something else, or a system cannot rank a set.
        ImportError: If a package is missing; it names the extra.

    Example:
        >>> results = evaluate(  # doctest: +SKIP
        ...     "scifact",
        ...     {"bm25": "bm25", "student": ["seed1", "seed2"], "teacher": ReRanker("my/cross-encoder", "bm25")},
        ...     "evaluation",
        ... )
    """
    if depth < 1 or batch_size < 1:
        raise ValueError(f"depth and batch_size must be at least 1, got {depth} and {batch_size}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}.")
    if plots:
        require("matplotlib", "plot")  # now, not after hours of work
    named = systems_of(systems)
    if baseline is not None and baseline not in (known := {name for each in named for name in each[:2]}):
        raise ValueError(f"the baseline {baseline!r} is no system here; there are {', '.join(sorted(known))}.")
    opened = _opened(sets, strict)
    searches = any(isinstance(each.source, (BM25, Encoder)) for each in named)
    searches = searches and any(each.candidates is None for each in opened.values())
    chosen = _measures(measures, depth, searches=searches)
    _check(opened, named)
    for evaluation_set in opened.values():
        check_grades(chosen, evaluation_set.qrels)
    for name, _, source in named[1:]:  # the first is loaded at once, and no other may fail when it has run for hours
        if isinstance(source, (Encoder, ReRanker)):
            load_ranker(source, name, device)
            _free()
    output = Path(output)
    cache = Path(cache_dir or output / "embeddings")
    descriptions: dict[str, dict[str, Any]] = {}
    rankings: dict[tuple[str, str], Ranking] = {}
    with tqdm(total=len(named) * len(opened), desc="Rankings", unit="", disable=not show_progress_bar) as bar:
        for name, group, source in named:
            bar.set_postfix_str(name)
            ranker = load_ranker(source, name, device)
            descriptions[name] = {"kind": ranker.kind, "group": group, **ranker.description}
            stage = source.first_stage if isinstance(source, ReRanker) else None
            for set_name, evaluation_set in opened.items():
                ranking = rankings[set_name, name] = Ranking(
                    evaluation_set,
                    output / set_name / name,
                    depth,
                    exclude_same_id,
                    batch_size,
                    cache,
                    show_progress_bar,
                    first=None if stage is None else rankings[set_name, stage],
                )
                make_ranking(ranker, ranking, name)
                bar.update()
            del ranker
            if not isinstance(source, (BM25, GivenRun)):
                _free()
    settings = {
        "measures": chosen,
        "depth": depth,
        "exclude_same_id": exclude_same_id,
        "strict": strict,
        "confidence": confidence,
        "baseline": baseline,
    }
    results = _measured(opened, descriptions, rankings, settings, provenance(device))
    texts = {name: each.queries for name, each in opened.items() if each.queries is not None}
    write_report(results, output, plots=plots, sections=sections, texts=texts)
    return results


def _opened(sets: Any, strict: bool) -> dict[str, EvaluationSet]:
    given = [sets] if isinstance(sets, (str, Path, EvaluationSet)) else list(sets)
    if not given:
        raise ValueError("there is no set to evaluate on: name a folder in BEIR's layout, or a set of BEIR.")
    opened: dict[str, EvaluationSet] = {}
    for one in given:
        evaluation_set = one if isinstance(one, EvaluationSet) else open_set(one, strict=strict)
        name = evaluation_set.name
        if name in opened:
            raise ValueError(f"two sets are named {name!r}: open one of them with another name.")
        if not all(NAME.fullmatch(part) and part not in RESERVED for part in name.split("/")):
            raise ValueError(
                f"the set's name {name!r} names a folder: use letters, digits and . _ - +, and not "
                f"{' or '.join(RESERVED)}. Open it with another name."
            )
        opened[name] = evaluation_set
    return opened


def _measures(names: Sequence[str] | None, depth: int, *, searches: bool) -> list[str]:
    """The measures that a search to this depth can fill."""
    chosen = list(DEFAULT_MEASURES if names is None else names)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"measures must be different names, and one at least, got {chosen}.")
    cutoffs = [measure.params.get("cutoff") for measure in parse_measures(chosen)]
    deep = [name for name, cutoff in zip(chosen, cutoffs, strict=True) if searches and (cutoff or 0) > depth]
    if deep and names is not None:
        raise ValueError(
            f"{', '.join(deep)} looks at more than the {depth:,} documents per query that are searched for, so its "
            "value would be that of a smaller cut-off. Raise it, depth=..., or leave the measure out."
        )
    return [name for name in chosen if name not in deep]


def _check(opened: Mapping[str, EvaluationSet], systems: Sequence[System]) -> None:
    """Refuse at once what would fail after hours of work."""
    for system in systems:
        check_model(system.source)
    for name, evaluation_set in opened.items():
        for system in systems:
            source = system.source
            if isinstance(source, GivenRun) and source.path is not None:
                file = source.file(name)
                if not file.exists():
                    raise FileNotFoundError(
                        f"the run {system.name} for {name} should be {file}: there is no such file."
                    )
                continue
            given = isinstance(source, GivenRun) or (isinstance(source, ReRanker) and source.first_stage is None)
            if given and evaluation_set.candidates is None:
                raise ValueError(
                    f"{system.name} takes the run that a set comes with, and {name} comes with none. Open the set with "
                    "a run (--candidates), or name a first stage."
                )
            if not isinstance(source, GivenRun) and (evaluation_set.queries is None or evaluation_set.corpus is None):
                raise ValueError(
                    f"{system.name} needs texts, and the set {name} has ids only: finished runs (--run) are all that "
                    "can be measured on it. Give the folder of its texts, or leave the system out."
                )


def _measured(
    opened: Mapping[str, EvaluationSet],
    descriptions: dict[str, dict[str, Any]],
    rankings: Mapping[tuple[str, str], Ranking],
    settings: dict[str, Any],
    origin: dict[str, Any],
) -> Results:
    """The results of rankings that are all made."""
    sets: dict[str, EvaluatedSet] = {}
    values: Values = {name: {} for name in opened}
    seconds: dict[str, dict[str, dict[str, float]]] = {name: {} for name in opened}
    options: dict[str, Any] = {"exclude_same_id": settings["exclude_same_id"]}
    for name, evaluation_set in opened.items():
        findings: list[Finding] = []
        for system, description in descriptions.items():
            ranking = rankings[name, system]
            run = TeacherScores.open(ranking.store)
            own, there = _own_documents(run, evaluation_set)
            findings += ranking.findings
            if settings["exclude_same_id"]:
                effect = "no results: exclude_same_id leaves out what has the query's own id and is not judged for it"
                findings += found(f"{system}: documents with the id of their query", own, effect)
            if description["kind"] not in ("run", "re-ranker"):  # what they lack is told of the run or first stage
                missing = [query for query in evaluation_set.query_ids if query not in there]
                findings += found(f"{system}: queries without a result", missing, "they count 0 in every measure")
            options["query_ids"] = evaluation_set.query_ids
            values[name][system] = per_query(run, evaluation_set.qrels, settings["measures"], **options)
            seconds[name][system] = ranking.seconds
        described = EvaluatedSet.of(evaluation_set)
        sets[name] = replace(described, findings=(*described.findings, *findings))
    return Results(origin, settings, sets, descriptions, values, seconds)


def _own_documents(run: TeacherScores, evaluation_set: EvaluationSet) -> tuple[list[str], set[str]]:
    """The queries whose list has their own document, not judged for them, and those that have a list at all."""
    own: list[str] = []
    there: set[str] = set()
    for row in run:
        query = str(row.query_id)
        judged = evaluation_set.qrels.get(query, ())
        if len(row.document_ids):
            there.add(query)
        if any(is_own_document(query, document, judged) for document in row.document_ids):
            own.append(query)
    return own, there


def _free() -> None:
    """Give the memory of a model back before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
