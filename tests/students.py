"""Tiny untrained students of every kind, without dropout, to compare two ways to one gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, T5EncoderModel

WIDTH = 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LAYERS = ["sliding_attention", "full_attention"] * 2
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trunk_config(kind: str, tokenizer: Any, **options: Any) -> Any:
    """The configuration of a small trunk of another architecture."""
    sizes: dict[str, Any] = dict(SIZES)
    if kind == "eurobert":
        sizes |= {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}
    if kind == "distilbert":
        sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if kind in ("t5", "mt5"):
        sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    if kind == "modernbert":
        sizes |= {"local_attention": 8, "num_hidden_layers": 4, "layer_types": LAYERS, "bos_token_id": 2}
    if kind in ("gemma3_text", "qwen3", "qwen2", "llama", "mistral"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    if kind == "gemma3_text":
        sizes |= {"sliding_window": 6, "layer_types": LAYERS[:2], "query_pre_attn_scalar": 16}
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(kind, **(vocabulary | sizes | options))


def untrained(auto: Any, config: Any) -> Any:
    """A trunk of this configuration; the usual small weights would give every text about the same embedding."""
    torch.manual_seed(0)
    trunk = auto(config) if auto is T5EncoderModel else auto.from_config(config)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return trunk


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
