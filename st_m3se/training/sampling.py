"""Which of a query's scored documents make its training list: pure functions of numpy arrays."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal, get_args

import numpy as np

from st_m3se.core.ids import Id

__all__ = [
    "SAMPLINGS",
    "Sampling",
    "likely_false_negatives",
    "random_keys",
    "repeated_texts",
    "sample_list",
    "teacher_top",
]

Sampling = Literal["top", "random", "stratified"]
SAMPLINGS: tuple[str, ...] = get_args(Sampling)


# For one list, whenever it is read.


def random_keys(seed: int, epoch: int, query_id: Id, count: int) -> np.ndarray:
    """One random number for each candidate of a query: uint64 ``[count]``.

    They depend on the arguments alone, so that every worker and rank draws the same list, whichever rows it reads and
    in whatever order. The query "7" and the query 7 get different ones. They are raw Philox output, which numpy
    promises to keep.
    """
    key = blake2b(repr((seed, epoch, query_id)).encode("utf-8", "backslashreplace"), digest_size=16).digest()
    keys: np.ndarray = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)
    return keys


def sample_list(
    num_positives: int,
    num_negatives: int,
    keys: np.ndarray,
    *,
    list_size: int | None,
    max_positives: int | None,
    sampling: Sampling,
) -> tuple[np.ndarray, int]:
    """Choose the documents of one list among a query's candidates, positives first, each part by falling teacher score.

    Args:
        num_positives: How many of the candidates, the first ones, are positives; at least 1.
        num_negatives: How many follow; at least 1.
        keys: uint64 ``[num_positives + num_negatives]``, see :func:`random_keys`.
        list_size: The most documents in the list, at least 2; None takes all candidates.
        max_positives: The most positives among them, below ``list_size``; None is no limit of its own. Where there are
            more, they are drawn at random.
        sampling: How negatives are drawn where there are more than fit:

            - "top": those that the teacher scores highest;
            - "random": any, each as likely;
            - "stratified": one from each of as many strata as negatives fit. The strata cut the negatives, in the
              order of their teacher scores, into parts of equal number (to within one), so that the list spans the
              teacher's scores from the highest quantile to the lowest.

    Returns:
        The places of the chosen candidates, ascending, and how many of them are positives.
    """
    room = num_positives + num_negatives if list_size is None else list_size
    positives = _lowest(keys[:num_positives], min(room - 1, num_positives if max_positives is None else max_positives))
    wanted = room - len(positives)
    if wanted >= num_negatives:
        negatives = np.arange(num_negatives)
    elif sampling == "top":
        negatives = np.arange(wanted)
    elif sampling == "random":
        negatives = _lowest(keys[num_positives:], wanted)
    else:
        edges = np.arange(wanted + 1) * num_negatives // wanted
        stratum = np.repeat(np.arange(wanted), np.diff(edges))
        negatives = np.lexsort((keys[num_positives:], stratum))[edges[:-1]]  # the lowest key of each stratum
    return np.concatenate([positives, num_positives + negatives]), len(positives)


def _lowest(keys: np.ndarray, count: int) -> np.ndarray:
    """The places of the ``count`` lowest keys, ascending: a random subset."""
    if count >= len(keys):
        return np.arange(len(keys))
    return np.sort(np.argpartition(keys, count)[:count])


# For all lists at once, when a dataset is built. Each array has one entry per candidate of all queries; ``rows``
# numbers the queries 0, 1, 2 ... and ascends.


def teacher_top(rows: np.ndarray, scores: np.ndarray, top_k: int) -> np.ndarray:
    """True for the ``top_k`` candidates of each query that the teacher scores highest; the first ones on a tie."""
    order = np.lexsort((-scores, rows))
    starts = np.searchsorted(rows, np.arange(rows[-1] + 1 if len(rows) else 0))
    top = np.zeros(len(rows), dtype=bool)
    top[order] = np.arange(len(rows)) - starts[rows] < top_k  # rows[order] is rows: they ascend
    return top


def likely_false_negatives(
    rows: np.ndarray,
    scores: np.ndarray,
    positives: np.ndarray,
    absolute_margin: float | None,
    relative_margin: float | None,
) -> np.ndarray:
    """True for negatives that the teacher scores too near to the query's positives to be trusted as negatives.

    As in :func:`sentence_transformers.util.mine_hard_negatives`: too near is above ``positive - absolute_margin``, or
    above ``positive - |positive| * relative_margin``, where ``positive`` is the query's lowest positive score.
    """
    lowest = np.full(rows[-1] + 1 if len(rows) else 0, np.inf)
    np.minimum.at(lowest, rows[positives], scores[positives])
    near = np.zeros(len(rows), dtype=bool)
    has_positive = np.isfinite(lowest)[rows]
    bounds = np.where(has_positive, lowest[rows], 0.0)
    if absolute_margin is not None:
        near |= scores > bounds - absolute_margin
    if relative_margin is not None:
        near |= scores > bounds - np.abs(bounds) * relative_margin
    near &= has_positive & ~positives
    return near


def repeated_texts(rows: np.ndarray, texts: np.ndarray, scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """True for candidates whose text another candidate of the same query has as well, for all but one of them.

    The one that stays is a positive if there is one, then the one scored highest, then the first.

    Args:
        rows: int ``[n]``.
        texts: int ``[n]``, equal where the texts are equal.
        scores: float ``[n]``, the teacher's.
        positives: bool ``[n]``.
    """
    order = np.lexsort((texts, rows))
    equal = (texts[order][1:] == texts[order][:-1]) & (rows[order][1:] == rows[order][:-1])
    copies = np.zeros(len(rows), dtype=bool)
    if not equal.any():  # the usual case, at the price of one sort
        return copies
    order = np.lexsort((-scores, ~positives, texts, rows))
    copies[order[1:]] = equal
    return copies
