"""Ensembles: several teachers' scores of the same documents become one store."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from st_m3se.core.errors import FormatError
from st_m3se.core.ragged import list_array, list_values, offsets, owners
from st_m3se.scores.describe import ScoreRange
from st_m3se.scores.shard import problems
from st_m3se.scores.teacher_scores import TeacherScores
from st_m3se.scores.writer import MANIFEST_FIELDS, TeacherScoresWriter

__all__ = ["Aggregation", "Calibration", "Missing", "calibrate", "combine", "is_search"]

logger = logging.getLogger(__name__)

Calibration = Literal["none", "z-norm", "min-max", "rank", "log-rank", "logit"]
Aggregation = Literal["mean", "median", "min"]
Missing = Literal["raise", "drop"]

CHUNK_QUERIES = 4_096
ALONE = ("log-rank", "logit")  # calibrations that make scores of what is none, for which one store is enough
LEAST = 1e-7  # probability, and as much from 1: float32 has none between 1 - 6e-8 and 1
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
    it is fastest when the others have the same one. The manifest names the ``parents``, and under ``source`` the
    method, the mean disagreement and what was dropped; scores that were calibrated have the ``scale`` "margin".

    Args:
        stores: Two or more, open or as paths. Their ids must be of the same types. One is enough with
            "log-rank" and "logit", which make scores of an order and of probabilities.
        output: The folder of the new store.
        calibration: "z-norm", the default since any two teachers differ in scale, "min-max", "rank", "log-rank",
            "logit", or "none" for teachers of one scale.
        aggregation: "mean", "median", or "min" (a document is as good as its harshest teacher says).
        spread: With "z-norm": what one standard deviation becomes. Students learn margins from these numbers, and those
            of z-scores are some five times smaller than those of logits: None takes the mean standard deviation of the
            first store's lists that are not constant, so that the result has the first teacher's units.
        missing: What happens with a query or a document that one of the stores lacks: "raise", or "drop" it.
        max_disagreement: Drop the documents whose calibrated scores have a standard deviation over the teachers above
            this, before ``spread``; two teachers that are one apart have 0.5. Mind that this may drop a positive.
        overwrite: Replace a store that is at ``output``.
        show_progress_bar: Show one, on standard error.

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
    if len(stores) < (1 if calibration in ALONE else 2):
        raise ValueError(f"combine needs at least two stores, with {' and '.join(ALONE)} one, got {len(stores)}.")
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
    searches = [name for name, store in zip(names, opened, strict=True) if is_search(store)]
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
    parents: list[dict[str, Any]] = [
        {
            "name": name,
            "queries": len(store),
            **{field: store.manifest[field] for field in MANIFEST_FIELDS if store.manifest.get(field) is not None},
            "unused": {"queries": len(store) - int(shared.sum()), "scores": 0},
        }
        for store, name in zip(opened, names, strict=True)
    ]
    manifest = _manifest(opened, parents, source, calibration)
    spans = [ScoreRange() for _ in opened]
    # source and parents are filled in as the rows pass: the writer takes the manifest down at the end.
    with (
        TeacherScoresWriter(output, manifest=manifest, overwrite=overwrite) as writer,
        tqdm(total=shared.sum(), unit=" queries", desc="Combining", disable=None if show_progress_bar else True) as bar,
    ):
        total, pairs, dropped = 0.0, 0, source["dropped"]
        for tables in _shared_tables(opened, names, shared):
            lengths, documents, values, unused = _align(tables, names, missing)
            for parent, count, span, row in zip(parents, unused, spans, values, strict=True):
                parent["unused"]["scores"] += count
                span.add(row)
            scores = np.stack([calibrate(row, lengths, calibration) for row in values])
            disagreement = scores.std(axis=0)
            total, pairs = total + float(disagreement.sum()), pairs + len(disagreement)
            combined = AGGREGATIONS[aggregation](scores, axis=0) * (1.0 if spread is None else spread)
            kept = np.ones(len(combined), bool) if max_disagreement is None else disagreement <= max_disagreement
            counts = np.bincount(owners(lengths)[kept], minlength=len(lengths))
            dropped["scores"] += int((~kept).sum())
            dropped["queries"] += int((counts == 0).sum())
            if kept.any():
                columns = {
                    "query_id": tables[0].column("query_id").filter(pa.array(counts > 0)),
                    "document_ids": list_array(documents.filter(pa.array(kept)), counts[counts > 0]),
                    "scores": list_array(combined[kept].astype(np.float32), counts[counts > 0]),
                }
                writer.write_table(pa.table(columns))
            bar.update(len(tables[0]))
        if pairs == dropped["scores"]:
            raise FormatError(
                f"no document is left: {pairs:,} are in all of {', '.join(names)}, and max_disagreement="
                f"{max_disagreement} dropped {dropped['scores']:,}. The mean disagreement is "
                f"{total / max(pairs, 1):.3f}."
            )
        source["mean_disagreement"] = total / pairs
    for name, span, store in zip(names, spans, opened, strict=True):
        if calibration != "logit" and (warning := span.warning(store.manifest)) is not None:
            logger.warning(f"{name}: {warning}")
    return TeacherScores.open(output)


def _name(store: TeacherScores) -> str:
    """The name of the store's folder; the whole path would say more of a machine than of the scores."""
    folders = dict.fromkeys(file.resolve().parent for file in store.files)
    return " + ".join((folder.parent if folder.name == "data" else folder).name for folder in folders)


