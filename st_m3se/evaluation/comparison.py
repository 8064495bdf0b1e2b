"""Several evaluations beside each other, where that is fair."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from st_m3se.core.errors import FormatError
from st_m3se.core.findings import EXAMPLES, Finding
from st_m3se.evaluation.results import FILE, EvaluatedSet, Results, Values

__all__ = ["compare_files", "merge_results"]

REPORTING = {"measures", "confidence", "baseline", "strict"}  # what does not change a value


def compare_files(
    paths: Iterable[str | Path],
    *,
    common_queries: bool = False,
    baseline: str | None = None,
    confidence: float | None = None,
) -> Results:
    """Load several results files and put them beside each other.

    Systems of the same name that were described or measured differently are told apart by their file: "model (a)".

    Args:
        paths: ``results.json`` files, or folders that hold one.
        common_queries: See :func:`merge_results`.
        baseline: Test every other system against this one; by default what the first file with a baseline says.
        confidence: By default what the first file says.

    Raises:
        FormatError: If a file is no results file, or files cannot be compared; it says what differs.
        OSError: If a file cannot be read.
    """
    files = [Path(path) for path in paths]
    loaded = dict(zip(_labels(files), map(Results.load, files), strict=True))
    merged = merge_results(loaded, common_queries=common_queries)
    changes = {"baseline": baseline, "confidence": confidence}
    return replace(
        merged, settings=merged.settings | {name: value for name, value in changes.items() if value is not None}
    )


def merge_results(parts: Mapping[str, Results] | Sequence[Results], *, common_queries: bool = False) -> Results:
    """Put the results of several evaluations beside each other.

    Sets, systems and measures are those of all parts; what was not measured stays empty. The same system with the same
    values in two parts is one system.

    Args:
        parts: The results; with labels, systems of the same name that differ are told apart by them: "model (label)".
        common_queries: Where a set has other queries or contents in another part, keep the queries that all have, with
            a finding that says so; where parts searched to different depths, keep the measures that look no deeper.

    Raises:
        FormatError: If a set has other contents or queries in another part, if parts searched differently, or if
            systems of one name differ and there are no labels.
    """
    named = dict(parts) if isinstance(parts, Mapping) else {str(row): part for row, part in enumerate(parts, 1)}
    if not named:
        raise FormatError("there are no results to merge.")
    settings = _settings(named, common_queries)
    sets = dict.fromkeys(name for part in named.values() for name in part.sets)
    merged = {name: _common_set(name, named, common_queries) for name in sets}
    renamed = _renamed(named, labelled=isinstance(parts, Mapping))
    systems: dict[str, dict[str, Any]] = {}
    values: Values = {name: {} for name in sets}
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    for label, part in named.items():
        for system, description in part.systems.items():
            new, group = (renamed[label].get(name, name) for name in (system, part.group_of(system)))
            systems.setdefault(new, {**description, "group": group})
            for name, measured in part.values.items():
                if system in measured:
                    places = {query: row for row, query in enumerate(part.sets[name].query_ids)}
                    rows = [places[query] for query in merged[name].query_ids]
                    kept = {key: array[rows] for key, array in measured[system].items() if key in settings["measures"]}
                    values[name][new] = {**kept, **values[name].get(new, {})}
            for name, steps in part.seconds.items():
                if system in steps:
                    seconds.setdefault(name, {}).setdefault(new, steps[system])
    every = [source for part in named.values() for source in part.parts]
    distinct = [source for row, source in enumerate(every) if source not in every[:row]]
    provenance = distinct[0] if len(distinct) == 1 else {"merged": distinct}
    label, baseline = next(
        ((label, part.settings["baseline"]) for label, part in named.items() if part.settings["baseline"]), ("", None)
    )
    settings["baseline"] = baseline and renamed[label].get(baseline, baseline)
    return Results(provenance, settings, merged, systems, values, seconds)


def _labels(files: Sequence[Path]) -> list[str]:
    """A short name for each results file that no other one has: the last folders of its path that tell it apart."""
    places = [(file / FILE if file.is_dir() else file).resolve() for file in files]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise FormatError(f"{twice} is given twice.")
    names = [place.parent.parts[1:] if place.name == FILE else place.with_suffix("").parts[1:] for place in places]
    for length in range(1, max(map(len, names), default=0) + 1):
        short = ["/".join(parts[-length:]) for parts in names]
        if len(set(short)) == len(short):
            return short
    return [str(file) for file in files]


def _settings(parts: Mapping[str, Results], common_queries: bool) -> dict[str, Any]:
    """One set of settings, if the parts' allow it; the baseline is still to be chosen."""
    (first, one), *others = parts.items()
    settings = dict(one.settings)
    measures = list(dict.fromkeys(measure for part in parts.values() for measure in part.measures))
    for label, other in others:
        for name in sorted((one.settings.keys() | other.settings.keys()) - REPORTING):
            ours, theirs = one.settings.get(name), other.settings.get(name)
            if ours == theirs:
                continue
            if name == "depth" and common_queries:
                settings["depth"] = min(settings["depth"], theirs)
                measures = [measure for measure in measures if _looks_at(measure) <= settings["depth"]]
                continue
            remedy = (
                "Evaluate again with the same depth, or ask for what is common (common_queries), which keeps the "
                "measures that look no deeper."
                if name == "depth"
                else "Evaluate again with the same setting."
            )
            raise FormatError(
                f"{first} and {label} cannot be compared: {name} is {ours!r} in the one and {theirs!r} in the other, "
                f"so a difference between systems might be one of settings. {remedy}"
            )
    if not measures:
        raise FormatError(f"no measure looks only at the {settings['depth']:,} documents that all parts searched.")
    return {**settings, "measures": measures, "strict": all(part.settings["strict"] for part in parts.values())}


