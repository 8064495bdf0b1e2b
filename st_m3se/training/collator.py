"""From ragged rows to a batch: each distinct document once, and where each query's list finds its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Real
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS, BaseDataCollator
from sentence_transformers.base.model import BaseModel
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from st_m3se.encoding.host import (
    has_waiting_trainer,
    model_of,
    own_prompt,
    reads_task,
    routes_by_default,
    stock_collator,
    training_arguments,
)
from st_m3se.encoding.positions import check_length
from st_m3se.losses.finite import LARGEST_SCORE

__all__ = ["DistillationCollator"]

logger = logging.getLogger(__name__)

AS_LISTS = "(Arrays and tensors: pass lists, e.g. with dataset.with_format(None).)"
COLUMNS = ("query", "documents", "scores")
OPTIONAL = ("positives", "document_ids", "relevant_ids", "query_id", "dataset_name")
TASKS = {"query": "query", "documents": "document"}


@dataclass
class DistillationCollator(SentenceTransformerDataCollator):
    """Collate rows of ``query``, ``documents``, ``scores`` and, if wished, ``positives`` into a distillation batch.

    ======================  =====================================================================================
    Column                  Content
    ======================  =====================================================================================
    ``query``               str
    ``documents``           list of str, of any length per row
    ``scores``              list of float, the teacher's score of each document; None or NaN where not scored
    ``positives``           optional list of bool, the relevant documents; without the column, document 0 is it
    ``document_ids``        optional list of str or int, the id of each document
    ``relevant_ids``        optional list of str or int, all documents known to be relevant, in the list or not
    ======================  =====================================================================================

    A text that occurs in several lists is tokenised and encoded once. With ``in_batch_negatives`` a loss takes the
    documents of other rows as negatives, but none that has the text or the id of a positive of the same query in any
    row, and none of its ``relevant_ids``. ``query_id`` may stand beside the columns and is left alone.

    Texts are read as ``model.encode_query`` and ``model.encode_document`` read them: with the task "query" or
    "document", which chooses the route of a Router and the lengths and markers of a multi-vector model, and with the
    model's own prompts. The ``prompts``, ``router_mapping`` and ``max_length`` of the training arguments change that,
    as they do for the trainer's own collator, and those given here too. Whoever reads a trainer's data loader by hand
    before it has begun to train does not see them, and a warning says so.

    Rows without ``documents``, such as the pairs of another dataset of the same trainer, go to the collator that the
    trainer would have made.

    A streamed dataset (``IterableDataset``) needs ``accelerator_config={"dispatch_batches": False}`` in the training
    arguments: accelerate would cut the documents to the number of queries.

    Args:
        preprocess_fn: ``model.preprocess``. Of any other function the model and the training arguments are not known:
            its prompts are those given here.
        router_mapping: As in the training arguments, for the columns ``query`` and ``documents``. None: theirs, and
            where they say nothing, ``{"query": "query", "documents": "document"}``.
        prompts: As in the training arguments, for the columns ``query`` and ``documents``. None: theirs, and where they
            say nothing, the model's own. ``{}``: no prompts.
        max_length: As in the arguments of a multi-vector trainer. None: theirs, and else the model's own lengths.

    Returns:
        ``query_*`` and ``document_*`` features (``Q`` and ``U`` rows), and ``label``: the mapping of ``scores``,
        ``positives``, ``mask`` and ``index``, each ``[Q, D]``, that the losses of this package take; and ``known``:
        keys of queries, documents and what is relevant, for in-batch negatives.

    Raises:
        ValueError: On rows that do not have this form, with the row's place in the batch; on settings that differ from
            the training arguments'; on texts that begin with the model's own prompt, which would stand twice.
    """

    # All that is no text: the host's batch samplers keep rows apart that are equal in any other column.
    valid_label_columns: list[str] = field(
        default_factory=lambda: [*DEFAULT_LABEL_COLUMNS, "positives", "document_ids", "relevant_ids", "query_id"]
    )
    router_mapping: Any = field(default=None, repr=False)
    prompts: Any = field(default=None, repr=False)
    _stock: BaseDataCollator | None = field(default=None, init=False, repr=False)
    _told: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned: no trainer calls it there."""
        return self.__dict__ | {"_told": training_arguments(model_of(self.preprocess_fn), self._told)}

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate the rows of one batch."""
        if not features:
            return {}
        stock = self._settings()
        if _is_of_the_host(features[0]):
            return self._of_the_host(stock, features)
        has_positives = "positives" in features[0]
        for place, row in enumerate(features):
            _check_row(place, row, has_positives)

        batch: dict[str, Any] = {}
        if "dataset_name" in features[0]:
            batch["dataset_name"] = features[0]["dataset_name"]
        texts: dict[str, int] = {}
        for row in features:
            for text in row["documents"]:
                texts.setdefault(text, len(texts))
        self._preprocess(stock, batch, "query", "query", [row["query"] for row in features])
        self._preprocess(stock, batch, "documents", "document", list(texts))

        shape = (len(features), max(len(row["documents"]) for row in features))
        scores = torch.full(shape, torch.nan)
        positives = torch.zeros(shape, dtype=torch.bool)
        mask = torch.zeros(shape, dtype=torch.bool)
        index = torch.zeros(shape, dtype=torch.int64)
        for place, row in enumerate(features):
            count = len(row["documents"])
            scores[place, :count] = torch.tensor([math.nan if s is None else float(s) for s in row["scores"]])
            positives[place, :count] = torch.tensor(
                row["positives"] if has_positives else [True] + [False] * (count - 1)
            )
            mask[place, :count] = True
            index[place, :count] = torch.tensor([texts[text] for text in row["documents"]])
        batch["label"] = {"scores": scores, "positives": positives, "mask": mask, "index": index}
        # A loss that is handed embeddings cannot see in tokens which texts are equal.
        batch["label"]["known"] = _known(features, texts)
        return batch

    def _of_the_host(self, stock: BaseDataCollator, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate an ordinary dataset's rows as the trainer's collator does, and refuse what the trainer refuses."""
        batch: dict[str, Any] = stock(features)
        model = model_of(self.preprocess_fn)
        if model is not None and not stock.router_mapping and routes_by_default(model, "text"):
            raise ValueError(
                f"the columns {list(features[0])} of an ordinary dataset need a router_mapping in the training "
                "arguments: the model's Router would send all of them to its default route."
            )
        return batch

    def _settings(self) -> BaseDataCollator:
        """The collator that the trainer would have made, with what is given here and in the training arguments."""
        arguments = training_arguments(model_of(self.preprocess_fn), self._told)
        chosen: dict[str, Any] = {}
        for name in ("prompts", "router_mapping", "max_length"):
            own, theirs = getattr(self, name), arguments.get(name) or None
            if own is not None and theirs is not None and own != theirs:
                raise ValueError(
                    f"the training arguments have {name}={theirs!r} and the collator has {name}={own!r}: one of the "
                    "two would have no effect. Give it to the training arguments alone."
                )
            chosen[name] = theirs if own is None else own
        stock = self._stock
        if stock is None or any(getattr(stock, name) != value for name, value in chosen.items()):
            if (model := model_of(self.preprocess_fn)) is not None:
                lengths = chosen["max_length"]
                for length in lengths.values() if isinstance(lengths, Mapping) else [lengths]:
                    check_length(model, length, "max_length")
                if not arguments and has_waiting_trainer(model) and self.prompts is None:
                    logger.warning(
                        "DistillationCollator: a trainer's arguments are known to what it calls, and to all when it "
                        "has begun to train. In a batch that is read by hand before that, their prompts and "
                        "router_mapping have no effect on the lists. If they have any, give them to the collator too."
                    )
                own_prompts = {task: own_prompt(model, task) for task in TASKS.values()}
                if chosen["prompts"] is None and any(own_prompts.values()):
                    logger.info(f"DistillationCollator: texts get the model's own prompts, {own_prompts!r}.")
            stock = self._stock = stock_collator(self.preprocess_fn, **chosen)
        return stock

    def _preprocess(
        self, stock: BaseDataCollator, batch: dict[str, Any], column: str, prefix: str, texts: list[str]
    ) -> None:
        """Add the features of one column, as the stock collator does: prompt, task and length are the column's."""
        router_mapping = stock._resolve_router_mapping(batch)
        model = model_of(self.preprocess_fn)
        prompts = stock._resolve_prompts(batch)
        if isinstance(stock.prompts, Mapping) and _by_dataset(stock.prompts):
            prompts = stock.prompts.get(batch["dataset_name"])  # None: they are for other datasets
        if _by_dataset(stock.router_mapping) and "dataset_name" not in batch:
            raise ValueError(
                f"router_mapping={stock.router_mapping!r} is by dataset, and this dataset has no name: all texts would "
                "take the default route. Give a mapping of columns, or a dict of datasets."
            )
        for name, mapping in (("prompts", prompts), ("router_mapping", router_mapping)):
            if isinstance(mapping, Mapping) and (unknown := set(mapping) - {"query", "documents"}):
                raise ValueError(
                    f"{name} names the column(s) {sorted(unknown)}, but the text columns of a distillation dataset are "
                    "'query' and 'documents'; these entries would have no effect. Rename them; for several datasets of "
                    "other columns give one mapping each: {dataset name: {column: ...}}."
                )
        task = router_mapping.get(column, TASKS[column])
        if prompts is None:
            prompt = None if model is None else _own_prompt(model, task, texts)
        else:
            prompt = stock._get_prompt_for_column(prompts, column)
        options: dict[str, Any] = {"prompt": prompt, "task": task}
        if (max_length := stock._get_max_length_for_task(task)) is not None:
            options["max_length"] = max_length
        try:
            features = self.preprocess_fn(texts, **options)
        except ValueError as error:
            if "No route found" not in str(error):
                raise
            raise ValueError(
                f"the model's Router has no route for the column {column!r}: {error} Name the routes in the training "
                "arguments: router_mapping={'query': ROUTE, 'documents': ROUTE}."
            ) from error
        for key, value in features.items():
            batch[f"{prefix}_{key}"] = value
        if column in router_mapping or model is None or reads_task(model):
            batch[f"{prefix}_task"] = task


