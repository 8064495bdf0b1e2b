"""A diagnosis to read: its table, its figures, and its section of an HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from st_m3se.core.markdown import markdown, markdown_table, text_table
from st_m3se.diagnostics.diagnosis import Diagnosis, write_csv
from st_m3se.diagnostics.plots import plot_densities, plot_evolution, plot_margins, save_figure
from st_m3se.diagnostics.separation import NUMBERS
from st_m3se.diagnostics.tracking import Evolution
from st_m3se.evaluation.report import data_uri, render
from st_m3se.evaluation.report import write_page as _write_page

__all__ = [
    "about",
    "about_gap",
    "html_section",
    "render_markdown",
    "render_text",
    "write_evolution",
    "write_page",
    "write_report",
]

FEW_QUERIES = 10
EXPLAINED = {
    "score_densities": (
        "Scores of relevant and of other documents",
        "How the scores of relevant documents (solid) and of all others in the lists (dashed) are distributed; each "
        "scorer in its own units. The less the two overlap, the better a threshold would tell them apart.",
    ),
    "margins": (
        "Normalised margins",
        "A positive's score minus a negative's of the same query, divided by the scorer's mean range of scores in a "
        "list, so that scorers of different units can be compared; each query counts the same. This normalisation is "
        "st-m3se's own. The share right of 0 is the AUC per query.",
    ),
    "evolution": (
        "Scores during training",
        "The scores of a few relevant and other documents of one query over the steps of the training.",
    ),
}
"""Figures by file name: title and what to see."""


def write_report(diagnosis: Diagnosis, folder: str | Path, evolutions: Sequence[Evolution] = ()) -> None:
    """Draw the figures of a diagnosis into its folder, as PNG and SVG, and write ``report.html`` around them.

    Raises:
        ImportError: Without matplotlib (extra ``plot``).
    """
    folder = Path(folder)
    save_figure(plot_densities(diagnosis.scorers), folder / "score_densities")
    save_figure(plot_margins(diagnosis.scorers), folder / "margins")
    if evolutions:
        write_evolution(evolutions, folder)
    write_page(folder)


def write_page(folder: str | Path) -> None:
    """Write ``report.html`` of the figures and numbers that are in a diagnosis' folder."""
    title, section = html_section(folder)
    _write_page(Path(folder) / "report.html", "section.html", title=title, html=section)


def write_evolution(evolutions: Sequence[Evolution], folder: str | Path) -> None:
    """Draw score evolutions side by side into ``evolution.png`` and ``.svg``, with their data as CSV."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(plot_evolution(evolutions), folder / "evolution")
    write_csv(folder / "evolution.csv", pd.concat(each.to_frame() for each in evolutions), "%.7g")


def html_section(folder: str | Path) -> tuple[str, str]:
    """A diagnosis as a section of an HTML page: its title, and HTML to put below it (headings from h3, no styles).

    The figures are images, since the folder may be another's: a browser runs no script in them.

    Args:
        folder: What ``st-m3se diagnose`` has written.
    """
    folder = Path(folder)
    diagnosis = Diagnosis.load(folder)
    name = diagnosis.data["name"]
    figures = [
        (data_uri((folder / f"{file}.svg").read_bytes()), heading, text)
        for file, (heading, text) in EXPLAINED.items()
        if (folder / f"{file}.svg").is_file()
    ]
    section = render(
        "diagnosis.html",
        about=about(diagnosis),
        numbers=NUMBERS,
        scorers=diagnosis.scorers,
        gap=about_gap(diagnosis),
        lists=[("Left out", _left_out(diagnosis)), ("In the data", diagnosis.data["notes"])],
        figures=figures,
    )
    return "How the scorers separate relevant documents" + (f": {name}" if name else ""), section


def render_text(diagnosis: Diagnosis) -> str:
    """The numbers as a table for a terminal."""
    head, rows = _table(diagnosis)
    lines = [about(diagnosis), "", text_table(head, rows, range(1, len(head)))]
    if diagnosis.gap is not None:
        lines += ["", about_gap(diagnosis)]
    lines += [f"left out: {text}" for text in _left_out(diagnosis)]
    lines += [f"in the data: {text}" for text in diagnosis.data["notes"]]
    return "\n".join(lines)


def render_markdown(diagnosis: Diagnosis) -> str:
    """The numbers as a Markdown table."""
    head, rows = _table(diagnosis)
    rows = [[markdown(name), *numbers] for name, *numbers in rows]
    return markdown_table(head, rows, range(1, len(head)))


def _table(diagnosis: Diagnosis) -> tuple[list[str], list[list[str]]]:
    """The numbers with their intervals, as texts; a row for each scorer."""
    rows = [
        [name, *(str(separation.numbers[number]) for number in NUMBERS)]
        for name, separation in diagnosis.scorers.items()
    ]
    return ["scorer", *NUMBERS.values()], rows


def _left_out(diagnosis: Diagnosis) -> list[str]:
    return [f"{count:,} {what}" for what, count in diagnosis.data["left_out"].items()]


def about(diagnosis: Diagnosis) -> str:
    """What the numbers are of, in a sentence."""
    data, settings = diagnosis.data, diagnosis.settings
    return (
        f"{data['queries']:,} queries, {data['positives']:,} relevant and {data['negatives']:,} other documents, the "
        f"same for every scorer. In brackets {settings['confidence']:.0%} intervals over {settings['n_resamples']:,} "
        "bootstrap draws of queries."
        + (" So few queries tell little, and their intervals less." if data["queries"] < FEW_QUERIES else "")
    )


def about_gap(diagnosis: Diagnosis, write: Callable[[str], str] = str) -> str:
    """The closed share of the teacher's lead, in a sentence; empty where nobody asked; ``write`` writes names."""
    gap = diagnosis.gap
    if gap is None:
        return ""
    before, after, teacher = map(write, gap.names)
    return f"From {before} to {after}, with {teacher} as the teacher: {gap}."
