"""Scoring candidates with a teacher: in shards that several processes share, and that a killed run keeps."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, overload

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm
from typing_extensions import Unpack

from st_m3se.core.findings import report
from st_m3se.core.ids import short
from st_m3se.retrieval.candidate_lists import CandidateLists
from st_m3se.retrieval.scoring_run import ScoringRun
from st_m3se.retrieval.teacher import Backend, CallableTeacher, Pairs, Precision, Teacher
from st_m3se.scores.describe import ScoreRange
from st_m3se.scores.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

    from st_m3se.data.texts import Texts

    Encoder: TypeAlias = SentenceTransformer | SparseEncoder | MultiVectorEncoder
    TeacherSource: TypeAlias = CrossEncoder | Encoder | Callable[[list[tuple[str, str]]], Any] | str | Path
    Candidates: TypeAlias = TeacherScores | Mapping[Any, Iterable[Any]] | str | Path
    TextSource: TypeAlias = Texts | Mapping[Any, Any] | Dataset | str | Path

__all__ = ["as_teacher", "score_candidates"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0
KEEP_SECONDS = 5.0  # of work that a kill loses, at most
FOLDER = re.compile(r"\w[\w.+ -]*")

Item = TypeVar("Item")
Result = TypeVar("Result")


class TeacherOptions(TypedDict, total=False):
    """How a teacher scores; :func:`score_candidates` says what each is."""

    max_length: int | None
    dtype: Precision | None
    prompt: str | None
    batch_tokens: int | None
    device: str | None
    backend: Backend
    revision: str | None
    trust_remote_code: bool
    label: int | None


@overload
def score_candidates(
    teacher: Mapping[str, TeacherSource],
    candidates: Candidates,
    queries: TextSource,
    corpus: TextSource,
    output: str | Path,
    *,
    shard_queries: int | None = ...,
    strict: bool = ...,
    show_progress_bar: bool = ...,
    **options: Unpack[TeacherOptions],
) -> dict[str, TeacherScores]: ...


@overload
def score_candidates(
    teacher: TeacherSource,
    candidates: Candidates,
    queries: TextSource,
    corpus: TextSource,
    output: str | Path,
    *,
    shard_queries: int | None = ...,
    strict: bool = ...,
    name: str | None = ...,
    show_progress_bar: bool = ...,
    **options: Unpack[TeacherOptions],
) -> TeacherScores: ...


def score_candidates(
    teacher: TeacherSource | Mapping[str, TeacherSource],
    candidates: Candidates,
    queries: TextSource,
    corpus: TextSource,
    output: str | Path,
    *,
    shard_queries: int | None = None,
    strict: bool = False,
    name: str | None = None,
    show_progress_bar: bool = True,
    **options: Unpack[TeacherOptions],
) -> TeacherScores | dict[str, TeacherScores]:
    """Score each query's candidate documents with a teacher, into a store.

    The work is cut into shards of whole queries, and every few seconds what there is of one is kept. So a run that was
    stopped or killed, at any moment, loses seconds: the same call again goes on. A call with another teacher,
    precision, maximum length or other texts and candidates is refused, and the message says what differs.

    Several processes share the work: under ``accelerate launch`` or ``torchrun`` each takes its part of the shards
    (``RANK`` and ``WORLD_SIZE``) on its own GPU (``LOCAL_RANK``); processes that are started by hand share them just
    as well. They meet in the output folder alone, by lock files that the system releases when a process ends, and
    each returns when all shards are done. A process that is left does the shards of one that died.

    Args:
        teacher: One of

            - a ``CrossEncoder``, or the name or path of one: its raw logits. Its own activation, a Sigmoid by
              default, would squeeze the margins between good documents away;
            - a ``SentenceTransformer``, ``SparseEncoder`` or ``MultiVectorEncoder``, or the name or path of one:
              ``model.similarity`` of the embeddings;
            - a function that takes a list of (query, document) pairs and returns as many numbers, as a list, an
              array or a tensor;
            - a mapping from a name to any of these: each makes a store in the folder of its name in ``output``.
        candidates: A store, or its path, whose scores are ignored; or a mapping from query id to document ids.
        queries: Whatever :meth:`Texts.open` takes: a mapping from id to text, a ``datasets.Dataset``, or a path of
            BEIR jsonl, Parquet, TSV or a folder.
        corpus: The documents, likewise.
        output: The folder of the store. Its rows are in the order of the candidates.
        max_length: Tokens of a pair, or for a bi-encoder of a text; what is longer is truncated. None is the model's.
        dtype: "float32", "bfloat16", "float16" or, on a CPU, "int8" (see :mod:`st_m3se.retrieval.int8`). None is
            bfloat16 on a GPU that has it, else float16 there (and float16 for a model that comes in it), and float32 on
            a CPU. It stands in the manifest.
        prompt: As ``CrossEncoder.predict(prompt=...)``; of a bi-encoder the queries' prompt. None is the model's.
        batch_tokens: Tokens of a batch with its padding. None is 1,024 on a CPU and 32,768 on a GPU; lower it when
            memory runs out. It may differ from one call to the next.
        shard_queries: Queries in a shard. None cuts 256 shards, but of 1,024 to 65,536 pairs.
        device: Such as "cuda:1" or "cpu". None is the GPU of this process, where there is one.
        backend: "torch", "onnx" or "openvino", for a teacher by name or path. The pairs of an int8 ONNX model whose
            activations are quantised dynamically are scored one by one: it takes their scale from the whole batch.
        revision: Of a teacher by name on the hub. The commit that it stands for goes into the manifest.
        trust_remote_code: Let a model by name run code of its own.
        label: Of a cross-encoder with several labels, the one whose logit is the score, counted from 0.
        strict: Refuse ids that repeat and empty texts. Else they are reported by warnings; of an id that repeats the
            last text counts.
        name: What the manifest calls the teacher. None is its name or path; a lambda needs one.
        show_progress_bar: Show pairs, pairs per second and the time left, in the first process.

    Returns:
        The finished store; of a mapping of teachers, a dict of stores by name.

    Raises:
        FileExistsError: If ``output`` holds something else.
        FormatError: If candidates are not valid, or an id has no text.
        TypeError: If an option is unknown.
        ValueError: If the run was begun with something else; if a score is not finite; if a cross-encoder has more
            than one label.
        KeyboardInterrupt: If it is interrupted, with a message of what is saved.

    Example:
        >>> scores = score_candidates(  # doctest: +SKIP
        ...     "cross-encoder/ms-marco-MiniLM-L6-v2", "bm25-run", "queries.jsonl", "corpus.jsonl", "teacher-scores"
        ... )
    """
    from st_m3se.data.collection import open_texts  # whose texts begin with this package's errors and ids

    if unknown := sorted(set(options) - set(TeacherOptions.__annotations__)):
        raise TypeError(
            f"score_candidates() has no option {', '.join(unknown)}. A teacher's options are "
            f"{', '.join(TeacherOptions.__annotations__)}; batches are cut by batch_tokens."
        )
    lists = CandidateLists(candidates)
    asked, findings = open_texts(queries, "queries")
    documents, unusual = open_texts(corpus, "corpus")
    report("score_candidates", findings + unusual, strict=strict)
    texts = asked, documents
    if not isinstance(teacher, Mapping):
        return _score(_teacher(teacher, name, options), lists, texts, Path(output), shard_queries, show_progress_bar)
    if name is not None:
        raise ValueError("name is for one teacher; of several each has the name under which it is given.")
    if not teacher or not all(isinstance(key, str) and FOLDER.fullmatch(key) for key in teacher):
        raise ValueError(
            f"teachers need names that can name a folder, of letters, digits and . _ - +, got {list(teacher)!r:.200}."
        )
    of = {key: None if isinstance(given, (str, Path)) else key for key, given in teacher.items()}
    for key in list(teacher)[1:]:  # what cannot teach is told before the first has worked for hours
        _teacher(teacher[key], of[key], options)
    return {
        key: _score(
            _teacher(given, of[key], options), lists, texts, Path(output) / key, shard_queries, show_progress_bar
        )
        for key, given in teacher.items()
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
    if all(hasattr(teacher, part) for part in ("settings", "prepare", "score")):  # a Teacher already
        own: Teacher = teacher
        return own
    of_models: dict[str, Any] = {"max_length": max_length, "dtype": dtype, "prompt": prompt}
    of_models |= {"batch_tokens": batch_tokens, "label": label}
    if isinstance(teacher, (str, Path)):
        from st_m3se.retrieval.teacher_models import load, wrap

        model = load(teacher, backend=backend, device=device, revision=revision, trust_remote_code=trust_remote_code)
        return wrap(model, name=name or str(teacher), revision=revision, **of_models)
    loading = {"backend": backend != "torch", "revision": revision is not None, "trust_remote_code": trust_remote_code}
    if given := [option for option, value in loading.items() if value]:
        raise ValueError(f"{', '.join(given)} belongs to a teacher by name or path; this one is loaded already.")
    if "sentence_transformers" in sys.modules:  # without it there is no instance of its classes
        from sentence_transformers.base.model import BaseModel

        if isinstance(teacher, BaseModel):
            from st_m3se.retrieval.teacher_models import wrap

            if device is not None:
                teacher.to(device)
            return wrap(teacher, name=name, **of_models)
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
    if given := [option for option, value in {**of_models, "device": device}.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} is for models; the function has to see to it itself.")
    return CallableTeacher(teacher, name)


def _teacher(teacher: Any, name: str | None, options: TeacherOptions) -> Teacher:
    if isinstance(teacher, (str, Path)) and options.get("device") is None and (rank := os.environ.get("LOCAL_RANK")):
        import torch

        if torch.cuda.is_available():
            options = {**options, "device": f"cuda:{int(rank) % torch.cuda.device_count()}"}
    return as_teacher(teacher, name=name, **options)


def _score(
    teacher: Teacher,
    lists: CandidateLists,
    texts: tuple[Texts, Texts],
    output: Path,
    shard_queries: int | None,
    show_progress_bar: bool,
) -> TeacherScores:
    inputs = {"queries": texts[0].fingerprint, "corpus": texts[1].fingerprint, "candidates": lists.fingerprint}
    run = ScoringRun(output, {**teacher.settings, **inputs}, lists, shard_queries)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with _Progress(run, str(teacher.settings["teacher"]), show_progress_bar and rank == 0) as progress:
        try:
            while missing := run.missing():
                own = [number for number in missing if number % world == rank]
                for turn in (own, missing):  # its own part first, then what others have not come to
                    if _score_shards(teacher, lists, texts, run, turn, progress):
                        break
                else:
                    _wait(run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped, {run.saved:,} of {int(run.sizes.sum()):,} pairs saved; the same command continues."
            ) from None
        finally:
            run.release()
        progress.look(at_once=True)
    run.finish(_manifest(teacher.settings, inputs))
    return TeacherScores.open(output)


def _score_shards(
    teacher: Teacher,
    lists: CandidateLists,
    texts: tuple[Texts, Texts],
    run: ScoringRun,
    numbers: list[int],
    progress: _Progress,
) -> int:
    """Score those of the shards that no other process works on; return how many."""

    def prepare(shard: tuple[int, pa.Table]) -> tuple[int, pa.Table, np.ndarray, np.ndarray, Any]:
        number, table = shard
        scores = run.kept(number)
        places = np.flatnonzero(np.isnan(scores))
        return number, table, scores, places, teacher.prepare(_pairs(table, *texts, places))

    done = 0
    span, told = ScoreRange(), False
    saving: Future[None] | None = None
    claimed = (shard for shard in lists.shards(run.shard_queries, set(numbers)) if run.claim(shard[0]))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="save") as disk:
        for number, table, scores, places, prepared in _ahead(prepare, claimed):
            progress.advance(len(scores) - len(places))
            fresh, kept = False, time.monotonic()
            try:
                for part, found in teacher.score(prepared):
                    _check(found, places[part], table, str(teacher.settings["teacher"]))
                    scores[places[part]], fresh = found, True
                    progress.advance(len(found))
                    if time.monotonic() - kept > KEEP_SECONDS:
                        run.save_some(number, scores)
                        fresh, kept = False, time.monotonic()
            except BaseException:  # an interrupt is the commonest
                if fresh:
                    run.save_some(number, scores)
                raise
            span.add(scores)
            if not told and (warning := span.warning(teacher.settings)) is not None:  # now, and not after hours
                logger.warning(f"the teacher {teacher.settings['teacher']}: {warning}")
                told = True
            if saving is not None:
                saving.result()
            saving = disk.submit(run.save, number, scores)
            progress.look()
            done += 1
        if saving is not None:
            saving.result()
    return done


def _ahead(make: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``make`` of each item in order; the next one is made in a thread while the caller works on this one."""
    waiting: deque[Any] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pairs(table: pa.Table, queries: Texts, corpus: Texts, places: np.ndarray) -> Pairs:
    """The pairs at these places of a shard."""
    lists = table.column("document_ids").combine_chunks()
    documents = lists.flatten().take(pa.array(places)).dictionary_encode()
    counts = lists.value_lengths().to_numpy()
    return Pairs(
        queries.take(table.column("query_id").to_pylist()),
        corpus.take(documents.dictionary.to_pylist()),
        np.repeat(np.arange(len(counts)), counts)[places],
        documents.indices.to_numpy(),
    )


