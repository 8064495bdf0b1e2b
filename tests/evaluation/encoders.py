"""Untrained encoders of each kind on the small checkpoint of conftest.py, and the texts of its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import ANSWERS, DIMENSION, PAIRS

QUERIES = {f"q{place}": query for place, (query, _) in enumerate(PAIRS)}
# Twice the same texts: equal scores; an empty one; and ids whose order is not that of the corpus.
CORPUS = (
    {f"d{97 * place % 100}": text for place, text in enumerate(ANSWERS)}
    | {"empty": ""}
    | {f"again{place}": text for place, text in enumerate(reversed(ANSWERS))}
)
KINDS = ("dense", "sparse", "multi-vector")


def make_encoder(kind: str, checkpoint: Path, **options: Any) -> Any:
    """A model of sentence-transformers, the same at each call, without dropout."""
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    torch.manual_seed(0)  # of the head that the checkpoint does not have
    if kind == "sparse":
        modules = [Transformer(str(checkpoint), transformer_task="fill-mask"), SpladePooling("max")]
        model = SparseEncoder(modules=modules, device="cpu", max_active_dims=20, **options)
    elif kind == "multi-vector":
        model = MultiVectorEncoder(modules=[Transformer(str(checkpoint)), MultiVectorMask()], device="cpu", **options)
    else:
        modules = [Transformer(str(checkpoint)), Pooling(DIMENSION, "mean")]
        model = SentenceTransformer(modules=modules, device="cpu", **options)
    return model.eval()
