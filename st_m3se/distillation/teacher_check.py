"""Is the teacher better than the student? Asked on held-out queries before anything is distilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from st_m3se.distillation.data import Qrels
from st_m3se.distillation.lists import BY_GENERATION, BY_TEACHER, ENSEMBLE, TEACHER, Run, measure
from st_m3se.distillation.results import p_text
from st_m3se.evaluation.significance import compare

__all__ = ["UNCHECKED", "PoorTeacherError", "check_teacher"]

LEAST_CHECKED = 10  # held-out queries, to refuse a teacher by
UNCHECKED = {
    BY_TEACHER: (
        "Nobody has judged held-out queries: whether the teacher is better than the student cannot be measured. What "
        "is measured instead, during and after training, is how far the student agrees with the teacher: how high it "
        "ranks the document that the teacher likes best. Some 50 judged queries in qrels/test.tsv would tell whether "
        "that is good."
    ),
    BY_GENERATION: (
        "The held-out queries were made from documents, and kept where this teacher ranks theirs first: they cannot "
        "tell whether it is better than the student, and nothing is refused. Some 50 judged queries of users in "
        "qrels/test.tsv and qrels/dev.tsv would tell."
    ),
}
"""Why a teacher cannot be measured, by what makes a document relevant to a held-out query."""


class PoorTeacherError(ValueError):
    """The teacher is no better than the student on held-out queries, so that there is nothing to distil."""


def check_teacher(
    runs: Mapping[str, Run], qrels: Qrels, *, ensemble: bool | None, anyway: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the teacher against the student, both re-ranking the same candidates, and say what follows.

    Args:
        runs: Those of "BM25", "student", "teacher" and "teacher + student".
        qrels: The judged held-out queries.
        ensemble: Whether the teacher is averaged with the student; None: where that is no worse here.
        anyway: Go on with a teacher that is no better.
        say: Told what was found.

    Returns:
        "measured": whether there were queries enough; "ensemble"; and where measured "nDCG@10" (system to mean),
        "taught_by", "p", "difference" and "per_query".

    Raises:
        PoorTeacherError: If there is nothing to learn, unless ``anyway``.
    """
    values = {name: measure(run, qrels)["nDCG@10"] for name, run in runs.items()}
    means = {name: float(found.mean()) for name, found in values.items()}
    if len(qrels) < LEAST_CHECKED:
        say(
            f"  {len(qrels)} held-out queries are too few to tell whether the teacher is better than the student: "
            "nothing is refused. Judge some more, or give dev more of them."
        )
        return {"measured": False, "ensemble": ensemble is not False}
    joins = means[ENSEMBLE] >= means[TEACHER] if ensemble is None else ensemble
    taught_by = ENSEMBLE if joins else TEACHER
    test = compare({"student": values["student"], taught_by: values[taught_by]}, "nDCG@10", baseline="student")[0]
    found = {
        "measured": True,
        "ensemble": joins,
        "nDCG@10": means,
        "taught_by": taught_by,
        "p": test.randomisation_p,
        "difference": test.difference,
        "per_query": {name: each.tolist() for name, each in values.items()},
    }
    listed = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    say(f"  {len(qrels)} queries, all re-rank the same candidates, nDCG@10: {listed}")
    if means["BM25"] > means[taught_by]:
        say(
            "  BM25 alone is better than that here, so that a student may learn as much from its first results: "
            "--control trains one that does."
        )
    p = p_text(test.randomisation_p)
    verdict = f"The {taught_by} is {{}} the student ({test.difference:+.3f}, p {p if p.startswith('<') else f'= {p}'})"
    if test.difference > 0:
        sure = "" if test.significant else "; so few queries cannot tell that from chance: more judged ones would"
        say(f"  {verdict.format('better than')}{sure}")
        return found
    remedies = [
        *(["--ensemble, which averages it with the student's scores"] if ensemble is False else []),
        "another --teacher, or a second one beside it, whose mean is taught",
        "training on judgements instead, where there are enough: --loss contrastive --anyway",
        "--anyway, to distil all the same",
    ]
    message = (
        f"{verdict.format('no better than')} on {len(qrels)} held-out queries: there is nothing to learn from it. "
        f"What may help: {'; '.join(remedies)}."
    )
    if not anyway:
        raise PoorTeacherError(message)
    say(f"  {message} Going on, as asked.")
    return found
