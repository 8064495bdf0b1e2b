"""Tables of an evaluation for a terminal, for Markdown and for LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from st_m3se.core.extras import require
from st_m3se.core.markdown import markdown
from st_m3se.evaluation.citations import citations
from st_m3se.evaluation.grids import NOTHING, Grid, Shown, grids, headline, legend
from st_m3se.evaluation.listings import (
    Listing,
    comparisons_listing,
    findings_listing,
    provenance_listing,
    seeds_listing,
    sets_listing,
    speeds_listing,
    systems_listing,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from st_m3se.evaluation.results import Results

__all__ = ["render_latex", "render_markdown", "render_terminal"]

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
NUMBER = r"[*+<\\\[\- \d]*\d|" + NOTHING + "$"


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
    console.print(Text(headline(results)))
    for grid in tables:
        for part in _fitting(grid, console.width, intervals=len(tables) == 1):
            console.print(part)
    for sentence in legend(results, intervals=len(tables) == 1):
        console.print(Text(sentence, style="dim"))
    if findings := findings_listing(results).rows:
        console.print(Text("\nUnusual about the data", style="bold"))
        for name, what, count, examples, effect in findings:
            seen = f" ({examples})" if examples else ""
            console.print(Text(f"{name}: {what}: {count}{seen}: {effect}"))


def _fitting(grid: Grid, width: int, *, intervals: bool) -> Iterator[object]:
    """The grid as rich tables no wider than the terminal, each with the first column."""
    from rich.table import Table
    from rich.text import Text

    cells = [[_styled(shown, intervals) for shown in row] for row in grid.figures]
    # A header may be broken at hyphens and slashes; a figure may not.
    least = [
        max([len(word) for word in re.split(r"[-/ ]", label)] + [_width(row[column]) for row in cells])
        for column, label in enumerate(grid.columns)
    ]
    first = max(len(label) for label in (grid.corner, *grid.rows)) + 4
    start = 0
    while start < len(grid.columns):
        stop, used = start + 1, first + least[start] + 3
        while stop < len(grid.columns) and used + least[stop] + 3 <= width:
            used += least[stop] + 3
            stop += 1
        table = Table(title=Text(grid.title, style="bold"), title_justify="left")
        table.add_column(Text(grid.corner), no_wrap=True)
        for column in range(start, stop):
            table.add_column(Text(grid.columns[column]), min_width=least[column], overflow="fold")
        last = len(grid.rows) - 1
        for row, label in enumerate(grid.rows):
            table.add_row(Text(label), *cells[row][start:stop], end_section=grid.by_set and row == last - 1)
        yield table
        start = stop


def _styled(shown: Shown | None, intervals: bool) -> Text:
    from rich.text import Text

    if shown is None:
        return Text(NOTHING, style="dim")
    text = Text(shown.mean, style="bold" if shown.best else "")
    text.append(" " + shown.marks if shown.marks else "", style="not bold")
    text.append("\n" + shown.interval if intervals and shown.interval else "", style="not bold dim")
    return text


def _width(text: Text) -> int:
    return max(map(len, text.plain.split("\n")))


def render_markdown(results: Results) -> str:
    """The whole report: tables, legend, tests, data, speeds, systems, provenance and what to cite."""
    parts = ["# Evaluation", markdown(headline(results))]
    tables = grids(results)
    for grid in tables:
        parts += [f"## {markdown(grid.title)}", _markdown_grid(grid)]
    parts += ["\n".join(f"- {markdown(sentence)}" for sentence in legend(results))]
    for measure in results.measures:
        if (tests := comparisons_listing(results, measure)).rows:
            parts += [f"## Significance: {markdown(measure)}", _markdown_listing(tests)]
    parts += ["## Sets", _markdown_listing(sets_listing(results)), "## Findings in the data"]
    findings = findings_listing(results)
    parts.append(_markdown_listing(findings) if findings.rows else "Nothing unusual was found.")
    for listing in (
        seeds_listing(results),
        speeds_listing(results),
        systems_listing(results),
        provenance_listing(results),
    ):
        if listing.rows:
            parts += [f"## {listing.title}", _markdown_listing(listing)]
    cited = "\n".join(f"- **{markdown(what)}**: {markdown(text)}" for what, text in citations(results))
    return "\n\n".join([*parts, "## Measures and what to cite", cited]) + "\n"


def _markdown_grid(grid: Grid) -> str:
    def show(shown: Shown | None) -> str:
        if shown is None:
            return NOTHING
        mean = f"**{shown.mean}**" if shown.best else shown.mean
        marks = f"<sup>{shown.marks}</sup>" if shown.marks else ""
        return f"{mean}{marks} <br><sub>{markdown(shown.interval)}</sub>" if shown.interval else mean + marks

    rows = [[markdown(label), *map(show, figures)] for label, figures in zip(grid.rows, grid.figures, strict=True)]
    return _markdown_table([markdown(label) for label in (grid.corner, *grid.columns)], rows)


def _markdown_listing(listing: Listing) -> str:
    return _markdown_table(list(map(markdown, listing.columns)), [list(map(markdown, row)) for row in listing.rows])


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are aligned right."""
    rules = []
    for column in range(len(columns)):
        numbers = rows and column and all(re.match(NUMBER, row[column].strip()) for row in rows)
        rules.append("---:" if numbers else "---")
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rules, *rows))


def render_latex(results: Results) -> str:
    """A table per measure for a paper: booktabs, best in bold, daggers, intervals in small print below."""
    note = " ".join(map(_latex, legend(results)))
    return "% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n" + "\n".join(
        _latex_grid(grid, note, row) for row, grid in enumerate(grids(results), 1)
    )


def _latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _latex_grid(grid: Grid, note: str, number: int) -> str:
    def mean(shown: Shown | None) -> str:
        if shown is None:
            return "--"
        text = shown.mean.replace(" ± ", r"\,$\pm$\,")
        marks = _latex(shown.marks).replace("$", "").replace(" ", r"\,")
        return (rf"\textbf{{{text}}}" if shown.best else text) + (rf"$^{{{marks}}}$" if shown.marks else "")

    def interval(shown: Shown | None) -> str:
        return rf"{{\scriptsize {shown.interval}}}" if shown is not None and shown.interval else ""

    def line(label: str, figures: Sequence[Shown | None], show: Callable[[Shown | None], str]) -> str:
        return " & ".join([label, *map(show, figures)]) + r" \\"

    body = []
    for row, (label, figures) in enumerate(zip(grid.rows, grid.figures, strict=True)):
        if grid.by_set and row == len(grid.rows) - 1:
            body.append(r"\midrule")
        body.append(line(_latex(label), figures, mean))
        if any(shown is not None and shown.interval for shown in figures):
            body.append(line("", figures, interval))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(grid.title)}. {note}}}",
            rf"\label{{tab:evaluation-{number}}}",
            rf"\begin{{tabular}}{{l{'l' * len(grid.columns)}}}",
            r"\toprule",
            line(_latex(grid.corner), [], mean).removesuffix(r" \\")
            + "".join(f" & {_latex(label)}" for label in grid.columns)
            + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
