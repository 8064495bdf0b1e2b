"""Score pickles, ``{query_id: {document_id: score}}``, without running them and without holding them in memory.

A pickle is a program. This module steps through it with :mod:`pickletools` and carries out only what builds dicts,
lists, tuples, strings and numbers; anything that could import or call is refused before it happens, but for NumPy's
scalars, which are recognised by name and rebuilt by ``struct``. Each entry of the outer dict is handed on as soon as it
is complete: a file of 160 million scores needs a thousand queries' worth of memory and not 18 GB.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from st_m3se.core.errors import FormatError, errors_in
from st_m3se.core.ids import short
from st_m3se.core.limits import HELD, LINE
from st_m3se.core.reading import Reading, open_binary
from st_m3se.core.scored_list import ScoredList
from st_m3se.scores.formats.format import Format

__all__ = ["SCORE_PICKLE", "read_score_pickle"]

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES"),  # only as the content of a NumPy scalar
}
MARK: Any = object()
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: MARK,
}
MEMO_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
MEMO_GET = {"GET", "BINGET", "LONG_BINGET"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NUMPY = {
    "numpy.core.multiarray scalar": "scalar",
    "numpy._core.multiarray scalar": "scalar",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}
STRUCT = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I"}
SCALARS = (str, int, float, bytes, type(None))  # bool is an int
OBJECT_BYTES = 64  # what an object takes at least, for the limit
CONTAINER = object()  # in the memo, for what is handed on and must not come again


class _Name(NamedTuple):
    """One of the few names that a pickle may mention."""

    name: str


class _DType:
    """The dtype of a NumPy scalar: a letter and a size."""

    def __init__(self, code: str) -> None:
        if code not in STRUCT:
            raise FormatError(f"a NumPy scalar of type {code!r:.40} is no score.")
        self.code, self.order = code, "<"

    def set_state(self, state: Any) -> None:
        """Take the byte order; the rest says nothing about plain numbers."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise FormatError("a NumPy dtype with an unknown state.")
        self.order = ">" if state[1] == ">" else "<"


def _call(function: Any, arguments: Any) -> Any:
    """Rebuild a NumPy scalar; no other call is carried out."""
    if not isinstance(function, _Name) or not isinstance(arguments, tuple):
        raise FormatError("the pickle calls something that is not a known constructor of NumPy scalars: refused.")
    if function.name == "dtype" and arguments and isinstance(arguments[0], str):
        return _DType(arguments[0].lstrip("<>|="))
    if function.name == "encode" and len(arguments) == 2 and arguments[1] == "latin1":  # bytes, up to protocol 2
        if not isinstance(arguments[0], str):
            raise FormatError("the pickle encodes something that is no text: refused.")
        return arguments[0].encode("latin1")
    if function.name == "scalar" and len(arguments) == 2 and isinstance(arguments[0], _DType):
        dtype, content = arguments
        if not isinstance(content, bytes):
            raise FormatError("a NumPy scalar without its bytes.")
        return struct.unpack(dtype.order + STRUCT[dtype.code], content)[0]
    raise FormatError(f"the pickle calls {function.name!r} in an unknown way: refused.")


