"""The losses that M3SE is compared with, over the same lists, masks and caching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_m3se import functional
from st_m3se.losses.base import DistillationLoss, InBatchLoss, InBatchOptions, Options


class MarginMSELoss(DistillationLoss):
    """Margin MSE over all pairs of a positive and a negative.

    The definition is in :func:`st_m3se.functional.margin_mse_loss`. Unlike sentence-transformers' loss of the same
    name it takes scores and not margins as labels, ragged lists, and several positives per query.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.

    Inputs:
        As :class:`M3SELoss`.
    """

    needs_positives = True
    matches = "margins"

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.margin_mse_loss`."""
        return functional.margin_mse_loss(student_scores, teacher_scores, positives=positives, mask=mask)

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return """
@misc{hofstatter2020improving,
    title={Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author={Sebastian Hofst{\\"a}tter and Sophia Althammer and Michael Schr{\\"o}der and Mete Sertkan and Allan Hanbury},
    year={2020},
    eprint={2010.02666},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""


class ContrastiveLoss(InBatchLoss):
    """Each known positive against the negatives, without the teacher: the labels' part of a mixture, and a control.

    The definition is in :func:`st_m3se.functional.contrastive_loss`. With one positive a query it is the value and
    gradient of sentence-transformers' ``MultipleNegativesRankingLoss`` with hard negatives. It is here so that
    :class:`CombinedLoss` can add it to a distillation loss at the price of one encoding, and so that a control without
    a teacher trains on exactly the lists of the distilled student.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        in_batch_negatives: Let the other queries' documents join the negatives.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.
        gather_across_devices: Let the documents of all processes' batches join, with ``in_batch_negatives``.

    Inputs:
        As :class:`M3SELoss`. Teacher scores are not used.
    """

    needs_positives = True

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.contrastive_loss`."""
        return functional.contrastive_loss(student_scores, positives=positives, mask=mask)

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return """
@misc{oord2019representation,
    title={Representation Learning with Contrastive Predictive Coding},
    author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
    year={2019},
    eprint={1807.03748},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


class AllMarginsMSELoss(DistillationLoss):
    """All margins: every difference between two scores of a list is the teacher's.

    The definition is in :func:`st_m3se.functional.all_margins_mse_loss`. :class:`M3SELoss` keeps one margin for each
    positive, :class:`MarginMSELoss` those between positives and negatives; this one keeps those among negatives too, at
    the same cost, and needs no positives.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.
        top_temperature: None weighs all documents alike. A number T gives those that the teacher likes best about half
            of the weight, by ``softmax(t / T)``.

    Inputs:
        As :class:`M3SELoss`. Positives are not used.
    """

    matches = "margins"

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        top_temperature: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        if top_temperature is not None:
            functional._check_temperature("top_temperature", top_temperature)
        super().__init__(model, scale, similarity_fct, **options)
        self.top_temperature = top_temperature

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.all_margins_mse_loss`."""
        return functional.all_margins_mse_loss(
            student_scores, teacher_scores, top_temperature=self.top_temperature, mask=mask
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        return super().get_config_dict() | {"top_temperature": self.top_temperature}

    @property
    def citation(self) -> str:
        """BibTeX for the model card: the work on Margin MSE, whose margins these extend."""
        return """
@misc{hofstatter2020improving,
    title={Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author={Sebastian Hofst{\\"a}tter and Sophia Althammer and Michael Schr{\\"o}der and Mete Sertkan and Allan Hanbury},
    year={2020},
    eprint={2010.02666},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""


class ScoreMSELoss(DistillationLoss):
    """Score MSE: the student's scores are the teacher's.

    The definition is in :func:`st_m3se.functional.score_mse_loss`. It pins the scores themselves and not only their
    differences, which a bi-encoder finds hard: in the paper it is below the plain bi-encoder.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.

    Inputs:
        As :class:`M3SELoss`. Positives are not used.
    """

    matches = "margins"

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.score_mse_loss`."""
        return functional.score_mse_loss(student_scores, teacher_scores, mask=mask)

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return """
@misc{ba2014deep,
    title={Do Deep Nets Really Need to be Deep?},
    author={Lei Jimmy Ba and Rich Caruana},
    year={2014},
    eprint={1312.6184},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


class SoftmaxCrossEntropyLoss(InBatchLoss):
    """Softmax cross-entropy between the teacher's and the student's distribution over a query's documents.

    The definition is in :func:`st_m3se.functional.softmax_cross_entropy_loss`. It compares distributions, so a
    teacher's scale matters less than for the losses on margins.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        in_batch_negatives: Let the other queries' documents join the student's denominator.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.
        gather_across_devices: Let the documents of all processes' batches join, with ``in_batch_negatives``.
        student_temperature: Divides the student scores (after ``scale``).
        teacher_temperature: Divides the teacher scores; raise it where the teacher is too sure.

    Inputs:
        As :class:`M3SELoss`. Positives are not used: the teacher's scores decide.
    """

    matches = "distribution"

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        student_temperature: float = 1.0,
        teacher_temperature: float = 1.0,
        **options: Unpack[InBatchOptions],
    ) -> None:
        functional._check_temperature("student_temperature", student_temperature)
        functional._check_temperature("teacher_temperature", teacher_temperature)
        self.teacher_temperature = teacher_temperature
        super().__init__(model, scale, similarity_fct, **options)
        self.student_temperature = student_temperature

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.softmax_cross_entropy_loss`."""
        return functional.softmax_cross_entropy_loss(
            student_scores,
            teacher_scores,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature,
            mask=mask,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        own = {"student_temperature": self.student_temperature, "teacher_temperature": self.teacher_temperature}
        return super().get_config_dict() | own

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return """
@misc{hinton2015distilling,
    title={Distilling the Knowledge in a Neural Network},
    author={Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
    year={2015},
    eprint={1503.02531},
    archivePrefix={arXiv},
    primaryClass={stat.ML}
}
"""
