import json
import statistics
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.results_samples import evaluated_set, hostile, provenance, results_of, sample, settings
from st_m3se.core.errors import FormatError
from st_m3se.evaluation.comparison import compare_files, merge_results
from st_m3se.evaluation.results import EvaluatedSet, Results
from st_m3se.evaluation.significance import compare


def same(first, second):
    assert first.to_json(summary=False) == second.to_json(summary=False)


def cell(results, column, group, measure="nDCG@10"):
    return SimpleNamespace(**results.means.loc[measure, column, group])


class TestFile:
    @pytest.mark.parametrize("make", [sample, hostile])
    def test_a_file_gives_back_what_was_saved(self, make, tmp_path):
        results = make()
        file = results.save(tmp_path / "new" / "results.json")
        same(Results.load(file), results)
        same(Results.load(file.parent), results)
        assert [path.name for path in file.parent.iterdir()] == ["results.json"]

    def test_the_summary_is_for_readers_and_never_believed(self, tmp_path):
        results = results_of({"toy": {"a": [0, 1, 1, 1], "b": [0, 0, 0, 1]}})
        file = results.save(tmp_path / "results.json")
        data = json.loads(file.read_text())
        mean, test = data["summary"]["means"][0], data["summary"]["tests"][0]
        assert [mean[key] for key in ("measure", "column", "group", "mean")] == ["nDCG@10", "toy", "a", 3 / 4]
        assert test["difference"] == 1 / 4 - 3 / 4
        mean["mean"] = 0.99
        file.write_text(json.dumps(data))
        with pytest.raises(FormatError, match="changed after it was written"):
            Results.load(file)
        del data["checksum"]
        file.write_text(json.dumps(data))
        assert cell(Results.load(file), "toy", "a").mean == 3 / 4

    def test_values_stand_on_one_line_so_that_people_can_read_the_rest(self, tmp_path):
        few, many = (sample(queries=count).save(tmp_path / f"{count}.json", summary=False) for count in (5, 500))
        assert len(many.read_text().splitlines()) == len(few.read_text().splitlines())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no JSON"),
            ('{"format": 1', "no JSON"),
            ("[" * 100_000, "no JSON"),
            ('{"query_id": "a", "scores": [1]}\n{"query_id": "b", "scores": [1]}\n', "no JSON"),
            ("[1, 2]", "should be a JSON object"),
            ('{"query_id": "a", "scores": [1]}', '"format" should be 1 and is None'),
            ('{"format": 2}', "newer st-m3se"),
            ('{"format": 1}', "provenance should be a JSON object, and is missing"),
            ('{"format": 1, "format": 1}', "'format' stands twice"),
        ],
    )
    def test_another_file_is_refused_by_name(self, text, message, tmp_path):
        file = tmp_path / "other.json"
        file.write_text(text)
        with pytest.raises(FormatError, match=message) as error:
            Results.load(file)
        assert str(file) in str(error.value)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path):
        file = tmp_path / "results.json"
        file.write_bytes(b"\xff\xfe\x00PAR1")
        with pytest.raises(FormatError, match=r"not a results\.json"):
            Results.load(file)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda d: d["values"]["toy"]["a"].update({"nDCG@10": [1, 0]}), "holds 2 values for 3 queries"),
            (lambda d: d["values"]["toy"]["a"].update({"nDCG@10": [1, 0, "1"]}), "a list, each entry a number"),
            (lambda d: d["values"]["toy"]["a"].update({"nDCG@10": [1, 0, True]}), "a list, each entry a number"),
            (lambda d: d["values"]["toy"]["a"].update({"nDCG@10": [1, 0, None]}), "a list, each entry a number"),
            (
                lambda d: d["values"]["toy"]["a"].update({"nDCG@10": [1, float("nan"), 1]}),
                "finite number for query 'q1'",
            ),
            (lambda d: d["values"]["toy"]["a"].update({"nDCG@10": [1, 0, 10**400]}), "a list, each entry a number"),
            (lambda d: d["seconds"].update({"toy": {"a": {"search": 10**400}}}), "should be a number"),
            (lambda d: d["values"]["toy"]["a"].update({"AP": [1, 1, 1]}), "not under settings"),
            (lambda d: d["values"]["toy"].update({"c": {}}), "'c' that is not under 'systems'"),
            (lambda d: d["values"].update({"other": {}}), "'other' that is not under 'sets'"),
            (lambda d: d["seconds"].update({"toy": {"a": {"search": -1}}}), "number of seconds"),
            (lambda d: d["seconds"].update({"toy": {"a": 3}}), "should be a JSON object"),
            (lambda d: d["settings"].update({"baseline": "c"}), "the baseline 'c' is no system; there are a, b"),
            (lambda d: d["settings"].update({"confidence": 95}), "between 0 and 1"),
            (lambda d: d["settings"].update({"measures": []}), "list of different names"),
            (lambda d: d["settings"].update({"measures": ["AP", "AP"]}), "list of different names"),
            (
                lambda d: d["settings"].pop("exclude_same_id"),
                r"settings\['exclude_same_id'\] should be true or false, and is missing",
            ),
            (lambda d: d["settings"].update({"depth": "1000"}), r"settings\['depth'\] should be a whole number"),
            (lambda d: d["systems"]["a"].pop("kind"), r"\['kind'\] should be a text, and is missing"),
            (lambda d: d["systems"]["a"].update({"group": 3}), r"\['group'\] should be a text"),
            (lambda d: d["systems"].update({"a": "bm25"}), "should be a JSON object"),
            (lambda d: d["sets"]["toy"].update({"query_ids": ["q0", "q1", "q1"]}), "has a query id twice"),
            (
                lambda d: d["sets"]["toy"].update({"query_ids": ["q0", 1, 2]}),
                r"\['query_ids'\] should be a list, each entry a text",
            ),
            (lambda d: d["sets"]["toy"].update({"queries": 4}), "says 4 queries and lists 3"),
            (
                lambda d: d["sets"]["toy"].update({"documents": "many"}),
                r"\['documents'\] should be a whole number from 0 or null",
            ),
            (lambda d: d["sets"]["toy"].pop("fingerprint"), r"\['fingerprint'\] should be a text, and is missing"),
            (
                lambda d: d["sets"]["toy"].update({"findings": [{"kind": "x"}]}),
                r"\['findings'\]\[0\]\['count'\] should be a whole number",
            ),
            (lambda d: d.pop("values"), "values should be a JSON object, and is missing"),
        ],
    )
    def test_parts_that_do_not_fit_are_refused_with_their_place(self, change, message, tmp_path):
        data = results_of({"toy": {"a": [0, 1, 1], "b": [0, 0, 1]}}).to_json(summary=False)
        change(data)
        file = tmp_path / "results.json"
        file.write_text(json.dumps(data))
        with pytest.raises(FormatError, match=message) as error:
            Results.load(file)
        assert str(file) in str(error.value)

    def test_a_set_without_queries_has_no_means(self):
        with pytest.raises(FormatError, match="has no queries"):
            results_of({"toy": {"a": []}})

    def test_the_description_of_a_set_is_taken_from_it(self):
        class Opened:
            name, split, form, fingerprint, findings = "toy", "dev", "re-ranking", "ab", ()
            query_ids, judgements, corpus = ("1", "2"), 3, None

        assert EvaluatedSet.of(Opened()) == EvaluatedSet(None, 3, "dev", "re-ranking", "ab", ("1", "2"))


