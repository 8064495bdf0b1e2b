import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from evaluation.results_samples import HOSTILE, hostile, results_of, sample
from st_m3se.evaluation import report
from st_m3se.evaluation.comparison import merge_results
from st_m3se.evaluation.plots import plots
from st_m3se.evaluation.report import write_html, write_report
from st_m3se.evaluation.results import Results
from st_m3se.evaluation.tables import grids, plain

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a page has, read strictly: an element that is not closed where it should be fails."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.scripts, self.table, self.tables = [], [], [], [], None, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append((self.open[-1], data))
        else:
            self.text.append(data)
            if "td" in self.open or "th" in self.open:
                self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = sample()
    file = write_html(results, tmp_path_factory.mktemp("page") / "report.html", plots=list(plots(results)))
    return file.read_text(encoding="utf-8")


def written(results, tmp_path, **options):
    return write_html(results, tmp_path / "report.html", **options).read_text(encoding="utf-8")


class TestPage:
    def test_it_needs_nothing_from_outside(self, page):
        assert not re.search(r"https?:", page)
        assert "@import" not in page
        for tag, attrs in Page(page).elements:
            for name in ("src", "href", "action", "srcset", "data"):
                if name in attrs:
                    assert re.match(r"#|data:image/svg\+xml;base64,", attrs[name]), (tag, attrs)

    def test_the_browser_is_told_to_load_nothing(self, page):
        (policy,) = [meta["content"] for meta in Page(page).all("meta") if "http-equiv" in meta]
        assert policy.startswith("default-src 'none'")

    def test_it_is_fit_for_readers_of_all_kinds(self, page):
        read = Page(page)
        assert page.startswith("<!DOCTYPE html>")
        assert read.all("html")[0]["lang"] == "en"
        assert len(read.all("title")) == len(read.all("h1")) == len(read.all("main")) == 1
        assert all(image["alt"] for image in read.all("img"))
        assert len(read.all("img")) == 9
        assert any(meta.get("name") == "viewport" for meta in read.all("meta"))
        for tag in ("prefers-color-scheme: dark", "@media print"):
            assert tag in page

    def test_ids_are_unique_and_links_lead_somewhere(self, page):
        read = Page(page)
        ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
        assert len(set(ids)) == len(ids)
        for link in read.all("a"):
            assert link["href"][1:] in ids
        for _, attrs in read.elements:
            if "aria-labelledby" in attrs:
                assert attrs["aria-labelledby"] in ids

    def test_headings_do_not_skip_a_level(self, page):
        levels = [int(tag[1]) for tag, _ in Page(page).elements if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_every_row_is_as_wide_as_its_head(self, page):
        tables = [table for table in Page(page).tables if table]
        assert len(tables) >= 8
        for table in tables:
            assert {len(row) for row in table} == {len(table[0])}

    def test_the_headline_table_holds_the_figures(self, page):
        (grid, *_), table = grids(sample()).values(), Page(page).tables[0]
        assert table[0] == ["set", *grid.columns]
        for line, (label, *figures) in zip(table[1:], grid.itertuples(), strict=True):
            shown = [figure.mean + figure.marks + figure.interval for figure in figures]
            assert ["".join(cell.split()) for cell in line] == ["".join(part.split()) for part in (label, *shown)]

    def test_plots_are_part_of_the_page(self, page):
        for image in Page(page).all("img"):
            assert b"<svg" in base64.b64decode(image["src"].partition(",")[2])

    def test_sections_come_first_to_last(self, page):
        titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
        order = ["Results", "Significance", "Intervals", "Queries", "Data", "Speed", "Provenance"]
        assert titles == [*order, "Measures and citations"]


class TestData:
    def embedded(self, text):
        (data,) = [script for _, script in Page(text).scripts if script.startswith('{"measures"')]
        return json.loads(data)

    def test_the_script_gets_each_value_per_query(self, page):
        results = sample()
        data = self.embedded(page)
        assert data["measures"] == list(results.measures)
        assert data["systems"] == list(results.groups)
        for name, found in zip(results.sets, data["sets"], strict=True):
            assert found["queries"] == list(results.sets[name].query_ids)
            assert found["reference"] == 0
            for measure, columns in zip(results.measures, found["values"], strict=True):
                for group, values in zip(results.groups, columns, strict=True):
                    np.testing.assert_allclose(values, results.per_query(name, group, measure), atol=5.1e-5)

    def test_what_would_be_too_much_is_left_to_the_file_beside_it(self, monkeypatch, tmp_path):
        monkeypatch.setattr(report, "EMBEDDED", 1000)
        text = written(sample(), tmp_path)
        assert self.embedded(text)["measures"] == ["nDCG@10"]
        assert "R@100, AP would make this page too large" in text

    def test_a_system_that_lacks_a_set_is_null_there(self, tmp_path):
        data = self.embedded(written(results_of({"x": {"a": [1]}, "y": {"b": [1]}}), tmp_path))
        assert data["sets"][0]["values"] == [[[1.0], None]]
        assert data["sets"][1]["reference"] == 1


class TestNames:
    def test_a_name_is_text_and_nothing_else(self, tmp_path):
        results = hostile()
        text = written(results, tmp_path, plots=list(plots(results)), title=HOSTILE)
        read = Page(text)
        assert "alert('x')</script>" not in text
        assert len(read.all("script")) == 3
        assert any(plain(HOSTILE) in part for part in read.text)
        (embedded,) = [script for _, script in read.scripts if script.startswith('{"measures"')]
        assert "<" not in embedded
        assert plain(HOSTILE) in json.loads(embedded)["systems"]

    def test_sections_are_put_in_as_they_are_under_an_escaped_title(self, tmp_path):
        text = written(sample(), tmp_path, sections=[("A & B", "<p>of <em>their</em> own</p>")])
        assert "<p>of <em>their</em> own</p>" in text
        assert '<h2 id="section-1-title">A &amp; B</h2>' in text
        assert '<a href="#section-1">A &amp; B</a>' in text
        Page(text)


class TestCases:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: results_of({"toy": {"a": [0, 1]}}),
            lambda: sample(baseline=None),
            lambda: sample(sets=("x", "y")),
            lambda: results_of({"x": {"a": [1]}, "y": {"b": [1]}}),
            lambda: merge_results([results_of({"x": {"a": [1]}}), results_of({"y": {"a": [1, 0]}}, measure="AP")]),
        ],
    )
    def test_small_and_odd_results_make_a_page(self, make, tmp_path):
        Page(written(make(), tmp_path))


