"""What a report's tables hold, before it is known whether they are for a terminal, a paper or a browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase
from typing import TYPE_CHECKING, NamedTuple

from st_m3se.evaluation.summary import Cell

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = [
    "AVERAGE",
    "DIGITS",
    "NOTHING",
    "Grid",
    "Shown",
    "bracketed",
    "grids",
    "headline",
    "leading",
    "legend",
    "plain",
    "reference",
]

DIGITS = 3
AVERAGE = "average"
NOTHING = "\N{EN DASH}"


class Shown(NamedTuple):
    """A figure as the tables show it: whether it is the best of its set, and its marks of significance."""

    cell: Cell
    best: bool
    marks: str

    @property
    def mean(self) -> str:
        """With the standard deviation where there are several seeds."""
        deviation = "" if self.cell.deviation is None else f" ± {self.cell.deviation:.{DIGITS}f}"
        return f"{self.cell.mean:.{DIGITS}f}{deviation}"

    @property
    def interval(self) -> str:
        """Of the mean; "" for an average over sets."""
        return "" if self.cell.interval is None else bracketed(self.cell.interval)


@dataclass(frozen=True)
class Grid:
    """A table of figures.

    Attributes:
        title: The measure; or the set or the system, where there is but one.
        corner: What the first column names.
        rows: Their labels.
        columns: Their labels.
        figures: [rows, columns]; None where nothing was measured.
        by_set: Whether the sets are the rows, with the average last.
    """

    title: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    figures: tuple[tuple[Shown | None, ...], ...]
    by_set: bool = False

    def turned(self) -> Grid:
        """With rows for columns."""
        figures = tuple(zip(*self.figures, strict=True))
        return Grid(self.title, "set", self.columns, self.rows, figures, by_set=not self.by_set)


def plain(text: str) -> str:
    """A name on one line, without characters that move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def grids(results: Results, *, turn: bool = True) -> list[Grid]:
    """The tables of figures, with the average over sets at the end.

    One table per measure; a single one of all measures where there is a single set or a single system.

    Args:
        results: What to show.
        turn: Let the sets run down where there are more of them than systems, as BEIR papers do.
    """
    summary = results.summary
    if len(summary.columns) == 1:
        label = summary.columns[0].label
        return [_grid(results, label, {measure: summary.cells[measure][label] for measure in results.measures})]
    by_measure = {
        measure: _grid(
            results,
            measure,
            {column.label: summary.cells[measure][column.label] for column in columns},
            summary.averages[measure],
        )
        for measure in results.measures
        if (columns := summary.columns if len(results.groups) == 1 else summary.columns_of[measure])
    }
    found = list(by_measure.values())
    if len(results.groups) == 1:
        figures = tuple(grid.figures[0] for grid in found)
        measures = tuple(map(plain, by_measure))
        found = [Grid(found[0].rows[0], "measure", measures, found[0].columns, figures)]
    return [grid.turned() if turn and len(grid.columns) > len(grid.rows) else grid for grid in found]


def _grid(
    results: Results,
    title: str,
    by_column: Mapping[str, Mapping[str, Cell]],
    average: Mapping[str, Cell] | None = None,
) -> Grid:
    columns = [*by_column.items(), *([] if average is None else [(AVERAGE, average)])]
    letters = _letters(results)
    figures = []
    for group in results.groups:
        row: list[Shown | None] = []
        for _, cells in columns:
            best = max((round(cell.mean, DIGITS) for cell in cells.values()), default=0.0)
            cell = cells.get(group)
            if cell is None:
                row.append(None)
            else:
                is_best = len(cells) > 1 and round(cell.mean, DIGITS) == best
                row.append(Shown(cell, is_best, _marks(results, cell, letters)))
        figures.append(tuple(row))
    labels = tuple(_label(results, group, letters) for group in results.groups)
    return Grid(plain(title), "system", labels, tuple(plain(label) for label, _ in columns), tuple(figures))


def _letters(results: Results) -> dict[str, str]:
    """a, b, ..., z, aa, ab, ... for the systems where all pairs are compared."""
    if results.baseline is not None or len(results.groups) < 2:
        return {}
    names = ["".join(pair) for length in (1, 2) for pair in product(ascii_lowercase, repeat=length)]
    return dict(zip(results.groups, names, strict=False))


def _label(results: Results, group: str, letters: Mapping[str, str]) -> str:
    seeds = len(results.groups[group])
    letter = f"{letters[group]}: " if group in letters else ""
    return letter + plain(group) + (f" ({seeds} seeds)" if seeds > 1 else "")


def _marks(results: Results, cell: Cell, letters: Mapping[str, str]) -> str:
    if results.baseline is not None:
        return ("†" if results.baseline in cell.better else "") + ("‡" if results.baseline in cell.worse else "")
    return " ".join(letters[group] for group in cell.better)


