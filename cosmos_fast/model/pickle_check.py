"""What a pickle of `torch.save` would do, found out before it is read: its instructions are walked, none is followed.

torch's unpickler for weights runs no foreign code, but it calls what makes memory out of a few bytes: `bytearray` of a
size, codings that lengthen text, storages of any size. Here only calls that a state dict needs pass, and only with
arguments that take no more than the file has.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable, Iterable
from typing import IO, Any

import torch

_WIDTHS = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
           "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8}  # fmt: skip
_STORAGES = {f"{module} {kind}Storage": width for kind, width in _WIDTHS.items() for module in ("torch", "torch.cuda")}
_STORAGES["torch.storage UntypedStorage"] = 1
_DTYPES = {f"torch {name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_TENSORS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3")
# Calls that take no memory, whatever their arguments; of numpy, nothing is called (see `torch_file`).
_SMALL = (
    *("torch._utils _rebuild_parameter", "torch._utils _rebuild_meta_tensor_no_storage", "torch device"),
    *("torch.serialization _get_layout", "numpy.core.multiarray scalar", "numpy._core.multiarray scalar"),
)
_ORDERED, _SIZE, _ENCODE, _NUMPY = "collections OrderedDict", "torch Size", "_codecs encode", "numpy dtype"
_SPARSE = "torch._utils _rebuild_sparse_tensor"
_CALLED = frozenset((*_TENSORS, *_SMALL, _ORDERED, _SIZE, _ENCODE, _NUMPY, _SPARSE))
_KNOWN = _CALLED | _STORAGES.keys() | _DTYPES.keys()

_VALUES = frozenset(("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class ForeignError(ValueError):
    """A pickle asks for something that no state dict needs; its text is the name of that."""


class _Name(str):
    """module and attribute that a pickle asks for."""


class _Dict:
    """entries: how many keys were set."""

    entries = 0


class _Storage:
    """nbytes: as the pickle claims. width: bytes of an element."""

    def __init__(self, nbytes: int, width: int) -> None:
        self.nbytes, self.width = nbytes, width


class _Tensor:
    def __init__(self, elements: int) -> None:
        self.elements = elements


class _Plain:
    """Has nothing inside: a size, a type of numpy."""


class PickleCheck:
    """Walks the pickles of one file. size: bytes of the file. storages: what tensors are kept in, by key."""

    def __init__(self, size: int) -> None:
        self.left = self.left_to_copy = size
        self.storages: dict[str | int, _Storage] = {}
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below marks
        self.memo: dict[int, Any] = {}

    def walk(self, pickled: bytes | IO[bytes]) -> Any:
        """One pickle, as far as its end; the object it makes, with a stand-in for all but plain values.

        Raises:
            ForeignError: it calls what no state dict needs.
            Exception: it makes no sense; no base class holds what bytes at random lead to.
        """
        self.stack, self.outer, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it is cut off")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _PUT:
            self.memo[argument] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            items = tuple(stack[-_TUPLES[name] :])
            _require(len(items) == _TUPLES[name], "a tuple lacks an item")
            stack[-_TUPLES[name] :] = [items]
        elif name == "GLOBAL":
            stack.append(_name(argument))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name != "PROTO":
            raise ValueError(f"its pickle holds {name}, which torch.save does not write")

    def _mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _marked(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _tuple(self) -> None:
        items = tuple(self._marked())
        self.stack.append(items)

    def _append(self, items: Iterable[Any]) -> None:
        _require(type(self.stack[-1]) is list, "it appends to what is no list")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        # Tuples could be nested so deep, or hold each other so often, that no hash of them is ever ready.
        _require(not any(isinstance(key, tuple) for key in items[::2]), "a key is a tuple")
        _require(isinstance(self.stack[-1], _Dict), "it sets items of what is no dict")
        self.stack[-1].entries += len(items) // 2

    def _build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Dict):
            _require(isinstance(state, _Dict), "the state of a dict is none")
            self._copy(state.entries)
        else:
            _require(isinstance(built, _Plain), "it sets the state of what has none")

    def _copy(self, count: int) -> None:
        """What a call copies counts: one long value, copied again and again, would fill any memory."""
        self.left_to_copy -= count
        _require(self.left_to_copy >= 0, "it would take more memory than it has bytes")

    def _reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        _require(isinstance(name, _Name) and isinstance(arguments, tuple), "it calls what is no function")
        if name not in _CALLED:
            raise ForeignError(name.replace(" ", "."))
        self.stack.append(self._made(name, arguments))

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What stands for the result of a call."""
        if name in _TENSORS:
            return _tensor(arguments, name)
        if name == _ORDERED:
            _require(arguments == (), "a dict is made of something")
            return _Dict()
        if name == _SIZE:
            (sizes,) = arguments
            _require(isinstance(sizes, tuple), "a size is none")
            self._copy(len(sizes))
        elif name == _ENCODE:
            text, coding = arguments
            if type(text) is not str or coding != "latin1":
                raise ForeignError("_codecs.encode")
            self._copy(len(text))
        elif name == _SPARSE:  # may make whole numbers of others, of lists as well
            _, parts = arguments
            _require(all(isinstance(part, _Tensor | _Plain | bool) for part in parts), "a sparse tensor is none")
            self._copy(sum(part.elements for part in parts if isinstance(part, _Tensor)))
        return _Plain() if name in (_SIZE, _NUMPY) else None

    def _storage(self) -> None:
        kind, name, key, _, count, *view = self.stack.pop()
        _require(kind == "storage" and isinstance(name, _Name) and name in _STORAGES, "a storage has no kind")
        _require(type(key) in (str, int) and type(count) is int and count >= 0, "a storage has no key or size")
        _require(not any(view), "a storage is a part of another")
        if key not in self.storages:
            width = _STORAGES[name]
            self.storages[key] = _Storage(count * width, width)
            self.left -= count * width
            _require(self.left >= 0, "it claims to hold more bytes than it has")
        self.stack.append(self.storages[key])


