"""Retrieval measures during training."""

from __future__ import annotations

from sentence_transformers.base.evaluation import BaseEvaluator

__all__ = ["RetrievalEvaluator"]


class RetrievalEvaluator(BaseEvaluator):
    """Search a corpus with a model and log the measures, in the trainer or alone.

    ``RetrievalEvaluator(source, *, measures=("nDCG@10", "RR@10", "R@100", "AP"), depth=100, name="", split="test",
    batch_size=32, chunk_size=16_384, exclude_same_id=True, show_progress_bar=False, write_csv=True, truncate_dim=None,
    query_prompt=None, corpus_prompt=None)``; ``source`` is a BEIR folder or an ``EvaluationSet``.
    """
