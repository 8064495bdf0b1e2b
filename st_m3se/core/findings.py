"""What is unusual in an evaluation set, and what is done about it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from st_m3se.core.errors import FormatError

__all__ = ["EXAMPLES", "NOTES", "Finding", "found", "refuse", "report"]

logger = logging.getLogger(__name__)

EXAMPLES = 3

NOTES = frozenset(
    {
        "query ids that are document ids",
        "another split",
        "candidates without scores",
        "candidates of queries that are not evaluated",
        "judged documents outside the run",
    }
)
"""Kinds that are how such sets are published: strict mode lets them pass."""


class Finding(NamedTuple):
    """Something unusual in a set, and what is done about it.

    Attributes:
        kind: What it is, such as "empty documents".
        count: How many.
        examples: The first three ids.
        effect: What was done, for the report.
    """

    kind: str
    count: int  # type: ignore[assignment] # tuple has a method of this name
    examples: tuple[str, ...]
    effect: str

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.kind}: {self.count:,} ({', '.join(self.examples)}{more}); {self.effect}."


def found(kind: str, ids: Sequence[object], effect: str, count: int | None = None) -> list[Finding]:
    """A list of one finding, or of none if there are no ``ids``, which may be the first of ``count``."""
    if not len(ids):
        return []
    return [Finding(kind, len(ids) if count is None else count, tuple(map(str, ids[:EXAMPLES])), effect)]


def report(name: str, findings: Iterable[Finding], *, strict: bool = False) -> None:
    """Say what is unusual, as warnings, mere notes as information; or refuse it.

    Raises:
        FormatError: In strict mode, see :func:`refuse`.
    """
    findings = list(findings)
    if strict:
        refuse(name, findings)
    for finding in findings:
        level = logging.INFO if finding.kind in NOTES else logging.WARNING
        logger.log(level, f"{name}: {finding}")


def refuse(name: str, findings: Iterable[Finding]) -> None:
    """What strict mode does.

    Raises:
        FormatError: If there are findings other than notes, naming the first ids of each.
    """
    refused = [finding for finding in findings if finding.kind not in NOTES]
    if refused:
        listed = "; ".join(
            f"{finding.kind}: {finding.count} ({', '.join(finding.examples)}{', ...' * (finding.count > EXAMPLES)})"
            for finding in refused
        )
        raise FormatError(
            f"{name} is refused by strict mode. {listed}. Mend the files, or leave strict mode: then these are dealt "
            "with as the report says."
        )
