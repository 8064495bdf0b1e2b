"""The one error type of the score store and of the readers and writers."""

from __future__ import annotations

__all__ = ["FormatError"]


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
