"""What an evaluation found: per-query values of every system on every set, in one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file, read_checked_json, with_checksum
from st_m3se.evaluation.evaluated import EvaluatedSet, is_count, is_number, is_texts, json_object

if TYPE_CHECKING:
    from st_m3se.evaluation.summary import Summary

__all__ = ["EvaluatedSet", "Results", "Values", "compare_files"]

FORMAT = 1
FILE = "results.json"
SETTINGS = {"measures", "depth", "exclude_same_id", "strict", "confidence", "baseline"}

Values = dict[str, dict[str, dict[str, np.ndarray]]]
"""Set -> system -> measure -> float64 [queries], in the order of the set's ``query_ids``."""


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Results:
    """Everything that reports, plots and significance tests are made from.

    Means, intervals and comparisons are no fields: :attr:`summary` derives them from the values.

    Args:
        provenance: "date", "st_m3se" (version), "packages", "python", "system", "cpu", "device", "command", "seed";
            of merged files {"merged": [one such mapping for each file]}.
        settings: "measures" (their order is that of the tables, the first is the headline), "depth",
            "exclude_same_id", "strict", "confidence" (of the intervals; 1 - confidence is the tests' level) and
            "baseline" (a group that every other one is tested against, or None: all pairs).
        sets: The sets by name, in the order of the tables.
        systems: Descriptions of the systems by name, in the order of the tables: "kind", "group" (systems of one group
            are seeds of one; without it the system is a group of its own), and whatever else tells how it was made.
        values: Set -> system -> measure -> [queries]. A system may be absent from a set.
        seconds: Set -> system -> step ("encode corpus", "search", "re-rank", ...) -> seconds.

    Raises:
        FormatError: If the parts do not fit together; it says where.
    """

    provenance: dict[str, Any]
    settings: dict[str, Any]
    sets: dict[str, EvaluatedSet]
    systems: dict[str, dict[str, Any]]
    values: Values
    seconds: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_settings()
        for system, description in self.systems.items():
            for key in ("kind", "group"):
                if not isinstance(description.get(key, system if key == "group" else None), str):
                    raise FormatError(f"systems[{system!r}] needs a text under {key!r}, not {description.get(key)!r}.")
        for name, evaluated in self.sets.items():
            if not evaluated.query_ids or len(set(evaluated.query_ids)) < evaluated.queries:
                what = "has a query id twice" if evaluated.query_ids else "has no queries"
                raise FormatError(f"sets[{name!r}] {what}, so values have no query to belong to.")
        for where in ("values", "seconds"):
            for place, systems in getattr(self, where).items():
                if place not in self.sets:
                    raise FormatError(f"{where} has a set {place!r} that is not under 'sets'.")
                for unknown in systems.keys() - self.systems.keys():
                    raise FormatError(f"{where}[{place!r}] has a system {unknown!r} that is not under 'systems'.")
        for name, measured in self.values.items():
            for system, measures in measured.items():
                for measure, values in measures.items():
                    self._check_values(name, system, measure, values)
        if self.baseline is not None and self.baseline not in self.groups:
            known = ", ".join(self.groups)
            raise FormatError(f"the baseline {self.settings['baseline']!r} is no system; there are {known}.")

    def _check_settings(self) -> None:
        if missing := SETTINGS - self.settings.keys():
            raise FormatError(f"settings lacks {', '.join(sorted(missing))}.")
        measures = self.settings["measures"]
        if not is_texts(measures) or not measures or len(set(measures)) < len(measures):
            raise FormatError(f"settings['measures'] must be a list of different names, not {measures!r}.")
        confidence = self.settings["confidence"]
        if not is_number(confidence) or not 0 < confidence < 1:
            raise FormatError(f"settings['confidence'] must lie between 0 and 1, not {confidence!r}.")
        if not (self.settings["baseline"] is None or isinstance(self.settings["baseline"], str)):
            raise FormatError(f"settings['baseline'] must be a system or null, not {self.settings['baseline']!r}.")
        if not is_count(self.settings["depth"]):
            raise FormatError(f"settings['depth'] must be a number of documents, not {self.settings['depth']!r}.")

    def _check_values(self, name: str, system: str, measure: str, values: np.ndarray) -> None:
        place = f"values[{name!r}][{system!r}][{measure!r}]"
        if measure not in self.settings["measures"]:
            raise FormatError(f"{place}: the measure is not under settings['measures'].")
        if values.shape != (self.sets[name].queries,):
            raise FormatError(
                f"{place} holds {values.size:,} values for {self.sets[name].queries:,} queries, so it is not known "
                "which query each belongs to."
            )
        if not np.isfinite(values).all():
            query = self.sets[name].query_ids[int(np.argmin(np.isfinite(values)))]
            raise FormatError(f"{place} is not a finite number for query {query!r}.")

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures, the headline first."""
        return tuple(self.settings["measures"])

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The systems of each group, in the order of the systems. A group of several is one system with seeds."""
        found: dict[str, list[str]] = {}
        for system in self.systems:
            found.setdefault(self.group_of(system), []).append(system)
        return {group: tuple(systems) for group, systems in found.items()}

    def group_of(self, system: str) -> str:
        """The group of a system; by default the system itself."""
        return str(self.systems[system].get("group", system))

    @property
    def baseline(self) -> str | None:
        """The group that the others are tested against; the settings may name it or a system of it."""
        name = self.settings["baseline"]
        return self.group_of(name) if name in self.systems else name

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The provenance of each evaluation that these results come from."""
        merged: list[dict[str, Any]] | None = self.provenance.get("merged")
        return [self.provenance] if merged is None else merged

    @cached_property
    def summary(self) -> Summary:
        """Means over queries and seeds, intervals and significance tests."""
        from st_m3se.evaluation.summary import summarise

        return summarise(self)

    def seeds(self, name: str, group: str, measure: str) -> dict[str, np.ndarray]:
        """The values on a set of each system of a group that was measured there."""
        found = self.values.get(name, {})
        return {system: found[system][measure] for system in self.groups[group] if measure in found.get(system, {})}

    def per_query(self, name: str, group: str, measure: str) -> np.ndarray | None:
        """A group's value for each query of a set, the mean over its seeds; None where it was not measured."""
        seeds = self.seeds(name, group, measure)
        return np.mean(list(seeds.values()), axis=0) if seeds else None

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read ``results.json``, or a folder that holds it.

        Raises:
            FormatError: If it is no such file, or its parts do not fit together.
            OSError: If it cannot be read.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            content = read_checked_json(path, required=False, pairs_hook=_unique)
            return cls.from_json(content)
        except FormatError as error:
            raise FormatError(error.message, file=str(path)) from error
        except ValueError as error:
            raise FormatError(f"not a {FILE} as st-m3se evaluate writes it: {error}.", file=str(path)) from error

    @classmethod
    def from_json(cls, data: Any) -> Results:
        """Check and take over what a JSON file held; a "summary" in it is derived anew.

        Raises:
            FormatError: If something is missing, of the wrong type, or does not fit the rest.
        """
        data = json_object(data, "the file")
        if data.get("format") != FORMAT:
            raise FormatError(
                f'not a {FILE} as st-m3se evaluate writes it: "format" should be {FORMAT} and is '
                f"{data.get('format')!r}. A per-query .jsonl, a run or a trainer's log is another thing; a higher "
                "number was written by a newer st-m3se."
            )
        parts = {part.name: json_object(data.get(part.name), part.name) for part in fields(cls)}
        for name, evaluated in parts["sets"].items():
            parts["sets"][name] = EvaluatedSet.from_json(json_object(evaluated, f"sets[{name!r}]"), f"sets[{name!r}]")
        for name, system in parts["systems"].items():
            json_object(system, f"systems[{name!r}]")
        for where, read in (("values", _read_values), ("seconds", _read_seconds)):
            for name, systems in parts[where].items():
                for system, entries in json_object(systems, f"{where}[{name!r}]").items():
                    place = f"{where}[{name!r}][{system!r}]"
                    for key, value in json_object(entries, place).items():
                        entries[key] = read(value, f"{place}[{key!r}]")
        return cls(**parts)

    def to_json(self, *, summary: bool = True) -> dict[str, Any]:
        """As ``results.json`` holds it; with the summary for readers that do not compute it."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "provenance": self.provenance,
            "settings": self.settings,
            "sets": {name: evaluated.to_json() for name, evaluated in self.sets.items()},
            "systems": self.systems,
            "seconds": self.seconds,
        }
        if summary:
            data["summary"] = self.summary.to_json()
        data["values"] = {
            name: {
                system: {measure: values.tolist() for measure, values in measures.items()}
                for system, measures in systems.items()
            }
            for name, systems in self.values.items()
        }
        return data

    def save(self, path: str | Path, *, summary: bool = True) -> Path:
        """Write the JSON file, lists of plain values on one line each; what stood there is replaced in one step."""
        path = Path(path)
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(_json_text(with_checksum(self.to_json(summary=summary))) + "\n", encoding="utf-8")
        return path

    @classmethod
    def merge(cls, parts: Mapping[str, Results] | Sequence[Results], *, common_queries: bool = False) -> Results:
        """Put the results of several evaluations beside each other; see :func:`st_m3se.evaluation.merging.merge`."""
        from st_m3se.evaluation.merging import merge

        return merge(parts, common_queries=common_queries)


def compare_files(
    paths: Iterable[str | Path],
    *,
    common_queries: bool = False,
    baseline: str | None = None,
    confidence: float | None = None,
) -> Results:
    """Load several results files and put them beside each other.

    Systems of the same name that were described or measured differently are told apart by their file: "model (a)" and
    "model (b)".

    Args:
        paths: ``results.json`` files, or folders that hold one.
        common_queries: Where the same set has other contents in another file, compare on the queries that all have,
            and say so in the report, instead of refusing.
        baseline: Test every other system against this one; by default what the first file with a baseline says.
        confidence: By default what the first file says.

    Raises:
        FormatError: If a file is no results file, or files cannot be compared; it says what differs.
        OSError: If a file cannot be read.
    """
    from st_m3se.evaluation.merging import labels

    files = [Path(path) for path in paths]
    loaded = dict(zip(labels(files), (Results.load(path) for path in files), strict=True))
    merged = Results.merge(loaded, common_queries=common_queries)
    changes = {"baseline": baseline, "confidence": confidence}
    settings = {**merged.settings, **{name: value for name, value in changes.items() if value is not None}}
    return Results(merged.provenance, settings, merged.sets, merged.systems, merged.values, merged.seconds)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{twice!r} stands twice in one object, so one of the two would be lost.")
    return found


def _read_values(values: Any, place: str) -> np.ndarray:
    if not isinstance(values, list) or not all(is_number(value) for value in values):
        raise FormatError(f"{place} should be a list of numbers, one per query.")
    return np.array(values, dtype=np.float64)


def _read_seconds(value: Any, place: str) -> float:
    if not is_number(value) or not 0 <= value < float("inf"):
        raise FormatError(f"{place} should be a number of seconds, not {value!r}.")
    return float(value)


def _json_text(value: Any, indent: str = "") -> str:
    """JSON with an object's entries on lines of their own and a list of plain values on one."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        rows = [
            f"{json.dumps(str(name), ensure_ascii=False)}: {_json_text(part, inner)}" for name, part in value.items()
        ]
        brackets = "{}"
    elif isinstance(value, list | tuple) and any(isinstance(part, dict | list | tuple) for part in value):
        rows = [_json_text(part, inner) for part in value]
        brackets = "[]"
    else:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return brackets[0] + ",".join(f"\n{inner}{row}" for row in rows) + f"\n{indent}{brackets[1]}"
