"""What tells a model from every other, so that embeddings of one are never taken for those of another."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["content_hash", "model_fingerprint"]

EXPORTED = (".onnx", ".onnx_data", ".bin", ".xml")
UNRELATED = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "tokenizer_class"),
    *("dtype", "embedding_dimension"),
)
"""What stands in a configuration without changing an embedding, or follows from the weights: some modules fill the
dimension in when they run for the first time."""
ADAPTER = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
"""What a layer of peft goes by, beside its weights."""


def model_fingerprint(model: Any) -> str:
    """A hash of all in a model that its embeddings depend on, 32 hexadecimal digits.

    These are its weights, every bit of them, with their precision; its modules' classes and settings, such as the
    pooling and the maximum length; the transformer's configuration; the tokenizer; prompts and ``truncate_dim``. Not
    its name or place: the same model is the same wherever it was loaded from.

    Raises:
        ValueError: If the model has no weights in torch (an exported one) and was not loaded from a local folder.
    """
    digest = blake2b(digest_size=16)
    state = model.state_dict()
    for key, value in sorted(state.items()):
        if isinstance(value, Tensor):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:  # what a quantised layer says of itself
            digest.update(_json([key, value]))
    if not state:
        _add_files(digest, model)
    seen: set[int] = set()
    for name, module in model.named_modules():
        described: list[Any] = [name, type(module).__qualname__, module.extra_repr()]
        if hasattr(module, "get_config_dict") and module is not model:
            described.append({key: value for key, value in module.get_config_dict().items() if key not in UNRELATED})
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            described.append({key: value for key, value in config.to_dict().items() if key not in UNRELATED})
        described += [getattr(module, attribute, None) for attribute in ADAPTER]
        digest.update(_json(described))
    tokenizer: Any = getattr(model, "tokenizer", None)
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        content = {
            key: value for key, value in json.loads(fast.to_str()).items() if key not in ("truncation", "padding")
        }
        digest.update(_json(content))
    elif hasattr(tokenizer, "get_vocab"):
        digest.update(_json([type(tokenizer).__qualname__, tokenizer.get_vocab(), tokenizer.special_tokens_map]))
    settings = {
        "max_seq_length": model.max_seq_length,
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "truncate_dim": getattr(model, "truncate_dim", None),
        "max_active_dims": getattr(model, "max_active_dims", None),
        "sides": [getattr(tokenizer, side, None) for side in ("padding_side", "truncation_side")],
    }
    digest.update(_json(settings))
    return digest.hexdigest()


def _add_files(digest: Any, model: Any) -> None:
    """The files of a model that was exported, whose weights torch does not know."""
    name = getattr(model.model_card_data, "base_model", None) or getattr(model.tokenizer, "name_or_path", None)
    files = sorted(path for path in Path(name or "").rglob("*") if path.suffix in EXPORTED) if name else []
    if not files:
        raise ValueError(
            f"nothing tells the weights of this model ({model.get_backend()} backend, {name!r}) from others, so that a "
            "cache of its embeddings could be mistaken for another's. Load it from a local folder."
        )
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)


def content_hash(content: dict[str, Any]) -> str:
    """A hash of settings that JSON can hold, 32 hexadecimal digits: the same in every process."""
    return blake2b(_json(content), digest_size=16).hexdigest()


def _json(content: Any) -> bytes:
    """Content as bytes that are the same in every process: of an object that JSON does not know, its class."""
    return json.dumps(content, sort_keys=True, default=lambda value: type(value).__qualname__).encode()
