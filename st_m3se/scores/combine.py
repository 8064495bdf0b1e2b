"""Ensembles: several teachers' scores of the same documents become one store."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from st_m3se.core.errors import FormatError
from st_m3se.scores.calibration import Calibration, calibrate, deviation
from st_m3se.scores.shard import problems
from st_m3se.scores.sigmoid import ScoreRange
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import MANIFEST_FIELDS, TeacherScoresWriter

__all__ = ["Aggregation", "Missing", "combine"]

logger = logging.getLogger(__name__)

Aggregation = Literal["mean", "median", "min"]
Missing = Literal["raise", "drop"]

CHUNK_QUERIES = 4_096
AGGREGATIONS: dict[str, Any] = {"mean": np.mean, "median": np.median, "min": np.min}


def combine(
    stores: Sequence[TeacherScores | str | Path],
    output: str | Path,
    *,
    calibration: Calibration = "z-norm",
    aggregation: Aggregation = "mean",
    spread: float | None = None,
    missing: Missing = "raise",
    max_disagreement: float | None = None,
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> TeacherScores:
    """Combine the scores that several teachers gave to the same documents, in a stream of bounded memory.

    Each teacher's scores are brought to a common scale query by query (:func:`calibrate`), over the documents that
    all stores share, and then aggregated document by document. Queries and documents come in the first store's order;
    it is fastest when the others have the same one.

    The manifest of the result names its ``parents`` with what their own manifests say, and under ``source`` the
    method, the mean disagreement, and what was dropped: scores by ``max_disagreement``, and queries that have no
    document left. Scores that were calibrated have no common zero any more,
    so its ``scale`` is then "margin".

    Args:
        stores: Two or more, open or as paths. Their ids must be of the same types.
        output: The folder of the new store.
        calibration: "z-norm", the default since any two teachers differ in scale, "min-max", "rank", or "none" for
            teachers of one scale.
        aggregation: "mean", "median", or "min" (a document is as good as its harshest teacher says).
        spread: With "z-norm": what one standard deviation becomes. Students learn margins from these numbers, and a
            margin of z-scores is some five times smaller than one of logits; so None takes the mean standard
            deviation of the first store's lists (over the shared documents, and leaving out constant lists), one
            number for the whole store, and the result has the first teacher's units. 1.0 gives plain z-scores.
        missing: What happens with a query or a document that one of the stores lacks: "raise", or "drop" it.
        max_disagreement: Drop the documents whose calibrated scores have a standard deviation over the teachers above
            this. It is in calibrated units, for "z-norm" in standard deviations of a list, before ``spread``; two
            teachers that are one apart have 0.5. Mind that this may drop a positive.
        overwrite: Replace a store that is at ``output``.
        show_progress_bar: Show one, on standard error.

    Returns:
        The new store, opened.

    Raises:
        FormatError: If the stores do not fit together, one is not valid, or nothing is left; the message names the
            store and the first queries or documents. Nothing is left at ``output``.
        FileExistsError: If ``output`` exists and ``overwrite`` is False.

    Example:
        >>> combine(["scores-minilm", "scores-bge"], "scores-both")  # doctest: +SKIP
    """
    for name, value, choices in (
        ("calibration", calibration, get_args(Calibration)),
        ("aggregation", aggregation, get_args(Aggregation)),
        ("missing", missing, get_args(Missing)),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    if spread is not None and (calibration != "z-norm" or not 0 < spread < math.inf):
        raise ValueError(f"spread is a positive number that belongs to z-norm, got {spread!r} with {calibration!r}.")
    if max_disagreement is not None and not max_disagreement >= 0:
        raise ValueError(f"max_disagreement must be at least 0, got {max_disagreement!r}.")
    if len(stores) < 2:
        raise ValueError(f"combine needs at least two stores, got {len(stores)}.")
    opened = [store if isinstance(store, TeacherScores) else TeacherScores.open(store) for store in stores]
    if empty := [str(number) for number, store in enumerate(opened, start=1) if not len(store)]:
        raise FormatError(f"store {' and '.join(empty)} of {len(opened)} is empty: there is nothing to combine.")
    names = [_name(store) for store in opened]
    if len(set(names)) < len(names):
        names = [f"{name} (store {number})" for number, name in enumerate(names, start=1)]
    folder = Path(output).resolve()
    if any(folder in file.resolve().parents for store in opened for file in store.files):
        raise ValueError(f"{output} is one of the stores to combine. Choose another name: it would be lost.")
    if calibration == "none" and aggregation != "mean":
        for name, store in zip(names, opened, strict=True):
            if store.manifest.get("scale") == "margin":
                raise FormatError(
                    f"{name} has margins: only the differences between a query's scores mean anything, and "
                    f"{aggregation} would compare them with other teachers' scores. Calibrate them, or take the mean."
                )
    searches = [name for name, store in zip(names, opened, strict=True) if _is_search(store)]
    if searches:
        logger.warning(
            f"{', '.join(searches)} has the scores of a search for candidates (BM25, a bi-encoder, or ranks that were "
            "merged), which count as much here as a teacher's. For a teacher, name the store of `st-m3se score`; a "
            "bi-encoder can be one there too."
        )
    shared = _shared_queries(opened, names, missing)
    if calibration == "z-norm" and spread is None:
        # Where nothing may be missing, the first store's lists are the shared ones: the others need not be read.
        read = len(opened) if missing == "drop" else 1
        spread = _mean_deviation(_shared_tables(opened[:read], names[:read], shared), names)

    source: dict[str, Any] = {
        "method": "combine",
        "calibration": calibration,
        "aggregation": aggregation,
        "spread": spread,
        "missing": missing,
        "max_disagreement": max_disagreement,
        "mean_disagreement": None,
        "dropped": {"queries": 0, "scores": 0},
    }
    parents = [_parent(store, name, int(shared.sum())) for store, name in zip(opened, names, strict=True)]
    manifest = _manifest(opened, parents, source, calibration)
    spans = [ScoreRange() for _ in opened]
    # source and parents are filled in as the rows pass: the writer takes the manifest down at the end.
    with TeacherScoresWriter(output, manifest=manifest, overwrite=overwrite) as writer:
        total, pairs = 0.0, 0
        for tables in _progress(_shared_tables(opened, names, shared), int(shared.sum()), show_progress_bar):
            lengths, documents, values, unused = _align(tables, names, missing)
            for parent, count in zip(parents, unused, strict=True):
                parent["unused"]["scores"] += count
            for span, row in zip(spans, values, strict=True):
                span.add(np.asarray(row))
            scores = np.stack([calibrate(row, lengths, calibration) for row in values])
            disagreement = scores.std(axis=0)
            total, pairs = total + float(disagreement.sum()), pairs + len(disagreement)
            combined = AGGREGATIONS[aggregation](scores, axis=0) * (1.0 if spread is None else spread)
            kept = np.ones(len(combined), bool) if max_disagreement is None else disagreement <= max_disagreement
            source["dropped"]["scores"] += int(len(kept) - kept.sum())
            source["dropped"]["queries"] += _write(writer, tables[0], lengths, documents, combined, kept)
        if pairs == source["dropped"]["scores"]:
            raise FormatError(
                f"no document is left: {pairs:,} are in all of {', '.join(names)}, and max_disagreement="
                f"{max_disagreement} dropped {source['dropped']['scores']:,}. The mean disagreement is "
                f"{total / max(pairs, 1):.3f}."
            )
        source["mean_disagreement"] = total / pairs
    for name, span, store in zip(names, spans, opened, strict=True):
        if (warning := span.warning(store.manifest)) is not None:
            logger.warning(f"{name}: {warning}")
    return TeacherScores.open(output)


def _name(store: TeacherScores) -> str:
    """The name of the store's folder; the whole path would say more of a machine than of the scores."""
    folders = dict.fromkeys(file.resolve().parent for file in store.files)
    return " + ".join((folder.parent if folder.name == "data" else folder).name for folder in folders)


