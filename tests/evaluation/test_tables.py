import io
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from evaluation.results_samples import HOSTILE, hostile, provenance, results_of, sample
from st_m3se.evaluation.comparison import merge_results
from st_m3se.evaluation.results import Results
from st_m3se.evaluation.tables import (
    NOTHING,
    grids,
    headline,
    legend,
    plain,
    render_latex,
    render_markdown,
    render_terminal,
    text_tables,
)


def printed(results, width=120):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render_terminal(results, console)
    return console.file.getvalue()


def rows_of(results, title):
    return text_tables(results)[title].to_numpy().tolist()


def means(results, measure):
    return {
        (group, name): float(results.per_query(name, group, measure).mean())
        for group in results.groups
        for name in results.sets
    }


def first_grid(results, **options):
    return next(iter(grids(results, **options).values()))


class TestGrids:
    def test_the_longer_side_runs_down(self):
        few, many = first_grid(sample(sets=("x", "y"))), first_grid(sample(sets=("x", "y", "z")))
        systems = ["bm25", "minilm (3 seeds)", "reranked"]
        assert (few.index.name, list(few.index), list(few.columns)) == ("system", systems, ["x", "y", "average"])
        assert (many.index.name, list(many.index), list(many.columns)) == ("set", ["x", "y", "z", "average"], systems)
        straight = first_grid(sample(sets=("x", "y", "z")), turn=False)
        assert list(straight.index) == systems
        assert straight.T.map(str).equals(many.map(str))  # as text: NaN is not itself

    def test_one_set_has_one_table_of_all_measures(self):
        ((title, grid),) = grids(sample(sets=("x",))).items()
        assert (title, list(grid.columns)) == ("x", ["nDCG@10", "R@100", "AP"])

    def test_one_system_has_one_table_of_all_measures(self):
        whole = sample()
        alone = Results(
            whole.provenance,
            {**whole.settings, "baseline": None},
            whole.sets,
            {"bm25": whole.systems["bm25"]},
            {name: {"bm25": systems["bm25"]} for name, systems in whole.values.items()},
        )
        ((title, grid),) = grids(alone).items()
        assert (title, list(grid.columns)) == ("bm25", ["nDCG@10", "R@100", "AP"])
        assert list(grid.index) == ["scifact", "nfcorpus", "fiqa", "average"]
        for measure, column in grid.items():
            expected = [whole.means.loc[measure, name, "bm25"]["mean"] for name in grid.index]
            assert [shown.value for shown in column] == expected
        assert list(first_grid(alone, turn=False).index) == list(grid.columns)

    def test_figures_are_the_means(self):
        results = sample()
        for measure, grid in grids(results, turn=False).items():
            for group, (_, row) in zip(results.groups, grid.iterrows(), strict=True):
                expected = [means(results, measure)[group, name] for name in results.sets]
                shown = [figure.mean.split(" ± ")[0] for figure in row]
                assert shown == [f"{value:.3f}" for value in (*expected, np.mean(expected))]
                assert row["average"].interval == ""

    def test_the_best_is_bold_and_so_is_who_ties_with_it_as_shown(self):
        grid = first_grid(results_of({"toy": {"a": [0.50001], "b": [0.49999], "c": [0.4], "d": [0.4999]}}))
        assert [shown.best for shown in grid["nDCG@10"]] == [True, True, False, True]
        assert not first_grid(results_of({"toy": {"a": [1, 0]}})).iloc[0, 0].best, "a lone system is not the best"

    @pytest.mark.parametrize(
        ("baseline", "rows", "marks"),
        [
            ("base", ["bad", "base", "good", "same"], ["‡", "", "†", ""]),
            (None, ["a: bad", "b: base", "c: good", "d: same"], ["", "a", "a b d", "a"]),
        ],
    )
    def test_marks_of_significance(self, baseline, rows, marks):
        values = {"bad": np.zeros(20), "base": np.full(20, 0.5), "good": np.ones(20), "same": np.full(20, 0.5)}
        grid = first_grid(results_of({"toy": values}, baseline=baseline))
        assert list(grid.index) == rows
        assert [shown.marks for shown in grid["nDCG@10"]] == marks

    def test_what_was_not_measured_is_empty(self):
        results = results_of({"x": {"a": [1, 0], "b": [1, 1]}, "y": {"b": [0, 0]}})
        row = first_grid(results, turn=False).iloc[0]
        assert [shown is None for shown in row] == [False, True, True]
        assert f"{NOTHING}: not measured." in legend(results)


