"""RankDistil as sentence-transformers losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor
from typing_extensions import Unpack

from st_m3se import functional
from st_m3se.losses.base import InBatchLoss, InBatchOptions

CITATION = """
@inproceedings{reddi2021rankdistil,
    title={RankDistil: Knowledge Distillation for Ranking},
    author={Reddi, Sashank and Pasumarthi, Rama Kumar and Menon, Aditya and Rawat, Ankit Singh and Yu, Felix and Kim, Seungyeon and Veit, Andreas and Kumar, Sanjiv},
    booktitle={Proceedings of the 24th International Conference on Artificial Intelligence and Statistics},
    year={2021},
    url={https://proceedings.mlr.press/v130/reddi21a.html}
}
"""


class RankDistilLoss(InBatchLoss):
    """RankDistil: match the teacher on its top k documents, push the rest down.

    The definition is in :func:`st_m3se.functional.rank_distil_loss`, with what is the paper's in it and what is ours.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        in_batch_negatives: Let the other queries' documents join below the top k.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.
        gather_across_devices: Let the documents of all processes' batches join, with ``in_batch_negatives``.
        top_k: How many of the teacher's documents to match; 8 is half of a usual list of 16.
        match: "binary" reads scores as log-odds, "score" matches them as they are.
        penalty_weight: Weight of the documents below the top k.

    Inputs:
        As :class:`M3SELoss`. Positives are not used: the teacher's order decides.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        top_k: int = 8,
        match: functional.Match = "binary",
        penalty_weight: float = 1.0,
        **options: Unpack[InBatchOptions],
    ) -> None:
        if match not in ("binary", "score"):
            raise ValueError(f'match must be "binary" or "score", got {match!r}.')
        functional._check_positive_int("top_k", top_k)
        functional._check_penalty_weight(penalty_weight)
        self.matches = "margins" if match == "score" else "odds"  # type: ignore[misc]
        super().__init__(model, scale, similarity_fct, **options)
        self.top_k = top_k
        self.match = match
        self.penalty_weight = penalty_weight

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.rank_distil_loss`."""
        return functional.rank_distil_loss(
            student_scores,
            teacher_scores,
            top_k=self.top_k,
            match=self.match,
            penalty_weight=self.penalty_weight,
            mask=mask,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        own = {"top_k": self.top_k, "match": self.match, "penalty_weight": self.penalty_weight}
        return super().get_config_dict() | own

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return CITATION


class CoupledRankDistilLoss(InBatchLoss):
    """Coupled RankDistil: the likelihood of rankings sampled from the teacher.

    The definition is in :func:`st_m3se.functional.coupled_rank_distil_loss`. Rankings are drawn from torch's global
    generator, which the trainer seeds.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        in_batch_negatives: Let the other queries' documents join behind the ranked ones, in every denominator.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.
        gather_across_devices: Let the documents of all processes' batches join, with ``in_batch_negatives``.
        top_k: The number of places that count. None: all scored documents.
        num_samples: Rankings per query and step.

    Inputs:
        As :class:`M3SELoss`. Positives are not used: the teacher's order decides.
    """

    matches = "rankings"

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float | None = None,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        top_k: int | None = None,
        num_samples: int = 8,
        **options: Unpack[InBatchOptions],
    ) -> None:
        if top_k is not None:
            functional._check_positive_int("top_k", top_k)
        functional._check_positive_int("num_samples", num_samples)
        super().__init__(model, scale, similarity_fct, **options)
        self.top_k = top_k
        self.num_samples = num_samples

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.coupled_rank_distil_loss`."""
        return functional.coupled_rank_distil_loss(
            student_scores, teacher_scores, top_k=self.top_k, num_samples=self.num_samples, mask=mask
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the model card shows them."""
        return super().get_config_dict() | {"top_k": self.top_k, "num_samples": self.num_samples}

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return CITATION