def _is_search(store: TeacherScores) -> bool:
    source = store.manifest.get("source")
    return store.manifest.get("teacher") is None and isinstance(source, dict) and "candidates" in source


def _parent(store: TeacherScores, name: str, shared: int) -> dict[str, Any]:
    facts = {field: value for field in MANIFEST_FIELDS if (value := store.manifest.get(field)) is not None}
    return {"name": name, "queries": len(store), **facts, "unused": {"queries": len(store) - shared, "scores": 0}}


def _manifest(
    stores: Sequence[TeacherScores], parents: list[dict[str, Any]], source: dict[str, Any], calibration: Calibration
) -> dict[str, Any]:
    teachers = [store.manifest.get("teacher") for store in stores]
    inputs = stores[0].manifest.get("inputs")
    margins = calibration != "none" or any(store.manifest.get("scale") == "margin" for store in stores)
    return {
        "teacher": " + ".join(map(str, teachers)) if all(teachers) else None,
        "inputs": inputs if all(store.manifest.get("inputs") == inputs for store in stores) else None,
        "scale": "margin" if margins else None,
        "source": source,
        "parents": parents,
    }


def _progress(stretches: Iterator[list[pa.Table]], queries: int, show: bool) -> Iterator[list[pa.Table]]:
    with tqdm(total=queries, unit=" queries", desc="Combining", disable=None if show else True) as bar:
        for tables in stretches:
            yield tables
            bar.update(len(tables[0]))


