"""What an evaluation found: values per query, and the means, intervals and tests that follow from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file, read_checked_json, with_checksum
from st_m3se.core.findings import Finding
from st_m3se.core.shape import check_shape
from st_m3se.evaluation.significance import compare, confidence_intervals

if TYPE_CHECKING:
    from st_m3se.evaluation.data import EvaluationSet

__all__ = ["AVERAGE", "FILE", "EvaluatedSet", "Results", "Values"]

FORMAT = 1
FILE = "results.json"
AVERAGE = "average"  # the last column of the tables
CQADUPSTACK = re.compile(r"cqadupstack[/_.: -]+(.+)", re.IGNORECASE)

MEANS = ["measure", "column", "group", "mean", "deviation", "seeds", "low", "high"]
TESTS = ["set", "measure", "first", "second", "difference", "low", "high", "randomisation_p", "t_p", "holm_p"]
TESTS += ["significant", "wins", "ties", "losses"]
SETTINGS = {
    "measures": [str],
    "depth": int,
    "exclude_same_id": bool,
    "strict": bool,
    "confidence": float,
    "baseline": (str, None),
}
SYSTEMS = {str: {"kind": str}}
FINDING = {"kind": str, "count": int, "examples": [str], "effect": str}
SET = {"documents": (int, None), "judgements": int, "split": str, "form": str, "fingerprint": str, "query_ids": [str]}
SHAPE = {
    "provenance": {},
    "settings": SETTINGS,
    "sets": {str: {**SET, "queries": int, "findings": [FINDING]}},
    "systems": SYSTEMS,
    "values": {str: {str: {str: [float]}}},
    "seconds": {str: {str: {str: float}}},
}

Values = dict[str, dict[str, dict[str, np.ndarray]]]
"""Set -> system -> measure -> float64 [queries], in the order of the set's ``query_ids``."""