def _check(scores: np.ndarray, places: np.ndarray, table: pa.Table, teacher: str) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if not len(bad):
        return
    lists = table.column("document_ids").combine_chunks()
    place = int(places[bad[0]])
    row = int(np.searchsorted(np.cumsum(lists.value_lengths().to_numpy()), place, side="right"))
    raise ValueError(
        f"the teacher {teacher} gives {scores[bad[0]]} to query {short(table.column('query_id')[row].as_py())} and "
        f"document {short(lists.flatten()[place].as_py())}, and a score must be finite ({len(bad)} of "
        f"{len(scores)} here are not). Numbers beyond float16 are the usual cause: use bfloat16 or float32."
    )


def _wait(run: ScoringRun) -> None:
    """Until the others are done, or one of them is gone and has left a shard."""
    while missing := run.missing():
        for number in missing:
            if run.claim(number):
                run.release(number)
                return
        time.sleep(POLL_SECONDS)


def _manifest(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
    from st_m3se import __version__

    weights = None if settings["weights"] is None else f"weights {settings['weights']}"
    return {
        **{name: settings[name] for name in ("teacher", "max_length", "dtype", "activation")},
        "revision": settings["revision"] or weights,
        "inputs": dict(inputs),
        "source": {
            "program": f"st-m3se {__version__}",
            **{name: settings[name] for name in ("backend", "prompt", "weights")},
            **({"quantisation": settings["quantisation"]} if settings.get("quantisation") else {}),
        },
    }


class _Progress:
    """Pairs done, by all processes of the run: of this one as they are scored, of the others by their shards."""

    def __init__(self, run: ScoringRun, teacher: str, shown: bool) -> None:
        self._run, self._total, self._looked = run, int(run.sizes.sum()), time.monotonic()
        self._bar = tqdm(
            total=self._total,
            initial=self._done(),
            desc=f"Scoring with {Path(teacher).name}",
            unit="pair",
            unit_scale=True,
            disable=not shown,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def _done(self) -> int:
        return self._total - int(self._run.sizes[self._run.missing()].sum())

    def advance(self, pairs: int) -> None:
        """Count pairs of this process."""
        self._bar.update(pairs)

    def look(self, at_once: bool = False) -> None:
        """Count what others have done, every few seconds."""
        if not self._bar.disable and (at_once or time.monotonic() - self._looked > LOOK_SECONDS):
            self._looked = time.monotonic()
            self._bar.update(max(0, self._done() - self._bar.n))
