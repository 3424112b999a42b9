"""Plain data out of a pickle without unpickling it: its instructions are walked, and only those that build numbers,
text, bytes, lists, tuples, dictionaries and numpy arrays of plain types are followed. Nothing is imported or called, so
that a pickle that wants to run code only gets its wish named.

Text that Python 2 wrote is bytes, as pickle's encoding="bytes" has it.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_NEW_TEXT = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_VALUES = frozenset((*_NUMBERS, *_NEW_TEXT, "BYTEARRAY8"))
_OLD_TEXT = frozenset(("STRING", "BINSTRING", "SHORT_BINSTRING"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUT, _GET = frozenset(("PUT", "BINPUT", "LONG_BINPUT")), frozenset(("GET", "BINGET", "LONG_BINGET"))
_MARK = object()
_PLAIN_TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_BUFFER = ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer")  # in protocol 5
# How protocol 2 of Python 3 writes bytes, and those of no length.
_BYTES, _NO_BYTES = "_codecs encode", ("__builtin__ bytes", "builtins bytes")
_NAMES = (*_ARRAY, *_BUFFER, _BYTES, *_NO_BYTES, "numpy ndarray", "numpy dtype")


class _Name(str):
    """module and attribute that a pickle asks for; never looked up."""


class _Type:
    """A numpy type that is being built."""

    def __init__(self, code: object) -> None:
        self.code, self.order = _text(code), "<"


class _Array:
    """A numpy array that is being built; value: once its state is known."""

    value: np.ndarray | None = None


def read_pickle(path: Path) -> Any:
    """The value. Raises OSError, and ValueError where it holds anything else, or is broken."""
    try:
        return _Walk().run(path.read_bytes())
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its instructions make no sense ({type(error).__name__})") from None


class _Walk:
    """stack: as pickle's own machine has it, with marks on it. memo: values that were named."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return _finished(self.stack.pop())
            self.step(opcode.name, argument)
        raise ValueError("it is cut off")

    def step(self, name: str, argument: Any) -> None:
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _OLD_TEXT:
            self.stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _PUT:
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.global_name(argument)
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it holds {name}, which is no plain data")

    def global_name(self, argument: str | None) -> None:
        """Refuses all names but numpy's, and that of a coding."""
        if argument is None:
            attribute, module = self.stack.pop(), self.stack.pop()
            argument = f"{module} {attribute}"
        if argument not in _NAMES:
            raise ValueError(f"it wants to run {argument.replace(' ', '.')[:60]}, which is never done")
        self.stack.append(_Name(argument))

    def marked(self) -> list[Any]:
        """What lies above the last mark, taken off with it."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # IndexError where there is none
            place -= 1
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def take(self, count: int) -> list[Any]:
        values = [self.stack.pop() for _ in range(count)]
        return values[::-1]

    def reduce(self) -> None:
        name, arguments = self.take(2)
        if type(name) is not _Name:
            raise ValueError("it wants to run something that is no name")
        if name in _ARRAY:
            self.stack.append(_Array())
        elif name == "numpy dtype":
            self.stack.append(_Type(arguments[0]))
        elif name == _BYTES and _text(arguments[1]) in ("latin1", "latin-1"):
            self.stack.append(arguments[0].encode("latin-1"))
        elif name in _NO_BYTES and arguments == ():
            self.stack.append(b"")
        elif name in _BUFFER:
            found = _Array()
            data, kind, shape, order = arguments
            found.value = _array(0, shape, kind, order == "F", bytes(data))
            self.stack.append(found)
        else:
            raise ValueError(f"it wants to run {name.replace(' ', '.')}, which is never done")

    def build(self) -> None:
        target, state = self.take(2)
        if type(target) is _Type:
            target.order = _text(state[1])
        elif type(target) is _Array:
            target.value = _array(*state)
        else:
            raise ValueError(f"it wants to change a {type(target).__name__}")
        self.stack.append(target)

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError(f"it wants to append to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise ValueError(f"it wants to fill a {type(target).__name__}")
        target.update(zip(values[::2], values[1::2], strict=True))


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(values[::2], values[1::2], strict=True))


_STEPS: dict[str, Callable[[_Walk], None]] = {
    "MARK": lambda walk: walk.stack.append(_MARK),
    "EMPTY_DICT": lambda walk: walk.stack.append({}),
    "EMPTY_LIST": lambda walk: walk.stack.append([]),
    "EMPTY_TUPLE": lambda walk: walk.stack.append(()),
    "DICT": lambda walk: walk.stack.append(_pairs(walk.marked())),
    "LIST": lambda walk: walk.stack.append(walk.marked()),
    "TUPLE": lambda walk: walk.stack.append(tuple(walk.marked())),
    "TUPLE1": lambda walk: walk.stack.append(tuple(walk.take(1))),
    "TUPLE2": lambda walk: walk.stack.append(tuple(walk.take(2))),
    "TUPLE3": lambda walk: walk.stack.append(tuple(walk.take(3))),
    "APPEND": lambda walk: walk.append(walk.take(1)),
    "APPENDS": lambda walk: walk.append(walk.marked()),
    "SETITEM": lambda walk: walk.set_items(walk.take(2)),
    "SETITEMS": lambda walk: walk.set_items(walk.marked()),
    "REDUCE": _Walk.reduce,
    "BUILD": _Walk.build,
}


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _array(_: object, shape: Any, kind: Any, by_columns: Any, data: Any) -> np.ndarray:
    if type(kind) is not _Type or kind.code not in _PLAIN_TYPES or not isinstance(data, bytes):
        raise ValueError("it holds an array of a kind that is no plain number")
    order = ">" if kind.order == ">" else "<"
    found = np.frombuffer(data, order + kind.code)
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) != len(found):
        raise ValueError("it holds an array of another size than it says")
    return found.reshape(shape, order="F" if by_columns else "C")


def _finished(value: Any) -> Any:
    """Arrays in place of what they were built as, one level into a dictionary: deeper ones are not needed."""
    if type(value) is _Array:
        return value.value
    if type(value) is dict:
        return {_text(key): one.value if type(one) is _Array else one for key, one in value.items()}
    return value
