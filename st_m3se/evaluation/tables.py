"""The tables of a report, and the sentences around them, for a terminal, for Markdown and for LaTeX."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from st_m3se.core.extras import require
from st_m3se.core.markdown import markdown, markdown_table
from st_m3se.evaluation.citations import citations
from st_m3se.evaluation.results import AVERAGE, Results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["Shown", "grids", "headline", "legend", "render_latex", "render_markdown", "render_terminal"]

DIGITS = 3
NOTHING = "\N{EN DASH}"
NUMBER = re.compile(r"[<+-]? ?[\d,]+(\.\d+)?( ± [\d.]+)?|\[[\d.+-]+, [\d.+-]+\]|" + NOTHING)
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    NOTHING: "--",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "\N{REPLACEMENT CHARACTER}": "?",
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # at the start of a row they would belong to the \\\\ before
    **{letter: "\\" + letter for letter in "&%$#_"},
}


# Tables of figures.


@dataclass(frozen=True)
class Shown:
    """A figure as the tables show it: with several seeds a deviation, on a set an interval, marks of significance."""

    value: float
    deviation: float
    low: float
    high: float
    best: bool
    marks: str

    @property
    def mean(self) -> str:
        """With the standard deviation where there are several seeds."""
        deviation = "" if np.isnan(self.deviation) else f" ± {self.deviation:.{DIGITS}f}"
        return f"{self.value:.{DIGITS}f}{deviation}"

    @property
    def interval(self) -> str:
        """Of the mean; "" for an average over sets."""
        return "" if np.isnan(self.low) else bracketed(self.low, self.high)


def plain(text: str) -> str:
    """A name on one line, without characters that move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def grids(results: Results, *, turn: bool = True) -> dict[str, pd.DataFrame]:
    """The tables of figures by title, each cell a :class:`Shown` or None; the average over sets is last.

    One table per measure; a single one of all measures where there is a single set or a single system. The index is
    named after what runs down: "system", "set" or "measure".

    Args:
        results: What to show.
        turn: Let the sets run down where there are more of them than systems, as BEIR papers do.
    """
    measures, labels = list(results.measures), list(results.columns)
    if len(labels) == 1:
        return {plain(labels[0]): _grid(results, [(measure, labels[0]) for measure in measures], measures)}
    alone = len(results.groups) == 1
    found = {}
    for measure in measures:
        if shown := labels if alone else results.columns_of(measure):
            columns = [*shown, AVERAGE]
            found[plain(measure)] = _grid(results, [(measure, column) for column in columns], columns)
    if alone:
        together = pd.concat(found.values()).set_axis(pd.Index(list(found), name="measure"))
        found = {str(next(iter(found.values())).index[0]): together}
    turned = {title: grid.T.rename_axis("set") for title, grid in found.items()}
    return {title: turned[title] if turn and grid.shape[1] > len(grid) else grid for title, grid in found.items()}


def _grid(results: Results, keys: Sequence[tuple[str, str]], labels: Sequence[str]) -> pd.DataFrame:
    """A row for each system; a column for each measure and column of the means."""
    letters = _letters(results)
    means = results.means.to_dict("index")
    best = results.means["mean"].groupby(level=[0, 1]).agg(["max", "size"]).to_dict("index")

    def shown(group: str, measure: str, column: str) -> Shown | None:
        if (cell := means.get((measure, column, group))) is None:
            return None
        most = best[measure, column]
        is_best = most["size"] > 1 and f"{cell['mean']:.{DIGITS}f}" == f"{most['max']:.{DIGITS}f}"
        marks = _marks(results, column, measure, group, letters) if column in results.sets else ""
        return Shown(cell["mean"], cell["deviation"], cell["low"], cell["high"], is_best, marks)

    rows = [
        (f"{letters[group]}: " if group in letters else "")
        + plain(group)
        + (f" ({len(systems)} seeds)" if len(systems) > 1 else "")
        for group, systems in results.groups.items()
    ]
    figures = [[shown(group, *key) for key in keys] for group in results.groups]
    return pd.DataFrame(figures, pd.Index(rows, name="system"), list(map(plain, labels)), dtype=object)


