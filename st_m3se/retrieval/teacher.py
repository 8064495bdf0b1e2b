"""Teachers: what gives a score to pairs of a query and a document."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

__all__ = ["Backend", "CallableTeacher", "Pairs", "Precision", "Teacher", "as_teacher"]

Backend = Literal["torch", "onnx", "openvino"]
Precision = Literal["float32", "bfloat16", "float16", "int8"]
Score = Callable[[list[tuple[str, str]]], Any]

Scored = Iterator[tuple[Any, np.ndarray]]
"""Scores as they are done, float32, each time with the places of their pairs: a slice, or int ``[pairs]``."""

PAIRS = 512  # what a callable gets at once, at most: what a call that fails costs


@dataclass(frozen=True)
class Pairs:
    """The pairs of a shard: its distinct texts and, for each pair, which two they are.

    Attributes:
        queries: Distinct queries.
        documents: Distinct documents.
        query_index: int ``[pairs]``, into ``queries``.
        document_index: int ``[pairs]``, into ``documents``.
    """

    queries: Sequence[str]
    documents: Sequence[str]
    query_index: np.ndarray
    document_index: np.ndarray

    def __len__(self) -> int:
        return len(self.query_index)

    def texts(self, start: int = 0, stop: int | None = None) -> list[tuple[str, str]]:
        """The pairs from ``start`` to ``stop`` as (query, document)."""
        queries, documents = self.queries, self.documents
        return [
            (queries[query], documents[document])
            for query, document in zip(
                self.query_index[start:stop].tolist(), self.document_index[start:stop].tolist(), strict=True
            )
        ]


class Teacher(Protocol):
    """Something that scores pairs, in two steps, so that the first overlaps with the second of the shard before.

    Attributes:
        settings: All that its scores depend on, as JSON holds it: "teacher", "revision", "weights" (a fingerprint),
            "max_length", "dtype", "activation", "prompt", "backend". Runs with other settings are other runs.
    """

    settings: dict[str, Any]

    def prepare(self, pairs: Pairs) -> Any:
        """What can be done ahead, in another thread: tokenise, sort, pack."""

    def score(self, prepared: Any) -> Scored:
        """The raw scores, a part at a time: what came is kept if the rest fails."""


class CallableTeacher:
    """Any function of a list of (query, document) pairs that returns as many numbers.

    Args:
        function: Called from one thread, with up to 512 pairs at a time in the order of the candidates.
        name: What the manifest calls it. None takes the function's own name. As there is nothing else to tell one
            function from another, change the name when the function changes.
    """

    def __init__(self, function: Score, name: str | None = None) -> None:
        self._function = function
        if name is None:
            own = getattr(function, "__qualname__", None) or type(function).__qualname__
            if "<lambda>" in own or own == "partial":
                raise ValueError(
                    "a teacher that is a lambda or a partial has no name, and without one a changed teacher cannot be "
                    'told from the one that a run was begun with: pass name="...".'
                )
            name = f"{getattr(function, '__module__', None) or type(function).__module__}.{own}"
        self.settings: dict[str, Any] = settings(name, backend="callable")

    def prepare(self, pairs: Pairs) -> list[list[tuple[str, str]]]:
        """The texts of the pairs."""
        return [pairs.texts(start, start + PAIRS) for start in range(0, len(pairs), PAIRS)]

    def score(self, prepared: list[list[tuple[str, str]]]) -> Scored:
        """Call the function and check what it returns."""
        start = 0
        for texts in prepared:
            scores = as_scores(self._function(texts), len(texts), self.settings["teacher"])
            yield slice(start, start + len(texts)), scores
            start += len(texts)


def as_scores(given: Any, count: int, teacher: str) -> np.ndarray:
    """What a function returned as float32 ``[count]``.

    Raises:
        ValueError: If it is anything else.
    """
    if hasattr(given, "detach"):
        given = given.detach().float().cpu()
    try:
        scores = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the teacher {teacher} must return numbers: {error}") from error
    if scores.shape != (count,):
        raise ValueError(
            f"the teacher {teacher} must return one number for each of {count} pairs, shape ({count},), got shape "
            f"{scores.shape}."
        )
    return scores


def settings(
    teacher: str,
    *,
    revision: str | None = None,
    weights: str | None = None,
    max_length: int | None = None,
    dtype: str | None = None,
    activation: str | None = None,
    prompt: str | None = None,
    backend: str = "torch",
    quantisation: str | None = None,
) -> dict[str, Any]:
    """What the scores of a teacher depend on; None is what there is not, or nobody knows."""
    return {
        "teacher": teacher,
        "revision": revision,
        "weights": weights,
        "max_length": max_length,
        "dtype": dtype,
        "activation": activation,
        "prompt": prompt,
        "backend": backend,
        "quantisation": quantisation,
    }


def as_teacher(
    teacher: Any,
    *,
    name: str | None = None,
    max_length: int | None = None,
    dtype: Precision | None = None,
    prompt: str | None = None,
    batch_tokens: int | None = None,
    device: str | None = None,
    backend: Backend = "torch",
    revision: str | None = None,
    trust_remote_code: bool = False,
    label: int | None = None,
) -> Teacher:
    """The teacher behind a model, a model's name or path, or a function; see :func:`score_candidates`.

    Raises:
        TypeError: If it is none of these.
        ValueError: If an option does not go with it.
    """
    if isinstance(teacher, (str, Path)):
        from st_m3se.retrieval.teacher_models import load, wrap

        model = load(teacher, backend=backend, device=device, revision=revision, trust_remote_code=trust_remote_code)
        return wrap(
            model,
            name=name or str(teacher),
            revision=revision,
            max_length=max_length,
            dtype=dtype,
            prompt=prompt,
            batch_tokens=batch_tokens,
            label=label,
        )
    loading = {"backend": backend != "torch", "revision": revision is not None, "trust_remote_code": trust_remote_code}
    if given := [option for option, value in loading.items() if value]:
        raise ValueError(f"{', '.join(given)} belongs to a teacher by name or path; this one is loaded already.")
    if "sentence_transformers" in sys.modules:  # without it there is no instance of its classes
        from sentence_transformers.base.model import BaseModel

        if isinstance(teacher, BaseModel):
            from st_m3se.retrieval.teacher_models import wrap

            if device is not None:
                teacher.to(device)
            return wrap(
                teacher,
                name=name,
                max_length=max_length,
                dtype=dtype,
                prompt=prompt,
                batch_tokens=batch_tokens,
                label=label,
            )
    if callable(getattr(teacher, "encode_query", None)):  # which are functions, too, but of features
        raise TypeError(
            f"a {type(teacher).__name__} has no scores of pairs of its own. Pass the function that compares its "
            "embeddings: st_m3se.evaluation.rankers.pair_scorer(model, batch_size=32), with a name."
        )
    if isinstance(teacher, Mapping) or not callable(teacher):
        raise TypeError(
            "a teacher must be a CrossEncoder, a SentenceTransformer, SparseEncoder or MultiVectorEncoder, the name or "
            f"path of one, or a function of (query, document) pairs, got {type(teacher).__name__}."
        )
    of_models = {
        "max_length": max_length,
        "dtype": dtype,
        "prompt": prompt,
        "batch_tokens": batch_tokens,
        "label": label,
    }
    if given := [option for option, value in {**of_models, "device": device}.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} is for models; the function has to see to it itself.")
    return CallableTeacher(teacher, name)
