"""Writers: TREC runs, PyLate's JSON lines, MarginMSE pairs and CSV; packed if the name ends in .gz or .zst."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from st_m3se.core.errors import FormatError
from st_m3se.core.files import atomic_file
from st_m3se.core.ids import Id
from st_m3se.core.scored_list import ScoredList

__all__ = ["WRITERS", "write_csv", "write_marginmse", "write_pylate", "write_run"]

PACKED = {".gz": "gzip", ".zst": "zstd"}
Rows = Iterable[ScoredList]
Qrels = Mapping[Any, Mapping[Any, int]]


@contextmanager
def _output(path: str | Path, overwrite: bool) -> Iterator[TextIO]:
    path = Path(path)
    packed = PACKED.get(path.suffix)
    with atomic_file(path, overwrite=overwrite) as temporary, temporary.open("wb") as raw:
        stream: Any = raw if packed is None else pa.CompressedOutputStream(pa.PythonFile(raw, "w"), packed)
        text = io.TextIOWrapper(io.BufferedWriter(stream), encoding="utf-8", newline="")
        try:
            yield text
        finally:
            # One layer after the other: closing the outermost would close the file before Arrow writes its end.
            buffer = text.detach()
            buffer.flush()
            buffer.detach()
            if packed is not None:
                stream.close()


def write_run(rows: Rows, path: str | Path, *, tag: str = "st-m3se", overwrite: bool = False) -> int:
    """Write a TREC run, ``query Q0 document rank score tag``, each list by falling score; returns the lines.

    Raises:
        FormatError: On an id that holds white space, which a reader would take for two columns.
    """
    if tag.split() != [tag]:
        raise ValueError(f"the tag must be one word, got {tag!r}.")
    count = 0
    with _output(path, overwrite) as file:
        for row in rows:
            query_id = _one_field(row.query_id, _spaced)
            scores = _decimal(row.scores)
            for rank, place in enumerate(np.argsort(-np.asarray(row.scores, dtype=np.float32), kind="stable"), start=1):
                document_id = _one_field(row.document_ids[place], _spaced)
                file.write(f"{query_id} Q0 {document_id} {rank} {scores[place]} {tag}\n")
                count += 1
    return count


def write_pylate(rows: Rows, path: str | Path, *, overwrite: bool = False) -> int:
    """Write ``{"query_id": ..., "document_ids": [...], "scores": [...]}`` per line; returns the lines."""
    count = 0
    with _output(path, overwrite) as file:
        for row in rows:
            ids = json.dumps(row.query_id, ensure_ascii=False), json.dumps(list(row.document_ids), ensure_ascii=False)
            scores = ", ".join(_decimal(row.scores))  # float32 digits; json would write those of a double
            file.write(f'{{"query_id": {ids[0]}, "document_ids": {ids[1]}, "scores": [{scores}]}}\n')
            count += 1
    return count


def write_csv(rows: Rows, path: str | Path, *, overwrite: bool = False) -> int:
    """Write ``query_id,document_id,score`` lines under a header; returns the lines.

    Raises:
        FormatError: On an id with a line break.
    """
    count = 0
    with _output(path, overwrite) as file:
        writer, careful = (
            csv.writer(file, lineterminator="\n"),
            csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL),
        )
        writer.writerow(["query_id", "document_id", "score"])
        for row in rows:
            query_id = _one_field(row.query_id, _line)
            for document_id, score in zip(row.document_ids, _decimal(row.scores), strict=True):
                cells = [query_id, _one_field(document_id, _line), score]
                # Ids that look like formulas are quoted, not changed: they have to be read back.
                (careful if any(cell.startswith(("=", "@")) for cell in cells) else writer).writerow(cells)
                count += 1
    return count


def write_marginmse(rows: Rows, path: str | Path, *, qrels: Qrels, overwrite: bool = False) -> int:
    """Write ``pos_score neg_score query_id positive_id negative_id`` with tabs; returns the lines.

    Every positive is paired with every negative, which is a scored document that ``qrels`` does not call relevant. A
    query without either has no pair and is left out.

    Raises:
        FormatError: On an id with a tab or line break.
    """
    count = 0
    with _output(path, overwrite) as file:
        for row in rows:
            judged = qrels.get(row.query_id, {})
            scores = dict(zip(row.document_ids, _decimal(row.scores), strict=True))
            positives = [document for document in scores if judged.get(document, 0) > 0]
            negatives = [document for document in scores if judged.get(document, 0) <= 0]
            for positive in positives:
                for negative in negatives:
                    ids = "\t".join(_one_field(value, _tabbed) for value in (row.query_id, positive, negative))
                    file.write(f"{scores[positive]}\t{scores[negative]}\t{ids}\n")
                    count += 1
    return count


WRITERS: dict[str, Callable[..., int]] = {
    "trec": write_run,
    "pylate": write_pylate,
    "csv": write_csv,
    "marginmse": write_marginmse,
}


def _decimal(scores: Iterable[float]) -> list[str]:
    """The shortest decimals that give the same float32 again."""
    return [str(score) for score in np.asarray(scores, dtype=np.float32)]


def _spaced(text: str) -> list[str]:
    return text.removeprefix("\ufeff").split()  # at the start of a file it would be a byte order mark


def _line(text: str) -> list[str]:
    return text.replace("\r", "\n").split("\n")


def _tabbed(text: str) -> list[str]:
    return text.replace("\r", "\n").replace("\n", "\t").split("\t")


def _one_field(value: Id, split: Callable[[str], list[str]]) -> str:
    text = str(value)
    if split(text) != [text]:
        raise FormatError(f"the id {text!r:.80} cannot be written in this format: it would be read as two fields.")
    return text
