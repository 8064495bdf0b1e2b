"""Evaluators for the trainer: how closely a student follows its teacher, and what it finds in a corpus."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from torch import Tensor

from st_m3se.core.markdown import check_name
from st_m3se.evaluation.data import EvaluationSet, open_set
from st_m3se.evaluation.measures import DEFAULT_MEASURES, check_grades, parse_measures, per_query
from st_m3se.evaluation.rankers import ranked_lists
from st_m3se.retrieval.models import CHUNK, embed_documents, embed_queries, model_kind, take_rows
from st_m3se.retrieval.search import Search, SearchResult
from st_m3se.retrieval.sources import Pairs

__all__ = ["DistillationEvaluator", "RetrievalEvaluator"]

logger = logging.getLogger(__name__)


class _Evaluator(BaseEvaluator):
    """What both write: the log, a line of the CSV file in the output folder, and the model card."""

    def __init__(self, name: str, primary_metric: str, write_csv: bool, card: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        check_name(name)
        self.name, self.primary_metric, self.write_csv, self._card = name, primary_metric, write_csv, card
        self.csv_file = f"{type(self).__name__}{f'_{name}' if name else ''}_results.csv"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate ``model``; the trainer gives the other arguments."""
        when = "" if epoch == -1 else f" after epoch {epoch}"
        when = when if epoch == -1 or steps == -1 else f" in epoch {epoch} after {steps} steps"
        logger.info(f"{type(self).__name__}: {self}{when}:")
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

    def compute_metrics(self, model: Any) -> dict[str, float]:
        """The measures, by name."""
        raise NotImplementedError

    def get_config_dict(self) -> dict[str, Any]:
        """The options that the model card shows."""
        return {key: value for key, value in self._card.items() if value is not None}


class _List(NamedTuple):
    query: int  # row of the distinct queries
    documents: np.ndarray  # rows of the distinct documents
    teacher: np.ndarray  # float64, the scores of these documents


