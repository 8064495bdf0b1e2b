"""Stops a training before numbers that are not finite reach the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

__all__ = ["LARGEST_SCORE", "require_finite"]

LARGEST_SCORE = 1e16
"""Of a teacher: sums of squared margins stay far from the end of float32, about 3e38. Real logits stay below 1e3."""


def require_finite(
    loss: Tensor, queries: Tensor, documents: Sequence[Tensor], teacher_scores: Tensor, name: str, batch: int
) -> None:
    """Refuse a loss that is not finite, and watch its gradient: the trainer logs over the first and misses the second.

    Args:
        loss: A scalar.
        queries: Their embeddings ``[Q, ...]``, whose gradient is looked at as soon as it is there.
        documents: Likewise, in pieces; together ``[U, ...]``.
        teacher_scores: ``[Q, D]``.
        name: The loss's name.
        batch: Its number, from 1.

    Raises:
        ValueError: Naming the batch, and what is not finite in which rows; from ``backward`` if it is the gradient.
    """

    def check(values: Tensor, what: str, begin: int = 0) -> None:
        finite = values.detach().isfinite()
        if bool(finite.all()):
            return
        rows = (begin + (~finite.reshape(len(values), -1).all(1)).nonzero().flatten()).tolist() if values.ndim else []
        known = teacher_scores[teacher_scores.isfinite()]
        span = f", teacher scores {float(known.min()):.4g} to {float(known.max()):.4g}" if len(known) else ""
        raise ValueError(
            f"{name}: {what} not finite in batch {batch} of this training (row(s) {rows or 'unknown'}{span}). The "
            "weights would become NaN, and every later step would train nothing. If the embeddings themselves are not "
            "finite, the step before was too large: lower the learning rate or the loss's scale, or train in bfloat16 "
            "or float32 instead of float16. Go on from the last checkpoint."
        )

    def pieces() -> Iterator[tuple[str, Tensor, int]]:
        yield "queries", queries, 0
        begin = 0
        for piece in documents:
            yield "documents", piece, begin
            begin += len(piece)

    if not bool(loss.detach().isfinite()):
        for kind, embeddings, begin in pieces():
            check(embeddings, f"the embeddings of the {kind} are", begin)
        check(loss, "the loss is")
    for kind, embeddings, begin in pieces():
        if embeddings.requires_grad:
            watch = partial(check, what=f"the gradient of the {kind}' embeddings is", begin=begin)
            embeddings.register_hook(watch)  # type: ignore[no-untyped-call]
