"""Plots of an evaluation: bars with intervals, and what each query won or lost. Legible in grey."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from st_m3se.core.extras import require
from st_m3se.core.files import atomic_file
from st_m3se.evaluation.results import AVERAGE
from st_m3se.evaluation.tables import DIGITS, NOTHING, grids, leading, plain, reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from st_m3se.evaluation.results import Results

__all__ = [
    "Plot",
    "image",
    "new_figure",
    "plot_bars",
    "plot_differences",
    "plot_wins",
    "plots",
    "save_figure",
    "style",
    "tidy",
]

# Okabe and Ito's colours, which people with colour blindness tell apart; in grey the hatches do it.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
WIDTH = 9.0  # inches
BARS = 32  # in a row
PANELS = 4  # in a row
STYLE = {
    "font.size": 9,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "st-m3se",  # the same file for the same figures
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures, also as a decorator; matplotlib's settings are as they were when it ends."""
    with require("matplotlib", "plot").rc_context(STYLE):
        yield


@dataclass(frozen=True)
class Plot:
    """A figure and what it shows: ``name`` for its files, ``caption`` below it, ``alt`` for who cannot see it."""

    name: str
    caption: str
    alt: str
    figure: Figure

    @cached_property
    def svg(self) -> bytes:
        """The figure as SVG."""
        return image(self.figure, "svg")


def plots(results: Results) -> Iterator[Plot]:
    """All plots of a report: bars and tested differences of every measure, wins and losses by the headline measure."""
    for title, grid in grids(results, turn=False).items():
        alt = f"Bar chart of the table {title}: {len(grid)} systems, {grid.shape[1]} groups of bars."
        caption = f"{title}: means with bootstrap intervals."
        yield Plot(f"bars {title}", caption, alt, _bars(results, title, grid))
    for measure in results.measures:
        if tests := _tests(results, measure):
            against = plain(_against(results))
            points = "; ".join(
                f"{plain(test.set)}, {plain(group)}: {test.difference:+.{DIGITS}f}{', significant' * test.significant}"
                for group, found in tests.items()
                for test in found.itertuples()
            )
            yield Plot(
                f"differences {measure}",
                f"{measure}: difference to {against} with bootstrap intervals; filled where significant.",
                f"Differences in {measure} to {against}. {points}.",
                plot_differences(results, measure),
            )
    measure = results.measures[0]
    for name in results.sets:
        others = _others(results, name, measure)
        if not others:
            continue
        against = plain(reference(results, name, measure) or "")
        counts = "; ".join(f"{plain(group)}: {_counts(values)}" for group, values in others.items())
        yield Plot(
            f"wins {name}",
            f"{plain(name)}: {measure} of each query minus that of {against}, sorted.",
            f"Sorted differences in {measure} to {against} on {plain(name)}. {counts}.",
            plot_wins(results, name, measure),
        )


def plot_bars(results: Results, measure: str | None = None) -> Figure:
    """Bars with intervals: every system on every set and on average; for a single set, on every measure.

    ``measure`` is by default the first; it has no effect where there is a single set.
    """
    tables = grids(results, turn=False)
    title = plain(measure or results.measures[0])
    title = title if title in tables else next(iter(tables))
    return _bars(results, title, tables[title])


