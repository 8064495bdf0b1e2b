"""Rows without any padding: the tokens of all of them as one sequence, in which attention keeps the rows apart.

What a flash attention package does for sentence-transformers' own unpadded path, here for models that were loaded
without one, on CPUs too: the features take that path's form, with the attention of :mod:`st_m3se.encoding.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SparseAutoEncoder, SpladePooling
from torch import Tensor, nn
from torch.distributed import fsdp

from st_m3se.encoding.attention import NAME, attend, has_kernels
from st_m3se.encoding.logits import max_logits

__all__ = [
    "Features",
    "Packed",
    "attention_apart",
    "first_tokens_only",
    "is_compiled",
    "is_sharded",
    "pack",
    "packable",
    "packable_pairs",
]

Features = dict[str, Any]

# Trunks of transformers in which tokens meet in attention alone, and through the attention interface. Others take
# padded chunks.
BY_PLACE = frozenset(
    {
        "bert",
        "camembert",
        "data2vec-text",
        "distilbert",
        "electra",
        "ernie",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
    }
)
"""Trunks that look up positions, counted from the first column."""
BY_ANGLE = frozenset(
    {
        "eurobert",
        "gemma3_text",
        "jina_embeddings_v3",
        "llama",
        "mistral",
        "modernbert",
        "nomic_bert",
        "qwen2",
        "qwen3",
    }
)
"""Trunks with rotary positions, to which only distances matter: padding may be on the left."""
BY_BIAS = frozenset({"mpnet", "mt5", "t5"})
"""Trunks that add a bias by distance to attention: on a CPU."""
TRUNKS = BY_PLACE | BY_ANGLE | BY_BIAS
LIKE_BERT = frozenset({"bert", "camembert", "data2vec-text", "electra", "ernie", "roberta", "xlm-roberta"})
"""Trunks with BERT's layers, before a head that reads the first token."""
MODELS = (SentenceTransformer, SparseEncoder, MultiVectorEncoder)
AFTER = (Pooling, Dense, Normalize, Dropout, LayerNorm, SpladePooling, SparseAutoEncoder, MultiVectorMask)
"""Modules that work on flattened features or on sentence embeddings."""
OF_TOKENS = ("input_ids", "token_type_ids")
KNOWN_KEYS = frozenset({*OF_TOKENS, "attention_mask", "modality", "prompt_length", "task"})


class Packed(dict[str, Any]):
    """Features of rows as sentence-transformers flattens them for a flash attention.

    Args:
        features: Those of all rows: ``input_ids``, ``position_ids`` and ``token_type_ids`` of shape ``[1, T]``, and
            what is not of tokens.
        lengths: The tokens of each row, on the CPU.
    """

    def __init__(self, features: Features, lengths: NDArray[np.int64]) -> None:
        ends = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        ends = ends.to(features["input_ids"].device, non_blocking=True)
        longest = int(lengths.max(initial=0))
        rows = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        super().__init__(features | rows)
        self.lengths = lengths

    def rows(self, begin: int, end: int) -> Packed:
        """The features of the rows from ``begin`` to ``end``."""
        first = int(self.lengths[:begin].sum())
        last = first + int(self.lengths[begin:end].sum())
        of_tokens = (*OF_TOKENS, "position_ids")
        features = {key: value[:, first:last] if key in of_tokens else value for key, value in self.items()}
        return Packed(features, self.lengths[begin:end])


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has this module."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


FSDP1 = fsdp.FullyShardedDataParallel
FSDP2: type = getattr(fsdp, "FSDPModule", FSDP1)  # since torch 2.6


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed ZeRO-3 has cut the weights, so that all processes meet in each forward pass.

    Of these FSDP2 alone is tested: FSDP1 and DeepSpeed, ZeRO-2 included, need GPUs.
    """
    return any(isinstance(module, (FSDP1, FSDP2)) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _kind(module: nn.Module) -> type:
    """The class of a module, or the one that FSDP2 has made its own of."""
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[0] is FSDP2 else kind


def _unwrapped(model: nn.Module) -> Any:
    """The model in the wrapper that a trainer may have put around it."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _transformer(model: nn.Module) -> Any:
    """The first module of a :func:`packable` model."""
    return next(_unwrapped(model).children())


def _trunk(transformer: Any) -> Any:
    """The model in which tokens meet, without a head."""
    bare = transformer.transformer_task == "feature-extraction"
    return transformer.model if bare else transformer.model.base_model


