"""What the example prints: the check of the teacher before training, and the table after it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measures import Run, p_value, per_query
from retrieval_data import Qrels
from rich.console import Console
from rich.table import Table


def p_text(p: float) -> str:
    """A p-value as text; a permutation test of 9,999 resamples says no more than this."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def print_check(console: Console, runs: dict[str, Run], qrels: Qrels, args: argparse.Namespace) -> dict[str, float]:
    """Compare the scorers on the same candidates of the dev queries, and say what follows.

    Returns:
        nDCG@10 by scorer.
    """
    values = {name: per_query(run, qrels)["nDCG@10"] for name, run in runs.items()}
    means = {name: sum(scores) / len(scores) for name, scores in values.items()}
    listed = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    console.print(
        f"[bold]Check[/] on {len(qrels)} held-out queries, all re-ranking the same candidates, nDCG@10: {listed}"
    )
    taught_by = "teacher + guide" if args.ensemble else "teacher"
    for rival in ("student", "BM25"):
        gain = means[taught_by] - means[rival]
        p = p_value(values[taught_by], values[rival], args.seed)
        if gain > 0:
            console.print(f"  {taught_by} is better than {rival} by {gain:.3f} ({p_text(p)}).")
            continue
        remedies = [
            None if args.ensemble else "--ensemble averages it with the guide's scores",
            None if args.finetune_teacher else "--finetune-teacher adapts the cross-encoder to this data first",
            None if args.filter else "--filter leaves out negatives that it scores above the known relevant document",
        ]
        advice = "; ".join(remedy for remedy in remedies if remedy) or "take another --teacher"
        console.print(
            f"  [yellow]{taught_by} is not better than {rival} ({gain:+.3f}, {p_text(p)}): there is little to learn "
            f"from its ranking. What helps: {advice}.[/]"
        )
    best = max(("teacher", "teacher + guide"), key=lambda name: means[name])
    if best != taught_by:
        flag = "--ensemble" if best == "teacher + guide" else "--no-ensemble"
        console.print(f"  {best} is better than {taught_by} here: {flag} teaches with it.")
    return means


def plot_training(
    curves: Mapping[str, Sequence[tuple[float, float]]], teachers: Mapping[str, float], taught_by: str, path: Path
) -> str | None:
    """Dev nDCG@10 over training, with a line where the teacher is; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        label = "distilled" if name == "student after" else name
        axes.plot([100 * done for done, _ in points], [value for _, value in points], marker="o", label=label)
    axes.axhline(teachers[taught_by], linestyle="--", color="black", label=f"{taught_by}, re-ranking")
    axes.set(xlabel="% of training", ylabel="nDCG@10 on held-out queries")
    axes.legend()
    figure.savefig(path, dpi=150)
    return str(path)


def print_table(console: Console, results: dict[str, Any]) -> None:
    """One table of all systems on the test queries, then the share of the lead closed, speed and place."""
    ways = {"teacher": "re-ranks candidates", "teacher + guide": "re-ranks candidates"}
    table = Table(
        title=f"{results['data']}: {results['queries']['test']} test queries, {results['documents']} documents",
        caption="whole corpus: ranks every document; re-ranks candidates: orders the pool of BM25 and guide, "
        "so what they miss stays missed. p: paired permutation test against the student after training.",
    )
    for column in ("system", "what it ranks", "MRR@10", "p", "nDCG@10", "p"):
        table.add_column(column, justify="left" if column in ("system", "what it ranks") else "right")
    for name, means in results["systems"].items():
        p_values = results["p_value_against_student_after"].get(name)
        cells = []
        for metric, mean in means.items():
            p = f"{p_values[metric]:.4f}" if p_values else "-"
            cells += [f"{mean:.3f}", "<0.001" if p_values and p_values[metric] < 0.001 else p]
        style = "bold" if name == "student after" else None
        table.add_row(name, ways.get(name, "whole corpus"), *cells, style=style)
    console.print(table)
    for metric, share in results["lead_closed"].items():
        if share is None:
            text = f"{results['taught_by']} had no lead over the student before training"
        else:
            text = f"{share:.0%} of the lead of '{results['taught_by']}' over the student was closed"
        console.print(f"{metric}: {text}")
    speed = results["teacher_pairs_per_second"]
    teacher = f"{speed:.0f} pairs/s" if speed else "not run (scores were ready)"
    console.print(
        f"Speed: student encodes {results['student_queries_per_second']:.0f} queries/s; "
        f"teacher {teacher}.\n"
        f"Time: {results['total_seconds']:.0f} s, of which training {results['train_seconds']:.0f} s.\n"
        f"Model saved in {results['model']}"
        + (f", its training drawn in {results['figure']}" if results.get("figure") else "")
    )