def _shared_queries(stores: Sequence[TeacherScores], names: Sequence[str], missing: Missing) -> np.ndarray:
    """Which of the first store's queries all stores have, in its order.

    Raises:
        FormatError: If ids are of different types, a query has two rows, or with ``missing="raise"`` one is missing.
    """
    for store, name in zip(stores[1:], names[1:], strict=True):
        for what, one, other in zip(("query", "document"), stores[0].id_types, store.id_types, strict=True):
            if one is not other:
                raise FormatError(
                    f"the {what} ids of {names[0]} are {one.__name__} and those of {name} are {other.__name__}: they "
                    "would never match. Convert one: st-m3se convert IN OUT --ids str (or int)."
                )
    ids = [store.query_ids() for store in stores]
    for name, column in zip(names, ids, strict=True):
        if pc.count_distinct(column, mode="all").as_py() != len(column) or column.null_count:
            raise FormatError(f"{name} has a query without an id, or one with two rows; its validate() says which.")
    shared = np.ones(len(ids[0]), dtype=bool)
    for column, name in zip(ids[1:], names[1:], strict=True):
        here = pc.is_in(ids[0], value_set=column)
        if missing == "raise":
            for absent, lacking, having in (
                (ids[0].filter(pc.invert(here)), name, names[0]),
                (column.filter(pc.invert(pc.is_in(column, value_set=ids[0]))), names[0], name),
            ):
                if len(absent):
                    raise FormatError(
                        f"{lacking} lacks {len(absent):,} queries of {having}, the first of them "
                        f"{absent.slice(0, 5).to_pylist()!r:.200}. Score them with each teacher, or "
                        'missing="drop" leaves them out.'
                    )
        shared &= here.to_numpy()
    if not shared.any():
        raise FormatError(f"no query is in all of {', '.join(names)}.")
    return shared


def _mean_deviation(stretches: Iterator[list[pa.Table]], names: Sequence[str]) -> float:
    """The mean standard deviation of the first store's lists of shared documents, of those that are not constant."""
    total, count = 0.0, 0
    for tables in stretches:
        lengths, _, values, _ = _align(tables, names, "drop")
        deviations = deviation(values[0], lengths)
        total, count = total + float(deviations.sum()), count + int((deviations > 0).sum())
    if not count:
        raise FormatError(
            f"every list of {names[0]} is constant, so it has no spread that the result could have. Put another store "
            "first, or choose one: spread=1.0 gives plain z-scores."
        )
    return total / count