def packable(model: nn.Module, features: Features) -> bool:
    """Whether the rows of these padded features may be packed, as far as the model and the features' kinds go."""
    plain = _unwrapped(model)
    if _kind(plain) not in MODELS or not {"input_ids", "attention_mask"} <= set(features) <= KNOWN_KEYS:
        return False
    modules: list[Any] = list(plain.children())
    first, *others = modules
    if type(first) not in (Transformer, MLMTransformer) or not all(type(module) in AFTER for module in others):
        return False
    return first.transformer_task in ("feature-extraction", "fill-mask") and _keeps_apart(
        plain, first, features["input_ids"].device
    )


def packable_pairs(model: CrossEncoder) -> bool:
    """Whether the pairs of a cross-encoder may be packed: its head reads each one's first token and nothing else."""
    first, *others = model.children()
    return (
        type(model) is CrossEncoder
        and type(first) is Transformer
        and not others
        and first.transformer_task == "sequence-classification"
        and type(first.model).__name__.endswith("ForSequenceClassification")
        and _keeps_apart(model, first, model.device)
        and _last_meeting(_trunk(first)) is not None
    )


def _keeps_apart(model: nn.Module, first: Any, device: torch.device) -> bool:
    """Whether the attention of a model, which begins with this module, can be replaced by the packed one."""
    whole, config = first.model, first.model.config
    by_bias = config.model_type in BY_BIAS
    autocast = torch.is_autocast_enabled(device.type) and whole.dtype != torch.float64
    return (
        first.backend == "torch"
        and config.model_type in TRUNKS
        and _kind(whole).__module__.startswith("transformers.")
        # MPNet has an attention of its own, which is neither name.
        and (config._attn_implementation == "sdpa" or config.model_type == "mpnet")
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "chunk_size_feed_forward", 0)
        and not config.output_attentions
        and not config.output_hidden_states
        and not (by_bias and device.type != "cpu")
        and has_kernels(config, device, torch.get_autocast_dtype(device.type) if autocast else whole.dtype)
        # Activations that are computed again in the backward pass would be by the model's usual attention.
        and not any(vars(module).get("gradient_checkpointing") for module in whole.modules())
        and not any(map(is_compiled, model.modules()))
    )


def pack(
    model: nn.Module, features: Features, ids: NDArray[np.int64], mask: NDArray[np.bool_], rows: NDArray[np.int64]
) -> Packed | None:
    """Pack rows of features that are :func:`packable`.

    Args:
        model: The model that they are for.
        features: The padded features.
        ids: Their ``input_ids``, on the CPU.
        mask: Their ``attention_mask``, on the CPU.
        rows: Which rows to pack, in order.

    Returns:
        The packed rows, or None where padding is between tokens, or before those of a trunk that counts positions from
        the first column, or where a text spells out the padding token, which RoBERTa skips when it counts them.
    """
    first = _transformer(model)
    offset = first._infer_flatten_position_offset()
    columns = np.arange(mask.shape[1])
    lengths = mask.sum(1)
    begins = mask.argmax(1)
    if first.config.model_type in BY_PLACE and begins.any():
        return None
    inside = (columns >= begins[:, None]) & (columns < (begins + lengths)[:, None])
    if not len(rows) or lengths.min() < 1 or not np.array_equal(mask, inside):
        return None
    if offset > 0 and bool(((ids == offset - 1) & mask).any()):
        return None
    lengths = lengths[rows]
    position = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    device = features["input_ids"].device
    tokens = torch.from_numpy(np.repeat(rows * mask.shape[1] + begins[rows], lengths) + position)
    tokens, position = (array.to(device, non_blocking=True) for array in (tokens, torch.from_numpy(position)))
    packed = {
        key: value.flatten()[tokens].unsqueeze(0) if key in OF_TOKENS else value
        for key, value in features.items()
        if key != "attention_mask"
    }
    return Packed(packed | {"position_ids": (position + offset).unsqueeze(0)}, lengths)


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let an object have another method while in this context."""
    vars(owner)[name] = function
    try:
        yield
    finally:
        del vars(owner)[name]


@contextmanager
def _mpnet_apart(trunk: Any, rows: Features) -> Iterator[None]:
    """Let MPNet's own attention keep the rows apart that ``rows`` tells of, with a bias for the longest only."""

    def bias(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        longest: Tensor = type(encoder).compute_position_bias(encoder, hidden[:, : rows["max_length_q"]])
        return longest

    def attention(layer: Any) -> Callable[..., Any]:
        def forward(hidden: Tensor, mask: Any = None, position_bias: Any = None, **_: Any) -> tuple[Tensor]:
            by_head = (*hidden.shape[:-1], -1, layer.attention_head_size)
            query, key, value = (linear(hidden).view(by_head).transpose(1, 2) for linear in (layer.q, layer.k, layer.v))
            dropout = layer.dropout.p if layer.training else 0.0
            ends: Features = {key: rows[key] for key in ("cu_seq_lens_q", "max_length_q")}
            out = attend(layer, query, key, value, None, dropout, position_bias=position_bias, **ends)[0]
            return (layer.o(out.flatten(2)),)

        return forward

    encoder = trunk.encoder
    with ExitStack() as stack:
        stack.enter_context(_replaced(encoder, "compute_position_bias", bias))
        for layer in encoder.layer:
            attn = layer.attention.attn
            stack.enter_context(_replaced(attn, "forward", attention(attn)))
        yield


@contextmanager
def _t5_apart(trunk: Any, rows: Features) -> Iterator[None]:
    """Let T5 make its bias for the longest of the rows that ``rows`` tells of, not for all of them together."""
    first = trunk.encoder.block[0].layer[0].SelfAttention

    def bias(*_: Any, **options: Any) -> Tensor:
        longest: Tensor = type(first).compute_bias(first, rows["max_length_q"], rows["max_length_q"], **options)
        return longest

    with _replaced(first, "compute_bias", bias):
        yield


def _pools_greatest(transformer: Any, after: list[nn.Module]) -> bool:
    """Whether the logits of a head are made for SPLADE's greatest of each row alone, and by a plain linear layer."""
    if transformer.transformer_task != "fill-mask" or not after or type(after[0]) is not SpladePooling:
        return False
    linear = transformer.model.get_output_embeddings()
    hooks = type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)
    return hooks and after[0].pooling_strategy == "max"


