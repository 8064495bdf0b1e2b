"""What the losses share: from the trainer's features and labels to student scores ``[Q, D]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import SimilarityFunction, maxsim, mean_maxsim, similarity_fct_name
from torch import Tensor, nn

from st_m3se.encoding.batch import (
    CachedEncoding,
    check_caching,
    check_student,
    encode,
    is_multi_vector,
    widened,
    with_tasks,
)
from st_m3se.encoding.host import calling_trainer
from st_m3se.encoding.positions import check_own_lengths
from st_m3se.encoding.rows import Features, has_tokens, in_order, is_sliceable, merge_columns
from st_m3se.losses.checks import TrainingChecks, check_collator, check_routes
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
from st_m3se.losses.late_interaction import (
    listed_scores,
    score_matrix,
    scoreable,
    token_similarity,
)
from st_m3se.losses.scale import Matches, ScaleCheck, default_scale

__all__ = ["DistillationLoss", "InBatchLoss", "InBatchOptions", "Options"]

LABEL_KEYS = ("scores", "positives", "mask", "index")
Column = Any
"""Features, or the embeddings that another loss has made of them."""
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


class DistillationLoss(CachedEncoding, nn.Module):
    """Base of the losses: encodes a batch, scores it with the student, and leaves the rest to :meth:`score_loss`.

    Labels come in two forms:

    - a float tensor ``[Q, D]`` of teacher scores with ``1 + D`` columns (query, document_1 ... document_D), from the
      stock collator or ``model.fit``; document_1 is the positive, NaN marks an unscored negative; or
    - the mapping that :class:`~st_m3se.DistillationCollator` makes from ragged lists, with two columns: the queries
      and the batch's distinct documents.

    Args:
        model: The student: a SentenceTransformer, SparseEncoder or MultiVectorEncoder.
        scale: Multiplies the similarity. None: 20 where that is a cosine, 1 otherwise. A cosine lies in [-1, 1] and the
            margins of a cross-encoder reach 20; 20 is also what most bi-encoders were trained with.
        similarity_fct: From query embeddings ``[Q, dim]`` and document embeddings ``[U, dim]`` to student scores
            ``[Q, U]``, e.g. ``util.dot_score``; for a MultiVectorEncoder a function of
            ``sentence_transformers.multi_vector_encoder.scoring``, which sees the batch's distinct documents as
            ``[U, 1, tokens, dim]``, e.g. ``XTRScores(top_k=128)``. None: the model's own similarity.
        mini_batch_num_tokens: Cache gradients over mini-batches of at most this many tokens, so that memory does
            not grow with the list length. None: no caching, which is faster where memory allows.

    Raises:
        ValueError: On an option out of range, and in :meth:`forward` on columns or labels that do not fit, and on a
            first training batch that holds nothing to learn from.
    """

    needs_positives: ClassVar[bool] = False
    """Whether every list must hold a positive."""
    matches: ClassVar[Matches | None] = None
    """What the loss compares with the teacher: "margins", scores in absolute units, which ``scale`` must fit; the
    teacher's "odds"; its "distribution", or "rankings" drawn from it; None: none of these."""

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        mini_batch_num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_student(type(self).__name__, model)
        if scale is not None and (
            isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf
        ):
            raise ValueError(
                f"scale must be a positive finite number, got {scale!r}: it multiplies the similarity. Leave it out for "
                "what suits the model."
            )
        if similarity_fct is not None and not callable(similarity_fct):
            raise ValueError(
                f"similarity_fct must be a function of two matrices of embeddings, such as util.dot_score, got "
                f"{similarity_fct!r}. To use the model's own, set its similarity_fn_name and leave this None."
            )
        check_caching(model, mini_batch_num_tokens)
        check_own_lengths(model)
        self.model = model
        # Resolved now: the trainer replaces self.model by a wrapper that may have no similarity of its own.
        self.similarity_fct = similarity_fct or SimilarityFunction.to_similarity_fn(model.similarity_fn_name)
        self.multi_vector = is_multi_vector(model)
        if self.multi_vector:
            self.similarity_fct = token_similarity(type(self).__name__, self.similarity_fct)
        if scale is None:  # MaxSim adds up the cosines of a query's tokens
            scale = 1.0 if self.similarity_fct is maxsim else default_scale(model, self.similarity_fct)
        self.scale = float(scale)
        self.in_batch_negatives = self.gather_across_devices = False
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.uses_gradient_cache = mini_batch_num_tokens is not None
        self._batches = 0  # in training, for messages
        self._counted: Any = None  # the teacher's scores of the last one
        self._checks = TrainingChecks(type(self).__name__)
        temperature = getattr(self, "teacher_temperature", 1.0)
        name = type(self).__name__
        self._scale_check = ScaleCheck(name, self.scale, self.matches, temperature) if self.matches else None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move the loss; a trainer does it first of all, and is looked at before it reads a row."""
        if (trainer := calling_trainer()) is not None:
            check_collator(trainer)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

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
        if self.multi_vector:
            columns = with_tasks(type(self).__name__, self.model, columns)
        check_routes(self.model, columns)
        self._count(labels)
        if torch.is_grad_enabled():
            if not isinstance(labels, Mapping):
                self._checks.columns(self.model, columns)
            self._checks.student(self, self.similarity_fct)
        if isinstance(labels, Mapping):
            documents, lists = self._from_collator(columns, labels)
        else:
            documents, lists = self._from_columns(columns, labels)
        self._check_lists(lists)
        if self.in_batch_negatives:
            if lists.known is None and all(map(has_tokens, [columns[0], documents[0]])):
                lists = replace(lists, known=_known_by_tokens(columns[0], documents[0], lists))
            elif lists.known is not None and has_tokens(columns[0]):
                # Queries of the same tokens are one query to the model, however they are spelt.
                lists = replace(lists, known=lists.known._replace(queries=text_keys(columns[0])))
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
            return self.forward_cached([queries, *documents], lists)
        of_queries = encode(self.model, queries)
        of_documents = [embedding for features in documents for embedding in encode(self.model, features)]
        return self.calculate_loss([of_queries, of_documents], lists)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return the batch's loss from embeddings that another loss has made: a scalar.

        The losses of sentence-transformers that hold another one call this: ``SpladeLoss``, ``CachedSpladeLoss``,
        ``CSRLoss``, and its recipe of combining losses.

        Args:
            embeddings: One tensor ``[Q, dim]`` per column, the queries first; or, with the labels of
                :class:`~st_m3se.DistillationCollator`, the queries ``[Q, dim]`` and the distinct documents
                ``[U, dim]``.
            labels: Teacher scores ``[Q, D]``, or the mapping of :class:`~st_m3se.DistillationCollator`.

        Raises:
            ValueError: On columns or labels that do not fit, on ``mini_batch_num_tokens`` (the embeddings are there
                already), and on ``in_batch_negatives`` or ``gather_across_devices`` where the texts cannot be known.
        """
        name, columns = type(self).__name__, list(embeddings)
        self._count(labels)
        if self.multi_vector:
            raise ValueError(
                f"{name} trains a MultiVectorEncoder, whose texts have an embedding per token and a mask of those that "
                "are scored; from embeddings alone it cannot know the mask. Let it encode: give it to the trainer itself."
            )
        if self.uses_gradient_cache:
            raise ValueError(
                f"{name} has mini_batch_num_tokens={self.mini_batch_num_tokens}, and is inside another loss that has "
                "encoded the whole batch already: nothing is left to cache, and memory would grow with the list "
                "length all the same. Set mini_batch_num_tokens of the outer loss (CachedSpladeLoss has it) and leave "
                f"it None in {name}."
            )
        if isinstance(labels, Mapping):
            documents, lists = self._from_collator(columns, labels)
        else:
            documents, lists = self._from_columns(columns, labels)
        self._check_lists(lists)
        if self.in_batch_negatives and lists.known is None:
            raise ValueError(
                f"{name} has in_batch_negatives=True, and the labels hold no `known`: what is relevant to a query could "
                f"not be kept out of its negatives. {COLLATOR_HINT}."
            )
        if self.gather_across_devices and lists.known is not None:
            lists = replace(lists, keys=lists.known.documents[: len(documents[0])])  # those of the texts come first
        return self.calculate_loss([columns[:1], documents], lists)

    def _count(self, labels: Any) -> None:
        """Count a batch once, though MatryoshkaLoss and AdaptiveLayerLoss hand it in several times."""
        scores = labels.get("scores") if isinstance(labels, Mapping) else labels
        if torch.is_grad_enabled() and (scores is None or scores is not self._counted):
            self._batches, self._counted = self._batches + 1, scores

    def _check_lists(self, lists: Lists) -> None:
        """Refuse lists without what the loss needs."""
        if self.needs_positives and not bool((lists.positives & lists.mask).any(1).all()):
            rows = (~(lists.positives & lists.mask).any(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"{type(self).__name__} compares positives with negatives, but row(s) {rows} of the batch have no "
                "positive. Mark at least one document of each list in `positives`, or drop these lists."
            )
        if torch.is_grad_enabled() and self.needs_positives:
            self._checks.positives(lists.scores, lists.positives, lists.mask)

    def calculate_loss(  # type: ignore[override]  # the host types labels as a tensor
        self, reps: list[list[Tensor]], labels: Lists, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings: ``reps`` holds the queries' chunks and the documents' chunks."""
        dtype = torch.promote_types(reps[0][0].dtype, torch.float32)
        queries, documents = widened([piece.to(dtype) for piece in reps[0]]), [piece.to(dtype) for piece in reps[1]]
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
            gathered, numbers, begin = gather_documents(widened(documents), labels.keys)
            documents, index = [gathered], index + begin
        # Half precision has three digits: a cosine times a scale of 20 would be off by 0.1.
        with torch.autocast(queries.device.type, enabled=False):
            if self.multi_vector:
                with_tokens = scoreable(documents, numbers)
                mask = mask & with_tokens[index]
            if self.multi_vector and not self.in_batch_negatives and self.similarity_fct in (maxsim, mean_maxsim):
                listed = listed_scores(queries, documents, index, mask, self.similarity_fct)
            else:
                similarity = self._similarity(queries, documents)
                listed = similarity.gather(1, index)
            if torch.is_grad_enabled() and self._scale_check is not None:  # a trainer never puts a loss in eval mode
                self._scale_check(listed, labels.scores, mask)
            student_scores = listed * self.scale
            teacher_scores, positives = labels.scores, labels.positives
            if self.in_batch_negatives:
                joining = _joining(labels, index, numbers, begin, similarity.shape[1])
                joining = joining & with_tokens if self.multi_vector else joining
                student_scores = torch.cat([student_scores, similarity * self.scale], dim=1)
                teacher_scores = torch.cat([teacher_scores, torch.full_like(similarity, torch.nan)], dim=1)
                positives = torch.cat([positives, torch.zeros_like(joining)], dim=1)
                mask = torch.cat([mask, joining], dim=1)
            loss = self.score_loss(student_scores, teacher_scores, positives, mask)
        if torch.is_grad_enabled():
            require_finite(loss, queries, documents, labels.scores, type(self).__name__, self._batches)
        self._checks.learned(loss, student_scores, teacher_scores, positives, mask)
        if with_backward:
            torch.autograd.backward(loss)
            return loss.detach()
        return loss

    def _similarity(self, queries: Tensor, documents: list[Tensor]) -> Tensor:
        """Of every query with every document, ``[Q, U]``, before the scale."""
        if self.multi_vector:
            similarity = score_matrix(queries, documents, self.similarity_fct)
        else:
            similarity = self.similarity_fct(queries, torch.cat(documents))
        shape = [len(queries), sum(map(len, documents))]
        if list(similarity.shape) != shape:
            raise ValueError(
                f"similarity_fct must return a matrix [Q, U] = {shape} of every query with every document, got "
                f"{list(similarity.shape)}. Use a matrix function such as util.cos_sim, not a pairwise one."
            )
        return similarity

    def _from_collator(self, columns: list[Column], labels: Mapping[str, Any]) -> tuple[list[Column], Lists]:
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
        rows = columns[1] if isinstance(columns[1], Tensor) else columns[1].get("attention_mask")
        if isinstance(rows, Tensor) and rows.ndim >= 2 and int(lists.index.max()) >= len(rows):
            raise ValueError(
                f"{name}: the labels point to document {int(lists.index.max())}, and only {len(rows)} documents came. "
                "Something cut the batch to its number of queries, as accelerate does with a streamed dataset: set "
                "accelerator_config={'dispatch_batches': False} in the training arguments."
            )
        if self.in_batch_negatives and "known" in labels:
            lists = replace(lists, known=Known(**labels["known"]))
        return [columns[1]], lists

    def _from_columns(self, columns: list[Column], labels: Any) -> tuple[list[Column], Lists]:
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
                f"document per query leaves nothing to compare: add a negative. Rows of lists: {COLLATOR_HINT}."
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
                "whose margins would be infinite when they are squared, or NaN for document_1, the positive. The loss "
                "of these rows would be infinite or empty. Score these documents again or drop the rows; NaN is allowed "
                "for negatives, as 'not scored'."
            )
        positives = torch.zeros_like(labels, dtype=torch.bool)
        positives[:, 0] = True
        mask = torch.ones_like(positives)
        documents, index = columns[1:], torch.arange(labels.numel(), device=labels.device)
        merged = None if any(isinstance(column, Tensor) for column in documents) else merge_columns(documents)
        if merged is not None:
            documents = [merged]
        elif self.in_batch_negatives:
            raise ValueError(
                "in_batch_negatives must know which documents are the same text, which it cannot see in these columns "
                "(flattened, static, unlike each other, or embeddings that another loss has made). "
                f"{COLLATOR_HINT}: it compares the texts."
            )
        return documents, Lists(labels, positives, mask, index.reshape(count, -1).T)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        return {
            "similarity_fct": similarity_fct_name(self.similarity_fct),
            "scale": self.scale,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }


class Options(TypedDict, total=False):
    """What the losses with options of their own hand on to :class:`DistillationLoss`."""

    mini_batch_num_tokens: int | None


class InBatchOptions(Options, total=False):
    """What the losses with options of their own hand on to :class:`InBatchLoss`."""

    in_batch_negatives: bool
    gather_across_devices: bool


class InBatchLoss(DistillationLoss):
    """Base of the losses in which a document without a teacher score has a part, and so other queries' documents may.

    Args:
        model: See :class:`DistillationLoss`.
        scale: Likewise.
        similarity_fct: Likewise.
        in_batch_negatives: Let the other queries' documents join as unscored negatives, except those that are in the
            query's own list or known to be relevant to it: a positive of the same query in another row of the batch, or
            one of the ``relevant_ids`` that :class:`~st_m3se.DistillationCollator` was given.
        mini_batch_num_tokens: See :class:`DistillationLoss`.
        gather_across_devices: Let the documents of all processes' batches join, not only this one's; needs
            ``in_batch_negatives``. Every process must then encode a batch at every step.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        in_batch_negatives: bool = False,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        if gather_across_devices and not in_batch_negatives:
            raise ValueError(
                "gather_across_devices=True gathers in-batch negatives, and in_batch_negatives is False: nothing "
                "would be gathered. Set in_batch_negatives=True too."
            )
        super().__init__(model, scale, similarity_fct, mini_batch_num_tokens=mini_batch_num_tokens)
        self.in_batch_negatives, self.gather_across_devices = in_batch_negatives, gather_across_devices

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        own = {
            "in_batch_negatives": self.in_batch_negatives,
            "gather_across_devices": self.gather_across_devices,
        }
        return super().get_config_dict() | own