def _shared_tables(stores: Sequence[TeacherScores], names: Sequence[str], shared: np.ndarray) -> Iterator[list[Any]]:
    """For a stretch of shared queries, each store's rows of them in the first store's order."""
    start = 0
    for table in stores[0].tables():
        for place in range(0, len(table), CHUNK_QUERIES):
            part = table.slice(place, CHUNK_QUERIES)
            part, start = part.filter(pa.array(shared[start : start + len(part)])), start + len(part)
            if not len(part):
                continue
            query_ids = part.column("query_id").to_pylist()
            tables = [part, *(pa.concat_tables(list(store.select(query_ids).tables())) for store in stores[1:])]
            for each, name in zip(tables, names, strict=True):
                _check(each, name)
            yield tables


def _check(table: pa.Table, name: str) -> None:
    if found := problems(table):
        raise FormatError(f"{name} is not valid: {'; '.join(found)}.")


def _flat(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """All scores of a table in double precision, and the lists' lengths."""
    lists = table.column("scores").combine_chunks()
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    return lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64), lengths


def _align(
    tables: Sequence[pa.Table], names: Sequence[str], missing: Missing
) -> tuple[np.ndarray, pa.Array, np.ndarray, list[int]]:
    """The documents that all tables share, query by query, and each table's scores of them.

    Returns:
        Lengths [Q] and document ids [N] of the shared lists, scores [S, N], and how many scores of each are not used.
    """
    documents = [table.column("document_ids").combine_chunks().flatten() for table in tables]
    flats = [_flat(table) for table in tables]
    values, lengths = [flat[0] for flat in flats], flats[0][1]
    if all(
        np.array_equal(flat[1], lengths) and each.equals(documents[0])
        for flat, each in zip(flats[1:], documents[1:], strict=True)
    ):
        return lengths, documents[0], np.stack(values), [0] * len(tables)
    codes = pa.concat_arrays(documents).dictionary_encode().indices.to_numpy().astype(np.int64)
    codes = np.split(codes, np.cumsum([len(each) for each in documents])[:-1])
    owners = [np.repeat(np.arange(len(lengths)), flat[1]) for flat in flats]
    keys = [owner * (1 << 32) + code for owner, code in zip(owners, codes, strict=True)]  # a pair of query and document
    places, shared = [np.arange(len(keys[0]))], np.ones(len(keys[0]), dtype=bool)
    for number, key in enumerate(keys[1:], start=1):
        order = np.argsort(key)
        found = np.searchsorted(key, keys[0], sorter=order)
        place = order[np.minimum(found, len(key) - 1)] if len(key) else np.zeros(len(keys[0]), dtype=np.int64)
        here = key[place] == keys[0] if len(key) else np.zeros(len(keys[0]), dtype=bool)
        if missing == "raise":
            extra = np.setdiff1d(np.arange(len(key)), place[here])
            for absent, holder, lacking in ((np.flatnonzero(~here), 0, number), (extra, number, 0)):
                if len(absent):
                    query = tables[0].column("query_id")[int(owners[holder][absent[0]])].as_py()
                    document = documents[holder][int(absent[0])].as_py()
                    raise FormatError(
                        f"{names[lacking]} has no score for document {document!r:.80} of query {query!r:.80}, which "
                        f"{names[holder]} has. Score the same candidates with each teacher, or "
                        'missing="drop" leaves such documents out.'
                    )
        places.append(place)
        shared &= here
    kept = np.flatnonzero(shared)
    aligned = np.stack([value[place[kept]] for value, place in zip(values, places, strict=True)])
    unused = [len(value) - len(kept) for value in values]
    return np.bincount(owners[0][kept], minlength=len(lengths)), documents[0].take(pa.array(kept)), aligned, unused


def _write(
    writer: TeacherScoresWriter,
    table: pa.Table,
    lengths: np.ndarray,
    documents: pa.Array,
    scores: np.ndarray,
    kept: np.ndarray,
) -> int:
    """Write the documents that are kept; returns how many queries have none left."""
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[kept], minlength=len(lengths))
    filled = counts > 0
    if filled.any():
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts[filled])]), pa.int32())
        documents = documents if kept.all() else documents.filter(pa.array(kept))
        columns = {
            "query_id": table.column("query_id").filter(pa.array(filled)),
            "document_ids": pa.ListArray.from_arrays(offsets, documents),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[kept].astype(np.float32))),
        }
        writer.write_table(pa.table(columns))
    return int(len(filled) - filled.sum())