def _letters(results: Results) -> dict[str, str]:
    """a, b, ..., z, aa, ab, ... for the systems where all pairs are compared."""
    if results.baseline is not None or len(results.groups) < 2:
        return {}
    names = ["".join(pair) for length in (1, 2) for pair in product(ascii_lowercase, repeat=length)]
    return dict(zip(results.groups, names, strict=False))


def _marks(results: Results, name: str, measure: str, group: str, letters: dict[str, str]) -> str:
    better = results.better_than(name, measure, group)
    if results.baseline is None:
        return " ".join(letters[other] for other in better)
    return "†" * (results.baseline in better) + "‡" * (group in results.better_than(name, measure, results.baseline))


def legend(results: Results, *, intervals: bool = True) -> list[str]:
    """What bold, marks, brackets and averages mean, in sentences; for tables with or without intervals."""
    sentences = []
    if len(results.groups) > 1:
        sentences.append("Bold: the best of each set.")
    if len(results.tests):
        sizes = results.tests.groupby(["set", "measure"]).size()
        number = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
        family = (
            "one comparison for each set and measure"
            if sizes.max() == 1
            else f"Holm-corrected over the {number} comparisons of the same set and measure"
        )
        what = (
            f"† significantly better, ‡ significantly worse than {plain(results.baseline)}"
            if results.baseline is not None
            else "Letters: the systems that this one is significantly better than"
        )
        sentences.append(
            f"{what}: two-sided paired randomisation test of the values per query, {family}, p ≤ {results.alpha:g}."
        )
    elif len(results.groups) > 1:
        missing = "" if results.baseline is None else f" that also has {plain(results.baseline)}, the baseline"
        sentences.append(f"Nothing was tested: no two systems were measured on the same set{missing}.")
    if intervals:
        level = f"{100 * results.settings['confidence']:g} %"
        sentences.append(f"Brackets: {level} bootstrap interval of the mean over the queries.")
    if any(len(systems) > 1 for systems in results.groups.values()):
        sentences.append("±: standard deviation over seeds; intervals and tests use each query's mean over the seeds.")
    together = any(len(names) > 1 for names in results.columns.values())
    if len(results.columns) > 1 or together:
        also = ", to which the subsets of CQADupStack count together as one" if together else ""
        sentences.append(
            f"Average: the unweighted mean over the table's sets{also}, of systems that have all; not tested."
        )
    if any(shown is None for grid in grids(results).values() for shown in grid.to_numpy().flat):
        sentences.append(f"{NOTHING}: not measured.")
    return sentences


def headline(results: Results) -> str:
    """The main outcome in a sentence or two."""
    measure, columns = results.measures[0], list(results.columns)
    alone = columns[0] if len(columns) == 1 else None
    where = f"on average over {len(results.columns_of(measure))} sets" if alone is None else f"on {plain(alone)}"
    keys = [(measure, alone or AVERAGE, group) for group in results.groups]
    means = results.means["mean"].reindex(keys).dropna().droplevel([0, 1])
    if not len(means):
        return f"No system has {plain(measure)} on every set, so there is no average to lead with."
    best = str(means.idxmax())
    text = f"{plain(best)} reaches {plain(measure)} {means[best]:.{DIGITS}f} {where}"
    if len(means) < 2:
        return text + "."
    text = f"Best of {len(means)} systems: {text}."
    other = results.baseline or str(means.drop(best).idxmax())
    if other == best:
        return f"{text} It is the baseline."
    tests = results.tests.query("measure == @measure and first in [@best, @other] and second in [@best, @other]")
    gain = tests["difference"].where(tests["second"] == best, -tests["difference"])
    better, worse = int((tests["significant"] & (gain > 0)).sum()), int((tests["significant"] & (gain < 0)).sum())
    role = "the baseline" if other == results.baseline else "the next best"
    if len(results.sets) == 1:
        verdict = "better than" if better else "worse than" if worse else "different from"
        negation = "" if better or worse else "not "
        return f"{text} It is {negation}significantly {verdict} {plain(other)}, {role}."
    return (
        f"{text} Against {plain(other)}, {role}, it is significantly better on {better} of {len(tests)} sets and "
        f"significantly worse on {worse}."
    )