@style()
def _bars(results: Results, title: str, grid: pd.DataFrame) -> Figure:
    from matplotlib.patches import Patch

    measure = title if title in results.measures and len(results.columns) > 1 else "value"
    systems, places = len(grid), list(range(grid.shape[1]))
    rows = max(1, -(-len(places) * systems // BARS))
    per_row = -(-len(places) // rows)
    parts = [places[start : start + per_row] for start in range(0, len(places), per_row)]
    columns = max(1, min(systems, int(110 / (max(map(len, grid.index)) + 8))))
    height = 0.4 + 0.22 * -(-systems // columns) + 2.6 * len(parts)
    figure = new_figure(WIDTH, height)
    panels = figure.subplots(len(parts), 1, squeeze=False, sharey=True)[:, 0]
    for panel, part in zip(panels, parts, strict=True):
        _draw_bars(panel, grid, part, per_row)
        panel.set_ylabel(measure)
    labels = [f" {label}" for label in grid.index]  # one that begins with an underscore would be left out
    handles = [Patch(**_look(row)) for row in range(systems)]
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    return _laid_out(figure)


def _draw_bars(panel: Axes, grid: pd.DataFrame, part: Sequence[int], slots: int) -> None:
    """Some of the columns, in a panel that has room for so many."""
    systems = len(grid)
    width = 0.84 / systems
    for row in range(systems):
        shown = grid.iloc[row, list(part)].tolist()
        x = np.arange(len(part)) + (row - (systems - 1) / 2) * width
        heights = np.array([np.nan if figure is None else figure.value for figure in shown])
        bars = panel.bar(x, np.nan_to_num(heights), width, **_look(row))
        for bar, height in zip(bars, heights, strict=True):
            bar.set_visible(bool(np.isfinite(height)))
        for place, figure in zip(x, shown, strict=True):
            if figure is None:
                panel.annotate(NOTHING, (place, 0), xytext=(0, 2), textcoords="offset points", ha="center")
                continue
            high = figure.value if np.isnan(figure.high) else figure.high
            if figure.low < figure.high:
                # The interval holds the mean but for rounding.
                errors = [[max(0.0, figure.value - figure.low)], [max(0.0, high - figure.value)]]
                panel.errorbar([place], [figure.value], errors, fmt="none", ecolor="black", capsize=2, linewidth=0.9)
            if systems * slots <= BARS // 2:
                text = f"{figure.value:.{DIGITS}f}"
                panel.annotate(text, (place, high), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    labels = ["\n".join(textwrap.wrap(grid.columns[place], max(10, 90 // slots))) for place in part]
    panel.set_xticks(np.arange(len(part)), labels)
    panel.set_xlim(-0.5, slots - 0.5)
    if AVERAGE in grid.columns and part[-1] == len(grid.columns) - 1:
        panel.axvline(len(part) - 1.5, color="0.5", linewidth=0.8, linestyle=":")
    panel.margins(y=0.12)
    panel.set_ylim(bottom=0)
    tidy(panel)


def _look(row: int) -> dict[str, Any]:
    """Of the bars of a system: no two of the first 64 are alike."""
    hatch = HATCHES[(row + row // len(COLOURS)) % len(HATCHES)]
    return {"facecolor": COLOURS[row % len(COLOURS)], "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}


def _against(results: Results) -> str:
    """The group that tested differences are shown to."""
    return results.baseline or leading(results)[0]


def _tests(results: Results, measure: str) -> dict[str, pd.DataFrame]:
    """Group -> its tests against the reference, a row for each set; the differences are the group's."""
    against, tests = _against(results), results.tests[results.tests["measure"] == measure]
    turned = tests.rename(columns={"first": "second", "second": "first"})
    turned = turned.assign(difference=-tests["difference"], low=-tests["high"], high=-tests["low"])
    both = pd.concat([tests, turned])
    found = dict(iter(both[both["first"] == against].groupby("second")))
    return {group: found[group] for group in results.groups if group in found}


@style()
def plot_differences(results: Results, measure: str | None = None) -> Figure:
    """The tested differences to the baseline on every set, with their intervals; filled where significant.

    Without a baseline, the differences to the first system, or to the first besides BM25 where there are two.
    ``measure`` is by default the first.

    Raises:
        ValueError: If nothing was tested against it.
    """
    measure = measure or results.measures[0]
    tests = _tests(results, measure)
    if not tests:
        raise ValueError(f"nothing was tested against {_against(results)!r} by {measure}: that takes a set with both.")
    tested = {name for found in tests.values() for name in found["set"]}
    names = [name for name in results.sets if name in tested]
    places = {name: place for place, name in enumerate(reversed(names))}
    columns = min(PANELS, len(tests))
    rows = -(-len(tests) // columns)
    height = 0.7 + rows * (0.6 + 0.24 * len(names))
    figure = new_figure(WIDTH if columns > 1 else WIDTH * 0.66, height)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, (group, found) in zip(panels.flat, tests.items(), strict=False):
        for test in found.itertuples():
            place, face = places[test.set], COLOURS[0] if test.significant else "white"
            panel.plot([test.low, test.high], [place] * 2, color="black", linewidth=1)
            panel.plot(
                test.difference, place, marker="o", markersize=5.5, markerfacecolor=face, markeredgecolor="black"
            )
        panel.axvline(0, color="0.5", linewidth=0.8, linestyle="--")
        panel.set_title(_title(group, columns), fontsize=9)
        panel.set_yticks(list(places.values()), ["\n".join(textwrap.wrap(plain(name), 30)) for name in places])
        panel.set_ylim(-0.6, len(names) - 0.4)
        tidy(panel, "x")
    _finish(panels, len(tests))
    figure.supxlabel(f"{measure} minus that of {textwrap.shorten(plain(_against(results)), 90)}", fontsize=9)
    return _laid_out(figure)


def _title(group: str, columns: int) -> str:
    return "\n".join(textwrap.wrap(plain(group), 92 // columns))


def _finish(panels: np.ndarray, used: int) -> None:
    """Hide the panels that nothing was left for, and put numbers below the lowest of each column."""
    for panel in panels.flat[used:]:
        panel.set_visible(False)
    columns = panels.shape[1]
    for column in range(columns):
        panels[(used - 1 - column) // columns, column].tick_params(labelbottom=True)


def _others(results: Results, name: str, measure: str) -> dict[str, np.ndarray]:
    """Each group's differences to the reference on a set, per query."""
    values = results.measured(name, measure)
    against = reference(results, name, measure)
    return {} if against is None else {group: values[group] - values[against] for group in values if group != against}


def _counts(differences: np.ndarray) -> str:
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return f"{wins:,} won, {len(differences) - wins - losses:,} tied, {losses:,} lost"


@style()
def plot_wins(results: Results, name: str, measure: str | None = None) -> Figure:
    """For each system, its value minus the baseline's for every query of a set, sorted: how many won, and how much.

    Args:
        results: What to show.
        name: The set.
        measure: By default the first.

    Raises:
        ValueError: If fewer than two systems were measured there, or the baseline was not.
    """
    measure = measure or results.measures[0]
    others = _others(results, name, measure)
    if not others:
        raise ValueError(
            f"on {name!r} there are no two systems with {measure}, one of them the baseline, to show differences of."
        )
    columns = min(PANELS, len(others))
    rows = -(-len(others) // columns)
    figure = new_figure(WIDTH if columns > 1 else WIDTH * 0.66, 0.5 + 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    limit = max(0.05, *(float(np.abs(values).max()) * 1.08 for values in others.values()))
    for panel, (group, values) in zip(panels.flat, others.items(), strict=False):
        _draw_wins(panel, values)
        panel.set_title(_title(group, columns), fontsize=9)
        panel.set_ylim(-limit, limit)
    _finish(panels, len(others))
    figure.supylabel(f"difference in {measure}", fontsize=9)
    against = textwrap.shorten(plain(reference(results, name, measure) or ""), 90)
    figure.supxlabel(f"queries, best difference to {against} first", fontsize=9)
    return _laid_out(figure)


def _draw_wins(panel: Axes, differences: np.ndarray) -> None:
    # Runs of equal differences are one step, so that thousands of queries do not make a large file.
    runs = [(value, len(list(equal))) for value, equal in groupby(np.sort(differences)[::-1].tolist())]
    steps = np.array([value for value, _ in runs])
    edges = np.cumsum([0, *(length for _, length in runs)])
    for part, colour, hatch in ((np.maximum(steps, 0), COLOURS[0], ""), (np.minimum(steps, 0), COLOURS[1], "////")):
        panel.stairs(part, edges, fill=True, facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.5)
    panel.axhline(0, color="black", linewidth=0.8)
    mean = float(differences.mean())
    panel.axhline(mean, color="0.3", linewidth=1, linestyle="--")
    panel.annotate(
        f"{_counts(differences)}\nmean {mean:+.{DIGITS}f} (dashed)",
        (0.97, 0.95),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=7.5,
    )
    panel.set_xlim(0, len(differences))
    panel.spines[["top", "right"]].set_visible(False)


def _laid_out(figure: Figure) -> Figure:
    """Laid out for good: the layout would shift a little with each file that is saved."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


@style()
def image(figure: Figure, form: str) -> bytes:
    """The figure as "svg" or "png", the same bytes for the same figure."""
    # Without these the SVG would hold the date, and addresses of vocabularies.
    metadata: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None} if form == "svg" else {}
    file = io.BytesIO()
    figure.savefig(file, format=form, dpi=150, metadata=metadata)
    return file.getvalue()


def save_figure(figure: Figure, path: str | Path, *, svg: bytes | None = None) -> tuple[Path, Path]:
    """Write ``path`` with the endings .png and .svg; the same figure gives the same bytes.

    ``svg`` is the figure as SVG, where that is there already.
    """
    path = Path(path)
    files = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg")
    for file, content in zip(files, (image(figure, "png"), svg or image(figure, "svg")), strict=True):
        with atomic_file(file, overwrite=True) as temporary:
            temporary.write_bytes(content)
    return files


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without pyplot's global state."""
    figure: Figure = require("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure


def tidy(panel: Axes, axis: Literal["x", "y"] = "y") -> None:
    """Without the upper and right border, with a quiet grid behind what is drawn."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=axis, color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
