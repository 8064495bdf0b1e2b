"""Put the results of several evaluations beside each other, where that is fair."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.findings import Finding
from st_m3se.evaluation.results import FILE, EvaluatedSet, Results, Values

__all__ = ["labels", "merge"]

REPORTING = ("measures", "confidence", "baseline", "strict")  # what does not change a value
SHOWN = 3


def merge(parts: Mapping[str, Results] | Sequence[Results], *, common_queries: bool = False) -> Results:
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
    sets = {name: None for part in named.values() for name in part.sets}
    merged = {name: _common_set(name, named, common_queries) for name in sets}
    renamed = _renamed(named, labelled=isinstance(parts, Mapping))
    systems: dict[str, dict[str, Any]] = {}
    values: Values = {name: {} for name in sets}
    seconds: dict[str, dict[str, dict[str, float]]] = {}
    for label, part in named.items():
        for system, description in part.systems.items():
            new = renamed[label].get(system, system)
            group = renamed[label].get(part.group_of(system), part.group_of(system))
            systems.setdefault(new, {**description, "group": group})
            for name, measured in part.values.items():
                if system in measured:
                    rows = _rows(part.sets[name], merged[name])
                    kept = {key: array[rows] for key, array in measured[system].items() if key in settings["measures"]}
                    values[name][new] = {**kept, **values[name].get(new, {})}
            for name, steps in part.seconds.items():
                if system in steps:
                    seconds.setdefault(name, {}).setdefault(new, steps[system])
    every = [source for part in named.values() for source in part.parts]
    distinct = [source for row, source in enumerate(every) if source not in every[:row]]
    provenance = distinct[0] if len(distinct) == 1 else {"merged": distinct}
    baseline = settings["baseline"]
    if baseline is not None and baseline not in systems:  # it was renamed: the one of the part that named it
        label = next(label for label, part in named.items() if part.settings["baseline"] == baseline)
        settings["baseline"] = renamed[label].get(baseline, baseline)
    return Results(provenance, settings, merged, systems, values, seconds)


def labels(files: Sequence[Path]) -> list[str]:
    """A short name for each results file that no other one has: the last folders of its path that tell it apart.

    Raises:
        FormatError: If a file is given twice.
    """
    places = [(file / FILE if file.is_dir() else file).resolve() for file in files]
    for place in places:
        if places.count(place) > 1:
            raise FormatError(f"{place} is given twice.")
    names = [place.parent.parts[1:] if place.name == FILE else place.with_suffix("").parts[1:] for place in places]
    for length in range(1, max(map(len, names), default=0) + 1):
        short = ["/".join(parts[-length:]) for parts in names]
        if len(set(short)) == len(short):
            return short
    return [str(file) for file in files]


def _settings(parts: Mapping[str, Results], common_queries: bool) -> dict[str, Any]:
    """One set of settings, if the parts' allow it."""
    (first, one), *others = parts.items()
    settings = dict(one.settings)
    measures = list(dict.fromkeys(measure for part in parts.values() for measure in part.measures))
    for label, other in others:
        for name in sorted((one.settings.keys() | other.settings.keys()) - set(REPORTING)):
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
    baseline = next((part.settings["baseline"] for part in parts.values() if part.settings["baseline"]), None)
    strict = all(part.settings["strict"] for part in parts.values())
    return {**settings, "measures": measures, "baseline": baseline, "strict": strict}


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
    findings = dict.fromkeys(finding for other in having.values() for finding in other.findings)
    note = Finding(
        "differs between the compared files",
        len(dropped),
        tuple(dropped[:SHOWN]),
        f"compared on the {len(common):,} queries that all files have; {found}",
    )
    return replace(
        one, query_ids=tuple(query for query in one.query_ids if query in common), findings=(note, *findings)
    )


def _difference(one: EvaluatedSet, other: EvaluatedSet) -> str:
    """What differs between two descriptions of a set, in words; "" for the same set."""
    found = []
    for name in ("split", "form", "documents", "judgements", "queries"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            found.append(f"{name} {ours} and {theirs}")
    if one.query_ids != other.query_ids:
        for which, left, right in (("first", one, other), ("second", other, one)):
            having = set(right.query_ids)
            if only := [query for query in left.query_ids if query not in having]:
                more = ", ..." if len(only) > SHOWN else ""
                found.append(f"only the {which} has {len(only):,} queries ({', '.join(only[:SHOWN])}{more})")
    if one.fingerprint != other.fingerprint:
        found.append(f"other contents (fingerprints {one.fingerprint[:12]} and {other.fingerprint[:12]})")
    return ", ".join(found)


def _rows(before: EvaluatedSet, after: EvaluatedSet) -> np.ndarray:
    """Where the values of the queries that are left stand."""
    places = {query: row for row, query in enumerate(before.query_ids)}
    return np.array([places[query] for query in after.query_ids], dtype=np.int64)


def _renamed(parts: Mapping[str, Results], *, labelled: bool) -> dict[str, dict[str, str]]:
    """Label -> old name -> new name, of the systems and groups that are not the same in another part."""
    renamed: dict[str, dict[str, str]] = {label: {} for label in parts}
    for label, part in parts.items():
        for other_label, other in parts.items():
            if other is part:
                continue
            for system in part.systems.keys() & other.systems.keys():
                if not (difference := _system_difference(system, part, other)):
                    continue
                if not labelled:
                    raise FormatError(
                        f"two systems are named {system!r}, and {difference}: {label} and {other_label}. Give the "
                        "results labels (a mapping), which tell the two apart."
                    )
                for name in (part.group_of(system), *part.groups[part.group_of(system)]):
                    renamed[label][name] = f"{name} ({label})"
    return renamed


def _system_difference(system: str, one: Results, other: Results) -> str:
    if _description(system, one) != _description(system, other):
        return "their descriptions differ"
    for name in one.values.keys() & other.values.keys():
        ours, theirs = one.values[name].get(system, {}), other.values[name].get(system, {})
        queries = {query: row for row, query in enumerate(other.sets[name].query_ids)}
        shared = [(row, queries[query]) for row, query in enumerate(one.sets[name].query_ids) if query in queries]
        left, right = np.array(shared, dtype=np.int64).reshape(-1, 2).T
        for measure in ours.keys() & theirs.keys():
            if not np.array_equal(ours[measure][left], theirs[measure][right]):
                return f"their {measure} on {name} differ"
    return ""


def _description(system: str, results: Results) -> dict[str, Any]:
    return {**results.systems[system], "group": results.group_of(system)}
