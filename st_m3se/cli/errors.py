"""Errors of the package as a command says them: in one line, with its own flags in place of Python's arguments."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

__all__ = ["flags_of", "in_flags", "with_flags"]

ALIASES = {"columns": "column", "id_type": "ids", "format": "source_format", "sources": "source"}
"""Arguments of the functions whose option the command calls otherwise."""

ARGUMENT = re.compile(
    r"(?<![\w./-])(?:"
    r"(?P<name>[a-z]+(?:_[a-z]+)*)=(?P<value>True|False|\.\.\.|'[^']*'|\"[^\"]*\"|\{'\w+': \.\.\.\}|[\w+-]+(?:\.\d+)?)"
    r"|(?<!')(?P<bare>[a-z]+(?:_[a-z]+)+)(?![\w=(/'])"
    r"|^(?P<first>[a-z]+)(?= (?:must|is|belongs)\b))"
)
"""``overwrite=True``, ``missing="drop"``, ``qrels=...``; ``max_length``; ``spread must be`` where a message begins."""

QUOTES, COLUMN = "\"'{}", "': ..."


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with what the package raises as one line on standard error, and the exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            typer.echo(f"error: {in_flags(' '.join(str(error).split()), flags_of(command))}", err=True)
            raise typer.Exit(1) from None

    return run


def flags_of(command: Callable[..., None]) -> dict[str, str]:
    """The command's options: the name in Python to the flag, ``--on`` or ``--on/--off``."""
    given = {name: get_args(hint)[1:] for name, hint in get_type_hints(command, include_extras=True).items()}
    options = {name: option for name, extras in given.items() for option in extras if isinstance(option, OptionInfo)}
    # In an annotation the first name stands where the default would, until typer moves it. Without one it follows.
    names = {name: [str(option.default), *(option.param_decls or ())] for name, option in options.items()}
    given_names = {name: [flag for flag in flags if flag.startswith("--")] for name, flags in names.items()}
    return {name: (flags or [f"--{name.replace('_', '-')}"])[0] for name, flags in given_names.items()}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message with the command's flags where it names arguments that the command has an option for."""

    def flag(match: re.Match[str]) -> str:
        name = match["name"] or match["bare"] or match["first"]
        on, _, off = (flags.get(ALIASES.get(name, name)) or flags.get(f"teacher_{name}", "")).partition("/")
        value = match["value"]
        if not on:
            return match[0]
        if value == "False":
            return off or f"no {on}"
        if value in (None, "True", "..."):
            return on
        return f"{on} {value.strip(QUOTES).replace(COLUMN, '=NAME')}"

    return ARGUMENT.sub(flag, message)
