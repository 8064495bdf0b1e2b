"""How much one file may ask for: against damaged files, and small ones that unpack to more than any memory.

Real files stay far below. Where one does not, its error names the environment variable that raises the limit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from st_m3se.core.errors import FormatError

__all__ = ["ARRAY", "HELD", "LINE", "RATIO", "VALUES", "Limit"]


@dataclass(frozen=True)
class Limit:
    """A number that an environment variable can raise.

    Attributes:
        variable: Its name.
        default: The number without it.
        unit: What is counted.
    """

    variable: str
    default: int
    unit: str

    @property
    def value(self) -> int:
        """The number that counts now.

        Raises:
            ValueError: If the variable holds none.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default
        if not text.isdecimal() or not 0 < int(text) < 1 << 62:
            raise ValueError(f"the environment variable {self.variable} must be a number of {self.unit}, got {text!r}.")
        return int(text)

    def error(self, what: str) -> FormatError:
        """What to raise where ``what`` is beyond it."""
        return FormatError(
            f"{what}: the limit is {self.value:,} {self.unit}. It stops damaged files and those that unpack to more "
            f"than any memory; if this one is neither, set the environment variable {self.variable} to more."
        )


LINE = Limit("ST_M3SE_MAX_LINE", 1 << 24, "bytes")
"""In one line of a text file, or one value of a pickle."""

VALUES = Limit("ST_M3SE_MAX_VALUES", 1_000_000, "values")
"""In one list, which is the documents of one query."""

ARRAY = Limit("ST_M3SE_MAX_ARRAY", 1 << 28, "bytes")
"""In a file that is one JSON array of objects, which is read as a whole."""

RATIO = Limit("ST_M3SE_MAX_RATIO", 200, "bytes for each that is stored")
"""Of a packed file; the first 32 MiB do not count."""

HELD = Limit("ST_M3SE_MAX_HELD", 1 << 28, "bytes")
"""What a pickle may keep in memory at a time, beside the query that is being read."""
