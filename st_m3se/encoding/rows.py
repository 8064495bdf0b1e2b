"""The rows of a batch's features: which may be picked, which are the same text, and in what order they are encoded.

Which rows are equal and how long they are is found on the CPU, where it takes a millisecond: on a GPU the same is a
dozen small kernels and as many waits for their results.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from st_m3se.encoding.host import merge_feature_batches, merging_disabled
from st_m3se.encoding.packing import Features, Packed, pack, packable

__all__ = [
    "Features",
    "columns_needed",
    "has_tokens",
    "in_order",
    "is_sliceable",
    "merge_columns",
    "slice_rows",
    "why_not_sliceable",
]


def why_not_sliceable(features: Features) -> str | None:
    """What is in the way of picking rows, beside a wrapper loss; None: nothing."""
    mask = features.get("attention_mask")
    if "cu_seq_lens_q" in features:
        return "they are flattened for an attention that needs no padding"
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return "they have no attention mask of one row per text (StaticEmbedding has none)"
    for key, value in features.items():
        if key != "prompt_length" and isinstance(value, Tensor) and (value.ndim == 0 or len(value) != len(mask)):
            return f"{key!r} does not have one row per text (images)"
    return None


def has_tokens(features: Features) -> bool:
    """Whether these features hold one padded row of token ids per text."""
    return "input_ids" in features and why_not_sliceable(features) is None


def is_sliceable(features: Features) -> bool:
    """Whether rows of these features can be picked and reordered: one padded row per text, and nothing else.

    Flattened features (unpadded attention), StaticEmbedding's token stream and images are not, and neither is
    anything while a wrapper loss such as AdaptiveLayerLoss, which hands state on through the feature dict, forbids
    new feature dicts.
    """
    return not merging_disabled() and why_not_sliceable(features) is None


def merge_columns(columns: Sequence[Features]) -> Features | None:
    """Concatenate the features of several columns of ``Q`` texts, column after column.

    Returns:
        The features of ``len(columns) * Q`` rows, or None where the columns cannot be joined or sliced.
    """
    if len(columns) == 1:
        merged: Features | None = columns[0]
    elif not all(is_sliceable(column) for column in columns):
        return None
    else:
        merged = merge_feature_batches(list(columns))
    return merged if merged is not None and is_sliceable(merged) else None


def _distinct(ids: NDArray[np.int64], mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first of each set of rows with equal tokens, however padded, and int64 ``[rows]``: which set a row is of."""
    data = ids[mask].tobytes()
    ends = [0, *(mask.sum(1).cumsum() * ids.itemsize).tolist()]
    sets: dict[bytes, int] = {}
    which = np.array([sets.setdefault(data[begin:end], len(sets)) for begin, end in itertools.pairwise(ends)])
    return np.unique(which, return_index=True)[1], which


def columns_needed(features: Features) -> Tensor:
    """The columns that each row needs, up to its last token: int64 ``[rows]``.

    Left padding counts, as positions are counted from it; and so do the tokens that a query is expanded by, which
    are scored whether or not others attend to them.
    """
    needed: Tensor = features["attention_mask"].bool()
    if "query_expansion_positions" in features:
        needed = needed | features["query_expansion_positions"].bool()
    return (needed * torch.arange(1, needed.shape[1] + 1, device=needed.device)).amax(1)


def in_order(model: nn.Module, features: Features) -> tuple[Features, Tensor]:
    """Keep one of each set of rows with equal tokens, and sort by the columns that they need, up to the last token.

    Args:
        model: The model that is to encode them.
        features: The features of all rows, which :func:`is_sliceable`.

    Returns:
        The features of the ``U`` distinct rows, packed where the model allows it, else padded; and int64 ``[rows]``:
        which of them each row is.
    """
    device = features["attention_mask"].device
    mask = features["attention_mask"].cpu().numpy().astype(bool)
    ids = features["input_ids"].cpu().numpy() if "input_ids" in features else None
    first, which = _distinct(ids, mask) if ids is not None else (np.arange(len(mask)), np.arange(len(mask)))
    widths = columns_needed(features).cpu().numpy()[first]
    order = widths.argsort(kind="stable")
    place = torch.from_numpy(order.argsort()[which]).to(device, non_blocking=True)
    packed = pack(model, features, ids, mask, first[order]) if ids is not None and packable(model, features) else None
    if packed is not None:
        return packed, place
    rows = torch.from_numpy(first[order]).to(device, non_blocking=True)
    taken = {
        key: value[rows] if isinstance(value, Tensor) and key != "prompt_length" else value
        for key, value in features.items()
    }
    return taken, place


def slice_rows(features: Features, begin: int, end: int, width: int | None = None) -> Features:
    """The features of the rows from ``begin`` to ``end``, padded ones cut to ``width`` columns."""
    if isinstance(features, Packed):
        return features.rows(begin, end)
    columns = features["attention_mask"].shape[1]
    return {
        key: value
        if not isinstance(value, Tensor) or key == "prompt_length"
        else value[begin:end, :width]
        if value.ndim > 1 and value.shape[1] == columns
        else value[begin:end]
        for key, value in features.items()
    }