class TestMeans:
    def test_the_frame_holds_every_value(self):
        results = results_of({"toy": {"m1": [0.1, 0.2], "m2": [0.3, 0.4]}}, groups={"m1": "m", "m2": "m"})
        frame = results.to_frame()
        assert list(frame.columns) == ["set", "system", "group", "measure", "query_id", "value"]
        assert frame["value"].tolist() == [0.1, 0.2, 0.3, 0.4]
        assert frame.iloc[3].tolist() == ["toy", "m2", "m", "nDCG@10", "q1", 0.4]

    def test_seeds_are_one_system(self):
        """Tests on three times the queries would find differences that are not there."""
        seeds = {"m1": [0.1, 0.5, 0.9], "m2": [0.3, 0.5, 0.7], "m3": [0.2, 0.2, 0.2]}
        results = results_of({"toy": {**seeds, "bm25": [0, 0, 0]}}, groups=dict.fromkeys(seeds, "m"), baseline="bm25")
        found = cell(results, "toy", "m")
        means = [statistics.mean(values) for values in seeds.values()]
        assert found.mean == pytest.approx(statistics.mean(means))
        assert found.deviation == pytest.approx(statistics.stdev(means))
        assert found.seeds == 3
        per_query = [0.6 / 3, 1.2 / 3, 1.8 / 3]
        np.testing.assert_allclose(results.per_query("toy", "m", "nDCG@10"), per_query)
        (test,) = results.tests.to_dict("records")
        (expected,) = compare(
            {"bm25": np.zeros(3), "m": results.per_query("toy", "m", "nDCG@10")}, "nDCG@10", baseline="bm25"
        )
        assert {name: test[name] for name in ("first", "second", "holm_p")} == {
            "first": "bm25",
            "second": "m",
            "holm_p": expected.holm_p,
        }
        assert (test["low"], test["high"]) == expected.interval

    def test_a_single_system_has_no_deviation(self):
        results = results_of({"toy": {"a": [0, 1]}})
        assert cell(results, "toy", "a").mean == 0.5
        assert np.isnan(cell(results, "toy", "a").deviation)
        assert results.better_than("toy", "nDCG@10", "a") == []

    def test_better_and_worse_are_not_mixed_up(self):
        values = {"good": np.ones(20), "base": np.full(20, 0.5), "bad": np.zeros(20)}
        for baseline in ("base", None):
            results = results_of({"toy": values}, baseline=baseline)
            better = {group: results.better_than("toy", "nDCG@10", group) for group in values}
            assert better == {"good": ["base"] if baseline else ["base", "bad"], "base": ["bad"], "bad": []}

    def test_the_interval_is_of_the_asked_confidence(self):
        values = {"toy": {"a": np.random.default_rng(0).uniform(size=50)}}
        wide, narrow = (cell(results_of(values, confidence=level), "toy", "a") for level in (0.95, 0.5))
        assert wide.low < narrow.low < np.mean(values["toy"]["a"]) < narrow.high < wide.high

    def test_averages_are_over_sets_however_many_queries_they_have(self):
        results = results_of({"small": {"a": [1.0]}, "large": {"a": [0, 0, 0, 1]}})
        assert cell(results, "average", "a").mean == (1 + 1 / 4) / 2

    def test_the_subsets_of_cqadupstack_count_as_one_set(self):
        values = {"cqadupstack/android": {"a": [1.0]}, "fiqa": {"a": [0.5]}, "cqadupstack/english": {"a": [0, 0]}}
        results = results_of(values)
        assert list(results.columns) == ["cqadupstack (2 subsets)", "fiqa"]
        assert cell(results, "cqadupstack (2 subsets)", "a").mean == (1 + 0) / 2
        assert cell(results, "average", "a").mean == ((1 + 0) / 2 + 0.5) / 2

    def test_one_subset_is_a_set(self):
        assert list(results_of({"cqadupstack/android": {"a": [1]}, "x": {"a": [1]}}).columns) == [
            "cqadupstack/android",
            "x",
        ]

    def test_a_system_that_lacks_a_set_has_no_average(self):
        """An average over the easier sets only would look better than the others'."""
        results = results_of({"easy": {"a": [1.0], "b": [0.5]}, "hard": {"b": [0.1]}})
        assert results.means.xs(("nDCG@10", "average")).index.tolist() == ["b"]
        assert set(results.tests["set"]) == {"easy"}

    def test_a_set_that_nobody_measured_so_is_no_part_of_the_average(self):
        first = results_of({"x": {"a": [1, 0], "b": [1, 1]}, "y": {"a": [0, 0], "b": [0, 1]}})
        merged = merge_results([first, results_of({"z": {"a": [1], "b": [0]}}, measure="AP")])
        assert merged.columns_of("nDCG@10") == ["x", "y"]
        assert cell(merged, "average", "a").mean == 1 / 4
        assert cell(merged, "average", "a", "AP").mean == 1

    def test_the_average_of_seeds_is_made_for_each(self):
        values = {"x": {"m1": [1.0], "m2": [0.0]}, "y": {"m1": [0.0], "m2": [1.0]}}
        found = cell(results_of(values, groups={"m1": "m", "m2": "m"}), "average", "m")
        assert (found.mean, found.deviation) == (0.5, 0.0)

    def test_a_baseline_may_be_named_by_its_system(self):
        values = {"toy": {"m1": [0, 0.2], "m2": [0.2, 0], "b": [1, 1]}}
        results = results_of(values, groups={"m1": "m", "m2": "m"}, baseline="m2")
        assert results.baseline == "m"
        assert results.tests["first"].tolist() == ["m"]


