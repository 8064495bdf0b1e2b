"""How closely a student follows its teacher on lists that it was not trained on."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor

from st_m3se.core.markdown import check_name
from st_m3se.retrieval.models import embed_documents, embed_queries, take_rows

__all__ = ["DistillationEvaluator"]

logger = logging.getLogger(__name__)

Encoder = SentenceTransformer | SparseEncoder | MultiVectorEncoder


class _List(NamedTuple):
    query: int  # row of the distinct queries
    documents: np.ndarray  # rows of the distinct documents
    teacher: np.ndarray  # float64, the scores of these documents


class DistillationEvaluator(BaseEvaluator):
    """Compare a student's scores with its teacher's on held-out lists.

    Pass it as ``evaluator=`` to the trainer of a SentenceTransformer, SparseEncoder or MultiVectorEncoder, or call it
    on a model. Each distinct text is encoded once. The measures are means over the queries whose teacher scores differ
    at all; documents that the teacher did not score are left out.

    ``kendall_tau``
        Kendall's tau-b between the two scores of a list's documents: 1 is the teacher's order, -1 its reverse. A
        student that scores all documents of a list alike has no order and gets 0. The primary metric.
    ``ndcg@k``
        How good the student's first ``k`` documents are in the teacher's eyes. The gain of a document is
        ``(t - min t) / (max t - min t)`` over its list's teacher scores ``t``: 1 for the teacher's first, 0 for its
        last, and no other change by scale or shift of the logits. The discount is ``1 / log2(1 + rank)``; the ideal
        order is the teacher's. Documents that the student ties share their mean gain, so that the order in which a
        list was written gives nothing away.
    ``margin_mae``, ``margin_rmse``
        How far the student's margins are from the teacher's, in units of the teacher's logits. The margin of a document
        is its distance from the teacher's first document (the first one on a tie): ``t_top - t_j`` for the teacher,
        ``scale * (s_top - s_j)`` for the student. Mean absolute difference over a list's other documents, averaged over
        queries; and the root of the equally averaged squares.

    Args:
        samples: Rows of ``query``, ``documents`` and ``scores``, as for :class:`~st_m3se.DistillationCollator`: dicts
            or a ``datasets.Dataset``; other columns are ignored. A dataset of
            :func:`~st_m3se.build_distillation_dataset` is read here, once. None or NaN is an unscored document.
        similarity_fct: From query embeddings ``[1, dim]`` and document embeddings ``[D, dim]`` to ``[1, D]``; those of
            a MultiVectorEncoder are lists of ``[tokens, dim]``. None is the model's own similarity.
        scale: What the loss multiplies the similarity with. Only the margin measures depend on it.
        at_k: The cut-off of nDCG.
        name: Goes in front of the metrics' names.
        batch_size: Texts that are encoded together.
        show_progress_bar: Whether to show one for the encoding.
        write_csv: Whether to add a line to ``DistillationEvaluator_<name>_results.csv`` in the output folder.
        truncate_dim: Cut dense embeddings to this dimension; None is the model's own.

    Raises:
        ValueError: If a sample is not of this form, with its place, or no list has two documents that the teacher tells
            apart.

    Example:
        ::

            held_out = build_distillation_dataset(scores.select(dev_ids), queries, corpus, qrels, list_size=None)
            evaluator = DistillationEvaluator(held_out, scale=20.0, name="dev")
            trainer = SentenceTransformerTrainer(..., evaluator=evaluator)
    """

    def __init__(
        self,
        samples: Iterable[Mapping[str, Any]],
        *,
        similarity_fct: Callable[[Any, Any], Tensor] | None = None,
        scale: float = 1.0,
        at_k: int = 10,
        name: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_name(name)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale must be a positive finite number, got {scale!r}. Give the loss's.")
        if isinstance(at_k, bool) or not isinstance(at_k, int) or at_k < 1:
            raise ValueError(f"at_k must be an integer of at least 1, got {at_k!r}.")
        self.similarity_fct, self.scale, self.at_k, self.name = similarity_fct, scale, at_k, name
        self.batch_size, self.show_progress_bar = batch_size, show_progress_bar
        self.write_csv, self.truncate_dim = write_csv, truncate_dim
        self.primary_metric = "kendall_tau"
        self.csv_file = "DistillationEvaluator" + (f"_{name}" if name else "") + "_results.csv"
        queries: dict[str, int] = {}
        documents: dict[str, int] = {}
        self.lists: list[_List] = []
        count = 0
        for place, sample in enumerate(samples):
            count += 1
            query, texts, teacher = _checked(place, sample)
            scored = ~np.isnan(teacher)
            if not scored.any() or teacher[scored].min() == teacher[scored].max():
                continue
            rows = [
                documents.setdefault(text, len(documents)) for text, keep in zip(texts, scored, strict=True) if keep
            ]
            self.lists.append(_List(queries.setdefault(query, len(queries)), np.array(rows), teacher[scored]))
        if not self.lists:
            raise ValueError(
                f"none of the {count} samples has two documents with different teacher scores, so there is no order to "
                "compare the student with. Give whole candidate lists, e.g. list_size=None."
            )
        if len(self.lists) < count:
            logger.warning(
                f"DistillationEvaluator: {count - len(self.lists)} of {count} lists are left out, because the teacher "
                "scores fewer than two of their documents, or all alike."
            )
        self.queries, self.documents = list(queries), list(documents)

    def __call__(  # type: ignore[override]
        self, model: Encoder, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate ``model``; the trainer gives the other arguments."""
        when = (
            "" if epoch == -1 else f" after epoch {epoch}" if steps == -1 else f" in epoch {epoch} after {steps} steps"
        )
        logger.info(f"DistillationEvaluator: {len(self.lists)} lists of the {self.name} dataset{when}:")
        metrics = self.compute_metrics(model)
        for key, value in metrics.items():
            logger.info(f"{key}: {value:.4f}")
        if output_path is not None and self.write_csv:
            file = Path(output_path) / self.csv_file
            file.parent.mkdir(parents=True, exist_ok=True)
            new = not file.is_file()
            with file.open("a", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                if new:
                    writer.writerow(["epoch", "steps", *metrics])
                writer.writerow([epoch, steps, *metrics.values()])
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)  # type: ignore[arg-type]
        return metrics

    def compute_metrics(self, model: Encoder) -> dict[str, float]:
        """The measures, by name."""
        rows = [list_metrics(each.teacher, student, self.scale, self.at_k) for each, student in self._scored(model)]
        tau, ndcg, mae, mse = np.mean(np.array(rows, dtype=np.float64), axis=0).tolist()
        return {"kendall_tau": tau, f"ndcg@{self.at_k}": ndcg, "margin_mae": mae, "margin_rmse": math.sqrt(mse)}

    def _scored(self, model: Encoder) -> Iterable[tuple[_List, np.ndarray]]:
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "show_progress_bar": self.show_progress_bar,
            "truncate_dim": self.truncate_dim,
        }
        queries = embed_queries(model, self.queries, **options)
        documents = embed_documents(model, self.documents, **options)
        similarity = self.similarity_fct or model.similarity
        for each in self.lists:
            with torch.no_grad():
                student = similarity(take_rows(queries, [each.query]), take_rows(documents, each.documents.tolist()))
            yield each, student[0].double().cpu().numpy()

    @property
    def description(self) -> str:
        """What the model card calls it."""
        return "Distillation"

    def get_config_dict(self) -> dict[str, Any]:
        """The options that the model card shows."""
        config: dict[str, Any] = {"scale": self.scale, "at_k": self.at_k}
        return config if self.truncate_dim is None else config | {"truncate_dim": self.truncate_dim}


