"""What the losses share: from the trainer's features and labels to student scores ``[Q, D]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import SimilarityFunction, cos_sim, similarity_fct_name
from torch import Tensor, nn

from st_m3se.encoding import TRIM_EVERY, check_caching, encode, give_memory_back
from st_m3se.host import CachedLossMixin, RandContext
from st_m3se.losses.finite import LARGEST_SCORE, require_finite
from st_m3se.losses.gather import (
    NO_KEY,
    Known,
    gather_documents,
    gather_known,
    not_relevant,
    text_keys,
    unlisted,
    unlisted_texts,
)
from st_m3se.losses.scale import ScaleCheck
from st_m3se.rows import Features, has_tokens, in_order, is_sliceable, merge_columns, slice_rows

__all__ = ["DistillationLoss"]

LABEL_KEYS = ("scores", "positives", "mask", "index")
COLLATOR_HINT = "Pass data_collator=DistillationCollator(preprocess_fn=model.preprocess) to the trainer"


@dataclass(frozen=True)
class Lists:
    """The candidate lists of one batch, each tensor ``[Q, D]``."""

    scores: Tensor  # teacher scores, NaN where unscored
    positives: Tensor  # bool
    mask: Tensor  # bool, True for real documents
    index: Tensor  # int64, rows of the U document embeddings
    queries: Tensor | None = None  # int64 [Q], rows of the query embeddings; None: one each, in order
    keys: Tensor | None = None  # int64 [U], where documents of other processes are to join
    known: Known | None = None  # where other queries' documents are to join


def _known_by_tokens(queries: Features, documents: Features, lists: Lists) -> Known:
    """What the rows alone tell: a positive of one row is relevant to the same query in another row."""
    keys = text_keys(documents)
    relevant = keys[lists.index].masked_fill(~(lists.positives & lists.mask), NO_KEY)
    return Known(text_keys(queries), relevant, keys, torch.arange(len(keys), device=keys.device))


def _joining(lists: Lists, index: Tensor, numbers: Tensor | None, begin: int, count: int) -> Tensor:
    """Which of ``count`` documents join a query's list as negatives: bool ``[Q, count]``.

    ``index``, ``numbers`` and ``begin`` are those of :func:`gather_documents`; None and 0 where nothing was gathered.
    """
    if numbers is None:
        joining = unlisted(index, lists.mask, count)
        return joining if lists.known is None else joining & not_relevant(lists.known, lists.known.queries, count)
    joining = unlisted_texts(numbers, index, lists.mask)
    if lists.known is None:
        return joining
    known, slot = gather_known(lists.known, begin), numbers.clamp(min=0)
    known = known._replace(rows=slot[known.rows])  # what is known of one copy of a text is known of all
    return joining & not_relevant(known, lists.known.queries, count)[:, slot]


class DistillationLoss(CachedLossMixin, nn.Module):
    """Base of the losses: encodes a batch, scores it with the student, and leaves the rest to :meth:`score_loss`.

    Labels come in two forms:

    - a float tensor ``[Q, D]`` of teacher scores with ``1 + D`` columns (query, document_1 ... document_D), from the
      stock collator or ``model.fit``; document_1 is the positive, NaN marks an unscored negative; or
    - the mapping that :class:`~st_m3se.DistillationCollator` makes from ragged lists, with two columns: the queries
      and the batch's distinct documents.

    Args:
        model: The student.
        similarity_fct: From query embeddings ``[Q, dim]`` and document embeddings ``[U, dim]`` to student scores
            ``[Q, U]``, e.g. ``util.dot_score``. None: the model's own similarity.
        scale: Multiplies the similarity. A cosine lies in [-1, 1], cross-encoder margins reach 20: ``scale`` must
            bridge the two. 1.0 suits dot products.
        in_batch_negatives: Let the other queries' documents join as unscored negatives, except those that are in the
            query's own list or known to be relevant to it: a positive of the same query in another row of the batch, or
            one of the ``relevant_ids`` that :class:`~st_m3se.DistillationCollator` was given. Only for losses in which
            an unscored document has a part.
        mini_batch_num_tokens: Cache gradients over mini-batches of at most this many tokens, so that memory does
            not grow with the list length. None: no caching, which is faster where memory allows.
        gather_across_devices: Let the documents of all processes' batches join, not only this one's; needs
            ``in_batch_negatives``. Every process must then encode a batch at every step.

    Raises:
        ValueError: On an option out of range, and in :meth:`forward` on columns or labels that do not fit.
    """

    uses_unscored: ClassVar[bool] = True
    """Whether an unscored document takes part in the loss, so that in-batch negatives make sense."""
    needs_positives: ClassVar[bool] = False
    """Whether every list must hold a positive."""
    matches_margins: ClassVar[bool] = False
    """Whether the loss compares student scores with teacher scores in absolute units, so that ``scale`` must fit."""

    def __init__(
        self,
        model: SentenceTransformer,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        scale: float = 1.0,
        in_batch_negatives: bool = False,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"scale must be a positive finite number, got {scale!r}: it multiplies the similarity.")
        if similarity_fct is not None and not callable(similarity_fct):
            raise ValueError(
                f"similarity_fct must be a function of two matrices of embeddings, such as util.dot_score, got "
                f"{similarity_fct!r}. To use the model's own, set its similarity_fn_name and leave this None."
            )
        if in_batch_negatives and not self.uses_unscored:
            raise ValueError(
                f"{type(self).__name__} leaves documents without a teacher score out, so in_batch_negatives=True would "
                "change nothing. Use M3SELoss, RankDistilLoss, CoupledRankDistilLoss or SoftmaxCrossEntropyLoss."
            )
        if gather_across_devices and not in_batch_negatives:
            raise ValueError(
                "gather_across_devices=True gathers in-batch negatives, and in_batch_negatives is False: nothing "
                "would be gathered. Set in_batch_negatives=True too."
            )
        check_caching(model, mini_batch_num_tokens)
        self.model = model
        # Resolved now: the trainer replaces self.model by a wrapper that may have no similarity of its own.
        self.similarity_fct = similarity_fct or SimilarityFunction.to_similarity_fn(model.similarity_fn_name)
        self.scale = scale
        self.in_batch_negatives = in_batch_negatives
        self.gather_across_devices = gather_across_devices
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.mini_batch_size = 1  # CachedLossMixin asks for it; the token budget decides
        self.uses_gradient_cache = mini_batch_num_tokens is not None
        self._mini_batches = 0
        self._batches = 0  # in training, for messages
        bounded = self.matches_margins and self.similarity_fct is cos_sim
        self._scale_check = ScaleCheck(type(self).__name__, scale) if bounded else None

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """The loss of scores, each tensor ``[Q, D]``; one call of a function of :mod:`st_m3se.functional`."""
        raise NotImplementedError

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | Mapping[str, Any]) -> Tensor:
        """Return the batch's loss, a scalar.

        Args:
            sentence_features: One feature dict per column, the queries first.
            labels: Teacher scores ``[Q, D]``, or the mapping of :class:`~st_m3se.DistillationCollator`.
        """
        columns = list(sentence_features)
        self._batches += torch.is_grad_enabled()
        if isinstance(labels, Mapping):
            documents, lists = self._from_collator(columns, labels)
        else:
            documents, lists = self._from_columns(columns, labels)
        if self.needs_positives and not bool((lists.positives & lists.mask).any(1).all()):
            rows = (~(lists.positives & lists.mask).any(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"{type(self).__name__} compares positives with negatives, but row(s) {rows} of the batch have no "
                "positive. Mark at least one document of each list in `positives`, or drop these lists."
            )
        if torch.is_grad_enabled() and self._scale_check is not None:  # the trainer never puts a loss in eval mode
            self._scale_check(lists.scores, lists.mask)

        if self.in_batch_negatives and lists.known is None and all(map(has_tokens, [columns[0], documents[0]])):
            lists = replace(lists, known=_known_by_tokens(columns[0], documents[0], lists))
        if len(documents) == 1 and is_sliceable(documents[0]):
            features, place = in_order(self.model, documents[0])
            lists = replace(lists, index=place[lists.index])
            if self.gather_across_devices:
                keys = text_keys(documents[0])
                lists = replace(lists, keys=keys.new_empty(int(place.max()) + 1).scatter_(0, place, keys))
            if lists.known is not None:
                lists = replace(lists, known=lists.known._replace(rows=place[lists.known.rows]))
            documents = [features]
        elif self.gather_across_devices:
            raise ValueError(
                "gather_across_devices compares the tokens of documents between processes, and these features have "
                "no padded rows of tokens (flattened, static or images). Leave gather_across_devices=False."
            )
        elif self.uses_gradient_cache:
            raise ValueError(
                "mini_batch_num_tokens needs features with one padded row per text, and these cannot be split: they "
                "are flattened, hold images, differ between columns, or a wrapper such as AdaptiveLayerLoss hands "
                "state on through them. Leave mini_batch_num_tokens=None."
            )
        queries = columns[0]
        if is_sliceable(queries):
            queries, place = in_order(self.model, queries)
            lists = replace(lists, queries=place)
        if self.uses_gradient_cache:
            return self.forward_cached([queries, *documents], lists)  # type: ignore[arg-type]
        of_queries = encode(self.model, queries)
        of_documents = [embedding for features in documents for embedding in encode(self.model, features)]
        return self.calculate_loss([of_queries, of_documents], lists)

    def embed_minibatch(
        self,
        sentence_feature: Features,
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed a mini-batch of the gradient cache; the tokens alive are the mini-batch's, whatever its chunks."""
        features = slice_rows(sentence_feature, begin, end)
        if with_grad and all(value.device.type == "cpu" for value in features.values() if isinstance(value, Tensor)):
            self._mini_batches += 1
            if self._mini_batches % TRIM_EVERY == 0:
                give_memory_back()
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*features.values()) if copy_random_state else None
            return torch.cat(encode(self.model, features)), state

    def calculate_loss(  # type: ignore[override]  # the host types labels as a tensor
        self, reps: list[list[Tensor]], labels: Lists, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings: ``reps`` holds the queries' chunks and the documents' chunks."""
        queries, documents = torch.cat(reps[0]), torch.cat(reps[1])
        dtype = torch.promote_types(queries.dtype, torch.float32)
        queries, documents = queries.to(dtype), documents.to(dtype)
        if labels.queries is not None:
            queries = queries[labels.queries]
        if len(labels.index) != len(queries):
            raise ValueError(
                f"{type(self).__name__} expects labels with one row per query, got {len(labels.index)} rows for "
                f"{len(queries)} queries: a query would be trained on another one's list. Check the collator."
            )
        index, mask = labels.index, labels.mask
        numbers, begin = None, 0
        if labels.keys is not None:
            documents, numbers, begin = gather_documents(documents, labels.keys)
            index = index + begin
        # Half precision has three digits: a cosine times a scale of 20 would be off by 0.1.
        with torch.autocast(queries.device.type, enabled=False):
            similarity = self.similarity_fct(queries, documents) * self.scale
            if similarity.shape != (len(queries), len(documents)):
                raise ValueError(
                    f"similarity_fct must return a matrix [Q, U] = {[len(queries), len(documents)]} of every query "
                    f"with every document, got {list(similarity.shape)}. Use a matrix function such as util.cos_sim, "
                    "not a pairwise one."
                )
            student_scores = similarity.gather(1, index)
            teacher_scores, positives = labels.scores, labels.positives
            if self.in_batch_negatives:
                joining = _joining(labels, index, numbers, begin, len(documents))
                student_scores = torch.cat([student_scores, similarity], dim=1)
                teacher_scores = torch.cat([teacher_scores, torch.full_like(similarity, torch.nan)], dim=1)
                positives = torch.cat([positives, torch.zeros_like(joining)], dim=1)
                mask = torch.cat([mask, joining], dim=1)
            loss = self.score_loss(student_scores, teacher_scores, positives, mask)
        if torch.is_grad_enabled():
            require_finite(loss, queries, documents, labels.scores, type(self).__name__, self._batches)
        if with_backward:
            torch.autograd.backward(loss)
            return loss.detach()
        return loss

    def _from_collator(self, columns: list[Features], labels: Mapping[str, Any]) -> tuple[list[Features], Lists]:
        name = type(self).__name__
        tensors = {key: value for key, value in labels.items() if key != "known"}
        if set(tensors) != set(LABEL_KEYS) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f"{name} expects the labels {list(LABEL_KEYS)}, got {list(labels)}. {COLLATOR_HINT}.")
        if len(columns) != 2:
            raise ValueError(
                f"{name} expects two columns beside list labels, the queries and the batch's distinct documents, got "
                f"{len(columns)}. {COLLATOR_HINT}."
            )
        lists = Lists(*(labels[key] for key in LABEL_KEYS))
        shapes = {key: list(labels[key].shape) for key in LABEL_KEYS}
        if lists.scores.ndim != 2 or any(shape != shapes["scores"] for shape in shapes.values()):
            raise ValueError(f"{name} expects labels of one shape [Q, D], got {shapes}. {COLLATOR_HINT}.")
        attention = columns[1].get("attention_mask")
        if isinstance(attention, Tensor) and attention.ndim == 2 and int(lists.index.max()) >= len(attention):
            raise ValueError(
                f"{name}: the labels point to document {int(lists.index.max())}, and only {len(attention)} documents came. "
                "Something cut the batch to its number of queries, as accelerate does with a streamed dataset: set "
                "accelerator_config={'dispatch_batches': False} in the training arguments."
            )
        if self.in_batch_negatives and "known" in labels:
            lists = replace(lists, known=Known(**labels["known"]))
        return [columns[1]], lists

    def _from_columns(self, columns: list[Features], labels: Any) -> tuple[list[Features], Lists]:
        """Read the stock collator's form: a tensor of scores and one column per document."""
        name, count = type(self).__name__, len(columns) - 1
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"{name} expects teacher scores as labels, a float tensor [Q, D], got {type(labels).__name__}. Add a "
                "column `label` with a list of scores per row, one for each document column."
            )
        if count < 2:
            raise ValueError(
                f"{name} expects at least 3 columns (query, document_1, document_2, ...), got {len(columns)}. One "
                "document per query leaves nothing to compare: add a negative."
            )
        if labels.ndim != 2 or labels.shape[1] != count:
            hint = (
                "A margin per row is the label of sentence-transformers' MarginMSELoss with one negative; this loss "
                "needs the scores themselves."
                if labels.ndim < 2
                else "Every document column needs its score, in the order of the columns. (MatryoshkaLoss cuts a label "
                "whose width equals the embedding size: use DistillationCollator, or another list length.)"
            )
            raise ValueError(
                f"{name} expects teacher scores of shape [Q, D] with D = {count}, one score for each document column, "
                f"got {list(labels.shape)}. {hint}"
            )
        if not labels.is_floating_point():
            raise ValueError(
                f"{name} expects floating point teacher scores, got {labels.dtype}. Relevance grades are not teacher "
                "scores: a loss on them would train towards the wrong margins. Score the documents with the teacher, "
                "or convert scores that happen to be whole numbers to floats."
            )
        large = labels.abs() > LARGEST_SCORE
        if bool(large.any()) or bool(labels[:, 0].isnan().any()):
            bad = (large.any(1) | labels[:, 0].isnan()).nonzero().flatten().tolist()
            raise ValueError(
                f"{name}: row(s) {bad} of the batch hold an infinite teacher score, or one beyond {LARGEST_SCORE:g}, "
                "whose margins would be infinite when they are squared, or NaN for document_1, the positive. The loss of these rows would be infinite or empty. Score these documents again or drop the "
                "rows; NaN is allowed for negatives, as 'not scored'."
            )
        positives = torch.zeros_like(labels, dtype=torch.bool)
        positives[:, 0] = True
        mask = torch.ones_like(positives)
        documents, index = columns[1:], torch.arange(labels.numel(), device=labels.device)
        merged = merge_columns(columns[1:])
        if merged is not None:
            documents = [merged]
        elif self.in_batch_negatives:
            raise ValueError(
                "in_batch_negatives must know which documents are the same text, which it cannot see in these "
                f"features (flattened, static or unlike between columns). {COLLATOR_HINT}: it compares the texts."
            )
        return documents, Lists(labels, positives, mask, index.reshape(count, -1).T)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        return {
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "scale": self.scale,
            "in_batch_negatives": self.in_batch_negatives,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
            "gather_across_devices": self.gather_across_devices,
        }
