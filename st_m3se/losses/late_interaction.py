"""Scores of multi-vector students, which compare every token of a query with every token of a document.

Their embeddings are ``[rows, tokens, dim + 1]``: the last number of a token is 1 where it is scored, else 0. So what is
scored goes wherever the embeddings go: through caching, which keeps one tensor per mini-batch, and between processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder import scoring
from sentence_transformers.util import (
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    maxsim,
    mean_maxsim,
)
from torch import Tensor

from st_m3se.encoding.batch import widened

__all__ = ["listed_scores", "score_matrix", "scoreable", "token_similarity"]

logger = logging.getLogger(__name__)

PLAIN = (maxsim, scoring.colbert_scores, scoring.colbert_kd_scores)
MEAN = (mean_maxsim, scoring.mean_colbert_scores, scoring.mean_colbert_kd_scores)
OF_ONE_VECTOR = (cos_sim, dot_score, euclidean_sim, manhattan_sim)
OF_PAIRS = (scoring.colbert_scores_pairwise, scoring.mean_colbert_scores_pairwise, scoring.xtr_scores_pairwise)
Similarity = Callable[..., Tensor]


def token_similarity(loss: str, similarity: Similarity) -> Similarity:
    """The function over all queries and documents that is meant by one for lists or for all.

    Args:
        loss: The name of the loss, for the message.
        similarity: ``maxsim``, ``mean_maxsim``, or a function of
            ``sentence_transformers.multi_vector_encoder.scoring``, those for knowledge distillation (``..._kd_scores``)
            included.

    Returns:
        ``maxsim``, ``mean_maxsim``, or a function like ``colbert_scores``.

    Raises:
        ValueError: If it compares single vectors, or pairs only.
    """
    if similarity in OF_ONE_VECTOR or similarity in OF_PAIRS:
        raise ValueError(
            f"{loss}: the student has an embedding per token, and similarity_fct {similarity.__name__} compares "
            f"{'one vector with another' if similarity in OF_ONE_VECTOR else 'pairs only'}. Leave it None for the "
            "model's own, or take one of sentence_transformers.multi_vector_encoder.scoring, such as colbert_scores."
        )
    if similarity in PLAIN:
        return maxsim
    if similarity in MEAN:
        return mean_maxsim
    if similarity is scoring.xtr_kd_scores:
        return scoring.xtr_scores
    if isinstance(similarity, scoring.XTRKDScores):
        return scoring.XTRScores(similarity.top_k, chunk_elements=similarity.chunk_elements)
    return similarity


def _apart(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings ``[rows, tokens, dim]``, and bool ``[rows, tokens]``: which are scored."""
    return embeddings[:, :, :-1], embeddings[:, :, -1] > 0


@lru_cache(maxsize=1)
def _say_once() -> None:
    logger.warning(
        "A document has no token that is scored: the model's skiplist holds all of them. Such documents are left out of "
        "the lists, as no score of theirs depends on the model."
    )


def scoreable(pieces: Sequence[Tensor], numbers: Tensor | None = None) -> Tensor:
    """Which documents have a token that is scored: bool ``[U]``; ``numbers`` are -1 for padding between processes."""
    has = torch.cat([(piece[:, :, -1] > 0).any(1) for piece in pieces])
    if has.device.type == "cpu" and not (has if numbers is None else has | (numbers < 0)).all():
        _say_once()
    return has


def _best(similarity: Tensor, scored: Tensor) -> Tensor:
    """The greatest over the last dimension of what is scored, 0 where nothing is."""
    lowest = torch.finfo(similarity.dtype).min
    # Not amax: it shares the gradient out between equal ones, and takes longer.
    best = similarity.masked_fill(~scored, lowest).max(-1).values if similarity.shape[-1] else similarity.sum(-1)
    return best.masked_fill(~scored.any(-1), 0.0)


def _counts(mask: Tensor) -> Tensor:
    """The scored tokens of each query, ``[Q]``; 1 for a query without any."""
    return mask.sum(1).clamp(min=1)


def listed_scores(
    queries: Tensor, pieces: Sequence[Tensor], index: Tensor, mask: Tensor, similarity: Similarity
) -> Tensor:
    """MaxSim, or its mean over the query's tokens, of each query with the documents of its own list: ``[Q, D]``.

    Args:
        queries: ``[Q, tokens, dim + 1]``.
        pieces: ``[u, tokens, dim + 1]`` each; together the ``U`` documents.
        index: int64 ``[Q, D]``, documents.
        mask: bool ``[Q, D]``; elsewhere scores are 0.
        similarity: ``maxsim`` or ``mean_maxsim``.
    """
    tokens, counted = _apart(queries)
    begin, places, scores = 0, [], []
    for piece in pieces:
        inside = mask & (index >= begin) & (index < begin + len(piece))
        of_query, place = inside.nonzero(as_tuple=True)
        documents, scored = _apart(piece[index[of_query, place] - begin])
        best = _best(torch.bmm(tokens[of_query], documents.transpose(1, 2)), scored.unsqueeze(1))
        scores.append((best * counted[of_query]).sum(1))
        places.append(of_query * index.shape[1] + place)
        begin += len(piece)
    of_lists = torch.zeros(index.numel(), dtype=queries.dtype, device=queries.device)
    of_lists = of_lists.scatter(0, torch.cat(places), torch.cat(scores)).view(index.shape)
    return of_lists / _counts(counted)[:, None] if similarity is mean_maxsim else of_lists


def score_matrix(queries: Tensor, pieces: Sequence[Tensor], similarity: Similarity) -> Tensor:
    """The scores of every query with every document: ``[Q, U]``.

    Args:
        queries: ``[Q, tokens, dim + 1]``.
        pieces: ``[u, tokens, dim + 1]`` each; together the ``U`` documents.
        similarity: From :func:`token_similarity`.
    """
    tokens, counted = _apart(queries)
    if similarity not in (maxsim, mean_maxsim):  # one for which a document's score may depend on all others
        documents, scored = _apart(widened(pieces))
        masks: dict[str, Any] = {"queries_mask": counted, "documents_mask": scored.unsqueeze(1)}
        return similarity(tokens, documents.unsqueeze(1), **masks)
    columns = []
    for piece in pieces:
        documents, scored = _apart(piece)
        products = torch.unflatten(tokens.flatten(0, 1) @ documents.flatten(0, 1).T, 1, scored.shape)
        best = torch.unflatten(_best(products, scored), 0, counted.shape)  # [Q, tokens, u]
        columns.append((best * counted.unsqueeze(2)).sum(1))
    scores = torch.cat(columns, dim=1)
    return scores / _counts(counted)[:, None] if similarity is mean_maxsim else scores
