import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from evaluation.results_samples import HOSTILE, hostile, results_of, sample
from st_m3se.evaluation.plots import image, plot_bars, plot_differences, plot_wins, plots

PNG = b"\x89PNG\r\n\x1a\n"


def bars_of(figure):
    return [
        [bar.get_height() for bar in container]
        for panel in figure.axes
        for container in panel.containers
        if hasattr(container, "patches")
    ]


class TestBars:
    def test_bars_are_the_means(self):
        results = sample()
        heights = bars_of(plot_bars(results, "AP"))
        for group, found in zip(results.groups, heights, strict=True):
            np.testing.assert_allclose(found, results.means["mean"].loc["AP", :, group])

    def test_whiskers_are_the_intervals(self):
        results = results_of({"toy": {"a": np.random.default_rng(0).uniform(size=30)}})
        figure = plot_bars(results)
        (whiskers,) = [c for panel in figure.axes for c in panel.containers if not hasattr(c, "patches")]
        (segment,) = whiskers[2][0].get_segments()
        np.testing.assert_allclose(segment[:, 1], results.means.loc["nDCG@10", "toy", "a"][["low", "high"]].tolist())

    def test_what_was_not_measured_has_no_bar(self):
        figure = plot_bars(results_of({"x": {"a": [1, 0], "b": [1, 1]}, "y": {"b": [0, 1]}}))
        visible = [[bar.get_visible() for bar in c] for c in figure.axes[0].containers if hasattr(c, "patches")]
        assert visible == [[True, False, False], [True, True, True]]

    def test_many_sets_are_broken_into_rows(self):
        figure = plot_bars(sample(sets=tuple(f"set-{number}" for number in range(18)), queries=5))
        assert len(figure.axes) > 1
        labels = [label.get_text() for panel in figure.axes for label in panel.get_xticklabels()]
        assert labels == [*(f"set-{number}" for number in range(18)), "average"]

    def test_systems_differ_in_hatch_and_colour(self):
        values = {f"s{number}": np.full(3, number / 20) for number in range(12)}
        figure = plot_bars(results_of({"toy": values}))
        styles = [(c[0].get_hatch(), c[0].get_facecolor()) for c in figure.axes[0].containers if hasattr(c, "patches")]
        assert len(set(styles)) == 12


class TestDifferences:
    @pytest.mark.parametrize("baseline", ["bm25", None])
    def test_points_and_whiskers_are_the_tests(self, baseline):
        """Without a baseline to the first model, as it was before, and not to BM25, which stands before it."""
        results = sample(baseline=baseline)
        against, others = (baseline, ["minilm", "reranked"]) if baseline else ("minilm", ["bm25", "reranked"])
        figure = plot_differences(results, "AP")
        assert [panel.get_title() for panel in figure.axes] == others
        for panel, system in zip(figure.axes, others, strict=True):
            drawn = panel.lines
            for place, name in enumerate(results.sets):
                (test,) = [
                    test
                    for test in results.tests.itertuples()
                    if (test.set, test.measure) == (name, "AP") and {test.first, test.second} == {against, system}
                ]
                sign = 1 if test.first == against else -1
                whisker, point = drawn[2 * place : 2 * place + 2]
                assert sorted(whisker.get_xdata()) == sorted([sign * test.low, sign * test.high])
                assert float(point.get_xdata()[0]) == sign * test.difference
                assert (point.get_markerfacecolor() != "white") == test.significant
                assert point.get_ydata()[0] == len(results.sets) - 1 - place

    def test_nothing_tested_has_no_plot(self):
        with pytest.raises(ValueError, match="nothing was tested against 'a'"):
            plot_differences(results_of({"toy": {"a": [0, 1]}}))


