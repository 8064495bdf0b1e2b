"""The formats in which teacher scores are published, and which of them a file has.

A new format is one :class:`~st_m3se.scores.formats.format.Format` and its entry in :data:`FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.reading import INTEGER, WHOLE
from st_m3se.core.scored_list import is_score
from st_m3se.scores.formats.format import Format, Head
from st_m3se.scores.formats.layouts import COLBERT, FLAGEMBEDDING, HARD_NEGATIVES, RANK_LLM, RANKIFY, TEVATRON, TUPLES
from st_m3se.scores.formats.pairs import GPL, MARGINMSE, MARGINMSE_TEXT, MARGINS
from st_m3se.scores.formats.pickled import SCORE_PICKLE
from st_m3se.scores.formats.runs import ITERATION, RANKING, TREC
from st_m3se.scores.formats.tables import CSV, PARQUET, PYLATE

__all__ = ["FORMATS", "sniff"]

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        *(TREC, PYLATE, CSV, MARGINMSE, MARGINMSE_TEXT, GPL, MARGINS, HARD_NEGATIVES, SCORE_PICKLE, TEVATRON),
        *(FLAGEMBEDDING, COLBERT, RANKING, PARQUET, TUPLES, RANK_LLM, RANKIFY),
    )
}
"""Each format by its name."""

HEADER = ["query-id", "corpus-id", "score"]
JUDGEMENTS = "judgements (to be passed as qrels)"
GRADES = range(5)
QRELS = "these are relevance judgements, not a teacher's scores: pass them as qrels."


def sniff(path: str | Path, columns: Mapping[str, str] | None = None) -> str:
    """Name the format of a file, one of :data:`FORMATS`, by its content; a table if it has the ``columns``.

    Raises:
        FormatError: If it is none that this package knows, or could be two.
    """
    with errors_in(path):
        head = Head.of(Path(path), columns)
        counts = {name: each.matches(head) for name, each in FORMATS.items()}
        if head.lines and counts["csv"] <= len(head.lines):  # more where the user chose the columns
            _refuse_judgements(head.lines, named=bool(counts["csv"]))
        most = max(counts.values())
        names = [name for name, count in counts.items() if count == most and 2 * count >= max(len(head.lines), 1)]
        if len(names) == 1 and names != ["ranking"]:
            return names[0]
        if head.start and not names and head.names is None and head.first is None and not head.lines:
            raise FormatError("this is neither text nor a packed file, Parquet or pickle that is known.")
        if head.names is not None:
            came = f"the names {head.names!r:.200}"
        elif head.lines:
            came = f"lines such as {head.lines[0]!r:.120}"
        else:
            came = "a list that is not [query_id, [document_id, score], ...]"
        raise _unsure(names, came, judgements=names == ["ranking"])  # of three columns, as judgements without a header


def _refuse_judgements(lines: list[str], *, named: bool) -> None:
    """Refuse relevance judgements, and what may be: a fraction is a score, and no grade."""
    if lines[0].split() == HEADER:
        scores = [line.split()[-1] for line in lines[1:]]
        if not any(is_score(score) and not WHOLE.fullmatch(score) for score in scores):
            if all(not is_score(score) or float(score) in GRADES for score in scores):
                raise FormatError(QRELS)
            came = f"the header of judgements and whole numbers such as {', '.join(scores[:3])}"
            raise _unsure(["csv"], came, judgements=True)
    fields = [line.split() for line in lines]
    judged = sum(len(row) == 4 and row[1].lower() in ITERATION and bool(INTEGER.fullmatch(row[3])) for row in fields)
    if not named and 2 * judged > len(lines):
        raise FormatError(QRELS)


def _unsure(names: list[str], came: str, *, judgements: bool = False) -> FormatError:
    could = [name + (f" ({FORMATS[name].meaning})" if FORMATS[name].meaning else "") for name in names]
    could += [JUDGEMENTS] * judgements
    what = f"could be {' or '.join(could)}" if could else "is in no format that is known"
    return FormatError(f"this {what}: it has {came}. Say which format it is (format=...).")