def _looks_at(measure: str) -> float:
    """How many documents of a ranking a measure looks at: its cut-off."""
    cutoff = re.search(r"@(\d+)$", measure)
    return int(cutoff[1]) if cutoff else float("inf")


def _common_set(name: str, parts: Mapping[str, Results], common_queries: bool) -> EvaluatedSet:
    """The set as all parts that have it see it."""
    having = {label: part.sets[name] for label, part in parts.items() if name in part.sets}
    (first, one), *others = having.items()
    differences = {label: found for label, other in others if (found := _difference(one, other))}
    if not differences:
        return one
    found = "; ".join(f"{first} and {label}: {text}" for label, text in differences.items())
    if not common_queries:
        raise FormatError(
            f"the set {name!r} is not the same everywhere, so its values cannot be compared. {found}. Evaluate on the "
            "same data, or ask for the common queries only (common_queries)."
        )
    common = set(one.query_ids).intersection(*(other.query_ids for _, other in others))
    if not common:
        raise FormatError(f"the sets {name!r} have no query in common, so nothing can be compared. {found}.")
    dropped = sorted({query for other in having.values() for query in other.query_ids} - common)
    note = Finding(
        "differs between the compared files",
        len(dropped),
        tuple(dropped[:EXAMPLES]),
        f"compared on the {len(common):,} queries that all files have; {found}",
    )
    findings = dict.fromkeys(finding for other in having.values() for finding in other.findings)
    query_ids = tuple(query for query in one.query_ids if query in common)
    return replace(one, query_ids=query_ids, findings=(note, *findings))


def _difference(one: EvaluatedSet, other: EvaluatedSet) -> str:
    """What differs between two descriptions of a set, in words; "" for the same set."""
    found = [
        f"{name} {getattr(one, name)} and {getattr(other, name)}"
        for name in ("split", "form", "documents", "judgements", "queries")
        if getattr(one, name) != getattr(other, name)
    ]
    for which, left, right in (("first", one, other), ("second", other, one)):
        having = set(right.query_ids)
        if only := [query for query in left.query_ids if query not in having]:
            more = ", ..." if len(only) > EXAMPLES else ""
            found.append(f"only the {which} has {len(only):,} queries ({', '.join(only[:EXAMPLES])}{more})")
    if one.fingerprint != other.fingerprint:
        found.append(f"other contents (fingerprints {one.fingerprint[:12]} and {other.fingerprint[:12]})")
    return ", ".join(found)


def _renamed(parts: Mapping[str, Results], *, labelled: bool) -> dict[str, dict[str, str]]:
    """Label -> old name -> new name, of the systems and groups that are not the same in another part."""
    renamed: dict[str, dict[str, str]] = {label: {} for label in parts}
    for label, part in parts.items():
        for other_label, other in parts.items():
            for system in part.systems.keys() & other.systems.keys():
                if other is part or not (difference := _system_difference(system, part, other)):
                    continue
                if not labelled:
                    raise FormatError(
                        f"two systems are named {system!r}, and {difference}: {label} and {other_label}. Give the "
                        "results labels (a mapping), which tell the two apart."
                    )
                group = part.group_of(system)
                renamed[label] |= {name: f"{name} ({label})" for name in (group, *part.groups[group])}
    return renamed


def _system_difference(system: str, one: Results, other: Results) -> str:
    ours, theirs = ({**part.systems[system], "group": part.group_of(system)} for part in (one, other))
    if ours != theirs:
        return "their descriptions differ"
    for name in one.values.keys() & other.values.keys():
        ours, theirs = (
            {measure: pd.Series(found, part.sets[name].query_ids) for measure, found in measured.items()}
            for part in (one, other)
            for measured in [part.values[name].get(system, {})]
        )
        for measure in ours.keys() & theirs.keys():
            common = ours[measure].index.intersection(theirs[measure].index)
            if (ours[measure][common] != theirs[measure][common]).any():
                return f"their {measure} on {name} differ"
    return ""
