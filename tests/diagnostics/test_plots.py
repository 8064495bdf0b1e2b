"""Figures: what they show, without colour and without pyplot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from st_m3se.diagnostics import (
    Evolution,
    measure_separation,
    plot_densities,
    plot_evolution,
    plot_gap,
    plot_margins,
    save_figure,
)
from st_m3se.diagnostics.plots import NEGATIVE, POSITIVE, STYLES

from .conftest import random_lists, random_scores

pytest.importorskip("matplotlib")


def separations(count: int = 3) -> dict:
    lists = random_lists(1)
    scores = {f"scorer {seed}": random_scores(lists, seed) * 3**seed for seed in range(count)}
    return measure_separation(lists, scores, n_resamples=5)


def evolution(name: str = "student", steps: int = 12) -> Evolution:
    random = np.random.default_rng(0)
    return Evolution(
        name,
        np.arange(steps) * 10,
        ("q1",) * 10,
        tuple(f"d{place}" for place in range(10)),
        np.array([True] * 5 + [False] * 5),
        random.normal(size=(steps, 10)),
        {"q1": "where is the red cat, and why does it sleep near the old house on the hill"},
    )


def lightness(color: str) -> float:
    red, green, blue = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_densities_of_each_scorer_are_drawn_in_its_units() -> None:
    found = separations(4)
    figure = plot_densities(found)
    assert len(figure.axes) == 4
    for axes, separation in zip(figure.axes, found.values(), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        np.testing.assert_array_equal(lines["positives"].get_ydata(), separation.positives)
        np.testing.assert_array_equal(lines["negatives"].get_ydata(), separation.negatives)
        np.testing.assert_array_equal(lines["negatives"].get_xdata(), separation.x)
        assert lines["positives"].get_linestyle() != lines["negatives"].get_linestyle()
        assert len({patch.get_hatch() for patch in axes.collections}) == 2
        assert f"{separation.numbers['overlap'].value:.2f}" in axes.get_title()


def test_all_margins_are_in_one_panel_and_differ_without_colour() -> None:
    found = separations(len(STYLES))
    (axes,) = plot_margins(found).axes
    lines = [line for line in axes.get_lines() if str(line.get_label()).startswith("scorer")]
    assert len(lines) == len(STYLES)
    for line, (name, separation) in zip(lines, found.items(), strict=True):
        shown = np.isin(separation.margin_x, line.get_xdata())
        np.testing.assert_array_equal(line.get_ydata(), separation.margin_density[shown])
        assert separation.margin_density[~shown].max(initial=0) <= 0.03 * separation.margin_density.max()
        assert line.get_label() == (
            f"{name}: peak {separation.numbers['margin_peak'].value:.2f}, "
            f"AUC {separation.numbers['auc_per_query'].value:.2f}"
        )
    assert len({(str(dashes), marker) for _, dashes, marker in STYLES}) == len(STYLES)
    assert len({marker for *_, marker in STYLES}) == len({str(dashes) for _, dashes, _ in STYLES}) == len(STYLES)
    assert abs(lightness(POSITIVE["color"]) - lightness(NEGATIVE["color"])) > 0.25


def test_models_stand_side_by_side_in_the_evolution() -> None:
    first, second = evolution("cross-encoder"), evolution("bi-encoder")
    figure = plot_evolution([first, second])
    assert [axes.get_title().splitlines()[0] for axes in figure.axes] == ["cross-encoder", "bi-encoder"]
    for axes, each in zip(figure.axes, (first, second), strict=True):
        lines = axes.get_lines()
        assert len(lines) == 10
        for place, line in enumerate(lines):
            np.testing.assert_array_equal(line.get_xdata(), each.steps)
            np.testing.assert_array_equal(line.get_ydata(), each.scores[:, place])
        assert lines[0].get_linestyle() != lines[9].get_linestyle()
        assert lines[0].get_marker() != lines[9].get_marker()


def test_the_gap_shows_train_and_test_with_their_seeds() -> None:
    values = {
        "cross-encoder": {"train": {64: [0.5, 0.6], 128: [0.7, 0.7]}, "test": {64: [0.3, 0.4], 128: [0.4, 0.6]}},
        "bi-encoder": {"train": {64: [0.5], 128: [0.8]}, "test": {64: [0.2], 128: [0.2]}},
    }
    (axes,) = plot_gap(values).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["cross-encoder, test"].get_xdata()) == [64, 128]
    assert list(lines["cross-encoder, test"].get_ydata()) == pytest.approx([0.35, 0.5])
    assert lines["bi-encoder, train"].get_linestyle() != lines["bi-encoder, test"].get_linestyle()
    assert lines["bi-encoder, train"].get_markerfacecolor() == "white"
    band = axes.collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.3)
    assert band[:, 1].max() == pytest.approx(0.6)


def test_files_are_whole_and_the_same_again(tmp_path: Path) -> None:
    found = separations()
    draws: dict[str, Callable[[], Any]] = {
        "densities": lambda: plot_densities(found),
        "margins": lambda: plot_margins(found),
        "evolution": lambda: plot_evolution([evolution()]),
    }
    for name, draw in draws.items():
        png, svg = save_figure(draw(), tmp_path / name)
        assert png.read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        again = save_figure(draw(), tmp_path / f"{name} again")
        assert [file.read_bytes() for file in again] == [png.read_bytes(), svg.read_bytes()]


def test_a_name_with_dots_keeps_them(tmp_path: Path) -> None:
    png, svg = save_figure(plot_margins(separations(1)), tmp_path / "v1.2")
    assert (png.name, svg.name) == ("v1.2.png", "v1.2.svg")


def test_neither_pyplot_nor_matplotlib_is_imported_unasked(tmp_path: Path) -> None:
    """pyplot opens windows and keeps figures; and without the extra everything else must work."""
    code = f"""
import sys
from st_m3se.diagnostics import Evolution, plot_evolution, save_figure
import st_m3se.diagnostics.diagnosis, st_m3se.diagnostics.report, st_m3se.cli.diagnose
assert "matplotlib" not in sys.modules
import numpy as np
e = Evolution("m", np.arange(2), ("q",), ("d",), np.array([True]), np.zeros((2, 1)), {{}})
save_figure(plot_evolution([e]), {str(tmp_path / "e")!r})
assert "matplotlib.pyplot" not in sys.modules
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
try:
    plot_evolution([e])
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'pip install "st-m3se[plot]"' in done.stdout
