"""What can be evaluated: BM25, encoders, re-rankers and runs, with names and the options that they depend on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from st_m3se.encoding.positions import check_length
from st_m3se.retrieval.bm25 import BM25
from st_m3se.retrieval.models import EncoderKind, detect_kind, load_encoder, model_configuration, model_kind
from st_m3se.retrieval.teacher import Backend, Precision

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

    Model: TypeAlias = SentenceTransformer | SparseEncoder | MultiVectorEncoder | str | Path
    Judge: TypeAlias = CrossEncoder | SentenceTransformer | Callable[[list[tuple[str, str]]], Any] | str | Path

__all__ = [
    "Encoder",
    "GivenRun",
    "ReRanker",
    "System",
    "file_stem",
    "systems_of",
]

NAME = re.compile(r"\w[\w.+@=,()-]*")  # a folder's name, and one word: the tag of a TREC run


@dataclass(frozen=True)
class Encoder:
    """A bi-encoder, sparse encoder or multi-vector encoder.

    Texts go through ``encode_query`` and ``encode_document``, so with the model's own prompts, and are compared with
    its own similarity.

    Args:
        model: A loaded model, or the name or folder of one.
        kind: "bi-encoder", "sparse encoder" or "multi-vector encoder". None goes by the model's configuration; a plain
            transformers checkpoint is a bi-encoder with mean pooling, as sentence-transformers has it.
        query_prompt: Text in front of each query. None is the model's own.
        document_prompt: Text in front of each document. None is the model's own.
        max_length: Tokens of a text; what is longer is truncated. None is the model's.
        dtype: "float32", "bfloat16" or "float16". None leaves the model as it comes.
        revision: Of a model by name on the hub.
        trust_remote_code: Let a model by name run code of its own.
    """

    model: Model
    kind: EncoderKind | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    max_length: int | None = None
    dtype: Precision | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self, device: str | None = None) -> Any:
        """The model on a device, in evaluation mode, with these options.

        Raises:
            ValueError: If an option does not go with it.
        """
        import torch

        if isinstance(self.model, (str, Path)):
            model = load_encoder(
                str(self.model),
                kind=self.kind,
                device=device,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )
        else:
            model = self.model
            changes = (self.kind, self.query_prompt, self.document_prompt, self.max_length, self.dtype)
            if any(change is not None for change in changes):
                raise ValueError(
                    "kind, prompts, max_length and dtype are for an encoder by name or folder; this one is loaded "
                    "already: set them on the model."
                )
            if device is not None:
                model.to(device)
        if self.max_length is not None:
            if model_kind(model) == "multi-vector":
                raise ValueError(
                    "a multi-vector encoder has a query_length and a document_length, so max_length does not say "
                    "which: load it with the lengths you want, and pass the model."
                )
            check_length(model, self.max_length, "max_length")
            model.max_seq_length = self.max_length
        for task, prompt in (("query", self.query_prompt), ("document", self.document_prompt)):
            if prompt is not None:
                model.prompts = {**model.prompts, task: prompt}
        if self.dtype is not None:
            model.to(getattr(torch, self.dtype))
        return model.eval()


@dataclass(frozen=True)
class ReRanker:
    """A model that puts the first documents of another system's ranking in a new order.

    Documents beyond ``depth`` follow below the re-ranked ones in the first stage's order, so that recall beyond
    ``depth`` is the first stage's.

    Args:
        model: A ``CrossEncoder``, the name or folder of one, or a function that takes a list of (query, document)
            pairs and returns as many numbers.
        first_stage: The name of another system of the same evaluation; of a name with several seeds each is
            re-ranked. None re-ranks the run that the set comes with.
        depth: How many documents of each query to re-rank.
        max_length: Tokens of a pair. None is the model's.
        dtype: As for :func:`~st_m3se.score_candidates`, as are the others.
        prompt: Text in front of each query.
        batch_tokens: Tokens of a batch; it may differ from one call to the next.
        backend: "torch", "onnx" or "openvino".
        revision: Of a model by name on the hub.
        trust_remote_code: Let a model by name run code of its own.
        label: Of a cross-encoder with several labels, the one whose logit is the score, counted from 0.
    """

    model: Judge
    first_stage: str | None = None
    depth: int = 100
    max_length: int | None = None
    dtype: Precision | None = None
    prompt: str | None = None
    batch_tokens: int | None = None
    backend: Backend = "torch"
    revision: str | None = None
    trust_remote_code: bool = False
    label: int | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}.")


@dataclass(frozen=True)
class GivenRun:
    """A ranking that was made elsewhere.

    Args:
        path: A TREC run, another file that ``st-m3se convert`` reads, or a store. ``{set}`` in it stands for the
            set's name. None is the run that the set comes with, as it is.
    """

    path: str | Path | None = None

    def file(self, set_name: str) -> Path:
        """The file for a set."""
        return Path(str(self.path).replace("{set}", set_name))


Source: TypeAlias = "BM25 | Encoder | ReRanker | GivenRun | Model"


class System(NamedTuple):
    """A source under its name. Systems of one group are seeds of one."""

    name: str
    group: str
    source: BM25 | Encoder | ReRanker | GivenRun


def systems_of(systems: Any) -> list[System]:
    """Name what is to be evaluated; first stages come before what re-ranks them.

    Args:
        systems: A mapping from a name to a source or to several, which are seeds of one system: ``NAME-1``, ``NAME-2``,
            ...; or a list of sources, which get the last part of their model's name; or one source. What a source is,
            see :func:`~st_m3se.evaluation.evaluate`.

    Raises:
        ValueError: If two have one name, a name cannot name a folder, or a first stage is missing.
        TypeError: If a source is none of these.
    """
    named: list[System] = []
    if isinstance(systems, Mapping):
        for name, given in systems.items():
            sources = list(given) if isinstance(given, (list, tuple)) else [given]
            if not sources:
                raise ValueError(f"the system {name!r} has no model.")
            for seed, source in enumerate(sources, start=1):
                named.append(System(name if len(sources) == 1 else f"{name}-{seed}", name, _source(source)))
    else:
        several = isinstance(systems, Sequence) and not isinstance(systems, str)
        for given in systems if several else [systems]:
            source = _source(given)
            named.append(System(name := _name(source), name, source))
    if not named:
        raise ValueError('there is no system to evaluate: name one, such as "bm25" or a model.')
    named = _with_first_stages(named)
    for place, system in enumerate(named):
        if not NAME.fullmatch(system.name):
            raise ValueError(
                f"the system name {system.name!r} names a folder and the tag of a run: use letters, digits and . _ - + "
                "only, for example by giving the system a name of its own."
            )
        if system.name in {other.name for other in named[:place]}:
            raise ValueError(
                f"two systems are named {system.name!r}. Give them names of their own; several models under one name "
                "are seeds of one system."
            )
    return named


def check_model(source: BM25 | Encoder | ReRanker | GivenRun) -> None:
    """Look at a model by name or folder without loading it, before others work for hours.

    Raises:
        ValueError: If there is none, or a cross-encoder where an encoder is expected.
    """
    if not isinstance(source, (Encoder, ReRanker)) or not isinstance(source.model, (str, Path)):
        return
    if isinstance(source, Encoder) and source.kind is None:
        detect_kind(str(source.model), revision=source.revision)
    else:
        model_configuration(str(source.model), source.revision)


def file_stem(path: str | Path) -> str:
    """The name of a run or of judgements without the endings that say what they are."""
    return re.sub(r"(\.(run|trec|qrels|txt|tsv|gz|zst|parquet))+$", "", Path(path).name)


def _source(given: Any) -> BM25 | Encoder | ReRanker | GivenRun:
    if isinstance(given, (BM25, Encoder, ReRanker, GivenRun)):
        return given
    if given == "bm25":
        return BM25()
    if given == "candidates":
        return GivenRun()
    if isinstance(given, (str, Path)):
        return Encoder(given)
    if type(given).__name__ == "CrossEncoder":
        raise TypeError("a CrossEncoder cannot search; re-rank with it: ReRanker(model, first_stage=...).")
    if callable(getattr(given, "encode_query", None)):
        return Encoder(given)
    raise TypeError(
        'a system is "bm25", BM25(...), "candidates", an encoder or its name, Encoder(...), ReRanker(...) or '
        f"GivenRun(...), got {given!r:.80}."
    )


def _name(source: BM25 | Encoder | ReRanker | GivenRun) -> str:
    if isinstance(source, BM25):
        return "bm25"
    if isinstance(source, GivenRun):
        return "candidates" if source.path is None else file_stem(source.path)
    model: Any = source.model
    if not isinstance(model, (str, Path)):
        data = getattr(model, "model_card_data", None)
        known = getattr(data, "model_id", None) or getattr(data, "base_model", None)
        own = getattr(model, "__qualname__", type(model).__qualname__)
        model = known or own.replace("<lambda>", "re-ranker").rsplit(".", 1)[-1]
    name = Path(str(model).rstrip("/")).name
    return f"{source.first_stage}+{name}" if isinstance(source, ReRanker) and source.first_stage else name


def _with_first_stages(systems: Sequence[System]) -> list[System]:
    """Re-rankers behind their first stages: one for each seed of the first stage, which are seeds as well."""
    ready: list[System] = []
    waiting = list(systems)
    while waiting:
        pending = {name for each in waiting for name in each[:2]}
        system = next((each for each in waiting if _first_stage(each) not in pending), waiting[0])
        waiting.remove(system)
        stage = _first_stage(system)
        if not isinstance(system.source, ReRanker) or stage is None:
            ready.append(system)
            continue
        stages = [each.name for each in ready if stage in each[:2]]
        if stage in pending or not stages:
            raise ValueError(
                f"{system.name!r} re-ranks {stage!r}, which is no other system here; there are "
                f"{', '.join(each.name for each in ready) or 'none'}."
            )
        for seed, first in enumerate(stages, start=1):
            own = system.name if len(stages) == 1 else f"{system.name}-{seed}"
            ready.append(System(own, system.group, replace(system.source, first_stage=first)))
    return ready


def _first_stage(system: System) -> str | None:
    return system.source.first_stage if isinstance(system.source, ReRanker) else None