class TestLegend:
    def test_it_says_what_was_tested(self):
        text = " ".join(legend(sample()))
        for part in ("worse than bm25", "randomisation test", "over the 2 comparisons", "p ≤ 0.05", "95 %"):
            assert part in text
        assert "standard deviation over seeds" in text
        assert "unweighted mean over the table's sets" in text

    def test_all_pairs(self):
        assert "Holm-corrected over the 3 comparisons" in " ".join(legend(sample(baseline=None)))

    def test_a_single_comparison_is_not_corrected(self):
        text = " ".join(legend(results_of({"toy": {"a": [0, 1], "b": [1, 1]}})))
        assert "Holm" not in text
        assert "one comparison for each set and measure" in text

    def test_a_lone_system_was_not_tested(self):
        assert legend(results_of({"toy": {"a": [0, 1]}})) == [
            "Brackets: 95 % bootstrap interval of the mean over the queries."
        ]

    def test_cqadupstack_is_explained(self):
        values = {f"cqadupstack/{name}": {"a": [0, 1]} for name in ("android", "english")}
        assert "subsets of CQADupStack" in " ".join(legend(results_of({**values, "x": {"a": [0, 1]}})))


class TestHeadline:
    def test_the_baseline_is_the_measure_of_the_best(self):
        text = headline(sample())
        assert text.startswith("Best of 3 systems: minilm reaches nDCG@10 ")
        assert (
            "Against bm25, the baseline, it is significantly better on 3 of 3 sets and significantly worse on 0."
            in text
        )

    @pytest.mark.parametrize(
        ("values", "end"),
        [
            ({"a": np.ones(20), "b": np.zeros(20)}, "It is significantly better than b, the next best."),
            ({"a": [1, 0, 1], "b": [0, 1, 0]}, "It is not significantly different from b, the next best."),
            ({"a": [1, 0]}, "a reaches nDCG@10 0.500 on toy."),
        ],
    )
    def test_one_set(self, values, end):
        assert headline(results_of({"toy": values})).endswith(end)

    def test_without_an_average_it_says_so(self):
        results = results_of({"x": {"a": [1]}, "y": {"b": [1]}})
        assert "No system has nDCG@10 on every set" in headline(results)


class TestTexts:
    def test_tests_count_wins_ties_and_losses_of_the_system(self):
        results = results_of({"toy": {"base": [0, 0.5, 0.5, 1], "new": [1, 0.5, 0.6, 0.5]}}, baseline="base")
        (row,) = rows_of(results, "Significance: nDCG@10")
        assert row[:3] == ["new", "base", f"{(1 + 0.5 + 0.6 + 0.5 - 2) / 4:+.3f}"]
        assert row[4] == "no"
        assert row[-3:] == ["2", "1", "1"]

    def test_rates_are_per_document_and_per_query(self):
        results = sample(sets=("x",), queries=60)
        rows = {row[2]: row[3:] for row in rows_of(results, "Seconds") if row[1] == "bm25"}
        assert rows["encode corpus"] == ["12.50", f"{1000 / 12.5:,.1f} documents/s"]
        assert rows["search"] == ["0.25", f"{60 / 0.25:,.1f} queries/s"]

    def test_seeds_are_listed_one_by_one(self):
        results = sample(sets=("x",))
        rows = rows_of(results, "Seeds")
        assert [row[2] for row in rows] == ["minilm-seed1", "minilm-seed2", "minilm-seed3"]
        assert rows[1][3] == f"{results.values['x']['minilm-seed2']['nDCG@10'].mean():.3f}"
        assert rows_of(results_of({"toy": {"a": [0, 1]}}), "Seeds") == []

    def test_groups_are_a_column_only_where_there_are_any(self):
        alone = text_tables(results_of({"toy": {"a": [0, 1]}}))["Systems"]
        assert list(alone.columns) == ["system", "kind", "description"]
        assert list(text_tables(sample())["Systems"].columns) == ["system", "group", "kind", "description"]
        assert "prompts" not in rows_of(sample(), "Systems")[0][-1]

    def test_each_evaluation_has_a_column_of_provenance(self):
        parts = [results_of({name: {"a": [1]}}, provenance=provenance(name)) for name in ("x", "y")]
        frame = text_tables(merge_results(parts))["Provenance"]
        assert list(frame.columns) == ["what", "evaluation 1", "evaluation 2"]
        rows = {row[0]: row[1:] for row in frame.to_numpy().tolist()}
        assert rows["date"] == ["x", "y"]
        assert rows["packages"][0] == "torch 2.13.0, ir_measures 0.4.3"
        assert rows["exclude_same_id"] == ["yes", "yes"]