class TestMerge:
    def test_merging_the_halves_gives_the_whole(self):
        whole = sample()
        names = list(whole.systems)
        halves = []
        for part in (names[:2], names[2:]):
            halves.append(
                Results(
                    whole.provenance,
                    {**whole.settings, "baseline": "bm25" if "bm25" in part else None},
                    whole.sets,
                    {name: whole.systems[name] for name in part},
                    {name: {s: v for s, v in systems.items() if s in part} for name, systems in whole.values.items()},
                    {name: {s: v for s, v in systems.items() if s in part} for name, systems in whole.seconds.items()},
                )
            )
        same(merge_results(halves), whole)

    def test_other_sets_and_measures_stand_beside_each_other(self):
        first = results_of({"x": {"a": [0, 1]}})
        second = results_of({"y": {"a": [1, 1, 1]}}, measure="AP", provenance=provenance("2026-02-02"))
        merged = merge_results([first, second])
        assert merged.measures == ("nDCG@10", "AP")
        assert list(merged.sets) == ["x", "y"]
        assert list(merged.systems) == ["a"]
        assert merged.per_query("x", "a", "AP") is None
        assert [part["date"] for part in merged.parts] == ["2026-01-02", "2026-02-02"]
        again = merge_results([merged, results_of({"z": {"a": [1]}})])
        assert len(again.parts) == 2

    def test_a_set_with_other_contents_is_refused_with_what_differs(self):
        ours = results_of({"toy": {"a": [0, 1, 1]}})
        theirs = results_of({"toy": {"b": [1, 1]}}, sets={"toy": evaluated_set(["q2", "q9"], fingerprint="ab" * 16)})
        with pytest.raises(FormatError) as error:
            merge_results({"one": ours, "two": theirs})
        for part in ("'toy'", "one and two", "queries 3 and 2", "only the first has 2 queries (q0, q1)"):
            assert part in str(error.value)
        for part in ("only the second has 1 queries (q9)", "0f0f0f0f0f0f and abababababab", "common_queries"):
            assert part in str(error.value)

    def test_common_queries_are_compared_when_asked_and_the_report_says_so(self):
        ours = results_of({"toy": {"a": [0.1, 0.2, 0.3]}})
        theirs = results_of(
            {"toy": {"b": [0.9, 0.3]}}, sets={"toy": evaluated_set(["q9", "q2"], fingerprint="ab" * 16)}
        )
        merged = merge_results({"one": ours, "two": theirs}, common_queries=True)
        assert merged.sets["toy"].query_ids == ("q2",)
        assert merged.values["toy"]["a"]["nDCG@10"].tolist() == [0.3]
        assert merged.values["toy"]["b"]["nDCG@10"].tolist() == [0.3]
        (finding,) = merged.sets["toy"].findings
        assert (finding.count, finding.examples) == (3, ("q0", "q1", "q9"))
        assert "1 queries that all files have" in finding.effect

    def test_sets_without_a_common_query_are_refused_even_then(self):
        theirs = results_of({"toy": {"b": [1, 1]}}, sets={"toy": evaluated_set(["x", "y"])})
        with pytest.raises(FormatError, match="no query in common"):
            merge_results([results_of({"toy": {"a": [0, 1]}}), theirs], common_queries=True)

    def test_the_same_queries_in_another_order_are_put_in_order(self):
        theirs = results_of({"toy": {"b": [0.2, 0.1]}}, sets={"toy": evaluated_set(["q1", "q0"])})
        merged = merge_results([results_of({"toy": {"a": [0.5, 0.6]}}), theirs])
        assert merged.values["toy"]["b"]["nDCG@10"].tolist() == [0.1, 0.2]

    def test_same_queries_but_other_judgements_are_refused(self):
        """Only the fingerprint tells that a qrels file was mended between the two."""
        theirs = results_of({"toy": {"b": [1, 1]}}, sets={"toy": evaluated_set(["q0", "q1"], fingerprint="cd" * 16)})
        with pytest.raises(FormatError, match="other contents"):
            merge_results([results_of({"toy": {"a": [0, 1]}}), theirs])

    def test_another_rule_for_same_ids_is_refused(self):
        theirs = results_of({"toy": {"b": [1, 1]}}, exclude_same_id=False)
        for common in (False, True):
            with pytest.raises(FormatError, match="exclude_same_id is True in the one and False"):
                merge_results([results_of({"toy": {"a": [0, 1]}}), theirs], common_queries=common)

    def test_another_depth_keeps_the_measures_that_look_no_deeper(self):
        parts = []
        for depth, system in ((1000, "a"), (100, "b")):
            measures = ["nDCG@10", "AP", "R@100", "R@1000"]
            values = {"toy": {system: {measure: np.ones(2) for measure in measures}}}
            sets = {"toy": evaluated_set(["q0", "q1"])}
            parts.append(
                Results(provenance(), settings(measures, depth=depth), sets, {system: {"kind": "run"}}, values)
            )
        with pytest.raises(FormatError, match="depth is 1000 in the one and 100"):
            merge_results(parts)
        merged = merge_results(parts, common_queries=True)
        assert merged.measures == ("nDCG@10", "R@100")
        assert merged.settings["depth"] == 100
        deep = [replace(part, settings={**part.settings, "measures": ["AP"]}, values={}) for part in parts]
        with pytest.raises(FormatError, match="no measure looks only at"):
            merge_results(deep, common_queries=True)

    def test_systems_of_one_name_that_differ_need_labels(self):
        ours, theirs = (results_of({"toy": {"bm25": [0, 1], "m": values}}) for values in ([0, 1], [1, 1]))
        with pytest.raises(FormatError, match="two systems are named 'm', and their nDCG@10 on toy differ"):
            merge_results([ours, theirs])
        merged = merge_results({"before": ours, "after": theirs})
        assert list(merged.systems) == ["bm25", "m (before)", "m (after)"]
        assert list(merged.groups) == ["bm25", "m (before)", "m (after)"]

    def test_a_baseline_that_is_told_apart_stays_the_baseline(self):
        ours, theirs = (results_of({"toy": {"m": values}}, baseline="m") for values in ([0, 1], [1, 1]))
        merged = merge_results({"before": ours, "after": theirs})
        assert merged.baseline == "m (before)"

    def test_seeds_of_both_parts_are_one_group(self):
        parts = [results_of({"toy": {name: [0, 1]}}, groups={name: "m"}) for name in ("m1", "m2")]
        assert merge_results(parts).groups == {"m": ("m1", "m2")}

    def test_nothing_is_not_merged(self):
        with pytest.raises(FormatError, match="no results to merge"):
            merge_results([])