def list_metrics(
    teacher: np.ndarray, student: np.ndarray, scale: float, at_k: int
) -> tuple[float, float, float, float]:
    """Kendall's tau-b, nDCG at ``at_k``, mean absolute and mean squared margin error of one list.

    Args:
        teacher: float ``[D]``, not all equal.
        student: float ``[D]``.
        scale: Multiplies the student's scores for the margins.
        at_k: The cut-off of nDCG.
    """
    from scipy.stats import kendalltau  # both are dependencies of sentence-transformers, and slow to import
    from sklearn.metrics import ndcg_score  # type: ignore[import-untyped]

    tied = student.min() == student.max()
    tau = 0.0 if tied else float(kendalltau(teacher, student).statistic)
    gains = (teacher - teacher.min()) / (teacher.max() - teacher.min())
    ndcg = float(ndcg_score(gains[None], student[None], k=at_k))
    top = int(np.argmax(teacher))
    errors = scale * (student[top] - student) - (teacher[top] - teacher)
    errors = np.delete(errors, top)
    return tau, ndcg, float(np.abs(errors).mean()), float((errors**2).mean())


def _checked(place: int, sample: Mapping[str, Any]) -> tuple[str, Sequence[str], np.ndarray]:
    """The three columns of a sample, its scores as float64 with NaN where there is none.

    Raises:
        ValueError: If the sample is not of the documented form.
    """
    if missing := [column for column in ("query", "documents", "scores") if column not in sample]:
        raise ValueError(f"sample {place} lacks {missing}; it has {list(sample)!r:.200}. Rename its columns.")
    query, texts, scores = sample["query"], sample["documents"], sample["scores"]
    if not isinstance(query, str):
        raise ValueError(f"sample {place}: `query` must be a str, got {type(query).__name__}. Look ids up first.")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"sample {place}: `documents` must be a list of str, got {texts!r:.200}.")
    if len(scores) != len(texts):
        raise ValueError(f"sample {place}: got {len(scores)} scores for {len(texts)} documents; give one for each.")
    teacher = np.array([math.nan if score is None else score for score in scores], dtype=np.float64)
    if np.isinf(teacher).any():
        raise ValueError(f"sample {place}: an infinite teacher score has no margin. Use None for 'not scored'.")
    return query, texts, teacher