def reference(results: Results, name: str, measure: str) -> str | None:
    """The group that differences per query are shown to: the baseline, or the first of :func:`leading` there."""
    measured = results.measured(name, measure)
    groups = leading(results) if results.baseline is None else [results.baseline]
    return next((group for group in groups if group in measured), None)


def leading(results: Results) -> list[str]:
    """The groups, BM25 last if there are two others: the first model, as it was before, is what the rest is held to."""
    lexical = [group for group, names in results.groups.items() if results.systems[names[0]]["kind"] == "bm25"]
    others = [group for group in results.groups if group not in lexical]
    return [*others, *lexical] if len(others) > 1 else list(results.groups)


def bracketed(low: float, high: float, sign: str = "") -> str:
    """An interval as tables show it; with ``sign`` "+" its ends have a sign."""
    return f"[{rounded(low, sign)}, {rounded(high, sign)}]"


def rounded(value: float, sign: str = "") -> str:
    """A figure as tables show it, without a minus in front of 0."""
    return f"{round(value, DIGITS) + 0.0:{sign}.{DIGITS}f}"


# Tables of texts.


def text_tables(results: Results) -> dict[str, pd.DataFrame]:
    """By title: every test of each measure, each seed, the sets, findings, seconds, systems and provenance.

    Those with nothing to show have no rows. All cells are texts on one line.
    """
    tests = {f"Significance: {measure}": _tests(results, measure) for measure in results.measures}
    found = {
        **tests,
        "Sets": _sets(results),
        "Findings in the data": _findings(results),
        "Seeds": _seeds(results),
        "Seconds": _seconds(results),
        "Systems": _systems(results),
        "Provenance": _provenance(results),
    }
    return {title: frame.astype(object).map(lambda cell: plain(str(cell))) for title, frame in found.items()}


def number_columns(frame: pd.DataFrame) -> list[int]:
    """The columns after the first that hold nothing but numbers."""
    columns = range(1, frame.shape[1])
    return [column for column in columns if all(map(NUMBER.fullmatch, frame.iloc[:, column]))]


def _tests(results: Results, measure: str) -> pd.DataFrame:
    """The difference with its interval, the p-values, and how many queries were won and lost."""
    tests = results.tests.query("measure == @measure")
    pairs = zip(tests["low"], tests["high"], strict=True)
    shown = {
        "set": tests["set"],
        "system": tests["second"],
        "against": tests["first"],
        "difference": tests["difference"].map(lambda value: rounded(value, "+")),
        "interval": [bracketed(*pair, "+") for pair in pairs],
        "significant": tests["significant"].map({True: "yes", False: "no"}),
        "Holm p": tests["holm_p"].map(_p),
        "p": tests["randomisation_p"].map(_p),
        "t-test p": tests["t_p"].map(_p),
    }
    counts = {name: tests[name].map("{:,}".format) for name in ("wins", "ties", "losses")}
    frame = pd.DataFrame({**shown, **counts})
    return frame.drop(columns="set") if len(results.sets) == 1 else frame  # which would push others out of sight


def _seeds(results: Results) -> pd.DataFrame:
    rows = [
        [
            name,
            group,
            system,
            *(f"{measured[m].mean():.{DIGITS}f}" if m in measured else NOTHING for m in results.measures),
        ]
        for name, systems in results.values.items()
        for group, seeds in results.groups.items()
        for system in seeds
        if len(seeds) > 1 and (measured := systems.get(system))
    ]
    return pd.DataFrame(rows, columns=["set", "system", "seed", *results.measures])


def _sets(results: Results) -> pd.DataFrame:
    rows = [
        [
            name,
            each.split,
            each.form,
            NOTHING if each.documents is None else f"{each.documents:,}",
            f"{each.queries:,}",
            f"{each.judgements:,}",
            each.fingerprint[:12],
        ]
        for name, each in results.sets.items()
    ]
    return pd.DataFrame(rows, columns=["set", "split", "form", "documents", "queries", "judgements", "fingerprint"])


