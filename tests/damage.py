"""What happens to files: a bit that flips, an end that is lost, a block of zeros."""

from __future__ import annotations

import random
from collections.abc import Iterator


def damaged(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` versions of a file's content, none of them equal to it."""
    source = random.Random(seed)
    made = 0
    while made < count:
        data = bytearray(content)
        place = source.randrange(len(data))
        kind = made % 4
        if kind == 0:
            data[place] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[place] = source.randrange(256)
        elif kind == 2:
            del data[place:]
        else:
            data[place : place + 64] = bytes(len(data[place : place + 64]))
        if bytes(data) != content:
            made += 1
            yield bytes(data)
