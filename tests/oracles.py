"""Plain-loop references of every loss: one query at a time, lists of floats and `math`, no tensors.

A query is a list of student scores and a list of teacher scores, one entry per column, with a list of flags that say
which columns are real documents (`mask`) and, where the loss needs it, one that says which are relevant (`positives`).
A teacher score of NaN means that the teacher never scored the document. Columns outside the mask are never read.

Each reference returns None where nothing of the loss is left for the query. `reduce` turns rows into a batch's loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import permutations

Scores = Sequence[float]
Flags = Sequence[bool]


def real_columns(mask: Flags) -> list[int]:
    """Columns that hold a document, from left to right."""
    return [column for column, real in enumerate(mask) if real]


def scored_columns(teacher: Scores, mask: Flags) -> list[int]:
    """Columns that hold a document with a teacher score, from left to right."""
    return [column for column in real_columns(mask) if not math.isnan(teacher[column])]


def best_first(teacher: Scores, columns: Iterable[int]) -> list[int]:
    """The columns by falling teacher score; of equal ones the first comes first."""
    ranking: list[int] = []
    for column in sorted(columns):
        place = len(ranking)
        while place > 0 and teacher[ranking[place - 1]] < teacher[column]:
            place -= 1
        ranking.insert(place, column)
    return ranking


def log_sum_exp(values: Iterable[float]) -> float:
    """`log(sum(exp(values)))`, finite for values of any size."""
    values = list(values)
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def softplus(value: float) -> float:
    """`log(1 + exp(value))`, finite for values of any size."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def sigmoid(value: float) -> float:
    """`1 / (1 + exp(-value))`, without overflow."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))


def binary_cross_entropy(logit: float, target: float) -> float:
    """Cross-entropy of `sigmoid(logit)` against the probability `target`."""
    return target * softplus(-logit) + (1 - target) * softplus(logit)


def m3se(student: Scores, teacher: Scores, positives: Flags, mask: Flags) -> float | None:
    """Margins of scored positives over j*, and the squared hinge of each negative over the student's score of j*."""
    negatives = [column for column in real_columns(mask) if not positives[column]]
    scored_negatives = [column for column in negatives if not math.isnan(teacher[column])]
    scored_positives = [column for column in scored_columns(teacher, mask) if positives[column]]
    if not scored_negatives:
        return None
    top = best_first(teacher, scored_negatives)[0]
    others = [column for column in negatives if column != top]
    if not scored_positives and not others:
        return None
    total = 0.0
    for column in scored_positives:
        total += ((teacher[column] - teacher[top]) - (student[column] - student[top])) ** 2
    for column in others:
        total += max(0.0, student[column] - student[top]) ** 2
    return total


def margin_mse(student: Scores, teacher: Scores, positives: Flags, mask: Flags) -> float | None:
    """Mean squared difference of margins over all pairs of a scored positive and a scored negative."""
    scored = scored_columns(teacher, mask)
    squares = []
    for positive in scored:
        for negative in scored:
            if positives[positive] and not positives[negative]:
                teacher_margin = teacher[positive] - teacher[negative]
                student_margin = student[positive] - student[negative]
                squares.append((teacher_margin - student_margin) ** 2)
    return sum(squares) / len(squares) if squares else None


def all_margins_mse(
    student: Scores, teacher: Scores, mask: Flags, top_temperature: float | None = None
) -> float | None:
    """Each pair of scored documents, one by one: the squared difference of margins, times the two weights."""
    scored = scored_columns(teacher, mask)
    if len(scored) < 2:
        return None
    weights = dict.fromkeys(scored, 1 / len(scored))
    if top_temperature is not None:
        total = log_sum_exp(teacher[column] / top_temperature for column in scored)
        weights = {
            column: (weights[column] + math.exp(teacher[column] / top_temperature - total)) / 2 for column in scored
        }
    loss = 0.0
    for i in scored:
        for j in scored:
            if i < j:
                margins = (teacher[i] - teacher[j]) - (student[i] - student[j])
                loss += weights[i] * weights[j] * margins**2
    return loss


def score_mse(student: Scores, teacher: Scores, mask: Flags) -> float | None:
    """Mean squared difference of scores over the scored documents."""
    squares = [(teacher[column] - student[column]) ** 2 for column in scored_columns(teacher, mask)]
    return sum(squares) / len(squares) if squares else None


