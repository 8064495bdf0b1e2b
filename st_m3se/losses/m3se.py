"""M3SE as a sentence-transformers loss."""

from __future__ import annotations

from torch import Tensor

from st_m3se import functional
from st_m3se.losses.base import InBatchLoss


class M3SELoss(InBatchLoss):
    """Multi-margin MSE: keep the teacher's margins to its top negative, and let no negative pass that one.

    The definition is in :func:`st_m3se.functional.m3se_loss`. A negative needs no teacher score for the second term,
    so ``in_batch_negatives=True`` adds the other queries' documents for free.

    Args:
        model: The student.
        scale: Multiplies the similarity. None: 20 for a cosine, 1 otherwise.
        similarity_fct: Matrix function ``([Q, dim], [U, dim]) -> [Q, U]``. None: the model's own similarity.
        in_batch_negatives: Let the other queries' documents join the second term. Default False, as in the paper.
        mini_batch_num_tokens: Gradient caching over mini-batches of so many tokens. None: none.
        gather_across_devices: Let the documents of all processes' batches join, with ``in_batch_negatives``.

    References:
        - In Defense of Dual-Encoders for Neural Ranking: https://proceedings.mlr.press/v162/menon22a.html
        - Gradient caching: https://huggingface.co/papers/2101.06983

    Requirements:
        1. Teacher scores, best as raw logits, for a positive and at least one negative per query.

    Inputs:
        +------------------------------------------------+---------------------------------------------------------+
        | Inputs                                         | Labels                                                  |
        +================================================+=========================================================+
        | (query, positive, negative_1, ..., negative_n) | [Teacher(query, positive), Teacher(query, negative_i)...] |
        +------------------------------------------------+---------------------------------------------------------+
        | (query, documents), ragged lists               | ``scores``, ``positives``: DistillationCollator          |
        +------------------------------------------------+---------------------------------------------------------+

    Relations:
        - :class:`MarginMSELoss` matches all margins; with one positive and one negative the two are equal.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
            from st_m3se import DistillationCollator, M3SELoss

            model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
            train_dataset = Dataset.from_dict({
                "query": ["how tall is the eiffel tower"],
                "documents": [["The tower is 330 m tall.", "The tower is in Paris.", "Tokyo has a tower."]],
                "scores": [[9.1, 1.7, -6.3]],  # raw logits of a CrossEncoder; the first document is the positive
            })
            trainer = SentenceTransformerTrainer(
                model=model,
                train_dataset=train_dataset,
                loss=M3SELoss(model, scale=15.0),
                data_collator=DistillationCollator(preprocess_fn=model.preprocess),
            )
            trainer.train()
    """

    needs_positives = True
    matches = "margins"

    def score_loss(self, student_scores: Tensor, teacher_scores: Tensor, positives: Tensor, mask: Tensor) -> Tensor:
        """See :func:`st_m3se.functional.m3se_loss`."""
        return functional.m3se_loss(student_scores, teacher_scores, positives=positives, mask=mask)

    @property
    def citation(self) -> str:
        """BibTeX for the model card."""
        return """
@inproceedings{menon2022defense,
    title={In Defense of Dual-Encoders for Neural Ranking},
    author={Menon, Aditya Krishna and Jayasumana, Sadeep and Rawat, Ankit Singh and Kim, Seungyeon and Reddi, Sashank and Kumar, Sanjiv},
    booktitle={Proceedings of the 39th International Conference on Machine Learning},
    year={2022},
    url={https://proceedings.mlr.press/v162/menon22a.html}
}
"""
