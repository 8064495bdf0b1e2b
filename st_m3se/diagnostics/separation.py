"""How far a scorer separates positives from negatives: densities, margins, overlap and AUC, as functions of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from st_m3se.diagnostics.lists import JudgedLists
from st_m3se.evaluation.significance import resamples

__all__ = [
    "NUMBERS",
    "Estimate",
    "Separation",
    "auc_per_query",
    "bandwidth",
    "list_spread",
    "margins",
    "measure_separation",
    "pooled_auc",
]

NUMBERS = {
    "overlap": "overlap",
    "auc_per_query": "AUC per query",
    "auc_pooled": "AUC pooled",
    "margin_peak": "margin peak",
    "margin_mean": "margin mean",
}
"""The numbers of a scorer, and what tables call them."""

TAIL = 4.0  # bandwidths beyond the last value at which a Gaussian kernel is as good as zero
BINS = (256, 1024)
BINS_PER_BANDWIDTH = 4.0


class Estimate(NamedTuple):
    """A number and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{round(number, 3) + 0.0:.3f}" for number in self)  # without a minus in front of 0
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True, eq=False)
class Separation:
    """What :func:`measure_separation` finds for one scorer.

    Attributes:
        numbers: By name, see :data:`NUMBERS`.
        spread: What the margins are divided by, in the scorer's units, see :func:`list_spread`.
        x: The places of the densities of scores, ``[G]``, in the scorer's units.
        positives: The density of the positives' scores there.
        negatives: That of the negatives' scores.
        margin_x: The places of the margins' density, ``[H]``, in units of the spread.
        margin_density: The density of the normalised margins there; each query has the same weight.
    """

    numbers: dict[str, Estimate]
    spread: float
    x: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    margin_x: np.ndarray
    margin_density: np.ndarray


def measure_separation(
    lists: JudgedLists,
    scores: Mapping[str, np.ndarray],
    *,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Separation]:
    """Densities of scores and of normalised margins, and five numbers with their intervals, for each scorer.

    - **Densities** are Gaussian kernel density estimates of :func:`bandwidth`, each document with the same weight.
      Where the lowest score is exactly 0, as BM25's, what a kernel has below 0 is reflected.
      ``scipy.stats.gaussian_kde`` gives the same to a hundredth of the peak, but would be evaluated anew for each draw;
      here a draw is a sum of curves.
    - **overlap**: ``∫ min(p, n)`` of the two curves: 0 if positives and negatives have no score in common, 1 if alike.
    - **AUC per query**: the share of a query's (positive, negative) pairs in the right order, ties counting half; the
      mean over queries. **AUC pooled**: the same over all pairs, of different queries as well.
    - **Normalised margins**: ``(s_i - s_j) / spread`` for each positive i and negative j of a query, see
      :func:`list_spread`; each query has the same weight. The paper does not publish its normalisation; this one is
      ours. **margin peak** is where their density is highest, **margin mean** their mean.

    Intervals are percentiles over draws of as many queries with replacement, the same for every scorer; spread and
    bandwidths are those of all queries. A draw repeats documents, which pulls similar curves apart, so the draws of the
    overlap are shifted to have the estimate as their mean.

    Args:
        lists: The lists.
        scores: By scorer's name: float ``[N]``, the scores of ``lists.document_ids``.
        n_resamples: Draws for the intervals.
        confidence: What share of the draws lies within.
        seed: For the draws.

    Raises:
        ValueError: If a scorer has another number of scores, or gives all documents of every list the same one.
    """
    if n_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"n_resamples must be at least 1 and confidence between 0 and 1, got {n_resamples}, {confidence}."
        )
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    everyone = np.ones((1, len(lists)))
    found = {}
    for name, given in scores.items():
        scorer = _Scorer(lists, np.asarray(given, np.float64), name)
        draws = [scorer.statistics(counts) for counts in resamples(len(lists), n_resamples, seed, scorer.size)]
        numbers = {}
        for number, (value,) in scorer.statistics(everyone).items():
            drawn = np.concatenate([each[number] for each in draws])
            if number == "overlap":
                drawn = np.clip(drawn + value - drawn.mean(), 0.0, 1.0)
            low, high = np.quantile(drawn, tails)
            numbers[number] = Estimate(float(value), float(min(low, value)), float(max(high, value)))
        positives, negatives, pairs = (curve(everyone)[0] for curve in scorer.curves)
        found[name] = Separation(
            numbers, scorer.spread, scorer.curves[0].x, positives, negatives, scorer.curves[2].x, pairs
        )
    return found


