"""Tiny untrained students of every kind, without dropout, to compare two ways to one gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig

WIDTH = 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trunk_config(kind: str, tokenizer: Any, **options: Any) -> Any:
    """The configuration of a small trunk; None where this version of transformers lacks the kind."""
    if kind not in CONFIG_MAPPING:
        return None
    sizes: dict[str, Any] = dict(SIZES)
    if kind == "eurobert":
        sizes |= {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}
    if kind == "distilbert":
        sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(kind, **(sizes | vocabulary | options))


def sparse_student(checkpoint: Path, **options: Any) -> Any:
    """A SPLADE model over the tests' BERT; ``options`` go to its pooling."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    torch.manual_seed(1)  # the head's transform is new
    transformer = Transformer(str(checkpoint), transformer_task="fill-mask", config_kwargs=DROPOUT)
    return SparseEncoder(modules=[transformer, SpladePooling(**options)], device="cpu").train()


def autoencoder_student(checkpoint: Path) -> Any:
    """A CSR model: an autoencoder with few active dimensions over mean-pooled embeddings."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    torch.manual_seed(2)
    transformer = Transformer(str(checkpoint), config_kwargs=DROPOUT)
    encoder = SparseAutoEncoder(input_dim=WIDTH, hidden_dim=64, k=8, k_aux=8)
    return SparseEncoder(modules=[transformer, Pooling(WIDTH, "mean"), encoder], device="cpu").train()


def multi_vector_student(checkpoint: Path, expansion: dict[str, Any] | None = None, **options: Any) -> Any:
    """A ColBERT model that scores no punctuation of documents; ``expansion`` is that of queries."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Normalize

    torch.manual_seed(3)
    transformer = Transformer(str(checkpoint), config_kwargs=DROPOUT, query_expansion=expansion)
    tokens = {"module_input_name": "token_embeddings"}
    dense = Dense(WIDTH, 16, bias=False, activation_function=torch.nn.Identity(), **tokens)
    mask = MultiVectorMask(skiplist_words=[".", ";"])
    return MultiVectorEncoder(modules=[transformer, dense, mask, Normalize(**tokens)], device="cpu", **options).train()