def legend(results: Results, *, intervals: bool = True) -> list[str]:
    """What bold, marks, brackets and averages mean, in sentences; for tables with or without intervals."""
    summary, settings = results.summary, results.settings
    sentences = []
    if len(results.groups) > 1:
        sentences.append("Bold: the best of each set.")
    tests = [tests for measures in summary.comparisons.values() for tests in measures.values()]
    if tests:
        sizes = sorted({len(family) for family in tests})
        number = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        family = (
            "one comparison for each set and measure"
            if sizes[-1] == 1
            else f"Holm-corrected over the {number} comparisons of the same set and measure"
        )
        what = (
            f"† significantly better, ‡ significantly worse than {plain(results.baseline)}"
            if results.baseline is not None
            else "Letters: the systems that this one is significantly better than"
        )
        sentences.append(
            f"{what}: two-sided paired randomisation test of the values per query, {family}, p ≤ {summary.alpha:g}."
        )
    elif len(results.groups) > 1:
        missing = "" if results.baseline is None else f" that also has {plain(results.baseline)}, the baseline"
        sentences.append(f"Nothing was tested: no two systems were measured on the same set{missing}.")
    if intervals:
        level = f"{100 * settings['confidence']:g} %"
        sentences.append(f"Brackets: {level} bootstrap interval of the mean over the queries.")
    if any(len(systems) > 1 for systems in results.groups.values()):
        sentences.append("±: standard deviation over seeds; intervals and tests use each query's mean over the seeds.")
    if len(summary.columns) > 1 or not summary.columns[0].is_set:
        subsets = [column for column in summary.columns if not column.is_set]
        also = ", to which the subsets of CQADupStack count together as one" if subsets else ""
        sentences.append(
            f"Average: the unweighted mean over the table's sets{also}, of systems that have all; not tested."
        )
    if any(shown is None for grid in grids(results) for row in grid.figures for shown in row):
        sentences.append(f"{NOTHING}: not measured.")
    return sentences


def headline(results: Results) -> str:
    """The main outcome in a sentence or two."""
    summary, measure = results.summary, results.measures[0]
    last = summary.columns[0].label
    cells = summary.cells[measure][last] if len(summary.columns) == 1 else summary.averages[measure]
    count = len(summary.columns_of[measure])
    where = f"on {plain(last)}" if len(summary.columns) == 1 else f"on average over {count} sets"
    if not cells:
        return f"No system has {plain(measure)} on every set, so there is no average to lead with."
    best = max(cells, key=lambda group: cells[group].mean)
    text = f"{plain(best)} reaches {plain(measure)} {cells[best].mean:.{DIGITS}f} {where}"
    if len(cells) < 2:
        return text + "."
    text = f"Best of {len(cells)} systems: {text}."
    other = results.baseline or max((group for group in cells if group != best), key=lambda group: cells[group].mean)
    if other == best:
        return f"{text} It is the baseline."
    tested = [name for name in results.sets if {best, other} <= summary.cells[measure][name].keys()]
    better = [name for name in tested if other in summary.cells[measure][name][best].better]
    worse = [name for name in tested if other in summary.cells[measure][name][best].worse]
    role = "the baseline" if other == results.baseline else "the next best"
    if len(results.sets) == 1:
        verdict = "better than" if better else "worse than" if worse else "different from"
        negation = "" if better or worse else "not "
        return f"{text} It is {negation}significantly {verdict} {plain(other)}, {role}."
    return (
        f"{text} Against {plain(other)}, {role}, it is significantly better on {len(better)} of {len(tested)} sets and "
        f"significantly worse on {len(worse)}."
    )


def reference(results: Results, name: str, measure: str) -> str | None:
    """The group that differences per query are shown to: the baseline, or the first of :func:`leading` there."""
    if results.baseline is not None:
        return results.baseline if results.per_query(name, results.baseline, measure) is not None else None
    measured = (group for group in leading(results) if results.per_query(name, group, measure) is not None)
    return next(measured, None)


def leading(results: Results) -> list[str]:
    """The groups, BM25 last if there are two others: the first model, as it was before, is what the rest is held to."""
    lexical = [group for group, names in results.groups.items() if results.systems[next(iter(names))]["kind"] == "bm25"]
    others = [group for group in results.groups if group not in lexical]
    return [*others, *lexical] if len(others) > 1 else list(results.groups)


def bracketed(interval: tuple[float, float], sign: str = "") -> str:
    """An interval as tables show it; with ``sign`` "+" its ends have a sign."""
    return "[" + ", ".join(f"{bound:{sign}.{DIGITS}f}" for bound in interval) + "]"
