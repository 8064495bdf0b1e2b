"""A folder with everything that an evaluation found: for programs, papers, terminals and browsers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_m3se.core.files import atomic_file
from st_m3se.evaluation.html import Section, write_html
from st_m3se.evaluation.plots import plots as draw
from st_m3se.evaluation.plots import save_figure
from st_m3se.evaluation.results import FILE
from st_m3se.evaluation.tables import render_latex, render_markdown

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = ["write_report"]


def write_report(
    results: Results,
    folder: str | Path,
    *,
    plots: bool = True,
    sections: Sequence[Section] = (),
    title: str | None = None,
    texts: Mapping[str, Mapping[Any, str]] | None = None,
) -> list[Path]:
    """Write ``results.json``, ``per_query.jsonl``, ``report.md``, ``report.tex``, ``report.html`` and ``plots/``.

    Files of these names are replaced; ``results.json`` comes first, so that nothing is lost if a package for the rest
    is missing.

    Args:
        results: What to report.
        folder: Where to; it is made.
        plots: Draw the plots, as PNG and SVG; the page holds them too. Needs matplotlib.
        sections: More sections for the page; see :func:`st_m3se.evaluation.html.write_html`.
        title: Of the page.
        texts: Of the queries, by set and id, for the page.

    Returns:
        The files.

    Raises:
        ImportError: If ``plots`` and matplotlib is missing.
    """
    folder = Path(folder)
    written = [results.save(folder / FILE), _write_per_query(results, folder / "per_query.jsonl")]
    for name, text in (("report.md", render_markdown(results)), ("report.tex", render_latex(results))):
        with atomic_file(folder / name, overwrite=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(folder / name)
    drawn = list(draw(results)) if plots else []
    taken: set[str] = set()
    for plot in drawn:
        written += save_figure(plot.figure, folder / "plots" / _file_name(plot.name, taken), svg=plot.svg)
    page = folder / "report.html"
    return [*written, write_html(results, page, plots=drawn, sections=sections, title=title, texts=texts)]


def _write_per_query(results: Results, path: Path) -> Path:
    """One JSON line per set, system and query: {"set", "system", "query_id", and each measure's value}."""
    keys = ["set", "system", "query_id", "measure"]
    wide = results.to_frame().set_index(keys)["value"].unstack("measure", sort=False).reset_index()
    with atomic_file(path, overwrite=True) as temporary:
        wide.to_json(temporary, orient="records", lines=True, force_ascii=False, double_precision=15)
    return path


def _file_name(name: str, taken: set[str]) -> str:
    """A file name that any system takes, and no other plot has; it is added to ``taken``."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "plot"
    number = 1
    while (found := short if number == 1 else f"{short}-{number}") in taken:
        number += 1
    taken.add(found)
    return found