def _findings(results: Results) -> pd.DataFrame:
    rows = [
        [name, finding.kind, f"{finding.count:,}", ", ".join(finding.examples), finding.effect]
        for name, each in results.sets.items()
        for finding in each.findings
    ]
    return pd.DataFrame(rows, columns=["set", "what", "count", "for example", "effect"])


def _seconds(results: Results) -> pd.DataFrame:
    rows = []
    for name, systems in results.seconds.items():
        for system, steps in systems.items():
            for step, seconds in steps.items():
                unit = "documents" if "corpus" in step else "queries"
                count = getattr(results.sets[name], unit)
                rate = f"{count / seconds:,.1f} {unit}/s" if count and seconds else NOTHING
                rows.append([name, system, step, f"{seconds:,.2f}", rate])
    return pd.DataFrame(rows, columns=["set", "system", "step", "seconds", "rate"])


def _systems(results: Results) -> pd.DataFrame:
    rows = []
    for name, system in results.systems.items():
        rest = {key: value for key, value in system.items() if key not in ("kind", "group") and value is not None}
        about = "; ".join(f"{key}: {_text(value)}" for key, value in rest.items())
        rows.append([name, results.group_of(name), system["kind"], about])
    frame = pd.DataFrame(rows, columns=["system", "group", "kind", "description"])
    return frame.drop(columns="group") if (frame["system"] == frame["group"]).all() else frame


def _provenance(results: Results) -> pd.DataFrame:
    """When, where and with what the values were made, a column for each evaluation, and the settings."""
    labels = [f"evaluation {number}" for number, _ in enumerate(results.parts, 1)]
    columns = {
        label: {name: _text(value) for name, value in {**part, **results.settings}.items()}
        for label, part in zip(labels if len(labels) > 1 else ["value"], results.parts, strict=True)
    }
    frame = pd.DataFrame(columns, index=list(dict.fromkeys(name for part in columns.values() for name in part)))
    return frame.fillna(NOTHING).rename_axis("what").reset_index()


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :func:`~st_m3se.evaluation.provenance.provenance` found, for a table of two columns."""
    return [(plain(name), plain(_text(value))) for name, value in provenance.items()]


def _text(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple) and all(isinstance(part, str | int | float) for part in value):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _p(value: float) -> str:
    return NOTHING if np.isnan(value) else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


# Renderings.


def render_terminal(results: Results, console: Console | None = None) -> None:
    """Print the tables, their legend and what was unusual about the data.

    A table that is wider than the terminal is printed in parts, so that no figure is cut.

    Args:
        results: What to show.
        console: Where to; by default standard output.

    Raises:
        ImportError: If rich is missing.
    """
    require("rich", "eval")
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False) if console is None else console
    tables = grids(results)
    alone, wide = len(tables) == 1, console.options.update(width=1 << 20)
    console.print(Text(headline(results)))
    for title, grid in tables.items():
        cells = grid.map(lambda shown: _styled(shown, intervals=alone))
        while cells.shape[1]:
            parts = [_table(title, cells.iloc[:, :count]) for count in range(1, cells.shape[1] + 1)]
            fitting = sum(console.measure(part, options=wide).minimum <= console.width for part in parts) or 1
            console.print(parts[fitting - 1])
            cells = cells.iloc[:, fitting:]
    for sentence in legend(results, intervals=alone):
        console.print(Text(sentence, style="dim"))
    findings = text_tables(results)["Findings in the data"]
    if len(findings):
        console.print(Text("\nUnusual about the data", style="bold"))
        for name, what, count, examples, effect in findings.itertuples(index=False):
            seen = f" ({examples})" if examples else ""
            console.print(Text(f"{name}: {what}: {count}{seen}: {effect}"))


def _table(title: str, cells: pd.DataFrame) -> Table:
    """For a terminal; a head may be broken, a figure may not."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left")
    table.add_column(Text(str(cells.index.name)), no_wrap=True)
    for label, column in cells.items():
        least = max(len(line) for text in column for line in text.plain.split("\n"))
        table.add_column(Text(str(label)), min_width=least, overflow="fold")
    for row, (label, *figures) in enumerate(cells.itertuples(), 1):
        table.add_row(Text(label), *figures, end_section=cells.index.name == "set" and row == len(cells) - 1)
    return table