def in_browser(file, script=""):
    """The page after its scripts and then ``script`` ran in a real browser."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    text = file.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    file.write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    profile = f"--user-data-dir={file.parent / 'profile'}"
    run = subprocess.run([browser, *options, profile, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return Page(run.stdout)


def table_of(page, head):
    return next(table for table in page.tables if table and table[0][0] == head)


@pytest.mark.slow
class TestBrowser:
    @pytest.mark.parametrize("make", [sample, hostile])
    def test_the_queries_are_listed(self, make, tmp_path):
        results = make()
        name = next(iter(results.sets))
        texts = {name: {query: f"text of {plain(query)}" for query in results.sets[name].query_ids}}
        page = in_browser(write_html(results, tmp_path / "report.html", texts=texts))
        queries = results.sets[name].queries
        assert f"{queries} of {queries} queries" in page.text
        rows = table_of(page, "query")
        assert len(rows) == min(queries, 20) + 1
        first = results.sets[name].query_ids[0]
        values = [f"{results.per_query(name, group, results.measures[0])[0]:.4f}" for group in results.groups]
        assert rows[1][: len(values) + 2] == [plain(first), f"text of {plain(first)}"[:160], *values]

    def test_what_is_chosen_is_shown(self, tmp_path):
        results = sample()
        script = """
            const set = (id, value, kind) => {
                document.getElementById(id).value = value;
                document.getElementById(id).dispatchEvent(new Event(kind));
            };
            set("set", 1, "change");
            set("measure", 2, "change");
            set("system", 2, "change");
            set("show", "lost", "change");
            set("filter", "5", "input");
            document.querySelector("#query-table th:last-child button").click();
            document.querySelector("#query-table th:last-child button").click();
        """
        rows = table_of(in_browser(write_html(results, tmp_path / "report.html"), script), "query")[1:]
        name = list(results.sets)[1]
        differences = results.per_query(name, "reranked", "AP") - results.per_query(name, "bm25", "AP")
        expected = {
            query: round(float(difference), 4)
            for query, difference in zip(results.sets[name].query_ids, differences, strict=True)
            if round(float(difference), 4) < 0 and "5" in query
        }
        assert len(expected) > 3
        assert {row[0] for row in rows} == set(expected)
        shown = [float(row[-1]) for row in rows]
        assert shown == sorted(shown)
        np.testing.assert_allclose(shown, [expected[row[0]] for row in rows], atol=1.1e-4)

    def test_tables_are_sorted_by_a_click_and_the_average_stays_below(self, tmp_path):
        results = sample()
        script = "document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells[1].firstChild.click();"
        page = in_browser(write_html(results, tmp_path / "report.html"), script)
        rows = page.tables[0][1:]
        values = [float(row[1].partition("[")[0]) for row in rows]
        assert values[:3] == sorted(values[:3], reverse=True)
        assert [row[0] for row in rows] != list(results.sets)
        assert rows[3][0] == "average"
        assert page.all("th")[1]["aria-sort"] == "descending"


class TestReport:
    def test_everything_is_written(self, tmp_path):
        results = sample(queries=9)
        files = write_report(results, tmp_path / "out")
        names = {file.relative_to(tmp_path / "out").as_posix() for file in files}
        assert names == {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        expected = {"results.json", "per_query.jsonl", "report.md", "report.tex", "report.html"}
        measures = ("ndcg-10", "r-100", "ap")
        drawn = [f"{kind}-{measure}" for kind in ("bars", "differences") for measure in measures]
        for plot in (*drawn, "wins-scifact", "wins-nfcorpus", "wins-fiqa"):
            expected |= {f"plots/{plot}.png", f"plots/{plot}.svg"}
        assert names == expected
        assert Results.load(tmp_path / "out").to_json(summary=False) == results.to_json(summary=False)

    def test_each_line_is_one_query_of_a_system(self, tmp_path):
        results = sample(queries=4)
        write_report(results, tmp_path, plots=False)
        lines = [json.loads(line) for line in (tmp_path / "per_query.jsonl").read_text().splitlines()]
        assert len(lines) == 3 * 5 * 4
        for line in lines:
            row = results.sets[line["set"]].query_ids.index(line["query_id"])
            for measure in results.measures:
                assert line[measure] == results.values[line["set"]][line["system"]][measure][row]

    def test_sets_whose_names_look_alike_have_files_of_their_own(self, tmp_path):
        values = {"a": [0, 1], "b": [1, 1]}
        write_report(results_of({"x/y": values, "x y": values, "X-Y": values}), tmp_path)
        names = sorted(path.stem for path in (tmp_path / "plots").glob("*.svg"))
        assert names == ["bars-ndcg-10", "differences-ndcg-10", "wins-x-y", "wins-x-y-2", "wins-x-y-3"]

    def test_without_matplotlib_the_values_are_kept_and_the_rest_is_written_on_demand(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=re.escape("st-m3se[plot]")):
            write_report(sample(), tmp_path)
        assert (tmp_path / "results.json").exists()
        write_report(sample(), tmp_path, plots=False)
        assert "<img" not in (tmp_path / "report.html").read_text()
