"""Retrieval measures during training."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from sentence_transformers.base.evaluation import BaseEvaluator

from st_m3se.core.markdown import check_name
from st_m3se.core.scored_list import ScoredList
from st_m3se.evaluation.data import EvaluationSet, open_set
from st_m3se.evaluation.measures import DEFAULT_MEASURES, check_grades, parse_measures, per_query
from st_m3se.retrieval.models import CHUNK, embed_documents, embed_queries, model_kind
from st_m3se.retrieval.search import Search, SearchResult
from st_m3se.retrieval.sources import Pairs

__all__ = ["RetrievalEvaluator"]

logger = logging.getLogger(__name__)


class RetrievalEvaluator(BaseEvaluator):
    """Search a corpus with a model and measure what it finds, in the trainer or alone.

    Pass it as ``evaluator=`` to the trainer of a SentenceTransformer, SparseEncoder or MultiVectorEncoder, or call it
    on a model. It takes the corpus chunk by chunk: each is encoded, searched exactly and dropped, so that neither the
    texts nor the embeddings of the corpus are ever held as a whole, on the GPU or elsewhere. When several processes
    train, the first one searches and measures, and sentence-transformers shares the encoding out among all.

    The measures are those of ``st-m3se evaluate``, under the same names and with trec_eval's values: graded where the
    judgements are, over all judged queries. In the trainer's logs they stand as
    ``eval_<name>_<measure>``, such as ``eval_scifact_nDCG@10``, which ``metric_for_best_model`` takes, too. The first
    measure is the primary one.

    Why not sentence-transformers' ``InformationRetrievalEvaluator``: its judgements are sets, without grades; it keeps
    the whole corpus as a list of texts and sorts hits in Python; and nothing leaves out a query's own document.

    Args:
        source: A BEIR folder, the name of a BEIR set, or an :class:`~st_m3se.evaluation.EvaluationSet`, with a corpus
            to search.
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
            trainer = SentenceTransformerTrainer(..., evaluator=evaluator)
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
        super().__init__()  # type: ignore[no-untyped-call]
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
        self.set, self.queries, self.corpus = opened, opened.queries, opened.corpus
        self.name = opened.name if name is None else name
        check_name(self.name)
        self.measures, self.depth, self.exclude_same_id = tuple(measures), depth, exclude_same_id
        self.batch_size, self.chunk_size, self.show_progress_bar = batch_size, chunk_size, show_progress_bar
        self.write_csv, self.truncate_dim = write_csv, truncate_dim
        self.query_prompt, self.query_prompt_name = query_prompt, query_prompt_name
        self.corpus_prompt, self.corpus_prompt_name = corpus_prompt, corpus_prompt_name
        self.primary_metric = self.measures[0]
        self.csv_file = "RetrievalEvaluator" + (f"_{self.name}" if self.name else "") + "_results.csv"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate ``model``; the trainer gives the other arguments."""
        when = (
            "" if epoch == -1 else f" after epoch {epoch}" if steps == -1 else f" in epoch {epoch} after {steps} steps"
        )
        logger.info(
            f"RetrievalEvaluator: {len(self.queries)} queries, {len(self.corpus)} documents, {self.name}{when}:"
        )
        metrics = {name: float(values.mean()) for name, values in self.evaluate_queries(model).items()}
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

    def evaluate_queries(self, model: Any) -> dict[str, np.ndarray]:
        """Each measure for each query: float64 ``[queries]``, in the order of the set's ``query_ids``."""
        return per_query(
            self._lists(self.search(model)),
            self.set.qrels,
            self.measures,
            exclude_same_id=self.exclude_same_id,
            query_ids=self.set.query_ids,
        )

    def search(self, model: Any) -> SearchResult:
        """What ``model`` finds: documents by their place in the corpus, for the set's queries in their order."""
        from tqdm.auto import tqdm

        texts = [text for _, batch in self.queries.batches() for text in batch]
        queries = embed_queries(
            model,
            texts,
            batch_size=self.batch_size,
            prompt=self.query_prompt,
            prompt_name=self.query_prompt_name,
            truncate_dim=self.truncate_dim,
        )
        own = Pairs.of_same_ids(self.queries, self.corpus, self.set.qrels) if self.exclude_same_id else None
        under_way = Search(
            queries,
            self.depth,
            similarity=model.similarity_fn_name,
            excluded=None if own is None else (own.queries, own.documents),
        )
        bar = tqdm(
            total=len(self.corpus),
            desc=f"Evaluating {self.name}".strip(),
            unit=" documents",
            disable=not self.show_progress_bar,
        )
        with bar:
            for _, batch in self.corpus.batches(self.chunk_size or CHUNK[model_kind(model)]):
                chunk = embed_documents(
                    model,
                    batch,
                    batch_size=self.batch_size,
                    prompt=self.corpus_prompt,
                    prompt_name=self.corpus_prompt_name,
                    truncate_dim=self.truncate_dim,
                )
                under_way.add(chunk)
                del chunk  # before the next one is encoded
                bar.update(len(batch))
        return under_way.result()

    def _lists(self, found: SearchResult) -> Iterator[ScoredList]:
        ids = self.corpus.ids.cast(pa.large_string()).combine_chunks()
        for query_id, rows, scores in zip(self.queries, found.rows, found.scores, strict=True):
            count = int((rows >= 0).sum())
            documents = ids.take(pa.array(rows[:count])).to_pylist()
            yield ScoredList(query_id, documents, scores[:count].tolist())

    def get_config_dict(self) -> dict[str, Any]:
        """The options that the model card shows."""
        config: dict[str, Any] = {"split": self.set.split, "depth": self.depth, "exclude_same_id": self.exclude_same_id}
        for key in ("truncate_dim", "query_prompt", "query_prompt_name", "corpus_prompt", "corpus_prompt_name"):
            if getattr(self, key) is not None:
                config[key] = getattr(self, key)
        return config