class TestTerminal:
    @pytest.mark.parametrize("width", [40, 80, 200])
    @pytest.mark.parametrize("baseline", ["bm25", None])
    def test_no_figure_is_cut_however_narrow_the_terminal(self, width, baseline):
        results = sample(baseline=baseline)
        text = printed(results, width)
        for grid in grids(results).values():
            for shown in grid.to_numpy().flat:
                assert re.search(rf"(?<!\d){re.escape(shown.mean)}(?!\d)", text)
        assert max(map(len, text.splitlines())) <= width
        assert "empty documents" in text

    def test_one_set_shows_intervals(self):
        results = sample(sets=("x",))
        assert first_grid(results).iloc[0, 0].interval in printed(results)

    def test_names_do_not_steer_the_terminal(self):
        results = results_of({"[bold]\x1b[2J": {"\x1b]0;title\x07[red]a": [0, 1], "b": [1, 1]}})
        text = printed(results)
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[red]a" in text
        assert "[bold]" in text


def cells_of(text):
    """What the tables of a Markdown text hold, read by a parser that is not ours."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    rows, row = [], None
    for token in tokens:
        if token.type == "tr_open":
            row = []
            rows.append(row)
        elif token.type == "inline" and row is not None:
            row.append("".join(part.content for part in token.children if part.type in ("text", "text_special")))
        elif token.type == "table_close":
            row = None
    return rows


class TestMarkdown:
    def test_every_figure_is_in_its_place(self):
        results = sample()
        rows = cells_of(render_markdown(results))
        grid = first_grid(results)
        assert rows[0] == ["set", *grid.columns]
        for row, (label, *figures) in zip(rows[1:], grid.itertuples(), strict=False):
            expected = [
                shown.mean + shown.marks + (" " + shown.interval if shown.interval else "") for shown in figures
            ]
            assert row == [label, *expected]

    def test_a_name_cannot_break_out_of_its_cell(self):
        results = hostile()
        text = render_markdown(results)
        rows = cells_of(text)
        name = plain(HOSTILE)
        assert any(name in row for row in rows)
        assert any(row[0] == name for row in rows)
        widths = {len(grid.columns) + 1 for grid in grids(results).values()}
        assert {len(row) for row in rows[:4]} <= widths
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        assert "<script" not in html

    def test_everything_is_there(self):
        text = render_markdown(sample())
        for part in ("# Evaluation", "## Significance: AP", "## Sets", "empty documents", "## Seeds", "## Seconds"):
            assert part in text
        for part in ("## Systems", "## Provenance", "Järvelin", "Streamlining evaluation"):
            assert part in text


class TestLatex:
    def test_a_table_for_each_measure_with_every_figure(self):
        results = sample()
        text = render_latex(results)
        for tag in ("toprule", "bottomrule", "begin{table}", "end{table}", "caption"):
            assert text.count("\\" + tag) == 3
        for grid in grids(results).values():
            for shown in grid.to_numpy().flat:
                mean = shown.mean.replace(" ± ", r"\,$\pm$\,")
                assert (rf"\textbf{{{mean}}}" if shown.best else mean) in text
        assert r"$^{\dagger}$" in text

    def test_each_row_has_a_cell_for_each_column(self):
        for results in (sample(), sample(sets=("x", "y")), sample(sets=("x",), baseline=None), hostile()):
            blocks = re.findall(r"\\begin\{tabular\}\{(l+)\}\n(.*?)\\end\{tabular\}", render_latex(results), re.DOTALL)
            assert len(blocks) == len(grids(results))
            for columns, body in blocks:
                rows = [line for line in body.splitlines() if line.endswith(r"\\")]
                assert len(rows) > 2
                for row in rows:
                    assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1

    def test_names_are_escaped(self):
        text = render_latex(hostile())
        without = re.sub(r"\\[&%$#_{}\\]|\$[^$\n]*\$", "", text.split("\n", 1)[1])
        assert not re.search(r"[#_~^<>|\"%]", without.replace("\\begin{", ""))
        assert without.count("{") == without.count("}")

    def test_a_row_that_begins_with_a_bracket_is_not_an_option_of_the_one_before(self):
        text = render_latex(results_of({"toy": {"[a]": [0, 1], "*b": [1, 1]}}, baseline="*b"))
        assert "\n{[}a{]} &" in text
        assert "\n{*}b &" in text