def _own_prompt(model: BaseModel, task: str, texts: Sequence[str]) -> str | None:
    """The model's own prompt for a task, where nobody has given one."""
    prompt = own_prompt(model, task) or None
    if prompt is not None and all(text.startswith(prompt) for text in texts):
        raise ValueError(
            f"all texts of a batch begin with the model's own prompt {prompt!r}, which encode_{task} and this collator "
            "put in front of them: they would have it twice. Take it off the texts, or give the collator prompts={}."
        )
    return prompt


def _by_dataset(mapping: Any) -> bool:
    """Whether a mapping of prompts or routes has datasets' names in front of the columns'."""
    return isinstance(mapping, Mapping) and any(isinstance(value, Mapping) for value in mapping.values())


def _is_of_the_host(row: Mapping[str, Any]) -> bool:
    """Whether a row is of an ordinary dataset: no lists but its label, and messages of a chat."""
    lists = {name: value for name, value in row.items() if _is_list(value) and name not in DEFAULT_LABEL_COLUMNS}
    return "documents" not in row and all(value and isinstance(value[0], Mapping) for value in lists.values())


def _positives(row: dict[str, Any]) -> Any:
    """The row's flags; without the column, the first document is the positive."""
    return row["positives"] if "positives" in row else [True] + [False] * (len(row["documents"]) - 1)


