"""Interpreter of pickle opcodes that imports and calls nothing. Opcodes are those of ``pickletools``.

A ``GLOBAL`` becomes a name, and ``REDUCE``, ``NEWOBJ`` and ``BUILD`` become records of the requested calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Global", "PersistentId", "PickleMachine", "PickleRecord"]

MAX_MEMO_INDEX = 2**32


@dataclass(frozen=True, eq=False)
class Global:
    """The name of a class or function, which is never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class PersistentId:
    """A reference to an object outside the pickle, e.g. a storage of torch."""

    value: Any


@dataclass(eq=False)
class PickleRecord:
    """A call or object that the pickle requests, reduced to what tensors need.

    Attributes:
        function: Name of the called function; None if it is not a plain name.
        arguments: Its positional arguments.
    """

    function: str | None
    arguments: tuple[Any, ...] = field(default=(), repr=False)


class _Mark:
    pass


_MARK = _Mark()
_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_IGNORED = {"PROTO", "FRAME"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class PickleMachine:
    """Stack, memo and the effect of each opcode."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """Remove the topmost value of the stack and return it."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def since_mark(self) -> list[Any]:
        """Remove the values above the latest mark, and the mark; return them in their order."""
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode.

        Raises:
            ValueError, IndexError, KeyError, TypeError, AttributeError: The opcode is not valid at this place.
        """
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _PUT:
            self.memo[self._index(argument)] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[self._index(argument)])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _LITERALS:
            self.stack.append(_LITERALS[name])
        elif name in _TUPLES:
            values = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(values[::-1]))
        elif name not in _IGNORED:
            getattr(self, f"_{name.lower()}")(argument)

    @staticmethod
    def _index(argument: Any) -> int:
        index = int(argument)
        if not 0 <= index < MAX_MEMO_INDEX:
            raise ValueError(f"memo index {index}")
        return index

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self.since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self.since_mark())

    def _frozenset(self, _: Any) -> None:
        self.stack.append(self.since_mark())

    def _dict(self, _: Any) -> None:
        values, items = self.since_mark(), dict[Any, Any]()
        _set_items(items, values)
        self.stack.append(items)

    def _append(self, _: Any) -> None:
        value = self.pop()
        _extend(self.stack[-1], [value])

    def _appends(self, _: Any) -> None:
        values = self.since_mark()
        _extend(self.stack[-1], values)

    def _additems(self, _: Any) -> None:
        self._appends(None)

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        _set_items(self.stack[-1], [key, value])

    def _setitems(self, _: Any) -> None:
        values = self.since_mark()
        _set_items(self.stack[-1], values)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Global(f"{module}.{name}"))

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is not text")
        self.stack.append(Global(f"{module}.{name}"))

    def _ext1(self, argument: int) -> None:
        self.stack.append(Global(f"extension {argument}"))

    _ext2 = _ext4 = _ext1

    def _call(self, function: Any, arguments: Any) -> None:
        name = function.name if isinstance(function, Global) else None
        if name == "collections.OrderedDict":
            items = dict[Any, Any]()
            pairs = arguments[0] if isinstance(arguments, tuple) and arguments else []
            for pair in pairs if isinstance(pairs, list) else []:
                if isinstance(pair, list | tuple) and len(pair) == 2:
                    _set_items(items, list(pair))
            self.stack.append(items)
            return
        self.stack.append(PickleRecord(name, arguments if isinstance(arguments, tuple) else ()))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._call(function, arguments)

    def _newobj(self, _: Any) -> None:
        self._reduce(None)

    def _newobj_ex(self, _: Any) -> None:
        self.pop()
        self._reduce(None)

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._call(Global(f"{module}.{name}"), tuple(self.since_mark()))

    def _obj(self, _: Any) -> None:
        function, *arguments = self.since_mark()
        self._call(function, tuple(arguments))

    def _build(self, _: Any) -> None:
        self.pop()  # attributes of an object, which are not needed
        if not self.stack:
            raise IndexError("no object to build")

    def _binpersid(self, _: Any) -> None:
        self.stack.append(PersistentId(self.pop()))

    def _persid(self, argument: str) -> None:
        self.stack.append(PersistentId(argument))

    def _next_buffer(self, _: Any) -> None:
        raise ValueError("buffers outside of the pickle")

    def _readonly_buffer(self, _: Any) -> None:
        raise ValueError("buffers outside of the pickle")


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, PickleRecord):
        raise TypeError(f"values appended to a {type(target).__name__}")


def _set_items(target: Any, values: list[Any]) -> None:
    if isinstance(target, PickleRecord):
        return
    if not isinstance(target, dict) or len(values) % 2:
        raise TypeError(f"items set in a {type(target).__name__}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[key if type(key) in (str, int) else object()] = value
