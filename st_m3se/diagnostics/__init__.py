"""What the paper looks at, on your own data: score densities, normalised margins, score evolution, as figures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_m3se.diagnostics.diagnosis import Diagnosis as Diagnosis
    from st_m3se.diagnostics.diagnosis import diagnose as diagnose
    from st_m3se.diagnostics.evolution import ScoreEvolutionCallback as ScoreEvolutionCallback
    from st_m3se.diagnostics.gap import ClosedShare as ClosedShare
    from st_m3se.diagnostics.gap import closed_share as closed_share
    from st_m3se.diagnostics.lists import JudgedLists as JudgedLists
    from st_m3se.diagnostics.model_card import add_to_model_card as add_to_model_card
    from st_m3se.diagnostics.plots import plot_densities as plot_densities
    from st_m3se.diagnostics.plots import plot_evolution as plot_evolution
    from st_m3se.diagnostics.plots import plot_gap as plot_gap
    from st_m3se.diagnostics.plots import plot_margins as plot_margins
    from st_m3se.diagnostics.plots import save_figure as save_figure
    from st_m3se.diagnostics.report import html_section as html_section
    from st_m3se.diagnostics.separation import Estimate as Estimate
    from st_m3se.diagnostics.separation import Separation as Separation
    from st_m3se.diagnostics.separation import measure_separation as measure_separation
    from st_m3se.diagnostics.tracking import Evolution as Evolution
    from st_m3se.diagnostics.tracking import TrackedList as TrackedList
    from st_m3se.diagnostics.tracking import track as track

MODULES = {
    "diagnosis": ("Diagnosis", "diagnose"),
    "evolution": ("ScoreEvolutionCallback",),
    "gap": ("ClosedShare", "closed_share"),
    "lists": ("JudgedLists",),
    "model_card": ("add_to_model_card",),
    "plots": ("plot_densities", "plot_evolution", "plot_gap", "plot_margins", "save_figure"),
    "report": ("html_section",),
    "separation": ("Estimate", "Separation", "measure_separation"),
    "tracking": ("Evolution", "TrackedList", "track"),
}
"""Where each public name is; imported when asked for, so that a measure does not wait for a model library."""

__all__ = [name for names in MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
