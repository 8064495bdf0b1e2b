"""How long a text may be for a model: learned positions end somewhere, and a longer text ends a run in its middle."""

from __future__ import annotations

from sentence_transformers.base.modules import Transformer
from torch import nn

__all__ = ["check_length", "check_own_lengths", "positions"]

TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
"""What transformers calls a table of learned positions; rotary and relative positions have none, and no end."""


def _end(module: nn.Module) -> int | None:
    ends = []
    for name, table in module.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in TABLES:
            # RoBERTa and its kin count from behind the padding token's, OPT from an offset of its own.
            before = 0 if table.padding_idx is None else table.padding_idx + 1
            ends.append(table.num_embeddings - int(getattr(table, "offset", before)))
    return min(ends, default=None)


def positions(model: nn.Module) -> int | None:
    """The most tokens of a text that a model's learned positions allow, on some route; None where nothing ends."""
    ends = [_end(module) for module in model.modules() if isinstance(module, Transformer)]
    known = [end for end in ends if end is not None]
    return max(known) if known and len(known) == len(ends) else None


def check_length(model: nn.Module, length: int | None, option: str) -> None:
    """Refuse a length that the model's learned positions do not reach.

    Raises:
        ValueError: With the length that fits.
    """
    end = positions(model)
    if length is not None and end is not None and length > end:
        raise ValueError(
            f"{option}={length} is beyond the model's {end} positions: the first text of more tokens than that would "
            f"end the run with an index error. Set {option} to {end} at most, or take a model for longer texts."
        )


def check_own_lengths(model: nn.Module) -> None:
    """Refuse a model whose own lengths are beyond its learned positions.

    Raises:
        ValueError: With the length that fits.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            for option in ("max_seq_length", "query_length", "document_length"):
                check_length(module, getattr(module, option, None), option)