def is_search(store: TeacherScores) -> bool:
    """Whether a store holds what a search for candidates gave, and no teacher's scores."""
    source = store.manifest.get("source")
    return store.manifest.get("teacher") is None and isinstance(source, dict) and "candidates" in source


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
        deviations = _deviations(values[0], lengths)
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
                if found := problems(each):
                    raise FormatError(f"{name} is not valid: {'; '.join(found)}.")
            yield tables


def _align(
    tables: Sequence[pa.Table], names: Sequence[str], missing: Missing
) -> tuple[np.ndarray, pa.Array, np.ndarray, list[int]]:
    """The documents that all tables share, query by query, and each table's scores of them.

    Returns:
        Lengths [Q] and document ids [N] of the shared lists, scores [S, N], and how many scores of each are not used.
    """
    documents = [table.column("document_ids").combine_chunks().flatten() for table in tables]
    values, lengths = zip(*(list_values(table, "scores") for table in tables), strict=True)
    wide = [each.astype(np.float64) for each in values]
    same = (each.equals(documents[0]) for each in documents)
    if all(np.array_equal(each, lengths[0]) for each in lengths) and all(same):
        return lengths[0], documents[0], np.stack(wide), [0] * len(tables)
    codes = pa.concat_arrays(documents).dictionary_encode().indices.to_numpy().astype(np.int64)
    codes = np.split(codes, offsets([len(each) for each in documents])[1:-1])
    keys = [owners(each) * (1 << 32) + code for each, code in zip(lengths, codes, strict=True)]  # query and document
    shared = reduce(np.intersect1d, keys)
    for holder, key in enumerate(keys if missing == "raise" else ()):
        if len(absent := np.flatnonzero(~np.isin(key, shared))):
            place = int(absent[0])
            query = tables[0].column("query_id")[int(key[place] >> 32)].as_py()
            lacking = next(name for name, other in zip(names, keys, strict=True) if key[place] not in other)
            raise FormatError(
                f"{lacking} has no score for document {documents[holder][place].as_py()!r:.80} of query "
                f"{query!r:.80}, which {names[holder]} has. Score the same candidates with each teacher, or "
                'missing="drop" leaves such documents out.'
            )
    kept = np.flatnonzero(np.isin(keys[0], shared))
    orders = [np.argsort(key) for key in keys]
    places = [order[np.searchsorted(key, keys[0][kept], sorter=order)] for key, order in zip(keys, orders, strict=True)]
    aligned = np.stack([each[place] for each, place in zip(wide, places, strict=True)])
    counts = np.bincount(owners(lengths[0])[kept], minlength=len(lengths[0]))
    return counts, documents[0].take(pa.array(kept)), aligned, [len(each) - len(kept) for each in values]


def calibrate(scores: np.ndarray, lengths: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Bring each query's scores to a scale that teachers share: float64 ``[N]``.

    * "none": as they are.
    * "z-norm": minus their mean, divided by their standard deviation (the population's); 0 where all are equal.
    * "min-max": the lowest becomes 0, the highest 1; 0.5 where all are equal.
    * "rank": the ranks, evenly spaced from 0 for the lowest to 1 for the highest; equal scores share their mean rank.
    * "log-rank": minus the logarithm of the rank, 1 for the best. Of this, softmax makes ``1 / rank``: a distribution
      that can be learned from a teacher that gives an order and no scores, such as a language model that sorts.
    * "logit": the logarithm of the odds of a probability, the logit that a cross-encoder's sigmoid was taken of; within
      16 of 0, since probabilities that were rounded to 0 or 1 do not tell.

    Args:
        scores: All queries' scores, one list after the other, shape [N].
        lengths: The lists' lengths, shape [Q]; they sum to N.
        calibration: The scale.

    Raises:
        ValueError: If "logit" meets a score that is no probability.
    """
    values = np.asarray(scores, dtype=np.float64)
    lengths = np.asarray(lengths)
    lengths = lengths[lengths > 0]
    if calibration == "none" or not len(lengths):
        return values
    if calibration == "logit":
        if values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"logit is for probabilities, from 0 to 1, and the scores are {values.min():g} to {values.max():g}. "
                "Raw logits need none."
            )
        values = values.clip(LEAST, 1 - LEAST)
        return np.log(values) - np.log1p(-values)
    owner, starts = owners(lengths), offsets(lengths)[:-1]
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    constant = (low == high)[owner]
    if calibration == "z-norm":
        mean, spread = _moments(values, lengths, owner)
        return np.where(constant, 0.0, (values - mean[owner]) / np.where(constant, 1.0, spread[owner]))
    if calibration == "min-max":
        return np.where(constant, 0.5, (values - low[owner]) / np.where(constant, 1.0, (high - low)[owner]))
    order = np.lexsort((values, owner))
    ordered = values[order]  # by owner first, so the owner of each is still `owner`
    new = np.append(True, (ordered[1:] != ordered[:-1]) | (owner[1:] != owner[:-1]))
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(values)) - 1
    places = ((first + last) / 2)[np.cumsum(new) - 1] - starts[owner]
    ranks: np.ndarray = np.empty(len(values))
    ranks[order] = places
    if calibration == "log-rank":
        return np.asarray(-np.log(lengths[owner] - ranks))
    return np.where(constant, 0.5, ranks / np.maximum(lengths - 1, 1)[owner])


def _deviations(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The standard deviation (the population's) of each list that is not empty, in order."""
    lengths = lengths[lengths > 0]
    return _moments(scores, lengths, owners(lengths))[1]


def _moments(values: np.ndarray, lengths: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each list; none is empty."""
    mean = np.bincount(owner, values, len(lengths)) / lengths
    return mean, np.sqrt(np.bincount(owner, (values - mean[owner]) ** 2, len(lengths)) / lengths)
