"""What a command's --help says, whatever the width of the terminal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints


def help_of(command: Callable[..., Any]) -> str:
    """The command's help, and the flags, help and choices of each option."""
    said = [inspect.getdoc(command) or ""]
    for name, hint in get_type_hints(command, include_extras=True).items():
        said.append(f"--{name.replace('_', '-')}")
        for kind in get_args(hint):
            said += [str(part) for part in (getattr(kind, "default", ""), getattr(kind, "help", ""))]
            said += getattr(kind, "param_decls", None) or ()
            said += [choice for choice in get_args(kind) if isinstance(choice, str)]  # of a Literal
    return " ".join(" ".join(said).split())