class DistillationEvaluator(_Evaluator):
    """Compare a student's scores with its teacher's on held-out lists.

    Pass it as ``evaluator=`` to the trainer of a SentenceTransformer, SparseEncoder or MultiVectorEncoder, or call it
    on a model. The measures are means over the queries whose teacher scores differ at all; documents that the teacher
    did not score are left out.

    ``kendall_tau``
        Kendall's tau-b between the two scores of a list: 1 is the teacher's order, -1 its reverse, 0 where the student
        scores all documents alike. The primary metric.
    ``ndcg@k``
        nDCG with the gains ``(t - min t) / (max t - min t)`` of a list's teacher scores ``t``. Documents that the
        student ties share their mean gain, so that the order of the list gives nothing away.
    ``margin_mae``, ``margin_rmse``
        The mean absolute error, and the root of the mean squared error, of ``scale * (s_top - s_j)`` against ``t_top -
        t_j`` over a list's documents but the teacher's first, averaged over queries; in units of the teacher's logits.

    Args:
        samples: Rows of ``query``, ``documents`` and ``scores``, as for :class:`~st_m3se.DistillationCollator`: dicts
            or a ``datasets.Dataset``, read once; other columns are ignored. None or NaN is an unscored document.
        similarity_fct: From query embeddings ``[1, dim]`` and document embeddings ``[D, dim]`` to ``[1, D]``; those of
            a MultiVectorEncoder are lists of ``[tokens, dim]``. None is the model's own similarity.
        scale: What the loss multiplies the similarity with. Only the margin measures depend on it.
        at_k: The cut-off of nDCG.
        name: Goes in front of the metrics' names.
        batch_size: Texts that are encoded together.
        show_progress_bar: Whether to show one for the encoding.
        write_csv: Add a line to ``DistillationEvaluator_<name>_results.csv`` in the output folder.
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
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale must be a positive finite number, got {scale!r}. Give the loss's.")
        if isinstance(at_k, bool) or not isinstance(at_k, int) or at_k < 1:
            raise ValueError(f"at_k must be an integer of at least 1, got {at_k!r}.")
        super().__init__(name, "kendall_tau", write_csv, {"scale": scale, "at_k": at_k, "truncate_dim": truncate_dim})
        self.similarity_fct, self.scale, self.at_k = similarity_fct, scale, at_k
        self._encoding: dict[str, Any] = {
            "batch_size": batch_size,
            "show_progress_bar": show_progress_bar,
            "truncate_dim": truncate_dim,
        }
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

    def __str__(self) -> str:
        return f"{len(self.lists)} lists of the {self.name} dataset"

    def compute_metrics(self, model: Any) -> dict[str, float]:
        """The measures, by name."""
        queries = embed_queries(model, self.queries, **self._encoding)
        documents = embed_documents(model, self.documents, **self._encoding)
        similarity = self.similarity_fct or model.similarity
        rows = []
        for query, places, teacher in self.lists:
            with torch.no_grad():
                student = similarity(take_rows(queries, [query]), take_rows(documents, places.tolist()))
            rows.append(list_metrics(teacher, student[0].double().cpu().numpy(), self.scale, self.at_k))
        tau, ndcg, mae, mse = np.mean(np.array(rows, dtype=np.float64), axis=0).tolist()
        return {"kendall_tau": tau, f"ndcg@{self.at_k}": ndcg, "margin_mae": mae, "margin_rmse": math.sqrt(mse)}


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
    """The three columns of a sample, its scores as float64 with NaN where there is none."""
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


class RetrievalEvaluator(_Evaluator):
    """Search a corpus with a model and measure what it finds, in the trainer or alone.

    Pass it as ``evaluator=`` to the trainer, or call it on a model. The corpus is encoded and searched exactly, in
    chunks. When several processes train, the first one searches and measures, and sentence-transformers shares the
    encoding out. The measures are those of ``st-m3se evaluate``; logs have them as ``eval_<name>_<measure>``, such as
    ``eval_scifact_nDCG@10``, which ``metric_for_best_model`` takes, too. The first measure is the primary one.

    Why not sentence-transformers' ``InformationRetrievalEvaluator``: its judgements have no grades; it keeps the whole
    corpus as a list of texts; and nothing leaves out a query's own document.

    Args:
        source: A BEIR folder, the name of a BEIR set, or an :class:`~st_m3se.evaluation.EvaluationSet` with a corpus.
        split: Which judgements of the folder: ``qrels/<split>.tsv``.
        name: Goes in front of the measures' names. None is the set's own name, "" is nothing.
        measures: Names such as "nDCG@10", see :func:`~st_m3se.evaluation.measures.parse_measures`.
        depth: Documents per query. Measures without a cut-off, such as AP, look at so many.
        exclude_same_id: Leave out the document that has the query's own id, as BEIR does, unless it is judged for it.
        batch_size: Texts that are encoded at once.
        chunk_size: Documents whose embeddings are held at a time. None is 16,384, or 1,024 of a MultiVectorEncoder.
        show_progress_bar: Show progress over the corpus.
        write_csv: Add a line to ``RetrievalEvaluator_<name>_results.csv`` in the output folder.
        truncate_dim: Cut dense embeddings to this dimension. None is the model's own.
        query_prompt: A prompt for the queries. None is what ``encode_query`` takes.
        query_prompt_name: Or the name of one of the model's.
        corpus_prompt: A prompt for the documents. None is what ``encode_document`` takes.
        corpus_prompt_name: Or the name of one of the model's.

    Raises:
        ValueError: If the set has no corpus to search, a measure is unknown, or a number is below 1.
        ImportError: If the extra ``eval`` is not installed.

    Example:
        ::

            evaluator = RetrievalEvaluator("data/scifact", split="dev")
            arguments = SentenceTransformerTrainingArguments(
                ..., load_best_model_at_end=True, metric_for_best_model="eval_scifact_nDCG@10"
            )
    """

    def __init__(
        self,
        source: str | Path | EvaluationSet,
        *,
        split: str = "test",
        name: str | None = None,
        measures: Sequence[str] = DEFAULT_MEASURES,
        depth: int = 1000,
        exclude_same_id: bool = True,
        batch_size: int = 32,
        chunk_size: int | None = None,
        show_progress_bar: bool = False,
        write_csv: bool = True,
        truncate_dim: int | None = None,
        query_prompt: str | None = None,
        query_prompt_name: str | None = None,
        corpus_prompt: str | None = None,
        corpus_prompt_name: str | None = None,
    ) -> None:
        for key, value in (("depth", depth), ("batch_size", batch_size), ("chunk_size", chunk_size)):
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}.")
        parse_measures(measures)
        opened = source if isinstance(source, EvaluationSet) else open_set(source, split=split)
        if opened.queries is None or opened.corpus is None or opened.form != "retrieval":
            given = "a run to re-rank" if opened.form != "retrieval" else "ids without texts"
            raise ValueError(
                f"{opened.name} is {given}, and this evaluator searches a corpus. Open a set with queries and corpus, "
                "without a run."
            )
        check_grades(measures, opened.qrels)
        card = {
            "split": opened.split,
            "depth": depth,
            "exclude_same_id": exclude_same_id,
            "truncate_dim": truncate_dim,
            "query_prompt": query_prompt,
            "query_prompt_name": query_prompt_name,
            "corpus_prompt": corpus_prompt,
            "corpus_prompt_name": corpus_prompt_name,
        }
        super().__init__(opened.name if name is None else name, measures[0], write_csv, card)
        self.set, self.queries, self.corpus = opened, opened.queries, opened.corpus
        self.measures, self.depth, self.exclude_same_id = tuple(measures), depth, exclude_same_id
        self.chunk_size, self.show_progress_bar = chunk_size, show_progress_bar
        both: dict[str, Any] = {"batch_size": batch_size, "truncate_dim": truncate_dim}
        self._of_queries = {**both, "prompt": query_prompt, "prompt_name": query_prompt_name}
        self._of_documents = {**both, "prompt": corpus_prompt, "prompt_name": corpus_prompt_name}

    def __str__(self) -> str:
        return f"{len(self.queries)} queries, {len(self.corpus)} documents, {self.name}"

    def compute_metrics(self, model: Any) -> dict[str, float]:
        """The means over the queries, by measure."""
        return {name: float(values.mean()) for name, values in self.evaluate_queries(model).items()}

    def evaluate_queries(self, model: Any) -> dict[str, np.ndarray]:
        """Each measure for each query: float64 ``[queries]``, in the order of the set's ``query_ids``."""
        lists = ranked_lists(self.queries, self.corpus, self.search(model))
        options: dict[str, Any] = {"exclude_same_id": self.exclude_same_id, "query_ids": self.set.query_ids}
        return per_query(lists, self.set.qrels, self.measures, **options)

    def search(self, model: Any) -> SearchResult:
        """What ``model`` finds: documents by their place in the corpus, for the set's queries in their order."""
        from tqdm.auto import tqdm

        texts = [text for _, batch in self.queries.batches() for text in batch]
        own = Pairs.of_same_ids(self.queries, self.corpus, self.set.qrels) if self.exclude_same_id else None
        under_way = Search(
            embed_queries(model, texts, **self._of_queries),
            self.depth,
            similarity=model.similarity_fn_name,
            excluded=None if own is None else (own.queries, own.documents),
        )
        description = f"Evaluating {self.name}".strip()
        bar = tqdm(total=len(self.corpus), desc=description, unit=" documents", disable=not self.show_progress_bar)
        with bar:
            for _, batch in self.corpus.batches(self.chunk_size or CHUNK[model_kind(model)]):
                chunk = embed_documents(model, batch, **self._of_documents)
                under_way.add(chunk)
                del chunk  # before the next one is encoded
                bar.update(len(batch))
        return under_way.result()