class TestWins:
    def test_the_steps_are_the_sorted_differences(self):
        results = results_of({"toy": {"base": [0.5, 0.5, 0.5, 0.5], "new": [1, 0.5, 0, 1]}}, baseline="base")
        figure = plot_wins(results, "toy")
        won, lost = (patch.get_data() for patch in figure.axes[0].patches)
        np.testing.assert_allclose(won.values, [0.5, 0, 0])
        np.testing.assert_allclose(lost.values, [0, 0, -0.5])
        np.testing.assert_allclose(won.edges, [0, 2, 3, 4])
        (text,) = [text.get_text() for text in figure.axes[0].texts]
        assert text.startswith("2 won, 1 tied, 1 lost\nmean +0.125")

    def test_each_other_system_has_a_panel(self):
        figure = plot_wins(sample(), "fiqa", "AP")
        assert [panel.get_title() for panel in figure.axes if panel.get_visible()] == ["minilm", "reranked"]

    def test_five_systems_leave_the_last_panels_empty(self):
        values = {f"s{number}": np.full(3, number / 20) for number in range(6)}
        figure = plot_wins(results_of({"toy": values}), "toy")
        assert [panel.get_visible() for panel in figure.axes] == [True] * 5 + [False] * 3

    def test_a_lone_system_has_nothing_to_win_against(self):
        with pytest.raises(ValueError, match="no two systems"):
            plot_wins(results_of({"toy": {"a": [0, 1]}}), "toy")


class TestAll:
    def test_there_is_one_for_each_table_and_set(self):
        made = list(plots(sample()))
        measures = ("nDCG@10", "R@100", "AP")
        names = [f"{kind} {measure}" for kind in ("bars", "differences") for measure in measures]
        assert [plot.name for plot in made] == [*names, "wins scifact", "wins nfcorpus", "wins fiqa"]
        assert all(plot.alt and plot.caption for plot in made)
        assert [plot.name for plot in plots(results_of({"toy": {"a": [0, 1]}}))] == ["bars toy"]

    def test_files_are_images_and_the_same_each_time(self):
        for plot, again in zip(plots(sample(sets=("x",))), plots(sample(sets=("x",))), strict=True):
            assert image(plot.figure, "png").startswith(PNG)
            svg = plot.svg
            assert svg == again.svg
            assert ElementTree.fromstring(svg).tag.endswith("svg")
            assert b"purl.org" not in svg

    def test_thousands_of_queries_do_not_make_a_large_file(self):
        rng = np.random.default_rng(0)
        ranks = {name: 1 / rng.integers(1, 11, 7000) for name in ("a", "b")}
        figure = plot_wins(results_of({"toy": ranks}), "toy")
        assert len(image(figure, "svg")) < 100_000

    @pytest.mark.filterwarnings("ignore:Glyph")
    def test_names_are_no_formulas(self):
        """matplotlib reads $...$ as a formula, and drops a label that begins with an underscore."""
        for plot in plots(hostile()):
            text = "".join(ElementTree.fromstring(plot.svg).itertext())
            assert "$y_1$" in text
        values = {"_hidden": [0, 1], "$\\broken{": [1, 1]}
        text = "".join(ElementTree.fromstring(image(plot_bars(results_of({HOSTILE: values})), "svg")).itertext())
        assert "_hidden" in text
        assert "$\\broken{" in text

    def test_nothing_global_is_left_behind(self):
        """A notebook keeps its own style and its own figures."""
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "import matplotlib; before = matplotlib.rcParams.copy()\n"
            "from evaluation.results_samples import results_of\n"
            "from st_m3se.evaluation.plots import image, plots\n"
            "results = results_of({'toy': {'a': [0, 1], 'b': [1, 1]}})\n"
            "for plot in plots(results): image(plot.figure, 'png')\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
            "changed = [name for name in before if name != 'backend' and before[name] != matplotlib.rcParams[name]]\n"
            "assert not changed, changed\n"
            "print('clean')"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.stdout == "clean\n", run.stderr

    def test_without_matplotlib_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=re.escape("st-m3se[plot]")):
            plot_bars(sample())