def margins(scores: np.ndarray, positives: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each positive's score minus each negative's of its query: the margins ``[M]``, and the query of each.

    ``scores`` are float ``[N]``, one list after the other, ``positives`` bool ``[N]`` and ``lengths`` int ``[Q]``.
    """
    parts, sizes = [np.zeros(0)], []
    ends = np.cumsum(lengths)
    for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        own, flags = scores[start:end], positives[start:end]
        parts.append(np.subtract.outer(own[flags], own[~flags]).ravel())
        sizes.append(len(parts[-1]))
    return np.concatenate(parts), np.repeat(np.arange(len(lengths)), sizes)


def list_spread(scores: np.ndarray, lengths: np.ndarray) -> float:
    """A scorer's usual range: highest minus lowest score of a list, in the mean over the lists."""
    starts = np.cumsum(lengths) - lengths
    return float((np.maximum.reduceat(scores, starts) - np.minimum.reduceat(scores, starts)).mean())


def auc_per_query(scores: np.ndarray, positives: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each list the share of its pairs that are in the right order, ties counting half: float64 ``[Q]``."""
    values, owner = margins(scores, positives, lengths)
    right = (values > 0) + 0.5 * (values == 0)
    return np.bincount(owner, right, len(lengths)) / np.bincount(owner, minlength=len(lengths))


def pooled_auc(scores: np.ndarray, positives: np.ndarray, owner: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The area under the ROC curve over the documents of all queries, ties counting half: float64 ``[B]``.

    ``scores`` and ``positives`` are ``[N]``, ``owner`` the query of each document, and ``counts`` ``[B, Q]`` how often
    each query counts; a row is one sample of queries.
    """
    order = np.flatnonzero(~positives)[np.argsort(scores[~positives], kind="stable")]
    below = np.zeros((len(counts), len(order) + 1))
    np.cumsum(counts[:, owner[order]], axis=1, out=below[:, 1:])
    # Of the negatives, how many lie below each positive; those that tie, by half.
    places = (np.searchsorted(scores[order], scores[positives], side=side) for side in ("left", "right"))
    ahead = sum(below[:, place] for place in places) / 2
    good = counts[:, owner[positives]]
    return np.asarray((good * ahead).sum(axis=1) / (good.sum(axis=1) * below[:, -1]))


def bandwidth(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Silverman's rule of thumb: ``0.9 min(σ, IQR / 1.349) n^(-1/5)`` (1986, equation 3.31).

    With the interquartile range it does not smooth two modes into one as rules on σ alone do. ``n`` is the effective
    number of values, ``(Σw)² / Σw²``. Where half of the values are equal, σ alone counts.

    Returns:
        The standard deviation of the kernel; 0 if all values are equal.
    """
    weights = np.full(len(values), 1 / len(values)) if weights is None else weights / weights.sum()
    mean = weights @ values
    sigma = float(np.sqrt(weights @ (values - mean) ** 2))
    order = np.argsort(values, kind="stable")
    places = np.cumsum(weights[order]) - weights[order] / 2
    low, high = np.interp((0.25, 0.75), places, values[order])
    width = min(sigma, (high - low) / 1.349) if high > low else sigma
    return float(0.9 * width * (1 / (weights**2).sum()) ** -0.2)


class _Curve:
    """A kernel density estimate as a function of how often each query counts: a sum of one curve a query."""

    def __init__(
        self, values: np.ndarray, owner: np.ndarray, weights: np.ndarray, queries: int, width: float, x: np.ndarray
    ) -> None:
        from scipy.ndimage import gaussian_filter1d

        self.x, self.step = x, float(x[1] - x[0])
        # Each value is shared between its two neighbours on the grid, which keeps the mean and halves the error.
        place = (values - x[0]) / self.step
        left = np.clip(np.floor(place).astype(np.int64), 0, len(x) - 2)
        share, cells = np.clip(place - left, 0.0, 1.0), owner * len(x) + left
        binned = np.bincount(cells, weights * (1 - share), queries * len(x))
        binned += np.bincount(cells + 1, weights * share, queries * len(x))
        self._mass = np.bincount(owner, weights, queries)
        self._curves = gaussian_filter1d(
            binned.reshape(queries, len(x)), width / self.step, axis=1, mode="reflect", truncate=TAIL
        )

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """The densities ``[B, G]`` when the queries count ``[B, Q]`` times."""
        return np.asarray(counts @ self._curves / ((counts @ self._mass)[:, None] * self.step))


class _Scorer:
    """One scorer's statistics as functions of how often each query counts."""

    def __init__(self, lists: JudgedLists, scores: np.ndarray, name: str) -> None:
        if scores.shape != lists.positives.shape:
            raise ValueError(f"{name} has {scores.shape} scores for {lists.positives.shape} documents.")
        self._lists, self._scores = lists, scores
        self.spread = list_spread(scores, lists.lengths)
        if not self.spread > 0:
            raise ValueError(
                f"{name} gives all documents of a list the same score, for every list: there is no margin to look at. "
                "Is it the right model, and were its weights loaded?"
            )
        queries = len(lists)
        values, owner = margins(scores, lists.positives, lists.lengths)
        values = values / self.spread
        weights = 1 / np.bincount(owner, minlength=queries)[owner]
        self._margin_mean = np.bincount(owner, weights * values, queries)
        self._auc = auc_per_query(scores, lists.positives, lists.lengths)
        # Equal values have no bandwidth of their own: they become a narrow peak.
        least = 1e-3 * float(np.ptp(scores))
        parts = [(scores[flags], lists.owner[flags]) for flags in (lists.positives, ~lists.positives)]
        widths = [max(bandwidth(own), least) for own, _ in parts]
        x = _grid(scores, min(widths), max(widths))
        width = max(bandwidth(values, weights), 1e-3 * float(np.ptp(values)), 1e-6)
        self.curves = [
            *(_Curve(*part, np.ones(len(part[0])), queries, own, x) for part, own in zip(parts, widths, strict=True)),
            _Curve(values, owner, weights, queries, width, _grid(values, width, width)),
        ]
        self.size = max(len(scores), BINS[1])

    def statistics(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Each number ``[B]`` when the queries count ``[B, Q]`` times."""
        queries = counts.sum(axis=1)
        positives, negatives, pairs = self.curves
        return {
            "overlap": np.minimum(positives(counts), negatives(counts)).sum(axis=1) * positives.step,
            "auc_per_query": counts @ self._auc / queries,
            "auc_pooled": pooled_auc(self._scores, self._lists.positives, self._lists.owner, counts),
            "margin_peak": pairs.x[pairs(counts).argmax(axis=1)],
            "margin_mean": counts @ self._margin_mean / queries,
        }


def _grid(values: np.ndarray, narrow: float, wide: float) -> np.ndarray:
    """The middles of bins that are a quarter of a bandwidth wide, from below the lowest value to above the highest."""
    low, high = float(values.min()), float(values.max()) + TAIL * wide
    if low != 0:  # else 0 is the lowest there can be, as of BM25: what a kernel has below it is reflected
        low -= TAIL * wide
    bins = int(np.clip(np.ceil((high - low) / narrow * BINS_PER_BANDWIDTH), *BINS))
    edges = np.linspace(low, high, bins + 1)
    return np.asarray((edges[1:] + edges[:-1]) / 2)
