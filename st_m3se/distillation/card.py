"""The numbers of a distillation in its model's card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from st_m3se.core.markdown import markdown, markdown_table
from st_m3se.diagnostics.model_card import put_section
from st_m3se.distillation.lists import AFTER
from st_m3se.distillation.results import P_EXPLAINED, about_seeds, table

__all__ = ["add_to_card"]

START, END = "<!-- st-m3se distillation -->", "<!-- end of st-m3se distillation -->"


def add_to_card(card: Path, results: Mapping[str, Any]) -> None:
    """Put the table, how it was measured and the command into a saved model's ``README.md``.

    Args:
        card: The file, as sentence-transformers has written it.
        results: What ``results.json`` holds.
    """
    config, queries = results["config"], results["queries"]
    head, rows = table(results)
    rows = [[f"**{name}**" if name == AFTER else name, *cells] for name, *cells in rows]
    lines = [
        START,
        f"## Distilled with st-m3se from {', '.join(markdown(name) for name in results['teachers'])}",
        f"Student: {markdown(str(config['student']))}. Taught by: {results['taught_by']}. {queries['train']:,} "
        f"training queries and {results['documents']:,} documents of {markdown(results['data'])}. Measured on "
        f"{queries['test']:,} test queries that were not trained on; relevant by {results['judged_by']}.",
        markdown_table(head, rows, range(2, len(head))),
        f"{P_EXPLAINED} The teacher re-ranks candidates of BM25 and the student.",
    ]
    if seeds := about_seeds(results):
        lines.append(seeds)
    if results["kept_start"]:
        lines.append(
            "**Training made the student worse on held-out queries: these are the weights of the student as it comes.**"
        )
    language = "python" if results["command"].startswith("st_m3se.") else "bash"
    lines += [f"Made with:\n\n```{language}\n{results['command']}\n```", END]
    put_section(card, "\n\n".join(lines), START, END)
