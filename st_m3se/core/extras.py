"""Packages that only some of this one needs, and which extra installs them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["require"]


def require(module: str, extra: str) -> Any:
    """Import a module, such as "scipy.stats", that an extra of this package installs, such as "eval".

    Raises:
        ImportError: If it cannot be imported; the message says what to install, and the cause why it failed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this needs {module}, which cannot be imported ({error}): pip install "st-m3se[{extra}]"', name=error.name
        ) from error