def softmax_cross_entropy(
    student: Scores,
    teacher: Scores,
    mask: Flags,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> float | None:
    """Cross-entropy of the student's softmax over all documents against the teacher's over the scored ones."""
    real, scored = real_columns(mask), scored_columns(teacher, mask)
    if not scored or len(real) < 2:
        return None
    teacher_total = log_sum_exp(teacher[column] / teacher_temperature for column in scored)
    student_total = log_sum_exp(student[column] / student_temperature for column in real)
    loss = 0.0
    for column in scored:
        probability = math.exp(teacher[column] / teacher_temperature - teacher_total)
        loss += probability * (student_total - student[column] / student_temperature)
    return loss


def contrastive(student: Scores, teacher: Scores, positives: Flags, mask: Flags) -> float | None:
    """Each positive alone against all negatives; the teacher is not asked."""
    real = real_columns(mask)
    negatives = [column for column in real if not positives[column]]
    relevant = [column for column in real if positives[column]]
    if not negatives or not relevant:
        return None
    total = 0.0
    for column in relevant:
        total += log_sum_exp(student[other] for other in [column, *negatives]) - student[column]
    return total / len(relevant)


def rank_distil(
    student: Scores, teacher: Scores, mask: Flags, top_k: int, match: str, penalty_weight: float = 1.0
) -> float | None:
    """Match on the teacher's top k, penalty on every other document, the unscored ones included."""
    ranking = best_first(teacher, scored_columns(teacher, mask))
    if not ranking:
        return None
    top = ranking[:top_k]
    rest = [column for column in real_columns(mask) if column not in top]
    loss = 0.0
    for column in top:
        if match == "binary":
            loss += binary_cross_entropy(student[column], sigmoid(teacher[column]))
        else:
            loss += (teacher[column] - student[column]) ** 2
    for column in rest:
        if match == "binary":
            loss += penalty_weight * softplus(student[column])
        else:
            loss += penalty_weight * max(0.0, student[column] - student[top[-1]]) ** 2
    return loss


def plackett_luce(student: Scores, ranking: Sequence[int], mask: Flags, top_k: int | None = None) -> float | None:
    """Negative log-probability, under the student, of the first `top_k` places of one ranking of the documents."""
    documents = [column for column in ranking if mask[column]]
    if len(documents) < 2:
        return None
    places = len(documents) if top_k is None else min(top_k, len(documents))
    loss = 0.0
    for place in range(places):
        left = [student[column] for column in documents[place:]]
        loss += log_sum_exp(left) - left[0]
    return loss


def full_ranking(teacher: Scores, mask: Flags) -> list[int]:
    """The most probable ranking of a row: scored documents best first, then unscored ones, then padding."""
    scored = scored_columns(teacher, mask)
    unscored = [column for column in real_columns(mask) if column not in scored]
    padding = [column for column in range(len(mask)) if not mask[column]]
    return best_first(teacher, scored) + unscored + padding


def most_probable_rank_distil(student: Scores, teacher: Scores, mask: Flags, top_k: int | None = None) -> float | None:
    """The coupled loss where the teacher is so sure that every sample is its own ranking."""
    scored = scored_columns(teacher, mask)
    if not scored:
        return None
    places = len(scored) if top_k is None else min(top_k, len(scored))
    return plackett_luce(student, full_ranking(teacher, mask), mask, places)


def ranking_probability(scores: Scores, ranking: Sequence[int]) -> float:
    """Plackett-Luce probability of a whole ranking of the columns that it names."""
    log_probability = 0.0
    for place, column in enumerate(ranking):
        log_probability += scores[column] - log_sum_exp(scores[other] for other in ranking[place:])
    return math.exp(log_probability)


def coupled_moments(
    student: Scores, teacher: Scores, mask: Flags, top_k: int | None = None
) -> tuple[float, float] | None:
    """Mean and variance of the coupled loss of one sampled ranking, over all rankings of the scored documents."""
    scored = scored_columns(teacher, mask)
    if not scored or len(real_columns(mask)) < 2:
        return None
    unscored = [column for column in real_columns(mask) if column not in scored]
    places = len(scored) if top_k is None else min(top_k, len(scored))
    mean = mean_of_squares = 0.0
    for ranking in permutations(scored):
        probability = ranking_probability(teacher, ranking)
        loss = plackett_luce(student, [*ranking, *unscored], mask, places)
        assert loss is not None
        mean += probability * loss
        mean_of_squares += probability * loss**2
    return mean, max(0.0, mean_of_squares - mean**2)


def reduce(rows: Sequence[float | None], reduction: str) -> float | list[float]:
    """The batch's loss: rows where nothing is left count 0 and are left out of the mean."""
    if reduction == "none":
        return [0.0 if row is None else row for row in rows]
    defined = [row for row in rows if row is not None]
    if reduction == "sum" or not defined:
        return sum(defined, 0.0)
    return sum(defined) / len(defined)
