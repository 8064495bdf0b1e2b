"""The figures, as matplotlib Figures without pyplot's global state, legible without colour.

What differs by colour differs by lightness too, and by line style, marker or hatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from st_m3se.core.extras import require
from st_m3se.diagnostics.separation import Separation
from st_m3se.diagnostics.tracking import Evolution
from st_m3se.evaluation.plots import new_figure, save_figure, style, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_densities", "plot_evolution", "plot_gap", "plot_margins", "save_figure"]

POSITIVE: dict[str, Any] = {"color": "#0b3c6f", "linestyle": "-"}
NEGATIVE: dict[str, Any] = {"color": "#e08214", "linestyle": (0, (4, 1.5))}
HATCHES = {"positives": "//", "negatives": ".."}
STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#000000", "-", "o"),
    ("#c7601a", (0, (5, 2)), "s"),
    ("#0072b2", (0, (6, 2, 1, 2)), "^"),
    ("#56b48c", (0, (1, 1.2)), "D"),
    ("#8a3c7b", (0, (3, 1, 1, 1, 1, 1)), "v"),
    ("#b8a000", (0, (8, 2)), "P"),
    ("#5b7fd0", (0, (2, 2)), "X"),
    ("#888888", (0, (10, 2, 2, 2)), "*"),
)
"""Colour, dashes and marker of the first, second ... scorer; the colours' lightness alternates."""
VISIBLE = 0.02  # of its peak: where a density is lower, a figure need not show it


