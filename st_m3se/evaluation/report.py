"""The report of an evaluation: a folder for programs, papers and browsers, and pages that need no other file."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from st_m3se.core.extras import require
from st_m3se.core.files import atomic_file
from st_m3se.evaluation.citations import citations
from st_m3se.evaluation.plots import Plot, save_figure
from st_m3se.evaluation.plots import plots as draw
from st_m3se.evaluation.results import FILE
from st_m3se.evaluation.tables import (
    NOTHING,
    grids,
    headline,
    legend,
    number_columns,
    plain,
    reference,
    render_latex,
    render_markdown,
    text_tables,
)

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = ["Section", "data_uri", "render", "write_html", "write_page", "write_report"]

Section = tuple[str, str]
"""A title, and HTML that is put into the page as it is."""

LETTERS = 160  # of a query
EMBEDDED = 1_000_000  # values per query that the page holds: some 7 MB


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
        sections: More sections for the page; see :func:`write_html`.
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


def write_html(
    results: Results,
    path: str | Path,
    *,
    plots: Sequence[Plot] = (),
    sections: Sequence[Section] = (),
    title: str | None = None,
    texts: Mapping[str, Mapping[Any, str]] | None = None,
) -> Path:
    """Write the page.

    Its tables are sorted by a click on a column's head, and the values per query can be searched. Without JavaScript
    everything but these is there. All names are escaped.

    Args:
        results: What to show.
        path: The file; what stood there is replaced.
        plots: From :func:`st_m3se.evaluation.plots.plots`; they become part of the file.
        sections: More sections, put before the provenance. The caller escapes what is not trusted in their HTML.
        title: By default the names of the sets.
        texts: Of the queries, by set and id, to stand beside the ids.
    """
    tables = text_tables(results)
    names = [plain(name) for name in results.sets]
    several = f" and {len(names) - 3} more sets" if len(names) > 3 else ""
    embedded, measures = _per_query(results, texts or {})
    return write_page(
        path,
        "report.html",
        title=title or "Evaluation on " + ", ".join(names[:3]) + several,
        headline=headline(results),
        grids=list(grids(results).items()),
        legend=legend(results),
        alpha=results.alpha,
        plots=[(plot, data_uri(plot.svg)) for plot in plots],
        tables=tables,
        tests={measure: tables[f"Significance: {measure}"] for measure in results.measures},
        citations=citations(results),
        sections=sections,
        embedded=embedded,
        left_out=[measure for measure in results.measures if measure not in measures],
        nothing=NOTHING,
        dates=", ".join(dict.fromkeys(str(part.get("date", "")) for part in results.parts)),
        version=", ".join(dict.fromkeys(str(part.get("st_m3se", "")) for part in results.parts)),
    )


def write_page(path: str | Path, template: str, *, package: str = "st_m3se.evaluation", **values: Any) -> Path:
    """Write a page in the style of all pages, which needs no other file.

    Args:
        path: The file; what stood there is replaced.
        template: Its name; it extends ``page.html``.
        package: Where its folder ``templates`` is.
        values: What it shows; "title" at least.
    """
    page = render(template, package=package, **values)
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def render(template: str, *, package: str = "st_m3se.evaluation", **values: Any) -> str:
    """A page or a part of one; all values are escaped, but for those that a template calls safe."""
    jinja2 = require("jinja2", "eval")
    folders = [jinja2.PackageLoader(name, "templates") for name in dict.fromkeys([package, "st_m3se.evaluation"])]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": True}
    environment.globals |= {"zip": zip, "number_columns": number_columns}
    return str(environment.get_template(template).render(**values))


def data_uri(svg: bytes) -> str:
    """A drawing as an image, whose ids, styles and scripts have no effect on the page around it."""
    return "data:image/svg+xml;base64," + b64encode(svg).decode("ascii")


def _per_query(results: Results, texts: Mapping[str, Mapping[Any, str]]) -> tuple[dict[str, Any], list[str]]:
    """The values per query for the page's script, of all measures or, where that is too much, of the headline's.

    In lists, not objects: a system may have any name.
    """
    measures = list(results.measures)
    count = sum(evaluated.queries for evaluated in results.sets.values()) * len(results.groups)
    measures = measures if count * len(measures) <= EMBEDDED else measures[:1]
    groups = list(results.groups)
    sets = []
    for name, evaluated in results.sets.items():
        values = []
        for measure in measures:
            found = [results.per_query(name, group, measure) for group in groups]
            values.append([None if array is None else [round(float(value), 4) for value in array] for array in found])
        against = reference(results, name, measures[0])
        sets.append(
            {
                "name": plain(name),
                "queries": [plain(query) for query in evaluated.query_ids],
                "texts": [shorten(plain(texts[name].get(query, "")), LETTERS) for query in evaluated.query_ids]
                if name in texts
                else None,
                "values": values,
                "reference": None if against is None else groups.index(against),
            }
        )
    return {"measures": measures, "systems": [plain(group) for group in groups], "sets": sets}, measures