class TestCompareFiles:
    def test_systems_are_told_apart_by_their_folder(self, tmp_path):
        for name, values in (("before", [0, 1]), ("after", [1, 1])):
            results_of({"toy": {"m": values}}).save(tmp_path / name / "results.json")
        merged = compare_files([tmp_path / "before", tmp_path / "after" / "results.json"], baseline="m (before)")
        assert list(merged.groups) == ["m (before)", "m (after)"]
        assert merged.baseline == "m (before)"

    def test_systems_are_told_apart_by_their_file_and_then_by_more_of_the_path(self, tmp_path):
        for name, values in (("x/a", [0, 1]), ("y/a", [1, 1]), ("y/b", [1, 0])):
            results_of({"toy": {"m": values}}).save(tmp_path / f"{name}.json")
        near = compare_files([tmp_path / "y" / "a.json", tmp_path / "y" / "b.json"])
        assert list(near.groups) == ["m (a)", "m (b)"]
        far = compare_files([tmp_path / "x" / "a.json", tmp_path / "y" / "a.json"])
        assert list(far.groups) == ["m (x/a)", "m (y/a)"]

    def test_a_file_is_not_compared_with_itself(self, tmp_path):
        file = results_of({"toy": {"m": [0, 1]}}).save(tmp_path / "results.json")
        with pytest.raises(FormatError, match="given twice"):
            compare_files([file, tmp_path])

    def test_another_baseline_and_confidence_may_be_asked_for(self, tmp_path):
        file = results_of({"toy": {"a": [0, 1], "b": [1, 1]}}).save(tmp_path / "results.json")
        results = compare_files([file], baseline="b", confidence=0.9)
        assert results.baseline == "b"
        assert results.alpha == 0.1
        with pytest.raises(FormatError, match="the baseline 'c' is no system"):
            compare_files([file], baseline="c")


def test_results_are_read_without_the_libraries_of_the_reports(tmp_path):
    """A table on a server must not wait for a model library, nor fail for want of a plotting one."""
    file = sample().save(tmp_path / "results.json")
    code = (
        "import sys; from st_m3se.evaluation.results import Results;"
        f"Results.load({str(file)!r});"
        "print(sorted({'matplotlib', 'jinja2', 'rich', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
