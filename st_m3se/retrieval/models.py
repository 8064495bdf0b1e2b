"""Encoders of sentence-transformers: which kind a model is, how it is loaded, and what it makes of texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "CHUNK",
    "EncoderKind",
    "Kind",
    "check_device",
    "describe_encoder",
    "detect_kind",
    "embed_documents",
    "embed_queries",
    "encode_texts",
    "encoder_kind",
    "encoder_name",
    "encoding_options",
    "load_encoder",
    "model_configuration",
    "model_file",
    "model_kind",
    "take_rows",
]

EncoderKind = Literal["bi-encoder", "sparse encoder", "multi-vector encoder"]

KINDS: dict[str, EncoderKind] = {
    "SentenceTransformer": "bi-encoder",
    "SparseEncoder": "sparse encoder",
    "MultiVectorEncoder": "multi-vector encoder",
    "ColBERT": "multi-vector encoder",  # what PyLate calls it
}
"""What a model's configuration says of its class, and what we call it."""

Kind = Literal["dense", "sparse", "multi-vector"]
"""What the embeddings of the three are."""

CHUNK: dict[Kind, int] = {"dense": 16_384, "sparse": 16_384, "multi-vector": 1_024}
"""Documents whose embeddings are held at a time, where they are not kept."""


def load_encoder(
    name: str,
    *,
    kind: EncoderKind | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model by name or folder as what it is.

    Args:
        name: The name or the folder.
        kind: Of the model. None goes by its configuration, see :func:`detect_kind`.
        device: Where it runs. None is what there is.
        revision: Of a model on the hub.
        trust_remote_code: Let it run code of its own.

    Raises:
        ValueError: If it is a cross-encoder, or there is no such model.
    """
    import sentence_transformers

    check_device(device)
    host = {"sparse encoder": "SparseEncoder", "multi-vector encoder": "MultiVectorEncoder"}
    known = kind or detect_kind(name, revision=revision)
    loader = getattr(sentence_transformers, host.get(known, "SentenceTransformer"))
    return loader(name, device=device, revision=revision, trust_remote_code=trust_remote_code)


def check_device(device: str | None) -> None:
    """Refuse a device that there is not, before anything is loaded for it.

    Raises:
        ValueError: If nothing can be put there.
    """
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without CUDA
        why = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the device {device!r} cannot be used here: {why}. Leave it out (device=...) to take what there is."
        ) from None


def detect_kind(name: str, *, revision: str | None = None) -> EncoderKind:
    """Whether a saved model is a bi-encoder, a sparse or a multi-vector encoder, by its configuration alone.

    What sentence-transformers goes by: ``model_type`` of ``config_sentence_transformers.json``, then the modules of
    ``modules.json``, then the architecture of Stanford's ColBERT. Everything else is a bi-encoder.

    Raises:
        ValueError: If it is a cross-encoder, or there is no such model.
    """
    modules, host, config = model_configuration(name, revision)
    declared, architectures = host.get("model_type"), config.get("architectures") or []
    classifies = modules is None and any(str(each).endswith("ForSequenceClassification") for each in architectures)
    if declared == "CrossEncoder" or (declared is None and classifies):
        raise ValueError(
            f"{name} is a cross-encoder: it scores pairs and cannot search. Re-rank with it (ReRanker, --rerank), or "
            "teach with it (--teacher); what searches is an encoder of single texts."
        )
    if declared is not None and declared not in KINDS:
        raise ValueError(f"{name} says that it is a {declared!r}, which is none of {', '.join(KINDS)}. Say its kind.")
    if declared is not None and declared != "SentenceTransformer":
        return KINDS[declared]
    for module in modules or []:
        if not isinstance(module, dict):
            raise ValueError(f"modules.json of the model {name} is damaged. Save or download it again.")
        for package, kind in (("sparse_encoder", "SparseEncoder"), ("multi_vector_encoder", "MultiVectorEncoder")):
            if f".{package}." in f".{module.get('type', '')}.":
                return KINDS[kind]
    return KINDS["ColBERT" if "HF_ColBERT" in architectures else "SentenceTransformer"]


def model_configuration(name: str, revision: str | None) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """modules.json, config_sentence_transformers.json and config.json of a model."""
    _look_for(name, revision)
    modules, config = (model_file(name, file, revision) for file in ("modules.json", "config.json"))
    if modules is None and config is None:
        raise ValueError(_no_model(name))
    return modules, model_file(name, "config_sentence_transformers.json", revision) or {}, config or {}


def _no_model(name: str) -> str:
    if (Path(name) / "model" / "modules.json").is_file():
        return f"{name} is no model, and holds one: {Path(name) / 'model'}. Name that."
    return (
        f"{name} is no model: there is no folder of this name with modules.json or config.json in it, and nothing "
        "that can be reached on the Hugging Face Hub. Mind the spelling, and the current directory."
    )


def _look_for(name: str, revision: str | None) -> None:
    """Refuse at once a name that the hub has not, or that it cannot be asked for: each file would be tried for long."""
    from huggingface_hub import errors, model_info, try_to_load_from_cache

    files = ("config.json", "modules.json")
    if Path(name).is_dir():
        return
    try:
        if not any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files):
            model_info(name, revision=revision, timeout=10)
    except Exception as error:  # of whichever client: the hub changed its own
        status = getattr(getattr(error, "response", None), "status_code", 404)
        if isinstance(error, errors.OfflineModeIsEnabled) or status not in (401, 404):
            return  # whoever loads it knows more, and fails fast
        raise ValueError(_no_model(name)) from error


def model_file(name: str, file: str, revision: str | None) -> Any:
    """What a JSON file of a model says: of modules.json a list, of any other an object; None where it has none.

    Raises:
        ValueError: If the file is damaged.
    """
    from sentence_transformers.util import load_file_path

    path = load_file_path(name, file, revision=revision)
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, list if file == "modules.json" else dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} of the model {name} is damaged: {error}. Save or download it again.") from error
    return content


def encoder_kind(model: Any) -> EncoderKind:
    """The kind of a model that is loaded.

    Raises:
        TypeError: If it is no encoder.
    """
    names: dict[Kind, EncoderKind] = {
        "dense": "bi-encoder",
        "sparse": "sparse encoder",
        "multi-vector": "multi-vector encoder",
    }
    return names[model_kind(model)]


def encoder_name(model: Any) -> str:
    """What a model calls itself, as far as it knows."""
    data = model.model_card_data
    return str(data.model_id or data.base_model or getattr(model.tokenizer, "name_or_path", "") or "unnamed")


def describe_encoder(model: Any, name: str) -> dict[str, Any]:
    """For the manifest of a run."""
    return {
        "name": name,
        "kind": encoder_kind(model),
        "similarity": str(model.similarity_fn_name),
        "max_length": getattr(model, "max_seq_length", None),
        "prompts": dict(model.prompts),
    }


def embed_queries(
    model: Any,
    queries: Sequence[str],
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    show_progress_bar: bool = False,
) -> Any:
    """The embeddings of queries, by ``encode_query``, on the model's device, as :func:`search` takes them.

    Args:
        model: A SentenceTransformer, SparseEncoder or MultiVectorEncoder.
        queries: Their texts.
        batch_size: Texts that are encoded at once.
        prompt_name: The name of one of the model's prompts. None is what ``encode_query`` takes itself.
        prompt: The prompt itself.
        truncate_dim: The dimension to cut dense embeddings to. None is the model's own.
        show_progress_bar: Show progress.
    """
    kind = model_kind(model)
    encoding = encoding_options(model, kind, "query", prompt_name, prompt, truncate_dim)
    return encode_texts(model.encode_query, list(queries), kind, batch_size, show_progress_bar, encoding)


def embed_documents(
    model: Any,
    documents: Sequence[str],
    *,
    batch_size: int = 32,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    show_progress_bar: bool = False,
) -> Any:
    """The same for documents, by ``encode_document``: a chunk of a corpus that is not kept."""
    kind = model_kind(model)
    encoding = encoding_options(model, kind, "document", prompt_name, prompt, truncate_dim)
    return encode_texts(model.encode_document, list(documents), kind, batch_size, show_progress_bar, encoding)


def take_rows(embeddings: Any, rows: list[int]) -> Any:
    """Some of the embeddings that :func:`embed_queries` or :func:`embed_documents` gave, in this order."""
    import torch

    if isinstance(embeddings, list):
        return [embeddings[row] for row in rows]
    return embeddings.index_select(0, torch.tensor(rows, dtype=torch.int64, device=embeddings.device))


def model_kind(model: Any) -> Kind:
    """The kind of embeddings that a model makes.

    Raises:
        TypeError: If it makes none.
    """
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder

    kinds: tuple[tuple[Any, Kind], ...] = (
        (SparseEncoder, "sparse"),
        (MultiVectorEncoder, "multi-vector"),
        (SentenceTransformer, "dense"),
    )
    for host, kind in kinds:
        if isinstance(model, host):
            return kind
    raise TypeError(
        "the model must be a SentenceTransformer, SparseEncoder or MultiVectorEncoder of sentence-transformers, got "
        f"{type(model).__name__}. A CrossEncoder has no embeddings: it re-ranks."
    )


def encoding_options(
    model: Any, kind: Kind, task: str, prompt_name: str | None, prompt: str | None, truncate_dim: int | None
) -> dict[str, Any]:
    """What ``encode_query`` or ``encode_document`` gets beside the texts."""
    options: dict[str, Any] = {"prompt_name": prompt_name, "prompt": prompt}
    if prompt_name is not None and prompt is None and prompt_name not in model.prompts:
        raise ValueError(f"the model has no prompt {prompt_name!r}; it has {list(model.prompts)}.")
    if kind == "dense":
        options |= {"truncate_dim": truncate_dim}
    elif truncate_dim is not None:
        raise ValueError(f"truncate_dim={truncate_dim} is for dense embeddings; the {task} embeddings here are {kind}.")
    return options


def encode_texts(
    encode: Any, texts: list[str], kind: Kind, batch_size: int, show_progress_bar: bool, options: dict[str, Any]
) -> Any:
    """The embeddings of texts, in the form that a search takes: by ``encode``, a method of the model."""
    tensors = {"convert_to_tensor": True} if kind != "multi-vector" else {}
    return encode(texts, batch_size=batch_size, show_progress_bar=show_progress_bar, **tensors, **options)