class _Machine:
    """The stack and memo of the pickle protocol, for data alone."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.count = 0
        self.held = self.kept = 0  # bytes, about: since the last query, and in the memo

    def push(self, value: Any) -> None:
        """Put an object onto the stack."""
        self.held += OBJECT_BYTES + (len(value) if isinstance(value, (str, bytes)) else 0)
        if self.held > HELD.value:
            raise HELD.error("one query of the pickle takes too much memory")
        self.stack.append(value)

    def put(self, index: int) -> None:
        """Store the top of the stack; of a dict or list that it was there, so that it can be let go of."""
        if index not in self.memo:
            self.count += 1
        top = self.stack[-1]
        self.memo[index] = CONTAINER if isinstance(top, (dict, list)) else top
        self.kept += 2 * OBJECT_BYTES + (len(top) if isinstance(top, (str, bytes)) else 0)
        if self.kept > 2 * HELD.value:
            raise HELD.error("the pickle keeps too much for later use")

    def to_mark(self) -> list[Any]:
        """Take off the stack what stands above the last mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not MARK:
            place -= 1
            if place < 0:
                raise IndexError
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def step(self, name: str, argument: Any) -> list[Any] | None:
        """Carry out one operation; returns keys and values in turn where the outer dict receives some."""
        stack = self.stack
        if name in VALUES:
            self.push(argument)
        elif name in EMPTY:
            self.push(EMPTY[name]())
        elif name in MEMO_PUT:
            self.put(argument)
        elif name == "MEMOIZE":
            self.put(self.count)
        elif name in MEMO_GET:
            if self.memo.get(argument, CONTAINER) is CONTAINER:
                raise FormatError("two queries share one object, which cannot be read in a stream.")
            self.push(self.memo[argument])
        elif name in CONSTANTS:
            self.push(CONSTANTS[name])
        elif name in ("SETITEMS", "SETITEM", "DICT"):
            return self.set_items(name)
        elif name in ("APPENDS", "APPEND", "LIST"):
            items = [stack.pop()] if name == "APPEND" else self.to_mark()
            if name == "LIST":
                stack.append(items)
            elif isinstance(stack[-1], list):
                stack[-1].extend(items)
            else:
                raise FormatError("the pickle appends to something that is not a list: refused.")
        elif name == "TUPLE" or name in TUPLES:
            items = self.to_mark() if name == "TUPLE" else [stack.pop() for _ in range(TUPLES[name])][::-1]
            # Flat: tuples of tuples that share their parts grow beyond any measure when they are compared or printed.
            if not all(isinstance(item, (*SCALARS, _Name, _DType)) for item in items):
                raise FormatError("the pickle has a tuple of tuples, lists or dicts, which is no score: refused.")
            stack.append(tuple(items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise FormatError("the pickle names something by what is no text: refused.")
                argument = f"{module} {attribute}"
            if argument not in NUMPY:
                raise FormatError(
                    f"the pickle names {argument!r:.80}, which is code and not a score: refused, not run."
                )
            stack.append(_Name(NUMPY[argument]))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], _DType):
                raise FormatError("the pickle builds an object of a class: refused.")
            stack[-1].set_state(state)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise FormatError(f"the pickle does {name}, which no file of scores needs: refused.")
        return None

    def set_items(self, name: str) -> list[Any] | None:
        """Fill a dict."""
        if name == "SETITEM":
            value, key = self.stack.pop(), self.stack.pop()
            items = [key, value]
        else:
            items = self.to_mark()
        if len(items) % 2:
            raise FormatError("a dict has a key without a value.")
        if name == "DICT":
            self.stack.append({})
        if len(self.stack) == 1 and isinstance(self.stack[0], dict):
            return items
        if not isinstance(self.stack[-1], dict):
            raise FormatError("the pickle sets items of something that is not a dict: refused.")
        if not all(isinstance(key, SCALARS) for key in items[::2]):
            raise FormatError("a key of a dict is neither a text nor a number, so it is no id: refused.")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
        return None


class _Bounded:
    """A file for pickletools, without values beyond the limit, and without ``tell``, which packed streams lack."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._most = file, LINE.value

    def read(self, size: int) -> bytes:
        if size > self._most:
            raise LINE.error(f"the pickle announces a value of {size:,} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(self._most + 1)
        if len(line) > self._most:
            raise LINE.error("the pickle has a value that does not end")
        return line


# What damaged bytes lead to in pickletools and in the machine above; nothing of the file has been run.
RECOVERABLE = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    AttributeError,
    EOFError,
    OSError,
    struct.error,
    pa.ArrowException,
)


def read_score_pickle(reading: Reading) -> Iterator[ScoredList]:
    """Read ``{query_id: {document_id: score}}``; the entries count as lines in messages."""

    def entries() -> Iterator[tuple[int, tuple[Any, Any]]]:
        machine, entry = _Machine(), 0
        with open_binary(reading.path) as file:
            stream: Any = _Bounded(file)
            for opcode, argument, _ in pickletools.genops(stream):
                items = machine.step(opcode.name, argument) or ()
                if items:
                    machine.held = 0
                for pair in zip(items[::2], items[1::2], strict=True):
                    entry += 1
                    yield entry, pair
        if len(machine.stack) != 1 or not isinstance(machine.stack[0], dict):
            raise FormatError("expected a pickled dict {query_id: {document_id: score}}.")

    def parse(item: tuple[Any, Any], number: int) -> ScoredList:
        key, value = item
        if not isinstance(value, dict):
            raise FormatError(f"expected {{document_id: score}} for {short(key)}, got {short(value)}.")
        return reading.row(key, list(value), list(value.values()), (), number)

    with errors_in(reading.path, RECOVERABLE, "this is not a whole pickle of scores"):
        yield from reading.parsed(parse, entries())


STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"}q", b"(d.")
SCORE_PICKLE = Format(
    "score-pickle", read_score_pickle, lambda head: max(len(head.lines), 1) if head.start.startswith(STARTS) else 0
)
