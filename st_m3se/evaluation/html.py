"""One static page that holds a whole evaluation and needs nothing else: no network, no other file."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from st_m3se.core.files import atomic_file
from st_m3se.evaluation.citations import citations
from st_m3se.evaluation.grids import NOTHING, grids, headline, legend, plain, reference
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
from st_m3se.evaluation.plots import Plot

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = ["Section", "data_uri", "write_html", "write_page"]

Section = tuple[str, str]
"""A title, and HTML that is put into the page as it is."""

LETTERS = 160  # of a query
EMBEDDED = 1_000_000  # values per query that the page holds: some 7 MB
NUMBER = re.compile(r"[<+-]? ?[\d,]+(\.\d+)?( ± [\d.]+)?|\[[\d.+-]+, [\d.+-]+\]|" + NOTHING)


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
    names = [plain(name) for name in results.sets]
    several = f" and {len(names) - 3} more sets" if len(names) > 3 else ""
    embedded, measures = _per_query(results, texts or {})
    return write_page(
        path,
        "report.html",
        title=title or "Evaluation on " + ", ".join(names[:3]) + several,
        headline=headline(results),
        grids=grids(results),
        legend=legend(results),
        alpha=results.summary.alpha,
        plots=[(plot, data_uri(plot)) for plot in plots],
        tests=[comparisons_listing(results, measure) for measure in results.measures],
        seeds=seeds_listing(results),
        sets=sets_listing(results),
        findings=findings_listing(results),
        speeds=speeds_listing(results),
        systems=systems_listing(results),
        provenance=provenance_listing(results),
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
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader(name, "templates") for name in dict.fromkeys([package, "st_m3se.evaluation"])]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": True}
    environment.globals["zip"] = zip
    environment.globals["number_columns"] = _number_columns
    page = environment.get_template(template).render(**values)
    with atomic_file(path, overwrite=True) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def _number_columns(listing: Listing) -> list[int]:
    """The columns after the first that hold nothing but numbers."""
    columns = range(1, len(listing.columns))
    return [column for column in columns if all(NUMBER.fullmatch(row[column]) for row in listing.rows)]


def data_uri(plot: Plot) -> str:
    """A plot as an image that is part of the page."""
    # As an image, a plot's ids and styles stay its own.
    return "data:image/svg+xml;base64," + b64encode(plot.svg).decode("ascii")


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
