"""The whole way, from texts to a distilled and measured model: :func:`distill`, and ``st-m3se distill``.

    from st_m3se import distill
    distill("my-data", "cross-encoder/ms-marco-MiniLM-L12-v2", "sentence-transformers/all-MiniLM-L6-v2", "distilled")

The output folder holds

- ``model/``: the student, with the numbers and the command in its card;
- ``results.json``: "systems" (system to measure to mean over test queries: "BM25", "student before", "student without a
  teacher" where there is a control, "student after", "teacher", "teacher + student"), "against_student_after" (system
  to measure to "difference", that of the student after training minus it, "interval", "p", "holm_p"), "lead_closed",
  "taught_by", "teachers" (who gave the scores that were taught), "judged_by" (see ``lists.JUDGES``), "check_on_dev",
  "trainings" (system to one entry a seed: "curve", "kept" (the step whose state is the model, 0 is the start),
  "start_weight" (the start's share in its weights), "value" (the model's on dev), "steps", "lists"), "kept_start",
  "per_query" (system to measure to values, in the order of "query_ids"), "relevant" (query to grades), "queries",
  "documents", "notes", "seconds" by stage, "teacher_pairs", "teacher_pairs_per_second", "student_queries_per_second",
  "config", "command", "provenance", and "stages": the name of each stage to its folder;
- ``dev_curve.json``: "curves" (system to one list a seed of {"step", "share", "value"}) and "teacher", its own figure;
- ``config.toml``: all options, as ``--config`` takes them;
- a folder for each stage, ``NAME-HASH``, with ``made_from.json`` (all that its content depends on) and
  ``finished.json`` (what came of it, "seconds"):

  - ``candidates-*``: stores ``bm25`` and ``guide``, of all queries;
  - ``teacher-dev-*``, ``teacher-train-*``, ``teacher-test-*``: a store ``teacher-1``, ... for each teacher;
  - ``mean-dev-*``, ...: stores ``teachers``, where there are several, and ``with-guide``;
  - ``training-student-seed1-*``, ``training-control-seed1-*``: ``curve.json`` and ``model/``;
  - ``run-student-seed1-*``, ``run-control-seed1-*``, and ``run-before-*`` where the guide is not the student (else its
    run is ``candidates-*/guide``): a store ``run``, the rankings of test queries;

- ``report.html``, one page with all of this, by :func:`st_m3se.distillation.report.write_report`.

With ``generate_queries`` a stage ``queries-*`` holds the data with the queries of :func:`st_m3se.generate_queries`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.distillation.config import DistillationConfig
    from st_m3se.distillation.data import DistillationData, open_data
    from st_m3se.distillation.pipeline import distill
    from st_m3se.distillation.teacher_check import PoorTeacherError

MODULES = {
    "DistillationConfig": "config",
    "DistillationData": "data",
    "PoorTeacherError": "teacher_check",
    "distill": "pipeline",
    "open_data": "data",
}
"""Where each public name is; imported when asked for, so that ``--help`` does not wait for torch."""

__all__ = ["DistillationConfig", "DistillationData", "PoorTeacherError", "distill", "open_data"]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