def _key(kind: str, value: str | int) -> int:
    """63 bits of a text or an id, the same in every process."""
    digest = blake2b(repr((kind, value)).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _known(rows: Sequence[dict[str, Any]], texts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The fields of :class:`st_m3se.losses.gather.Known`: a document has a key for its text and for each of its ids.

    The texts' keys come first, in order.
    """
    keys_of_texts = {text: _key("text", text) for text in texts}
    documents = {key: texts[text] for text, key in keys_of_texts.items()}
    relevant: list[list[int]] = []
    for row in rows:
        ids = row.get("document_ids", [None] * len(row["documents"]))
        known = {_key("id", relevant_id) for relevant_id in row.get("relevant_ids", ())}
        for text, document_id, flag in zip(row["documents"], ids, _positives(row), strict=True):
            if document_id is not None:
                documents[_key("id", document_id)] = texts[text]
            if flag:
                known.update([keys_of_texts[text]] + ([] if document_id is None else [_key("id", document_id)]))
        relevant.append(sorted(known))
    width = max(map(len, relevant))
    return {
        "queries": torch.tensor([_key("text", row["query"]) for row in rows]),
        "relevant": torch.tensor([keys + [-1] * (width - len(keys)) for keys in relevant], dtype=torch.int64),
        "documents": torch.tensor(list(documents)),
        "rows": torch.tensor(list(documents.values())),
    }


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_ids(place: int, row: dict[str, Any]) -> None:
    count = len(row["documents"])
    for name, expected in (("document_ids", f"{count} ids"), ("relevant_ids", "ids")):
        ids = row.get(name, [0] * count)
        of_length = _is_list(ids) and (name == "relevant_ids" or len(ids) == count)
        if not of_length or not all(isinstance(value, (str, int)) for value in ids):
            raise ValueError(
                f"row {place}: `{name}` must be a list of {expected}, each str or int, got {ids!r:.200}. Without it a "
                "document known to be relevant could become an in-batch negative. Complete the column or remove it."
            )
    if "relevant_ids" in row and "document_ids" not in row:
        raise ValueError(
            f"row {place}: `relevant_ids` without `document_ids`: no document could be recognised by its id, and those "
            "known to be relevant would be in-batch negatives. Add `document_ids`, or remove `relevant_ids`."
        )


def _check_row(place: int, row: dict[str, Any], has_positives: bool) -> None:
    """Refuse a row that is not of the documented form.

    Raises:
        ValueError: With the row's place in the batch, what was expected, what came, and the remedy.
    """
    if missing := [column for column in COLUMNS if column not in row]:
        raise ValueError(
            f"DistillationCollator expects the columns {list(COLUMNS)}, and row {place} lacks {missing} (it has "
            f"{list(row)}). Rename the dataset's columns; for one column per document use the stock collator."
        )
    if unknown := set(row) - {*COLUMNS, *OPTIONAL}:
        raise ValueError(
            f"DistillationCollator does not know the column(s) {sorted(unknown)} and would leave them out of "
            "training. Remove them with dataset.remove_columns, or rename them."
        )
    if ("positives" in row) != has_positives:
        raise ValueError(
            f"row {place}: either every row has `positives` or none has, and row 0 differs. Document 0 would be the "
            "positive of some rows, whatever it is. Add the column to all rows, or remove it."
        )
    query, documents, scores = row["query"], row["documents"], row["scores"]
    if not isinstance(query, str):
        raise ValueError(f"row {place}: `query` must be a str, got {type(query).__name__}. Look ids up first.")
    if not _is_list(documents) or not documents or not all(isinstance(text, str) for text in documents):
        raise ValueError(
            f"row {place}: `documents` must be a list of at least one str, got {documents!r:.200}. Anything else would "
            f"be read as another text. Look ids up, and drop what is missing with its score. {AS_LISTS}"
        )
    if not _is_list(scores) or len(scores) != len(documents):
        came = f"{len(scores)} scores" if _is_list(scores) else type(scores).__name__
        raise ValueError(
            f"row {place}: `scores` must be a list with one teacher score for each of the {len(documents)} documents, "
            f"got {came}. A score for the wrong document would be learned. Score each document. {AS_LISTS}"
        )
    for score in scores:
        # A Real is also the numpy.float32 that CrossEncoder.predict returns.
        if score is not None and (isinstance(score, bool) or not isinstance(score, Real)):
            raise ValueError(
                f"row {place}: a teacher score must be a float, or None if not scored, got {score!r}. It would be "
                "learned as a number that the teacher never gave. Convert the column, or score the documents again."
            )
        if score is not None and abs(float(score)) > LARGEST_SCORE:
            raise ValueError(
                f"row {place}: a teacher score must be finite, and at most {LARGEST_SCORE:g} so that the squares of "
                f"margins are finite in single precision too, got {score!r}: the weights would become NaN. Use None "
                "for 'not scored'."
            )
    positives = _positives(row)
    if not _is_list(positives) or len(positives) != len(documents):
        raise ValueError(
            f"row {place}: `positives` must be a list of {len(documents)} bools, got {positives!r:.200}. A wrong "
            f"document would be the positive. Complete the column, or remove it if document 0 is it. {AS_LISTS}"
        )
    if not all(isinstance(flag, (bool, np.bool_)) for flag in positives):
        raise ValueError(
            f"row {place}: `positives` must hold bools, one per document, got {positives!r:.200}. Places of positives, "
            "or grades, would mark wrong documents. Convert them, e.g. [grade >= 1 for grade in grades]."
        )
    _check_ids(place, row)
    relevant = {text for text, flag in zip(documents, positives, strict=True) if flag}
    for text, flag in zip(documents, positives, strict=True):
        if not flag and text in relevant:
            raise ValueError(
                f"row {place}: the document {text!r:.80} is in the list as a positive and as a negative. The two "
                "copies have one embedding, so no margin between them can be learned. Keep the positive one."
            )
