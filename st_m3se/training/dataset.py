"""From teacher scores, texts and judgements to training lists, drawn afresh every epoch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, config

from st_m3se.core.findings import report
from st_m3se.data.collection import Collection, absent_documents
from st_m3se.scores import TeacherScores
from st_m3se.scores.sigmoid import ScoreRange
from st_m3se.training.join import JoinOptions, join_lists
from st_m3se.training.reader import Layout, ListReader
from st_m3se.training.sampling import SAMPLINGS, Sampling

__all__ = ["build_distillation_dataset"]

logger = logging.getLogger(__name__)


def build_distillation_dataset(
    scores: TeacherScores | str | Path,
    queries: Any = None,
    corpus: Any = None,
    qrels: Mapping[Any, Mapping[Any, int]] | str | Path | None = None,
    *,
    data: Collection | str | Path | None = None,
    split: str | None = None,
    list_size: int | None = 16,
    sampling: Sampling = "stratified",
    seed: int = 0,
    layout: Layout = "lists",
    teacher_positives: int | None = None,
    max_positives: int | None = None,
    min_relevance: int = 1,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    relabel: bool = False,
    resample: bool = True,
    strict: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Build a training dataset with one row per query: its text, and scored documents drawn from its candidates.

    All ids are looked up here, once. The dataset holds ids and scores, in a file that Arrow maps into memory; texts are
    joined and lists are drawn when a row is read, in whichever worker reads it. ``select``, ``shuffle``, ``filter`` and
    ``train_test_split`` work as ever; ``dataset.with_format(None)`` shows the ids, scores and number of positives from
    which lists are drawn, and every one of them.

    **Fresh lists.** Each epoch draws other lists, if the trainer is given a :class:`~st_m3se.ResampleCallback`. A list
    depends on nothing but ``seed``, the epoch and the query's id: not on workers, ranks, the order of rows, or an
    interruption. ``model.fit`` copies all rows first and so keeps the lists of the first epoch.

    **Texts** are not joined by :func:`sentence_transformers.util.resolve_ids`: it resolves all ids of a row, where here
    a list takes 16 of some hundred, chosen anew every epoch; it cannot build on a score store, and it finds a missing
    id only when training reaches it.

    **Queries that cannot be trained on**, without a scored positive or without a negative, are left out, counted, and
    reported once by a warning. So are judged positives without a teacher score: every document of a list has one.
    Documents of one query with the same text count as one: the positive, else the one scored highest.

    Args:
        scores: A store of teacher scores, or its path.
        queries: The queries' texts: whatever :meth:`Texts.open <st_m3se.data.texts.Texts.open>` takes, such as a
            mapping from id to text, a ``datasets.Dataset``, or a BEIR file or folder.
        corpus: The documents' texts, alike. Both must have every id of ``scores``; use ``scores.select`` for fewer.
        qrels: Relevance judgements, query id to document id to relevance, or a file for
            :func:`~st_m3se.data.qrels.read_qrels`.
        data: Instead of ``queries`` and ``corpus``, a folder that has both, or a BEIR set by its name; see
            :meth:`Collection.open <st_m3se.Collection.open>`.
        split: With ``data``, whose judgements are the ``qrels``, such as "train". None uses none.
        list_size: The most documents in a list, the positives among them. None takes every candidate, as for
            evaluation. 16 keeps a batch of 32 queries at some 500 texts.
        sampling: How negatives are drawn where there are more than fit: "top" (the teacher's highest, the hardest),
            "random", or "stratified": one from each of as many strata of equal size, in the order of teacher scores, so
            that every list spans the teacher's range. The default follows arXiv 2604.04734, which finds lists that
            cover the range of scores to distil better than the top ones and than random ones.
        seed: For the draws.
        layout: "lists" gives rows of ``query``, ``documents``, ``scores`` and ``positives`` for
            :class:`~st_m3se.DistillationCollator`, of at most ``list_size`` documents, with ``document_ids`` and
            ``relevant_ids``, which keep every known positive, drawn or not, scored or not, out of in-batch negatives.
            "columns" gives ``query``, ``document_1`` to ``document_<list_size>`` and ``label`` (their scores) for the
            stock collator and ``model.fit``, with the positive as ``document_1``; queries with fewer negatives are left
            out. A CrossEncoder as the student takes "columns" with its ``MarginMSELoss``, and "reranker", rows of
            ``query``, ``documents`` and ``label`` (their scores), with its listwise losses, such as ``ListNetLoss`` and
            ``LambdaLoss``. (LambdaLoss takes scores for gains, ``2 ** score - 1``, and negative ones for 0.)
        teacher_positives: This many of the teacher's highest-scored documents count as positives, besides those of the
            qrels. None means 0 with qrels and 1 without.
        max_positives: The most positives in a list, drawn afresh where there are more; the others are never negatives.
            None means half of ``list_size``, and 1 for columns, where it can be nothing else.
        min_relevance: The relevance from which a judged document is a positive.
        absolute_margin: Leave out likely false negatives: those scored above the query's lowest positive score minus
            this. In units of the teacher's scores, usually logits. As in
            :func:`sentence_transformers.util.mine_hard_negatives`.
        relative_margin: The same, with a share of the positive score's magnitude. Of logits, which have no zero that
            means anything, ``absolute_margin`` is the clearer choice.
        relabel: Count what these margins find as positives, instead of leaving it out.
        resample: Whether lists change with the epoch. False for evaluation.
        strict: Refuse what is unusual: ids that repeat, empty texts, judgements that repeat or contradict each other,
            and judged documents that are absent. Else this is reported by warnings and dealt with as in evaluation,
            see :meth:`Collection.open <st_m3se.Collection.open>`.
        cache_dir: Where to keep the joined file, which the next run finds again. None is the cache of the datasets
            library.

    Returns:
        The dataset. Its description (``dataset.info.description``) says what was left out. With
        ``batch_sampler="no_duplicates_hashed"`` it cannot be used: hashes are made once and lists change; use
        ``"no_duplicates"``.

    Raises:
        FormatError: If a text is missing, naming its id, or ids are of different types.
        ValueError: On an option out of range, or if no query is left.

    Example:
        ::

            dataset = build_distillation_dataset("teacher-scores", data="my-data", split="train")
            trainer = SentenceTransformerTrainer(
                model=model,
                train_dataset=dataset,
                loss=M3SELoss(model),
                data_collator=DistillationCollator(preprocess_fn=model.preprocess),
                callbacks=[ResampleCallback()],
            )
    """
    _check_options(list_size, sampling, layout, max_positives)
    if not isinstance(scores, TeacherScores):
        scores = TeacherScores.open(scores)
    opened = Collection.open(data, split, queries=queries, corpus=corpus, qrels=qrels, cache_dir=cache_dir)
    (queries, corpus), qrels, findings = opened.texts, opened.qrels, list(opened.findings)
    if qrels is not None:
        findings += absent_documents(qrels, corpus, "they are in no list")
    report("build_distillation_dataset", findings, strict=strict)
    if teacher_positives is None:
        teacher_positives = 1 if qrels is None else 0
    _check_numbers(seed, teacher_positives, min_relevance, absolute_margin, relative_margin)
    if qrels is None and teacher_positives == 0:
        raise ValueError("without qrels, teacher_positives must be at least 1: nothing else says what is a positive.")
    if max_positives is None and list_size is not None:
        max_positives = 1 if layout == "columns" else max(list_size // 2, 1)

    if relabel and absolute_margin is None and relative_margin is None:
        raise ValueError(
            "relabel makes positives of the documents that the teacher scores near a known one: say how near with "
            "absolute_margin (0.0: above it) or relative_margin."
        )
    options = JoinOptions(
        teacher_positives=teacher_positives,
        min_relevance=min_relevance,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        relabel=relabel,
        min_negatives=list_size - 1 if layout == "columns" and list_size is not None else 1,
    )
    folder = Path(config.HF_DATASETS_CACHE) / "st-m3se-lists" if cache_dir is None else Path(cache_dir)
    path, counts = join_lists(scores, queries, corpus, qrels, options, folder)
    summary = counts.describe(options.min_negatives)
    complete = counts.kept == counts.queries and not counts.judged_unscored
    logger.log(logging.INFO if complete else logging.WARNING, f"build_distillation_dataset: {summary}")

    span = (
        ScoreRange() if counts.lowest is None or counts.highest is None else ScoreRange(counts.lowest, counts.highest)
    )
    if (warning := span.warning(scores.manifest)) is not None:
        logger.warning(f"build_distillation_dataset: {warning}")

    dataset = Dataset.from_file(str(path), info=DatasetInfo(description=summary))
    reader = ListReader(queries, corpus, list_size, max_positives, sampling, seed, layout, resample, len(dataset))
    return dataset.with_transform(reader)


def _check_options(list_size: int | None, sampling: str, layout: str, max_positives: int | None) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {list(SAMPLINGS)}, got {sampling!r}.")
    if layout not in ("lists", "columns", "reranker"):
        raise ValueError(f'layout must be "lists", "columns" or "reranker", got {layout!r}.')
    if list_size is None and layout == "columns":
        raise ValueError('layout="columns" needs a list_size: every row has the same columns.')
    if list_size is not None and (not _is_int(list_size) or list_size < 2):
        raise ValueError(f"list_size must be an integer of at least 2, a positive and a negative, got {list_size!r}.")
    if max_positives is not None:
        if not _is_int(max_positives) or max_positives < 1 or (list_size is not None and max_positives >= list_size):
            raise ValueError(
                f"max_positives must be an integer of at least 1 and below list_size={list_size}, got "
                f"{max_positives!r}: a list needs a negative as well."
            )
        if layout == "columns" and max_positives != 1:
            raise ValueError(
                f'layout="columns" has one positive, document_1, got max_positives={max_positives}. Use layout="lists".'
            )


def _check_numbers(
    seed: int,
    teacher_positives: int,
    min_relevance: int,
    absolute_margin: float | None,
    relative_margin: float | None,
) -> None:
    for name, value, least in (
        ("seed", seed, 0),
        ("teacher_positives", teacher_positives, 0),
        ("min_relevance", min_relevance, 1),
    ):
        if not _is_int(value) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    for name, margin in (("absolute_margin", absolute_margin), ("relative_margin", relative_margin)):
        if margin is not None and (
            isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < math.inf
        ):
            raise ValueError(f"{name} must be None or a finite number of at least 0, got {margin!r}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
