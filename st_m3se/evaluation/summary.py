"""Means over queries and seeds, intervals and significance tests of an evaluation, all from its per-query values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from st_m3se.evaluation.significance import Comparison, compare, confidence_intervals

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = ["Cell", "Column", "Summary", "columns", "summarise"]

CQADUPSTACK = re.compile(r"cqadupstack[/_.: -]+(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """A column of the tables: a set, or the subsets of CQADupStack, whose mean counts as one set as BEIR has it."""

    label: str
    sets: tuple[str, ...]

    @property
    def is_set(self) -> bool:
        """Whether it is one set, with intervals and tests, and no mean of several."""
        return len(self.sets) == 1 and self.label == self.sets[0]


@dataclass(frozen=True)
class Cell:
    """A group's figure in one column.

    Attributes:
        mean: Over the queries, and over the seeds.
        deviation: Standard deviation (n - 1) of the seeds' means; None for fewer than two seeds.
        seeds: How many systems the group has here.
        interval: Of the mean over queries, by bootstrap; None for a mean over sets.
        better: The groups that this one is significantly better than.
        worse: The groups that it is significantly worse than.
    """

    mean: float
    deviation: float | None
    seeds: int
    interval: tuple[float, float] | None = None
    better: tuple[str, ...] = ()
    worse: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """What the tables and plots show.

    Attributes:
        alpha: The level of the tests.
        columns: All columns.
        columns_of: Measure -> the columns where any system was measured by it.
        cells: Measure -> column's label -> group -> figure; a group that was not measured there is absent.
        averages: Measure -> group -> the unweighted mean over ``columns_of``; absent unless the group has all of them.
        comparisons: Set -> measure -> tests, Holm-corrected over those of the same set and measure.
    """

    alpha: float
    columns: tuple[Column, ...]
    columns_of: dict[str, tuple[Column, ...]]
    cells: dict[str, dict[str, dict[str, Cell]]]
    averages: dict[str, dict[str, Cell]]
    comparisons: dict[str, dict[str, list[Comparison]]]

    def set_cell(self, measure: str, name: str, group: str) -> Cell | None:
        """The figure of a group on a set, which need not have a column of its own."""
        return self.cells[measure].get(name, {}).get(group)

    def to_json(self) -> dict[str, Any]:
        """For readers of ``results.json`` that do not derive it."""
        return {
            "alpha": self.alpha,
            "means": {
                measure: {label: _cells(found) for label, found in columns.items()}
                for measure, columns in self.cells.items()
            },
            "averages": {measure: _cells(found) for measure, found in self.averages.items()},
            "comparisons": {
                name: {measure: [_plain(asdict(test)) for test in tests] for measure, tests in found.items()}
                for name, found in self.comparisons.items()
            },
        }


def columns(sets: Sequence[str]) -> tuple[Column, ...]:
    """One column per set, in their order; the subsets of CQADupStack share one where the first of them stands."""
    subsets = tuple(name for name in sets if CQADUPSTACK.fullmatch(name))
    if len(subsets) < 2:
        return tuple(Column(name, (name,)) for name in sets)
    # BEIR has 12; the label says how many there are, so that a part of them is not taken for the whole.
    together = Column(f"cqadupstack ({len(subsets)} subsets)", subsets)
    return tuple(together if name in subsets else Column(name, (name,)) for name in sets if name not in subsets[1:])


def summarise(results: Results) -> Summary:
    """Derive the means, intervals and tests."""
    alpha = round(1 - results.settings["confidence"], 10)
    parts = columns(list(results.sets))
    cells: dict[str, dict[str, dict[str, Cell]]] = {}
    columns_of: dict[str, tuple[Column, ...]] = {}
    averages: dict[str, dict[str, Cell]] = {}
    comparisons: dict[str, dict[str, list[Comparison]]] = {name: {} for name in results.sets}
    for measure in results.measures:
        cells[measure] = {}
        for name in results.sets:
            tests = _tests(results, name, measure, alpha)
            if tests:
                comparisons[name][measure] = tests
            cells[measure][name] = dict(_set_cells(results, name, measure, tests))
        for column in parts:
            if not column.is_set:
                cells[measure][column.label] = _means(results, measure, [[name] for name in column.sets])
        columns_of[measure] = tuple(column for column in parts if any(cells[measure][name] for name in column.sets))
        averages[measure] = _means(results, measure, [list(column.sets) for column in columns_of[measure]])
    return Summary(alpha, parts, columns_of, cells, averages, comparisons)


def _tests(results: Results, name: str, measure: str, alpha: float) -> list[Comparison]:
    values = {group: results.per_query(name, group, measure) for group in results.groups}
    measured = {group: per_query for group, per_query in values.items() if per_query is not None}
    baseline = results.baseline
    if len(measured) < 2 or not (baseline is None or baseline in measured):
        return []
    return compare(measured, measure, baseline=baseline, alpha=alpha)


def _set_cells(results: Results, name: str, measure: str, tests: list[Comparison]) -> Iterator[tuple[str, Cell]]:
    measured = {group: seeds for group in results.groups if (seeds := results.seeds(name, group, measure))}
    if not measured:
        return
    per_query = {group: np.mean(list(seeds.values()), axis=0) for group, seeds in measured.items()}
    intervals = confidence_intervals(per_query, level=results.settings["confidence"])
    for group, seeds in measured.items():
        means = [float(values.mean()) for values in seeds.values()]
        better: list[str] = []
        worse: list[str] = []
        for test in tests:
            if test.significant and group in (test.first, test.second):
                other = test.second if group == test.first else test.first
                won = (test.difference > 0) == (group == test.second)  # the difference is the second's
                (better if won else worse).append(other)
        yield (
            group,
            Cell(float(np.mean(means)), _deviation(means), len(means), intervals[group], tuple(better), tuple(worse)),
        )


def _means(results: Results, measure: str, parts: Sequence[Sequence[str]]) -> dict[str, Cell]:
    """The unweighted mean over parts, each the unweighted mean over its sets, of the groups that have every set.

    Each seed is averaged by itself, so that the deviation is that of the average; a seed that lacks a set is left out.
    """
    found: dict[str, Cell] = {}
    if not parts:
        return found
    for group, systems in results.groups.items():
        by_set = {name: results.seeds(name, group, measure) for part in parts for name in part}
        whole = [system for system in systems if all(system in seeds for seeds in by_set.values())]
        averages = [
            float(np.mean([np.mean([by_set[name][system].mean() for name in part]) for part in parts]))
            for system in whole
        ]
        if averages:
            found[group] = Cell(float(np.mean(averages)), _deviation(averages), len(averages))
    return found


def _deviation(means: Sequence[float]) -> float | None:
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def _cells(found: dict[str, Cell]) -> dict[str, Any]:
    return {group: _plain(asdict(cell)) for group, cell in found.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """NumPy's numbers and tuples as JSON has them."""
    return {
        name: value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }
