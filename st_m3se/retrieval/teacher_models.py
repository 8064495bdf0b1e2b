"""Cross-encoders, and encoders of each kind, of sentence-transformers as teachers."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.util import batch_to_device
from torch import Tensor

from st_m3se.encoding.host import training_arguments
from st_m3se.encoding.packing import Packed as PackedRows
from st_m3se.encoding.packing import first_tokens_only, packable_pairs
from st_m3se.encoding.positions import check_length, positions
from st_m3se.retrieval.int8 import QUANTISATION, quantised
from st_m3se.retrieval.models import check_device, model_configuration, model_file
from st_m3se.retrieval.teacher import Backend, Pairs, Precision, Scored, Teacher, settings

__all__ = ["BiEncoderTeacher", "CrossEncoderTeacher", "check_saved", "load", "wrap"]

TEACHERS: tuple[Any, ...] = (CrossEncoder, SentenceTransformer, SparseEncoder, MultiVectorEncoder)
logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 1_024, "gpu": 32_768}  # a CPU's caches are small; a GPU has to be filled
FETCH_SECONDS = 2.0  # between two looks at what a device has done: each lets it run dry for a moment
ENCODED = 512  # documents of a bi-encoder between two such looks
KEPT = 2**28  # numbers of embeddings that a teacher keeps from shard to shard: 1 GiB
TOKENISED = 512  # pairs in one call of the tokenizer
UNBOUNDED = 1_000_000  # tokenizers without a maximum length say 1e30
SAMPLE = 1_024  # values of each weight tensor in its fingerprint
FILES = (".onnx", ".onnx_data", ".bin", ".xml")
HEADS = ("ForSequenceClassification", "ForCausalLM")
UNPROMPTED = (
    "the teacher is a language model without a prompt: it scores how likely 'yes' is to follow a query and a document "
    "that nobody asked about, which gives plausible numbers even from a base model. If it is a reranker, give the "
    "prompt that it was trained with (prompt=...), or load a CrossEncoder saved with its prompts and tokens; "
    'prompt="" if it needs none.'
)
HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")


def load(
    name: str | Path,
    *,
    backend: Backend = "torch",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CrossEncoder | SentenceTransformer:
    """Load a cross-encoder or bi-encoder, whichever it is.

    Raises:
        ValueError: If the model is neither: an encoder without a classification head would give random scores, and so
            would an adapter without its head.
        ImportError: If the backend cannot be imported; the message names what failed. Optimum lags behind
            transformers: OpenVINO runs with optimum-intel 2.2 and transformers 5.5, ONNX waits for an optimum-onnx
            later than 0.1.0, which imports names that transformers 5 no longer has.
    """
    check_device(device)
    kind = _kind(str(name), revision)
    if kind is CrossEncoder:
        _check_adapter(str(name), revision, trust_remote_code)
    else:
        logger.warning(
            f"{name} is a {kind.__name__}: its scores are similarities of embeddings, not a cross-encoder's."
        )
    options: dict[str, Any] = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    try:
        model: CrossEncoder | SentenceTransformer = kind(str(name), backend=backend, **options)
        return model
    except Exception as error:  # the host wraps a missing package into a bare Exception
        wrapped = type(error) is Exception and "requires installing" in str(error)
        if not wrapped and not (backend != "torch" and isinstance(error, ImportError)):
            raise
        raise ImportError(
            f"backend={backend!r} cannot be imported: {error.__context__ if wrapped else error}. It needs "
            f'pip install "sentence-transformers[{backend}]", in releases of Optimum and transformers that fit; '
            "Optimum names the transformers that it supports. backend='torch' needs neither."
        ) from error


def _kind(name: str, revision: str | None) -> Any:
    modules, host, config = model_configuration(name, revision)
    kind = host.get("model_type")
    for known in TEACHERS:
        if kind == known.__name__:
            return known
    if kind is not None:
        known_kinds = ", ".join(known.__name__ for known in TEACHERS)
        raise ValueError(f"{name} is a {kind}; a teacher is one of {known_kinds}.")
    if modules is not None:
        return SentenceTransformer
    heads = config.get("architectures") or []
    if not any(head.endswith(HEADS) for head in heads):
        raise ValueError(
            f"{name} is neither a cross-encoder (its architectures are {heads}, without a classification head, so that "
            "its scores would be random) nor a saved SentenceTransformer. Load it yourself and pass the model."
        )
    return CrossEncoder


def check_saved(name: str, *, label: int | None, prompt: str | None, trust_remote_code: bool) -> None:
    """Refuse by its configuration alone what :func:`load` and :func:`wrap` would refuse, before hours of other work.

    Raises:
        ValueError: If it is no teacher, has several labels and none is chosen, or is a language model without a prompt.
    """
    from transformers import AutoConfig

    if _kind(name, None) is not CrossEncoder:
        return
    _check_adapter(name, None, trust_remote_code)
    modules, _, config = model_configuration(name, None)
    heads = config.get("architectures") or []
    if any(head.endswith("ForSequenceClassification") for head in heads):
        _check_label(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).num_labels, label)
    elif modules is None and prompt is None:  # a saved CrossEncoder has modules, and may have a prompt
        raise ValueError(UNPROMPTED)


def _check_label(labels: int, label: int | None) -> None:
    if label is not None and (labels == 1 or not 0 <= label < labels):
        raise ValueError(
            f"label={label} chooses one of several scores of a cross-encoder, from 0 on, and this model gives {labels}."
        )
    if labels != 1 and label is None:
        raise ValueError(
            f"the cross-encoder has {labels} labels, and a teacher gives one score: which of the labels means "
            "relevance is not written in the model. Say it (label=...), or pass a function that combines them."
        )


def _check_adapter(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a LoRA adapter whose base model has no classification head, and which brings none.

    Each load would draw another head, and the scores would be random: ``add_adapter`` of a CrossEncoder saves the
    adapter alone.
    """
    adapter = model_file(name, "adapter_config.json", revision)
    if adapter is None:
        return
    base = adapter.get("base_model_name_or_path")
    if adapter.get("modules_to_save") or not base:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, revision=adapter.get("revision"), trust_remote_code=trust_remote_code)
    heads = config.architectures or []
    if not any(head.endswith(HEADS) for head in heads):
        raise ValueError(
            f"{name} is an adapter of {base}, whose architectures are {heads}, without a classification head, and the "
            "adapter holds none: each load would draw a random one, and other scores. Train it with "
            "LoraConfig(modules_to_save=['classifier']) or the head's name in your model, or on a base that was saved "
            "with its head."
        )


def _warn_of_new_head(model: CrossEncoder) -> None:
    """Name a loaded model whose folder had no classification head, and which no trainer has trained since."""
    saved = getattr(model.config, "architectures", None) or []
    adapters = getattr(model.transformers_model, "peft_config", None) or {}
    kept = any(adapter.modules_to_save for adapter in adapters.values())
    if any(head.endswith(HEADLESS) for head in saved) and not kept and not training_arguments(model):
        logger.warning(
            f"the cross-encoder was loaded from {saved}, without a classification head, so that its head is new: "
            "unless you have trained it since, its scores are random, and another load gives others."
        )


def _check_language_model(model: CrossEncoder, prompt: str | None) -> None:
    """Refuse a language model that is asked nothing: what the host makes of any that is no saved CrossEncoder."""
    heads = [module for module in model if isinstance(module, LogitScore)]
    if not heads:
        return
    if heads[0].true_token_id == heads[0].false_token_id:
        raise ValueError(
            f"the language model's head compares token {heads[0].true_token_id} with itself, so that every score is 0: "
            "its tokenizer has no token for 'yes' or 'no'. Build the CrossEncoder with a LogitScore of its own tokens."
        )
    if prompt is None:
        raise ValueError(UNPROMPTED)


def wrap(
    model: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    max_length: int | None = None,
    dtype: Precision | None = None,
    prompt: str | None = None,
    batch_tokens: int | None = None,
    label: int | None = None,
) -> Teacher:
    """The teacher of a model; the model keeps its own precision, a copy gets the teacher's where they differ."""
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}.")
    labels = model.num_labels if isinstance(model, CrossEncoder) else 1
    _check_label(labels, label)
    if max_length is not None and isinstance(model, MultiVectorEncoder):
        raise ValueError(
            "a multi-vector encoder has a query_length and a document_length, so max_length does not say which: set "
            "them on the model (model[0].document_length), and pass it."
        )
    length = max_length or model.max_seq_length
    if length is None or length > UNBOUNDED:
        raise ValueError("the model's tokenizer knows no maximum length. Say one: max_length=512, for instance.")
    check_length(model, max_length, "max_length")
    if (end := positions(model)) is not None and length > end:  # a tokenizer that does not know its model
        length = max_length = end
    if isinstance(model, CrossEncoder):
        _check_language_model(model, _prompt(model, prompt))
        _warn_of_new_head(model)
    own = getattr(model.config, "_name_or_path", None) if model.config is not None else None
    weights = _weights(model, name)
    found = getattr(model.config, "_commit_hash", None) if model.config is not None else None
    ready, precision = _cast(model, dtype)
    known = settings(
        name or own or type(model).__name__,
        revision=found or revision,
        weights=weights,
        max_length=int(length),
        dtype=precision,
        activation=(f"identity, label {label}" if label is not None else "identity")
        if isinstance(model, CrossEncoder)
        else f"{model.similarity_fn_name} similarity",
        prompt=_prompt(model, prompt) if isinstance(model, CrossEncoder) else prompt,
        backend=model.get_backend(),
        quantisation=QUANTISATION if precision == "int8" else None,
    )
    tokens = batch_tokens or BATCH_TOKENS["cpu" if model.device.type == "cpu" else "gpu"]
    if _is_quantised_by_batch(model, name):
        tokens, known["dtype"] = 1, "dynamic int8, each text alone"
        logger.warning(
            f"the teacher {known['teacher']} is an int8 model that takes the scale of its activations from the whole "
            "batch, so that a score would depend on the pairs beside it, by some tenths of a logit. Its pairs are "
            "scored one by one. A model whose weights alone are quantised may have batches, and so may backend='torch'."
        )
    if isinstance(model, CrossEncoder):
        return CrossEncoderTeacher(ready, known, max_length, tokens, label or 0)
    return BiEncoderTeacher(ready, known, max_length, tokens)


def _prompt(model: CrossEncoder, prompt: str | None) -> str | None:
    """As CrossEncoder.predict has it: the given one, or the model's default."""
    if prompt is not None or model.default_prompt_name is None:
        return prompt
    default: str | None = model.prompts.get(model.default_prompt_name)
    return default


def _cast(model: Any, dtype: Precision | None) -> tuple[Any, str | None]:
    if model.get_backend() != "torch":
        if dtype not in (None, "float32"):
            raise ValueError(f"dtype={dtype!r} is for torch; with other backends the exported file has its precision.")
        return model, None
    if dtype is None:
        # A model that comes in 16 bits was made for these; otherwise bfloat16, whose range is that of float32.
        dtype = "float32"
        if model.device.type == "cuda":
            bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "float16" if model.dtype == torch.float16 or not bfloat16 else "bfloat16"
    if dtype == "int8":
        return quantised(model), dtype
    wanted: torch.dtype = getattr(torch, dtype)
    if any(parameter.is_floating_point() and parameter.dtype != wanted for parameter in model.parameters()):
        model = copy.deepcopy(model).to(wanted)
    return model, dtype


def _weights(model: Any, name: str | None) -> str | None:
    """A fingerprint of weights and tokenizer: evenly spaced values of each tensor, which any training changes."""
    digest = blake2b(digest_size=16)
    state = model.state_dict()
    for key, tensor in sorted(state.items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)].cpu()
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update((sample.double() if sample.is_floating_point() else sample.long()).numpy().tobytes())
    if not state:  # an exported model: its files are what there is
        files = sorted(path for path in Path(name or "").rglob("*") if path.suffix in FILES) if name else []
        if not files:
            return None
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    if isinstance(model, MultiVectorEncoder):  # lengths, expansion and skiplist are part of what it scores
        parts: list[Any] = list(model.children())
        digest.update(repr([part.get_config_dict() for part in parts if hasattr(part, "config_keys")]).encode())
    if (fast := getattr(model.tokenizer, "backend_tokenizer", None)) is not None:
        content = json.loads(fast.to_str())
        digest.update(json.dumps({k: v for k, v in content.items() if k not in ("truncation", "padding")}).encode())
    return digest.hexdigest()