@dataclass(frozen=True)
class EvaluatedSet:
    """What a report says about a set, without its texts.

    Attributes:
        documents: Documents of the corpus; None where the set has no corpus, only qrels.
        judgements: Judged pairs of the evaluated queries.
        split: "test", "dev", ...
        form: "retrieval", or "re-ranking" where the candidates were given.
        fingerprint: Of the set's contents: values are compared per query only where it is the same.
        query_ids: The evaluated queries, in the order of the values.
        findings: What was unusual about the data, and what was done.
    """

    documents: int | None
    judgements: int
    split: str
    form: str
    fingerprint: str
    query_ids: tuple[str, ...]
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, source: EvaluationSet) -> EvaluatedSet:
        """The description of an opened set."""
        return cls(
            documents=None if source.corpus is None else len(source.corpus),
            judgements=source.judgements,
            split=source.split,
            form=source.form,
            fingerprint=source.fingerprint,
            query_ids=tuple(source.query_ids),
            findings=tuple(source.findings),
        )

    @property
    def queries(self) -> int:
        """How many queries were evaluated."""
        return len(self.query_ids)


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Results:
    """Everything that reports and plots are made from.

    Args:
        provenance: "date", "st_m3se" (version), "packages", "python", "system", "cpu", "device", "command", "seed";
            of merged files {"merged": [one such mapping for each file]}.
        settings: "measures" (in the order of the tables, the headline first), "depth", "exclude_same_id", "strict",
            "confidence" (of the intervals; 1 - confidence is the tests' level) and "baseline" (a group that every
            other one is tested against, or None: all pairs).
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
        check_shape(self.settings, SETTINGS, "settings")
        check_shape(self.systems, SYSTEMS, "systems")
        measures, confidence = self.settings["measures"], self.settings["confidence"]
        if not measures or len(set(measures)) < len(measures):
            raise FormatError(f"settings['measures'] must be a list of different names, not {measures!r}.")
        if not 0 < confidence < 1:
            raise FormatError(f"settings['confidence'] must lie between 0 and 1, not {confidence!r}.")
        for system, description in self.systems.items():
            if not isinstance(description.get("group", system), str):
                raise FormatError(f"systems[{system!r}]['group'] should be a text, not {description['group']!r}.")
        for name, evaluated in self.sets.items():
            if not evaluated.query_ids or len(set(evaluated.query_ids)) < evaluated.queries:
                what = "has a query id twice" if evaluated.query_ids else "has no queries"
                raise FormatError(f"sets[{name!r}] {what}, so values have no query to belong to.")
            if name == AVERAGE:
                raise FormatError(f"a set cannot be called {AVERAGE!r}, as the last column of the tables is.")
        for where in ("values", "seconds"):
            for name, systems in getattr(self, where).items():
                if name not in self.sets:
                    raise FormatError(f"{where} has a set {name!r} that is not under 'sets'.")
                for system, entries in systems.items():
                    if system not in self.systems:
                        raise FormatError(f"{where}[{name!r}] has a system {system!r} that is not under 'systems'.")
                    for key, value in entries.items():
                        place = f"{where}[{name!r}][{system!r}][{key!r}]"
                        if where == "values":
                            self._check_values(name, key, value, place)
                        elif not 0 <= value < float("inf"):
                            raise FormatError(f"{place} should be a number of seconds, not {value!r}.")
        if self.baseline is not None and self.baseline not in self.groups:
            known = ", ".join(self.groups)
            raise FormatError(f"the baseline {self.settings['baseline']!r} is no system; there are {known}.")

    def _check_values(self, name: str, measure: str, values: np.ndarray, place: str) -> None:
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
    def alpha(self) -> float:
        """The level of the tests."""
        return round(1 - float(self.settings["confidence"]), 10)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The provenance of each evaluation that these results come from."""
        merged: list[dict[str, Any]] | None = self.provenance.get("merged")
        return [self.provenance] if merged is None else merged

    @cached_property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The columns of the tables, and the sets of each: one, but for the subsets of CQADupStack.

        Their mean counts as one set, as BEIR has it; the label says how many there are, since BEIR has 12.
        """
        subsets = tuple(name for name in self.sets if CQADUPSTACK.fullmatch(name))
        if len(subsets) < 2:
            return {name: (name,) for name in self.sets}
        together = f"cqadupstack ({len(subsets)} subsets)"
        found = {together if name in subsets else name: (name,) for name in self.sets}
        return {**found, together: subsets}

    def columns_of(self, measure: str) -> list[str]:
        """The columns where any system was measured by it."""
        measured = {name for name, systems in self.values.items() if any(measure in each for each in systems.values())}
        return [label for label, names in self.columns.items() if measured.intersection(names)]

    def per_query(self, name: str, group: str, measure: str) -> np.ndarray | None:
        """A group's value for each query of a set, the mean over its seeds; None where it was not measured."""
        found = self.values.get(name, {})
        seeds = [found[system][measure] for system in self.groups[group] if measure in found.get(system, {})]
        return np.mean(seeds, axis=0) if seeds else None

    def measured(self, name: str, measure: str) -> dict[str, np.ndarray]:
        """The values per query of each group that was measured on a set."""
        found = {group: self.per_query(name, group, measure) for group in self.groups}
        return {group: values for group, values in found.items() if values is not None}

    def to_frame(self) -> pd.DataFrame:
        """All values, a row each: set, system, group, measure, query_id, value."""
        parts = [
            pd.DataFrame(
                {
                    "set": name,
                    "system": system,
                    "group": self.group_of(system),
                    "measure": measure,
                    "query_id": self.sets[name].query_ids,
                    "value": values,
                }
            )
            for name, systems in self.values.items()
            for system, measures in systems.items()
            for measure, values in measures.items()
        ]
        if not parts:
            return pd.DataFrame(columns=["set", "system", "group", "measure", "query_id", "value"])
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def tests(self) -> pd.DataFrame:
        """The tests, a row each, Holm-corrected over those of the same set and measure.

        The difference is the second's mean minus the first's, low and high are its bootstrap interval; wins, ties and
        losses say on how many queries the second is better, equal and worse.
        """
        return pd.DataFrame(self._tests(), columns=TESTS)

    def _tests(self) -> Iterator[dict[str, Any]]:
        for name in self.sets:
            for measure in self.measures:
                values = self.measured(name, measure)
                if len(values) < 2 or not (self.baseline is None or self.baseline in values):
                    continue
                for test in compare(values, measure, baseline=self.baseline, alpha=self.alpha):
                    signs = np.sign(values[test.second] - values[test.first]).tolist()
                    counts = {"wins": signs.count(1), "ties": signs.count(0), "losses": signs.count(-1)}
                    yield {
                        "set": name,
                        **asdict(test),
                        **dict(zip(("low", "high"), test.interval, strict=True)),
                        **counts,
                    }

    def better_than(self, name: str, measure: str, group: str) -> list[str]:
        """The groups that one is significantly better than on a set."""
        return [other for other in self.groups if (name, measure, group, other) in self._better]

    @cached_property
    def _better(self) -> set[tuple[str, str, str, str]]:
        return {
            (test.set, test.measure, *((test.second, test.first) if test.difference > 0 else (test.first, test.second)))
            for test in self.tests[self.tests["significant"]].itertuples()
        }

    @cached_property
    def means(self) -> pd.DataFrame:
        """The means over queries and seeds, by (measure, column, group).

        The columns are the sets, what :attr:`columns` puts together, and "average", the unweighted mean over the
        measure's columns; each only of the groups that have all of its sets. Of each: mean; deviation, the standard
        deviation (n - 1) over the seeds, NaN for one; seeds, how many, without those that lack a set; low and high, the
        bootstrap interval over queries, NaN for a mean over sets.
        """
        return pd.DataFrame(self._means(), columns=MEANS).set_index(MEANS[:3])

    def _means(self) -> Iterator[tuple[Any, ...]]:
        for measure in self.measures:
            by_set = {
                name: {system: each[measure].mean() for system, each in systems.items() if measure in each}
                for name, systems in self.values.items()
            }
            seeds = pd.DataFrame(by_set, index=list(self.systems), columns=list(self.sets), dtype=np.float64)
            shown = self.columns_of(measure)
            for label in shown:
                seeds[label] = seeds[list(self.columns[label])].mean(axis=1, skipna=False)
            seeds[AVERAGE] = seeds[shown].mean(axis=1, skipna=False)
            for column in seeds:
                values = self.measured(column, measure) if column in self.sets else {}
                intervals = confidence_intervals(values, level=self.settings["confidence"]) if values else {}
                for group, systems in self.groups.items():
                    found = seeds.loc[list(systems), column].dropna()
                    if len(found):
                        interval = intervals.get(group, (np.nan, np.nan))
                        yield measure, column, group, found.mean(), found.std(), len(found), *interval

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read ``results.json``, or a folder that holds it.

        Raises:
            FormatError: If it is no such file, was damaged, or its parts do not fit together.
            OSError: If it cannot be read.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            return cls.from_json(read_checked_json(path, required=False, pairs_hook=_unique))
        except FormatError as error:
            raise FormatError(error.message, file=str(path)) from error
        except ValueError as error:
            raise FormatError(f"not a {FILE} as st-m3se evaluate writes it: {error}.", file=str(path)) from error

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        """Check and take over what a JSON file held; a "summary" in it is derived anew.

        Raises:
            FormatError: If something is missing, of the wrong type, or does not fit the rest.
        """
        if data.get("format") != FORMAT:
            raise FormatError(
                f'not a {FILE} as st-m3se evaluate writes it: "format" should be {FORMAT} and is '
                f"{data.get('format')!r}. A per-query .jsonl, a run or a trainer's log is another thing; a higher "
                "number was written by a newer st-m3se."
            )
        check_shape(data, SHAPE, "")
        sets = {}
        for name, each in data["sets"].items():
            if each["queries"] != len(each["query_ids"]):
                raise FormatError(
                    f"sets[{name!r}] says {each['queries']:,} queries and lists {len(each['query_ids']):,} query_ids."
                )
            findings = tuple(
                Finding(**{**finding, "examples": tuple(finding["examples"])}) for finding in each["findings"]
            )
            known = {key: each[key] for key in SET} | {"query_ids": tuple(each["query_ids"]), "findings": findings}
            sets[name] = EvaluatedSet(**known)
        values = _each(data["values"], lambda column: np.array(column, dtype=np.float64))
        return cls(data["provenance"], data["settings"], sets, data["systems"], values, data["seconds"])

    def to_json(self, *, summary: bool = True) -> dict[str, Any]:
        """As ``results.json`` holds it; with :attr:`means` and :attr:`tests` for readers that do not compute them."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "provenance": self.provenance,
            "settings": self.settings,
            "sets": {
                name: {
                    **vars(each),
                    "queries": each.queries,
                    "findings": [finding._asdict() for finding in each.findings],
                }
                for name, each in self.sets.items()
            },
            "systems": self.systems,
            "seconds": self.seconds,
        }
        if summary:
            frames = {"means": self.means.reset_index(), "tests": self.tests}
            records = {
                name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in frames.items()
            }
            data["summary"] = {"alpha": self.alpha, **records}
        data["values"] = _each(self.values, lambda column: column.tolist())
        return data

    def save(self, path: str | Path, *, summary: bool = True) -> Path:
        """Write the JSON file, lists of plain values on one line each; what stood there is replaced in one step."""
        path = Path(path)
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(_json_text(with_checksum(self.to_json(summary=summary))) + "\n", encoding="utf-8")
        return path


def _each(values: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The values with each column, one of a set, system and measure, changed."""
    return {
        name: {
            system: {measure: change(column) for measure, column in measures.items()}
            for system, measures in systems.items()
        }
        for name, systems in values.items()
    }


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{twice!r} stands twice in one object, so one of the two would be lost.")
    return found


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