@contextmanager
def _greatest_only(transformer: Any, pooling: Any, rows: Features) -> Iterator[None]:
    """Let a head make the greatest logits of the rows that ``rows`` tells of, and SPLADE's pooling take them as such.

    Its activation only grows, so that the greatest of the activations is that of the greatest.
    """
    linear = transformer.model.get_output_embeddings()

    def greatest(hidden: Tensor) -> Tensor:
        return max_logits(hidden.flatten(0, -2), linear.weight, linear.bias, rows["cu_seq_lens_q"].diff())

    def pool(features: Features) -> Features:
        pooled = features["token_embeddings"].relu().log1p()
        pooled = pooled.log1p() if pooling.activation_function == "log1p_relu" else pooled
        if pooling.embedding_dimension is None:
            pooling.embedding_dimension = pooled.shape[1]
        return features | {"sentence_embedding": pooled}

    with _replaced(linear, "forward", greatest), _replaced(pooling, "forward", pool):
        yield


@contextmanager
def attention_apart(model: nn.Module) -> Iterator[None]:
    """Let the model's attention keep packed rows apart while in this context."""
    transformer, *after = _unwrapped(model).children()
    config, trunk = transformer.model.config, _trunk(transformer)
    rows: Features = {}  # of the piece that the model is given
    with ExitStack() as stack:
        handle = transformer.register_forward_pre_hook(lambda _, args: rows.update(args[0]))
        stack.callback(handle.remove)
        if _pools_greatest(transformer, after):
            stack.enter_context(_greatest_only(transformer, after[0], rows))
        if config.model_type in BY_BIAS:
            stack.enter_context((_mpnet_apart if config.model_type == "mpnet" else _t5_apart)(trunk, rows))
        configs = {id(config): config for module in trunk.modules() if (config := getattr(module, "config", None))}
        for config in configs.values():
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = NAME
        yield


def _last_meeting(trunk: Any) -> nn.Module | None:
    """What comes next when tokens have met for the last time; None where nobody knows."""
    kind = trunk.config.model_type
    if kind in LIKE_BERT:
        last: nn.Module = trunk.encoder.layer[-1].attention.output
        return last
    by_first = kind == "modernbert" and trunk.config.classifier_pooling == "cls"
    return trunk.final_norm if by_first else None


@contextmanager
def first_tokens_only(model: CrossEncoder) -> Iterator[None]:
    """Let a model of :func:`packable_pairs` keep packed pairs apart, and drop what its head does not read.

    After the last attention that is all but the first token of each: three quarters of the last layer's work.
    """
    first = _transformer(model)
    meeting: Any = _last_meeting(_trunk(first))
    rows: Features = {}

    def firsts(_: nn.Module, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        begins = rows["cu_seq_lens_q"][:-1].long()
        return tuple(
            each[0].index_select(0, begins).unsqueeze(1) for each in tokens
        )  # [1, T, width] to [rows, 1, width]

    with attention_apart(model), ExitStack() as stack:
        stack.callback(first.register_forward_pre_hook(lambda _, args: rows.update(args[0])).remove)
        stack.callback(meeting.register_forward_pre_hook(firsts).remove)
        yield