def _is_quantised_by_batch(model: Any, name: str | None) -> bool:
    """Whether an exported model quantises its activations by a scale of the batch: ONNX's DynamicQuantizeLinear."""
    if model.get_backend() != "onnx":
        return False
    loaded = getattr(getattr(getattr(model[0], "auto_model", None), "session", None), "_model_path", None)
    files = [Path(loaded)] if loaded else sorted(Path(name).rglob("*.onnx")) if name else []
    for path in files:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if content.find(b"DynamicQuantizeLinear") >= 0:
                return True
    return False


@dataclass(frozen=True)
class Packed:
    """Tokenised pairs, longest first, one behind the other.

    Attributes:
        order: Which pair stands at each place, ``[pairs]``.
        lengths: Tokens of the pair at each place, ``[pairs]``.
        tokens: By feature, such as ``input_ids``: int32 ``[sum(lengths)]``.
        common: Features that are the same for every batch.
    """

    order: np.ndarray
    lengths: np.ndarray
    tokens: dict[str, np.ndarray]
    common: dict[str, Any]


class CrossEncoderTeacher:
    """The logits of a CrossEncoder, as ``predict`` with an Identity activation gives them, in packed batches.

    ``predict`` sorts by characters, cuts every 32 pairs and tokenises each batch between two forward passes. Here the
    host's own ``preprocess`` tokenises ahead in another thread, without padding; pairs are sorted by tokens, and a
    batch takes as many as fit into ``batch_tokens``. On a CPU, pairs of a model built like BERT run one behind the
    other without padding, as in training; others get padding. A score depends on the pairs beside it by rounding.
    """

    def __init__(
        self, model: CrossEncoder, known: dict[str, Any], max_length: int | None, batch_tokens: int, label: int = 0
    ) -> None:
        if not isinstance(model[0], Transformer):
            raise TypeError(
                f"the cross-encoder begins with a {type(model[0]).__name__}, and what it makes of texts is its own "
                "affair. Pass a function: def teacher(pairs): return model.predict(pairs, activation_fn=Identity())."
            )
        if model.tokenizer is None or model.tokenizer.pad_token_id is None:
            raise ValueError(
                "the cross-encoder's tokenizer has no padding token, which batches of pairs need. Give it one that no "
                "text ends with, and tell the model: model.tokenizer.pad_token = model.tokenizer.eos_token; "
                "model.config.pad_token_id = model.tokenizer.pad_token_id; then pass the model, or save and name it."
            )
        self._model, self._batch_tokens, self._label = model.eval(), batch_tokens, label
        self.settings = known
        text: dict[str, Any] = {"padding": False}
        if max_length is not None:
            text["max_length"] = max_length
        self._processing = {"text": text, "common": {"return_tensors": None}}
        # Flattening (flash attention) would join the pairs of a call; sorted batches have next to no padding anyway.
        model[0].unpad_inputs = False
        self._packable = model.device.type == "cpu" and packable_pairs(model)
        self._offset = model[0]._infer_flatten_position_offset() if self._packable else 0

    def prepare(self, pairs: Pairs) -> Packed:
        """Tokenise, sort and pack."""
        lengths: list[np.ndarray] = []
        tokens: dict[str, list[np.ndarray]] = {}
        common: dict[str, Any] = {}
        for start in range(0, len(pairs), TOKENISED):
            features = self._model.preprocess(
                pairs.texts(start, start + TOKENISED),
                prompt=self.settings["prompt"],
                processing_kwargs=self._processing,
            )
            counts = np.fromiter(map(len, features["input_ids"]), dtype=np.int64, count=len(features["input_ids"]))
            lengths.append(counts)
            for name, values in features.items():
                if not isinstance(values, list):
                    common[name] = values
                elif name != "attention_mask":  # all ones, before there is padding
                    flat = np.fromiter(chain.from_iterable(values), dtype=np.int32, count=int(counts.sum()))
                    tokens.setdefault(name, []).append(flat)
        if not lengths:
            return Packed(np.zeros(0, np.int64), np.zeros(0, np.int64), {}, {})
        counts = np.concatenate(lengths)
        order = np.argsort(-counts, kind="stable")
        sorted_counts = counts[order]
        starts, ends = (np.cumsum(counts) - counts)[order], np.cumsum(sorted_counts)
        places = np.arange(int(counts.sum())) + np.repeat(starts - (ends - sorted_counts), sorted_counts)
        return Packed(
            order, sorted_counts, {name: np.concatenate(parts)[places] for name, parts in tokens.items()}, common
        )

    def score(self, prepared: Packed) -> Scored:
        """Run the batches; a GPU works ahead of this loop, which looks every few seconds for what is there."""
        waiting: list[torch.Tensor] = []
        done, looked = 0, time.monotonic()
        packs = self._packs(prepared)
        start, ends = 0, prepared.lengths.cumsum()
        while start < len(prepared.order):
            token = int(ends[start] - prepared.lengths[start])
            if packs:
                rows = int(np.searchsorted(ends, token + self._batch_tokens, side="right")) - start
            else:
                rows = self._batch_tokens // int(prepared.lengths[start])
            lengths = prepared.lengths[start : start + max(1, rows)]
            features = (self._rows if packs else self._batch)(prepared, lengths, token)
            # Not around the loop: whoever takes the scores must not find himself in another mode or attention.
            with torch.inference_mode(), first_tokens_only(self._model) if packs else nullcontext():
                scores = self._model(batch_to_device(features, self._model.device))["scores"]
                waiting.append(scores.float().reshape(len(lengths), -1)[:, self._label])
            start += len(lengths)
            if start == len(prepared.order) or time.monotonic() - looked > FETCH_SECONDS:
                yield prepared.order[done:start], torch.cat(waiting).cpu().numpy()
                waiting, done, looked = [], start, time.monotonic()

    def _packs(self, prepared: Packed) -> bool:
        """Whether these pairs run without padding: on a CPU, unless one spells out the token that RoBERTa skips."""
        padding = self._offset - 1
        return self._packable and not (padding >= 0 and bool((prepared.tokens["input_ids"] == padding).any()))

    def _rows(self, prepared: Packed, lengths: np.ndarray, token: int) -> dict[str, Any]:
        """The features of a batch without padding."""
        end = token + int(lengths.sum())
        places = np.arange(end - token) - np.repeat(lengths.cumsum() - lengths, lengths) + self._offset
        arrays = {name: values[token:end].astype(np.int64) for name, values in prepared.tokens.items()}
        tokens = {name: torch.from_numpy(array)[None] for name, array in (arrays | {"position_ids": places}).items()}
        return dict(PackedRows(tokens | prepared.common, lengths))

    def _batch(self, prepared: Packed, lengths: np.ndarray, token: int) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        width = int(lengths[0])
        mask = np.arange(width) < lengths[:, None]
        if tokenizer.padding_side == "left":
            mask = mask[:, ::-1]
        features: dict[str, Any] = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        for name, values in prepared.tokens.items():
            padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}.get(name, 0)
            padded = np.full(mask.shape, padding, dtype=np.int64)
            padded[mask] = values[token : token + int(lengths.sum())]
            features[name] = torch.from_numpy(padded)
        return features | prepared.common


