"""What the paper saw beside what `reproduce_paper.py` saw, in a few lines of Markdown, from its numbers alone."""

from __future__ import annotations

from typing import Any


def render_summary(summary: dict[str, Any]) -> str:
    """Markdown with a line for each finding of the paper whose exhibit has been made."""
    data = summary["data"]
    lines = [
        f"# {data['name']}",
        "",
        f"{data['documents']:,} documents, {data['training lists']:,} training lists; re-ranking, measured on "
        f"{data['measured queries']['test']:,} test queries, of which {data['ceiling']['test']:.0%} have a relevant "
        "document in their list. Means over seeds. Verdicts compare means; p-values are of a paired randomisation test "
        "over queries, Holm-corrected where the line says so. Within chance: the order is the paper's, but a test, or "
        "intervals that overlap, cannot tell it from chance.",
        "",
        "| the paper | here | |",
        "|---|---|---|",
    ]
    lines += [f"| {saw} | {found} | {verdict} |" for saw, found, verdict in _findings(summary)]
    if "table" in summary:
        lines += ["", "| system | RR@10 | nDCG@10 |", "|---|---:|---:|"]
        for group, found in summary["table"]["test"].items():
            cells = []
            for values in (found[measure] for measure in ("RR@10", "nDCG@10")):
                seeds = values["seeds"]
                mean = sum(seeds) / len(seeds)
                spread = (sum((seed - mean) ** 2 for seed in seeds) / max(len(seeds) - 1, 1)) ** 0.5
                cells.append(f"{mean:.3f}" + (f" ± {spread:.3f}" if len(seeds) > 1 else ""))
            lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(same: bool, certain: bool = True) -> str:
    if not same:
        return "**not** as in the paper"
    return "as in the paper" if certain else "as in the paper, but within chance"


def _findings(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the paper saw, what was seen here, and whether that is the same."""
    found: list[tuple[str, str, str]] = []
    distilled = f"bi-encoder+{summary['arguments']['distilled']}"
    if (teacher := summary.get("teacher")) is not None:
        scores = {name: values["RR@10"] for name, values in teacher["test"].items()}
        text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        found.append(
            (
                "The teacher is better than the bi-encoder that nobody taught",
                f"RR@10 {text}, p = {teacher['p']:.4f}",
                _verdict(teacher["difference"] > 0, teacher["better than the bi-encoder"]),
            )
        )
    if (gap := summary.get("gap size")) is not None:
        size = max(next(iter(gap.values())), key=int)
        lost = {system: places[size]["train"] - places[size]["test"] for system, places in gap.items()}
        text = ", ".join(
            f"{system} {places[size]['train']:.3f} → {places[size]['test']:.3f}" for system, places in gap.items()
        )
        found.append(
            (
                "The bi-encoder loses more from train to test than the cross-encoder, and distilled less",
                f"RR@10 on train → test at size {size}: {text}",
                _verdict(lost["bi-encoder"] > lost["cross-encoder"] and lost["bi-encoder"] > lost[distilled]),
            )
        )
    if (tests := summary.get("bi-encoder by dropout")) is not None:
        values = {place: values["test"] for place, values in summary["gap dropout"]["bi-encoder"].items()}
        least = tests[0]["first"]
        text = "; ".join(
            [
                f"test RR@10 {values[least]:.3f} at {least}",
                *(
                    f"{values[test['second']]:.3f} at {test['second']}, p = {test['holm_p']:.4f} (Holm)"
                    for test in tests
                ),
            ]
        )
        better = [test for test in tests if test["difference"] > 0]
        helps = any(test["significant"] for test in better)
        found.append(
            ("More dropout does not help the bi-encoder on test", text, _verdict(not helps, certain=not better))
        )
    if (margins := summary.get("margins")) is not None:
        peaks = {name: margins[name]["margin_peak"] for name in ("teacher", "cross-encoder", "bi-encoder", distilled)}
        text = ", ".join(f"{name} {value:.2f} [{low:.2f}, {high:.2f}]" for name, (value, low, high) in peaks.items())
        found.append(
            (
                "The margins of the large cross-encoder, the teacher, peak highest (.63), of the distilled bi-encoder "
                "(.28) above the plain one's (.20); by the paper's normalisation, which is not public",
                f"peaks by ours: {text}",
                _verdict(
                    peaks["teacher"][0] > peaks[distilled][0] > peaks["bi-encoder"][0],
                    peaks["teacher"][1] > peaks[distilled][2] and peaks[distilled][1] > peaks["bi-encoder"][2],
                ),
            )
        )
    if (table := summary.get("table")) is not None:
        tests = {test["second"]: test for test in table["RR@10 against"]["bi-encoder"]}
        if (test := tests.get(distilled)) is not None:
            found.append(
                (
                    "Distillation with M3SE is better than no teacher",
                    f"{distilled}: RR@10 {test['difference']:+.3f}, p = {test['holm_p']:.4f} (Holm)",
                    _verdict(test["difference"] > 0, test["significant"]),
                )
            )
        means = {group: values["RR@10"]["mean"] for group, values in table["test"].items() if "bi-encoder+" in group}
        best = max(means, key=means.__getitem__)
        rivals = {
            baseline: next(test for test in tests if test["second"] == best)
            for baseline, tests in table["RR@10 against"].items()
            if baseline in means and baseline != best
        }
        against = [
            f"{test['difference']:+.3f} over {baseline.split('+')[1]}, p = {test['holm_p']:.4f} (Holm)"
            for baseline, test in rivals.items()
        ]
        found.append(
            (
                "Of the losses M3SE is the best, softmax cross-entropy close to it",
                "; ".join([f"the best is {best.split('+')[1]} with RR@10 {means[best]:.3f}", *against]),
                _verdict(best == "bi-encoder+m3se", all(test["significant"] for test in rivals.values())),
            )
        )
    return found