@style()
def plot_densities(scorers: Mapping[str, Separation]) -> Figure:
    """The densities of positives' and negatives' scores, one panel for each scorer, since each has units of its own."""
    columns = min(len(scorers), 3 if len(scorers) != 4 else 2)
    rows = math.ceil(len(scorers) / columns)
    figure = new_figure(max(4.2 * columns, 5.0), 3.2 * rows + 0.5)
    for place, (name, found) in enumerate(scorers.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for label, look in (("positives", POSITIVE), ("negatives", NEGATIVE)):
            density = getattr(found, label)
            axes.plot(found.x, density, linewidth=1.8, label=label, **look)
            filled: dict[str, Any] = {"facecolor": "none", "edgecolor": (look["color"], 0.55), "linewidth": 0}
            axes.fill_between(found.x, density, hatch=HATCHES[label], label=label, **filled)
        axes.set_xlim(*_visible(found.x, found.positives, found.negatives))
        axes.set_ylim(bottom=0)
        numbers = found.numbers
        axes.set_title(
            f"{_short(name)}\noverlap {numbers['overlap'].value:.2f}, "
            f"AUC {numbers['auc_per_query'].value:.2f} per query, {numbers['auc_pooled'].value:.2f} pooled",
            fontsize=9,
        )
        axes.set_xlabel("score")
        if place % columns == 1 or columns == 1:
            axes.set_ylabel("density")
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    both: Any = list(zip(handles[1::2], handles[0::2], strict=True))  # hatch and line in one
    figure.legend(both, labels[0::2], loc="outside lower center", ncols=2, frameon=False, handlelength=3)
    return figure


@style()
def plot_margins(scorers: Mapping[str, Separation]) -> Figure:
    """The densities of all scorers' normalised margins in one panel."""
    figure = new_figure(7.2, 4.4)
    axes = figure.add_subplot()
    limits = [_visible(found.margin_x, found.margin_density) for found in scorers.values()]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    for place, (name, found) in enumerate(scorers.items()):
        color, dashes, marker = STYLES[place % len(STYLES)]
        numbers = found.numbers
        shown = (found.margin_x >= low) & (found.margin_x <= high)
        x, y = found.margin_x[shown], found.margin_density[shown]
        axes.plot(
            x,
            y,
            color=color,
            linestyle=dashes,
            linewidth=1.8,
            marker=marker,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            # evenly along the axis, and not at the same places for two scorers
            markevery=_places(x, low, high, place / max(len(scorers), 2)),
            label=f"{_short(name)}: peak {numbers['margin_peak'].value:.2f}, AUC {numbers['auc_per_query'].value:.2f}",
        )
    axes.axvline(0, color="#777777", linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("normalised margin: (positive's score - negative's score) / mean range of a list's scores")
    axes.set_ylabel("density")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=1 if len(scorers) == 1 else 2, frameon=False, handlelength=4)
    return figure


@style()
def plot_evolution(evolutions: Sequence[Evolution]) -> Figure:
    """Scores over training steps: one column for each model, side by side, and one row for each query."""
    queries = list(dict.fromkeys(query for each in evolutions for query in each.query_ids))
    texts = {query: text for each in reversed(evolutions) for query, text in each.queries.items()}
    figure = new_figure(max(4.4 * len(evolutions), 6.0), 3.2 * len(queries) + 0.9)
    for row, query in enumerate(queries):
        for column, each in enumerate(evolutions):
            own = [place for place, other in enumerate(each.query_ids) if other == query]
            if not own:
                continue
            axes = figure.add_subplot(len(queries), len(evolutions), row * len(evolutions) + column + 1)
            every = max(1, len(each.steps) // 8)
            for positive, look in ((True, POSITIVE), (False, NEGATIVE)):
                places = [place for place in own if each.positives[place] == positive]
                for count, place in enumerate(places):
                    axes.plot(
                        each.steps,
                        each.scores[:, place],
                        linewidth=1.5,
                        marker="o" if positive else "s",
                        markersize=4,
                        markerfacecolor=look["color"] if positive else "white",
                        markevery=(count * every // 5, every),
                        label=f"{'' if positive else 'not '}relevant ({len(places)})",
                        **look,
                    )
            known = texts.get(query, f"query {query}")
            axes.set_title(
                (f"{_short(each.name)}\n" if row == 0 else "") + f"“{shorten(known, 52, placeholder=' …')}”", fontsize=9
            )
            axes.set_ylabel("score")
            if row == len(queries) - 1:
                axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(require("matplotlib.ticker", "plot").MaxNLocator(integer=True))
            tidy(axes)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, handlelength=3
    )
    return figure


@style()
def plot_gap(
    values: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    *,
    measure: str = "RR@10",
    axis: str = "embedding size",
) -> Figure:
    """A measure on training and on test queries against embedding size (or dropout), with bands over seeds.

    Args:
        values: System to split ("train", "test") to place on the axis to the seeds' values. The line is their mean, the
            band reaches from the lowest to the highest.
        measure: What the values are.
        axis: What the places are.
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for place, (system, splits) in enumerate(values.items()):
        color, _, marker = STYLES[place % len(STYLES)]
        for split, points in splits.items():
            x = sorted(points)
            drawn = [np.asarray(points[each], dtype=np.float64) for each in x]
            test = split == "test"
            axes.plot(
                x,
                [each.mean() for each in drawn],
                color=color,
                linestyle="-" if test else (0, (4, 2)),
                linewidth=1.8,
                marker=marker,
                markersize=6,
                markerfacecolor=color if test else "white",
                label=f"{_short(system)}, {split}",
            )
            low, high = ([end(each) for each in drawn] for end in (np.min, np.max))
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xticks(sorted({x for splits in values.values() for points in splits.values() for x in points}))
    axes.set_xlabel(axis)
    axes.set_ylabel(measure)
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=min(3, len(values)), frameon=False, handlelength=4)
    return figure


def _short(name: str) -> str:
    """The end of a path or of a long name, which is what tells models apart."""
    last = name.rstrip("/").rsplit("/", 1)[-1]
    last = f" {last}" if last.startswith("_") else last  # legends leave out what begins with an underscore
    return last if len(last) <= 40 else f"{last[:18]} … {last[-18:]}"


def _visible(x: np.ndarray, *densities: np.ndarray) -> tuple[float, float]:
    shown = np.flatnonzero(np.any([density > VISIBLE * density.max() for density in densities], axis=0))
    return float(x[shown[0]]), float(x[shown[-1]])


def _places(x: np.ndarray, low: float, high: float, offset: float, count: int = 12) -> list[int]:
    wanted = np.linspace(low, high, count, endpoint=False) + offset * (high - low) / count
    wanted = wanted[(wanted >= x[0]) & (wanted <= x[-1])]
    places: list[int] = np.unique(np.searchsorted(x, wanted).clip(0, len(x) - 1)).tolist()
    return places
