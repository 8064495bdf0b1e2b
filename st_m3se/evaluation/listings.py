"""The tables of texts in a report: tests, sets, findings, seconds, systems and provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from st_m3se.evaluation.grids import DIGITS, NOTHING, bracketed, plain

if TYPE_CHECKING:
    from st_m3se.evaluation.results import Results

__all__ = [
    "Listing",
    "comparisons_listing",
    "findings_listing",
    "provenance_listing",
    "provenance_rows",
    "seeds_listing",
    "sets_listing",
    "speeds_listing",
    "systems_listing",
]


class Listing(NamedTuple):
    """A table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def comparisons_listing(results: Results, measure: str) -> Listing:
    """Every test of a measure: the difference with its interval, how many queries won and lost, and the p-values."""
    rows = []
    for name, measures in results.summary.comparisons.items():
        for test in measures.get(measure, []):
            first, second = (results.per_query(name, group, measure) for group in (test.first, test.second))
            assert first is not None  # a test has two sides
            assert second is not None
            difference = second - first
            wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
            rows.append(
                (
                    plain(name),
                    plain(test.second),
                    plain(test.first),
                    f"{round(test.difference, DIGITS) + 0.0:+.{DIGITS}f}",  # no minus in front of 0
                    bracketed(test.interval, "+"),
                    "yes" if test.significant else "no",
                    _p(test.holm_p),
                    _p(test.randomisation_p),
                    _p(test.t_p),
                    f"{wins:,}",
                    f"{len(difference) - wins - losses:,}",
                    f"{losses:,}",
                )
            )
    columns = ("set", "system", "against", "difference", "interval", "significant")
    start = len(results.sets) == 1  # a column of one word would push others out of sight
    heads = (*columns, "Holm p", "p", "t-test p", "wins", "ties", "losses")
    return Listing(measure, heads[start:], [row[start:] for row in rows])


def seeds_listing(results: Results) -> Listing:
    """The mean of each seed, of the systems that have several."""
    rows = [
        (
            plain(name),
            plain(group),
            plain(system),
            *(
                f"{found.mean():.{DIGITS}f}" if (found := measured.get(measure)) is not None else NOTHING
                for measure in results.measures
            ),
        )
        for name, systems in results.values.items()
        for group, seeds in results.groups.items()
        for system in seeds
        if len(seeds) > 1 and (measured := systems.get(system))
    ]
    return Listing("Seeds", ("set", "system", "seed", *results.measures), rows)


def sets_listing(results: Results) -> Listing:
    """The sets and their sizes."""
    rows = [
        (
            plain(name),
            plain(evaluated.split),
            evaluated.form,
            NOTHING if evaluated.documents is None else f"{evaluated.documents:,}",
            f"{evaluated.queries:,}",
            f"{evaluated.judgements:,}",
            evaluated.fingerprint[:12],
        )
        for name, evaluated in results.sets.items()
    ]
    return Listing("Sets", ("set", "split", "form", "documents", "queries", "judgements", "fingerprint"), rows)


def findings_listing(results: Results) -> Listing:
    """What was unusual about the data, and what was done about it."""
    rows = [
        (
            plain(name),
            plain(finding.kind),
            f"{finding.count:,}",
            plain(", ".join(finding.examples)),
            plain(finding.effect),
        )
        for name, evaluated in results.sets.items()
        for finding in evaluated.findings
    ]
    return Listing("Findings", ("set", "what", "count", "for example", "effect"), rows)


def speeds_listing(results: Results) -> Listing:
    """How long each step took."""
    rows = []
    for name, systems in results.seconds.items():
        for system, steps in systems.items():
            for step, seconds in steps.items():
                documents = "corpus" in step
                count = results.sets[name].documents if documents else results.sets[name].queries
                rate = (
                    f"{count / seconds:,.1f} {'documents' if documents else 'queries'}/s"
                    if count and seconds
                    else NOTHING
                )
                rows.append((plain(name), plain(system), plain(step), f"{seconds:,.2f}", rate))
    return Listing("Seconds", ("set", "system", "step", "seconds", "rate"), rows)


def systems_listing(results: Results) -> Listing:
    """How each system was made."""
    rows = []
    for name, system in results.systems.items():
        rest = {key: value for key, value in system.items() if key not in ("kind", "group") and value is not None}
        about = "; ".join(f"{key}: {_text(value)}" for key, value in rest.items())
        rows.append((plain(name), plain(results.group_of(name)), plain(system["kind"]), plain(about)))
    if all(name == group for name, group, *_ in rows):
        return Listing("Systems", ("system", "kind", "description"), [(row[0], *row[2:]) for row in rows])
    return Listing("Systems", ("system", "group", "kind", "description"), rows)


def provenance_listing(results: Results) -> Listing:
    """When, where and with what the values were made."""
    parts = [dict(_flat(part)) for part in results.parts]
    names = dict.fromkeys(name for part in parts for name in part)
    rows = [(plain(name), *(plain(part.get(name, NOTHING)) for part in parts)) for name in names]
    settings = [(plain(name), *([plain(_text(value))] * len(parts))) for name, value in results.settings.items()]
    columns = ("value",) if len(parts) == 1 else tuple(f"evaluation {number}" for number in range(1, len(parts) + 1))
    return Listing("Provenance", ("what", *columns), [*rows, *settings])


def provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :func:`~st_m3se.evaluation.provenance.provenance` found, for a table of two columns."""
    return [(plain(name), plain(text)) for name, text in _flat(provenance)]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield name, ", ".join(f"{key} {_text(part)}" for key, part in value.items())
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    """A setting for people."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple) and all(isinstance(part, str | int | float) for part in value):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _p(value: float) -> str:
    if np.isnan(value):
        return NOTHING
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
