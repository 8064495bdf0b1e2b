"""Whether a JSON file that others may have written or changed holds what it should."""

from __future__ import annotations

from typing import Any

from st_m3se.core.errors import FormatError

__all__ = ["check_shape"]

NAMES = {str: "a text", int: "a whole number from 0", float: "a number", bool: "true or false", None: "null"}


def check_shape(value: Any, shape: Any, place: str) -> None:
    """Compare a value of a JSON file with what it should be.

    Args:
        value: The value.
        shape: ``str``, ``int`` (a count, from 0), ``float`` (any number that a float can hold), ``bool`` or None; a
            tuple of several that are allowed; ``[shape]`` for a list; ``{str: shape}`` for an object with any keys;
            ``{"key": shape, ...}`` for an object with these keys and any others.
        place: Where it stands in the file, for the message.

    Raises:
        FormatError: If it is something else, with its place.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise _wrong(value, "a JSON object", place)
        parts = dict.fromkeys(value, shape[str]) if str in shape else shape
        for key, part in parts.items():
            check_shape(value.get(key), part, f"{place}[{key!r}]" if place else str(key))
    elif isinstance(shape, list):
        (part,) = shape
        if isinstance(part, dict | list):
            if not isinstance(value, list | tuple):
                raise _wrong(value, "a list", place)
            for row, each in enumerate(value):
                check_shape(each, part, f"{place}[{row}]")
        elif not isinstance(value, list | tuple) or not all(_fits(each, part) for each in value):
            raise _wrong(value, f"a list, each entry {NAMES[part]}", place)
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if not any(_fits(value, kind) for kind in kinds):
            raise _wrong(value, " or ".join(NAMES[kind] for kind in kinds), place)


def _fits(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int:
        return isinstance(value, int) and value >= 0
    if kind is float and isinstance(value, int):
        return abs(value) < 1 << 1000
    return isinstance(value, kind)


def _wrong(value: Any, expected: str, place: str) -> FormatError:
    found = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    return FormatError(f"{place or 'the file'} should be {expected}, and is {found}.")
