"""A diagnosis to read: its table, its figures, and its section of an HTML page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from st_m3se.core.markdown import cell, markdown
from st_m3se.diagnostics.diagnosis import Diagnosis, write_csv
from st_m3se.diagnostics.plots import plot_densities, plot_evolution, plot_margins, save_figure
from st_m3se.diagnostics.separation import NUMBERS
from st_m3se.diagnostics.tracking import Evolution
from st_m3se.evaluation.html import write_page as _write_page

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
    rows = []
    for each in evolutions:
        for step, scores in zip(each.steps.tolist(), each.scores.tolist(), strict=True):
            for query, document, positive, score in zip(
                each.query_ids, each.document_ids, each.positives.tolist(), scores, strict=True
            ):
                rows.append([cell(each.name), step, cell(query), cell(document), int(positive), f"{score:.7g}"])
    write_csv(folder / "evolution.csv", ["model", "step", "query_id", "document_id", "positive", "score"], rows)


def html_section(folder: str | Path) -> tuple[str, str]:
    """A diagnosis as a section of an HTML page: its title, and HTML that holds the figures as SVG images.

    As images, since the folder may be another's: a browser runs no script in them.

    Args:
        folder: What ``st-m3se diagnose`` has written.

    Returns:
        The title, and the HTML that belongs below it (headings from h3, no styles of its own).
    """
    folder = Path(folder)
    diagnosis = Diagnosis.load(folder)
    data = diagnosis.data
    title = "How the scorers separate relevant documents" + (f": {data['name']}" if data["name"] else "")
    parts = [f"<p>{escape(about(diagnosis))}</p>", _html_table(diagnosis)]
    if diagnosis.gap is not None:
        parts.append(f"<p><strong>Distance to the teacher.</strong> {escape(about_gap(diagnosis))}</p>")
    for heading, texts in (("Left out", _left_out(diagnosis)), ("In the data", data["notes"])):
        if texts:
            items = "".join(f"<li>{escape(text)}</li>" for text in texts)
            parts.append(f"<p>{heading}:</p><ul>{items}</ul>")
    for name, (heading, text) in EXPLAINED.items():
        file = folder / f"{name}.svg"
        if file.is_file():
            drawing = _image(file.read_bytes(), heading)
            parts.append(f"<h3>{escape(heading)}</h3><figure>{drawing}<figcaption>{escape(text)}</figcaption></figure>")
    return title, "\n".join(parts)


def render_text(diagnosis: Diagnosis) -> str:
    """The numbers as a table for a terminal."""
    rows = _rows(diagnosis)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines = [about(diagnosis), "", *lines]
    if diagnosis.gap is not None:
        lines += ["", about_gap(diagnosis)]
    lines += [f"left out: {text}" for text in _left_out(diagnosis)]
    lines += [f"in the data: {text}" for text in diagnosis.data["notes"]]
    return "\n".join(lines)


def render_markdown(diagnosis: Diagnosis) -> str:
    """The numbers as a Markdown table."""
    header, *rows = _rows(diagnosis)
    rows = [[markdown(name), *numbers] for name, *numbers in rows]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _left_out(diagnosis: Diagnosis) -> list[str]:
    return [f"{count:,} {what}" for what, count in diagnosis.data["left_out"].items()]


def _rows(diagnosis: Diagnosis) -> list[list[str]]:
    return [
        ["scorer", *NUMBERS.values()],
        *(
            [name, *(str(separation.numbers[number]) for number in NUMBERS)]
            for name, separation in diagnosis.scorers.items()
        ),
    ]


def about(diagnosis: Diagnosis) -> str:
    """What the numbers are of, in a sentence."""
    data, settings = diagnosis.data, diagnosis.settings
    return (
        f"{data['queries']:,} queries, {data['positives']:,} relevant and {data['negatives']:,} other documents, the "
        f"same for every scorer. In brackets {settings['confidence']:.0%} intervals over {settings['n_resamples']:,} "
        "bootstrap draws of queries."
    )


def about_gap(diagnosis: Diagnosis, write: Callable[[str], str] = str) -> str:
    """The closed share of the teacher's lead, in a sentence; empty where nobody asked for it.

    Args:
        diagnosis: Whose.
        write: How to write the scorers' names, such as :func:`~st_m3se.core.markdown.markdown`.
    """
    gap = diagnosis.gap
    if gap is None:
        return ""
    before, after, teacher = map(write, gap.names)
    return f"From {before} to {after}, with {teacher} as the teacher: {gap}."


def _html_table(diagnosis: Diagnosis) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("scorer", *NUMBERS.values()))
    body = []
    for name, separation in diagnosis.scorers.items():
        cells = [f"<td>{escape(name)}</td>"]
        for number in NUMBERS:
            value, low, high = separation.numbers[number]
            cells.append(f"<td>{value:.3f} <small>[{low:.3f}, {high:.3f}]</small></td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" role="region" tabindex="0" aria-label="Table: scorers">{table}</div>'


def _image(svg: bytes, label: str) -> str:
    return f'<img src="data:image/svg+xml;base64,{b64encode(svg).decode("ascii")}" alt="{escape(label)}"/>'
