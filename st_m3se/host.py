"""The private parts of sentence-transformers that the losses build on, imported here and nowhere else.

Beside them :func:`st_m3se.packing.pack` asks the host's Transformer where its positions begin.
"""

from __future__ import annotations

try:
    from sentence_transformers.base.losses.gradcache import (
        CachedLossMixin,
        RandContext,
        _validate_mini_batch_num_tokens,
        has_static_embedding_input,
    )
    from sentence_transformers.base.losses.merged_forward import _MERGING_DISABLED, merge_feature_batches
except ImportError as error:
    raise ImportError(
        "st-m3se builds on the gradient caching and column merging of sentence-transformers 6.x, which this version "
        "of sentence-transformers lacks. Install one that has them: pip install 'sentence-transformers>=6.2,<7'."
    ) from error

__all__ = [
    "CachedLossMixin",
    "RandContext",
    "has_static_embedding_input",
    "merge_feature_batches",
    "merging_disabled",
    "validate_mini_batch_num_tokens",
]

merging_disabled = _MERGING_DISABLED.get
validate_mini_batch_num_tokens = _validate_mini_batch_num_tokens
