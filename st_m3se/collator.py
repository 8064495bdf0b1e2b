"""From ragged rows to a batch: each distinct document once, and where each query's list finds its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from numbers import Real
from typing import Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from st_m3se.losses.finite import LARGEST_SCORE

__all__ = ["DistillationCollator"]

AS_LISTS = "(Arrays and tensors: pass lists, e.g. with dataset.with_format(None).)"
COLUMNS = ("query", "documents", "scores")
OPTIONAL = ("positives", "document_ids", "relevant_ids", "query_id", "dataset_name")


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

    A streamed dataset (``IterableDataset``) needs ``accelerator_config={"dispatch_batches": False}`` in the training
    arguments: accelerate would cut the documents to the number of queries.

    Args:
        preprocess_fn: ``model.preprocess``.
        router_mapping: As in the training arguments, for the columns ``query`` and ``documents``.
        prompts: As in the training arguments, for the columns ``query`` and ``documents``. A trainer does not hand
            its own ``prompts``, ``router_mapping`` or ``max_length`` to a collator that you pass: give them here.
        max_length: As in the training arguments.

    Returns:
        ``query_*`` and ``document_*`` features (``Q`` and ``U`` rows), and ``label``: the mapping of ``scores``,
        ``positives``, ``mask`` and ``index``, each ``[Q, D]``, that the losses of this package take; with
        ``document_ids``, also ``known``: keys of queries, documents and what is relevant, for in-batch negatives.

    Raises:
        ValueError: On rows that do not have this form, with the row's place in the batch.
    """

    valid_label_columns: list[str] = field(default_factory=lambda: ["scores"])

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate the rows of one batch."""
        if not features:
            return {}
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
        self._preprocess(batch, "query", "query", [row["query"] for row in features])
        self._preprocess(batch, "documents", "document", list(texts))

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
        # From padded tokens the loss finds equal texts itself.
        if any("document_ids" in row for row in features) or "document_attention_mask" not in batch:
            batch["label"]["known"] = _known(features, texts)
        return batch

    def _preprocess(self, batch: dict[str, Any], column: str, prefix: str, texts: list[str]) -> None:
        """Add the features of one column, as the stock collator does: prompt, task and length are the column's."""
        prompts, router_mapping = self._resolve_prompts(batch), self._resolve_router_mapping(batch)
        for name, mapping in (("prompts", prompts), ("router_mapping", router_mapping)):
            if isinstance(mapping, Mapping) and (unknown := set(mapping) - {"query", "documents"}):
                raise ValueError(
                    f"{name} names the column(s) {sorted(unknown)}, but the text columns of a distillation dataset are "
                    "'query' and 'documents'; these entries would have no effect. Rename them."
                )
        task = router_mapping.get(column)
        options: dict[str, Any] = {"prompt": self._get_prompt_for_column(prompts or {}, column), "task": task}
        if (max_length := self._get_max_length_for_task(task)) is not None:
            options["max_length"] = max_length
        for key, value in self.preprocess_fn(texts, **options).items():
            batch[f"{prefix}_{key}"] = value
        if task is not None:
            batch[f"{prefix}_task"] = task


def _positives(row: dict[str, Any]) -> Any:
    """The row's flags; without the column, the first document is the positive."""
    return row["positives"] if "positives" in row else [True] + [False] * (len(row["documents"]) - 1)


def _key(kind: str, value: str | int) -> int:
    """63 bits of a text or an id, the same in every process."""
    digest = blake2b(repr((kind, value)).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _known(rows: Sequence[dict[str, Any]], texts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The fields of :class:`st_m3se.losses.gather.Known`: a document has a key for its text and for each of its ids."""
    documents = {_key("text", text): place for text, place in texts.items()}
    relevant: list[list[int]] = []
    for row in rows:
        ids = row.get("document_ids", [None] * len(row["documents"]))
        known = {_key("id", relevant_id) for relevant_id in row.get("relevant_ids", ())}
        for text, document_id, flag in zip(row["documents"], ids, _positives(row), strict=True):
            keys = [_key("text", text)] if document_id is None else [_key("text", text), _key("id", document_id)]
            documents.update(dict.fromkeys(keys, texts[text]))
            known.update(keys if flag else ())
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
