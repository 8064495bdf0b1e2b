"""Tables for a terminal and in Markdown, and foreign text in Markdown and CSV: shown as it is, and nothing more."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

__all__ = ["cell", "check_name", "markdown", "markdown_table", "text_table"]

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#&!])")
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def markdown(text: str) -> str:
    """A text as Markdown that shows it on one line: no markup, HTML, link or comment of its own."""
    printable = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return SPECIAL.sub(r"\\\1", printable)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> str:
    """A table of cells that are Markdown already; the columns of ``numbers`` are aligned right."""
    rules = ["---:" if column in numbers else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rules, *rows))


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Container[int] = ()) -> str:
    """A table for a terminal; the columns of ``numbers`` are aligned right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            f"{text:{'>' if place in numbers else '<'}{width}}"
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *rows)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def check_name(name: str) -> None:
    """Refuse a name that would be markup where others print it as it is: the host does so in model cards.

    Raises:
        ValueError: If so.
    """
    if not name.isprintable() or re.search(r"[<>|`\\]", name):
        raise ValueError(
            f"the name {name!r:.80} goes into model cards and file names: leave out < > | ` \\ and breaks."
        )


def cell(text: str) -> str:
    """A name as a CSV cell that no spreadsheet takes for a formula; an apostrophe in front is how they write that."""
    return f"'{text}" if text.startswith(FORMULA) else text
