"""The one error type for data that is not what it should be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FormatError", "errors_in"]


class FormatError(ValueError):
    """A file, or a row, is not what it should be.

    Args:
        message: What was expected, what came, and what to do.
        file: The file it happened in.
        line: The line, or for Parquet the row, counted from 1.
    """

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        self.message, self.file, self.line = message, file, line
        place = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(place + message)


@contextmanager
def errors_in(
    path: str | Path, damage: tuple[type[Exception], ...] = (), what: str = "this file cannot be read"
) -> Iterator[None]:
    """Errors of the block that name no file name this one; those of ``damage`` become FormatErrors."""
    try:
        yield
    except FormatError as error:
        raise error if error.file else FormatError(error.message, file=str(path)) from None
    except damage as error:
        raise FormatError(f"{what}: {str(error) or repr(error)}", file=str(path)) from error