_STEPS: dict[str, Callable[[PickleCheck], None]] = {
    "MARK": PickleCheck._mark,
    "TUPLE": PickleCheck._tuple,
    "EMPTY_LIST": lambda walk: walk.stack.append([]),
    "EMPTY_DICT": lambda walk: walk.stack.append(_Dict()),
    "APPEND": lambda walk: walk._append([walk.stack.pop()]),
    "APPENDS": lambda walk: walk._append(walk._marked()),
    "SETITEM": lambda walk: walk._set_items([walk.stack.pop(-2), walk.stack.pop()]),
    "SETITEMS": lambda walk: walk._set_items(walk._marked()),
    "BUILD": PickleCheck._build,
    "REDUCE": PickleCheck._reduce,
    "BINPERSID": PickleCheck._storage,
}


def _require(sound: bool, text: str) -> None:
    if not sound:
        raise ValueError(text)


def _name(argument: str) -> _Name:
    if argument not in _KNOWN:
        # Bytes at random may look like an instruction; then they are no names.
        _require(re.fullmatch(r"[A-Za-z_][\w.]* [A-Za-z_][\w.]*", argument) is not None, "it asks for no name")
        raise ForeignError(argument.replace(" ", "."))
    return _Name(argument)


def _tensor(arguments: tuple[Any, ...], name: str) -> _Tensor:
    """Lies within its storage, which torch would make larger."""
    storage, offset, sizes, strides = arguments[:4]
    _require(isinstance(storage, _Storage), "a tensor has no storage")
    numbers = (offset, *sizes, *strides)
    _require(all(type(number) is int and number >= 0 for number in numbers), "a tensor has no shape")
    width = storage.width if name == _TENSORS[0] else _DTYPES[arguments[6]].itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    _require(0 in sizes or (last + 1) * width <= storage.nbytes, "a tensor is larger than its storage")
    return _Tensor(math.prod(sizes))