class _Embedded:
    """Embeddings of texts, each made once and kept for the shards to come, until there is no more room."""

    def __init__(self, encode: Callable[..., Any], options: dict[str, Any]) -> None:
        self._encode, self._options = encode, options
        self._places: dict[str, int] = {}
        self._kept: Any = None

    def __call__(self, texts: Sequence[str]) -> tuple[Any, np.ndarray]:
        """All that are kept, in single precision, and at which place of them each of these texts is."""
        if self._places and _numbers(self._kept) > KEPT:
            self._places, self._kept = {}, None
        new = [text for text in dict.fromkeys(texts) if text not in self._places]
        if new:
            made = _float(self._encode(new, **self._options))
            if not self._places:
                self._kept = made
            else:
                self._kept = self._kept + made if isinstance(made, list) else torch.cat([self._kept, made])
            self._places.update(zip(new, range(len(self._places), len(self._places) + len(new)), strict=True))
        return self._kept, np.array([self._places[text] for text in texts])


class BiEncoderTeacher:
    """The model's own similarity of dense, sparse or multi-vector embeddings; each distinct text is encoded once."""

    def __init__(
        self, model: SentenceTransformer, known: dict[str, Any], max_length: int | None, batch_tokens: int
    ) -> None:
        self._model, self.settings = model.eval(), known
        options: dict[str, Any] = {"show_progress_bar": False}
        if not isinstance(model, MultiVectorEncoder):  # of which there is a list of tensors, as long as each text
            options["convert_to_tensor"] = True
        options["batch_size"] = max(1, batch_tokens // known["max_length"])
        if max_length is not None:
            options["processing_kwargs"] = {"text": {"max_length": max_length}}
        prompt = {} if known["prompt"] is None else {"prompt": known["prompt"]}
        self._queries = _Embedded(model.encode_query, options | prompt)
        self._documents = _Embedded(model.encode_document, options)

    def prepare(self, pairs: Pairs) -> Pairs:
        """Nothing: ``encode`` sorts and tokenises."""
        return pairs

    def score(self, prepared: Pairs) -> Scored:
        """Encode what is not encoded yet, a few hundred documents at a time, and compare texts pair by pair."""
        if not len(prepared):
            return
        with torch.inference_mode():
            queries, of_query = self._queries(prepared.queries)
        for start in range(0, len(prepared.documents), ENCODED):
            index = prepared.document_index - start
            places = np.flatnonzero((index >= 0) & (index < ENCODED))
            with torch.inference_mode():
                documents, of_document = self._documents(prepared.documents[start : start + ENCODED])
                left = _take(queries, of_query[prepared.query_index[places]])
                right = _take(documents, of_document[index[places]])
                scores = self._model.similarity_pairwise(left, right).float().cpu().numpy()
            yield places, scores


def _numbers(embeddings: Any) -> int:
    """How many numbers embeddings hold."""
    if isinstance(embeddings, list):
        return sum(map(Tensor.numel, embeddings))
    return int(embeddings._nnz() if embeddings.is_sparse else embeddings.numel())


def _float(embeddings: Any) -> Any:
    """In single precision; those of a multi-vector encoder are a list."""
    return [each.float() for each in embeddings] if isinstance(embeddings, list) else embeddings.float()


def _take(embeddings: Any, rows: np.ndarray) -> Any:
    """Some of the embeddings, in this order; sparse ones stay sparse."""
    if isinstance(embeddings, list):
        return [embeddings[row] for row in rows.tolist()]
    return embeddings.index_select(0, torch.tensor(rows, dtype=torch.int64, device=embeddings.device))