def _styled(shown: Shown | None, *, intervals: bool) -> Text:
    from rich.text import Text

    if shown is None:
        return Text(NOTHING, style="dim")
    text = Text(shown.mean, style="bold" if shown.best else "")
    text.append(" " + shown.marks if shown.marks else "", style="not bold")
    text.append("\n" + shown.interval if intervals and shown.interval else "", style="not bold dim")
    return text


def render_markdown(results: Results) -> str:
    """The whole report: tables, legend, tests, data, speeds, systems, provenance and what to cite."""

    def show(shown: Shown | None) -> str:
        if shown is None:
            return NOTHING
        mean = f"**{shown.mean}**" if shown.best else shown.mean
        marks = f"<sup>{shown.marks}</sup>" if shown.marks else ""
        return f"{mean}{marks} <br><sub>{markdown(shown.interval)}</sub>" if shown.interval else mean + marks

    parts = ["# Evaluation", markdown(headline(results))]
    for title, grid in grids(results).items():
        head = [markdown(label) for label in (grid.index.name, *grid.columns)]
        lines = [[markdown(label), *figures] for label, *figures in grid.map(show).itertuples()]
        parts += [f"## {markdown(title)}", markdown_table(head, lines, range(1, len(head)))]
    parts += ["\n".join(f"- {markdown(sentence)}" for sentence in legend(results))]
    for title, frame in text_tables(results).items():
        rows = frame.map(markdown).to_numpy().tolist()
        if rows:
            table = markdown_table([*map(markdown, frame.columns)], rows, number_columns(frame))
            parts += [f"## {markdown(title)}", table]
        elif title == "Findings in the data":
            parts += [f"## {title}", "Nothing unusual was found."]
    cited = "\n".join(f"- **{markdown(what)}**: {markdown(text)}" for what, text in citations(results))
    return "\n\n".join([*parts, "## Measures and what to cite", cited]) + "\n"


def render_latex(results: Results) -> str:
    """A table per measure for a paper: booktabs, best in bold, daggers, intervals in small print below."""
    note = " ".join(map(_latex, legend(results)))
    return "% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n" + "\n".join(
        _latex_grid(title, grid, note, number) for number, (title, grid) in enumerate(grids(results).items(), 1)
    )


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _latex_grid(title: str, grid: pd.DataFrame, note: str, number: int) -> str:
    def mean(shown: Shown | None) -> str:
        if shown is None:
            return "--"
        text = shown.mean.replace(" ± ", r"\,$\pm$\,")
        marks = _latex(shown.marks).replace("$", "").replace(" ", r"\,")
        return (rf"\textbf{{{text}}}" if shown.best else text) + (rf"$^{{{marks}}}$" if shown.marks else "")

    rows = []
    for row, (label, *figures) in enumerate(grid.itertuples(), 1):
        if grid.index.name == "set" and row == len(grid):
            rows.append(r"\midrule")
        rows.append(" & ".join([_latex(label), *map(mean, figures)]) + r" \\")
        if any(intervals := [shown.interval if shown else "" for shown in figures]):
            small = [rf"{{\scriptsize {interval}}}" if interval else "" for interval in intervals]
            rows.append(" & ".join(["", *small]) + r" \\")
    head = " & ".join(map(_latex, (grid.index.name, *grid.columns))) + r" \\"
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(title)}. {note}}}",
            rf"\label{{tab:evaluation-{number}}}",
            rf"\begin{{tabular}}{{l{'l' * len(grid.columns)}}}",
            *(r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
            *(r"\end{tabular}", r"\end{table}", ""),
        ]
    )
