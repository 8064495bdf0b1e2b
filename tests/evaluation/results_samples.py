"""Results of evaluations that never ran: made values, to test what is derived from them and how it is shown."""

from functools import cache

import numpy as np

from st_m3se.core.findings import Finding
from st_m3se.evaluation.results import EvaluatedSet, Results

HOSTILE = "<script>alert('x')</script> [$y_1$] \"a|b\" & 100% #~^\\{*z*}\n__proto__"


def evaluated_set(query_ids, *, fingerprint="0f" * 16, findings=(), documents=1_000):
    return EvaluatedSet(
        documents=documents,
        judgements=2 * len(query_ids),
        split="test",
        form="retrieval",
        fingerprint=fingerprint,
        query_ids=tuple(query_ids),
        findings=tuple(findings),
    )


def settings(measures=("nDCG@10", "R@100"), *, baseline=None, depth=1000, confidence=0.95, exclude_same_id=True):
    return {
        "measures": list(measures),
        "depth": depth,
        "exclude_same_id": exclude_same_id,
        "strict": False,
        "confidence": confidence,
        "baseline": baseline,
    }


def provenance(date="2026-01-02"):
    return {
        "date": date,
        "st_m3se": "0.1.0",
        "packages": {"torch": "2.13.0", "ir_measures": "0.4.3"},
        "python": "3.11",
        "system": "Linux",
        "cpu": "2 cores",
        "device": "cpu",
        "command": "st-m3se evaluate --set toy",
        "seed": 0,
    }


def results_of(values, *, groups=None, baseline=None, measure="nDCG@10", sets=None, **options):
    """Results of one measure from {set: {system: values}}."""
    names = dict.fromkeys(system for systems in values.values() for system in systems)
    groups = groups or {}
    if sets is None:
        sets = {
            name: evaluated_set([f"q{row}" for row in range(len(next(iter(systems.values()))))])
            for name, systems in values.items()
        }
    return Results(
        provenance=options.pop("provenance", provenance()),
        settings=settings([measure], baseline=baseline, **options),
        sets=sets,
        systems={name: {"kind": "bi-encoder", **({"group": groups[name]} if name in groups else {})} for name in names},
        values={
            name: {system: {measure: np.array(found, dtype=np.float64)} for system, found in systems.items()}
            for name, systems in values.items()
        },
    )


@cache
def sample(*, baseline="bm25", sets=("scifact", "nfcorpus", "fiqa"), queries=60, rename=()):
    """BM25, a bi-encoder with three seeds that is better, and a re-ranker that is a little worse than BM25.

    The same object each time, so that its means and tests are computed once.
    """
    rng = np.random.default_rng(7)
    rename = dict(rename)
    kinds = {
        "bm25": ("bm25", "bm25", 0.0),
        "minilm-seed1": ("bi-encoder", "minilm", 0.15),
        "minilm-seed2": ("bi-encoder", "minilm", 0.16),
        "minilm-seed3": ("bi-encoder", "minilm", 0.14),
        "reranked": ("re-ranker", "reranked", -0.02),
    }
    measures = ("nDCG@10", "R@100", "AP")
    values, seconds = {}, {}
    for name in sets:
        base = rng.uniform(0, 0.8, queries)
        values[name], seconds[name] = {}, {}
        for system, (_, _, gain) in kinds.items():
            noise = rng.normal(0, 0.05, queries)
            values[name][rename.get(system, system)] = {
                measure: np.round(np.clip(base + gain + noise + 0.05 * place, 0, 1), 6)
                for place, measure in enumerate(measures)
            }
            seconds[name][rename.get(system, system)] = {"encode corpus": 12.5, "search": 0.25}
    finding = Finding("empty documents", 2, ("d7", "d9"), "kept: they can be found, and score as the models say")
    return Results(
        provenance=provenance(),
        settings=settings(measures, baseline=rename.get(baseline, baseline)),
        sets={
            name: evaluated_set([f"{name}-{row}" for row in range(queries)], findings=[finding] if row == 0 else [])
            for row, name in enumerate(sets)
        },
        systems={
            rename.get(system, system): {
                "kind": kind,
                "group": rename.get(group, group),
                "model": "none" if kind == "bm25" else f"models/{system}",
                "prompts": None,
                "depth": 1000,
            }
            for system, (kind, group, _) in kinds.items()
        },
        values=values,
        seconds=seconds,
    )


@cache
def hostile():
    """A system, a set and a query with a name that breaks whatever does not escape."""
    other = HOSTILE + " too"
    base = sample(sets=(HOSTILE, "plain"), queries=12, rename=(("bm25", HOSTILE), ("minilm", other)))
    ids = (HOSTILE, *base.sets[HOSTILE].query_ids[1:])
    finding = Finding(HOSTILE, 1, (HOSTILE,), HOSTILE)
    sets = {**base.sets, HOSTILE: evaluated_set(ids, findings=[finding])}
    return Results(base.provenance, base.settings, sets, base.systems, base.values, base.seconds)
