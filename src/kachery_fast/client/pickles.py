"""Pickles of plain data: what may be written, and a reader that cannot be talked into anything else.

A pickle is a program. The usual remedy, a list of permitted names for ``find_class``, is not enough once numpy is on
the list: the state of a dtype goes into memory unchecked, and one whose flags say that its numbers are object
pointers hands control to whoever wrote the file. So this reader, besides the list of names,

- calls only the makers below, each with arguments of the shape that pickle itself writes;
- never makes an object by its class (NEWOBJ, OBJ, INST), which none of the permitted types needs;
- sets a state (BUILD) on numpy arrays and dtypes alone, once, before anything uses them: a dtype is made anew from its
  description and gets the state that numpy itself writes for it; an array's bytes must have the length of its shape.

It is built on Python's own unpickler, whose steps can be overridden: about 10^6 list items a second, while the bytes
of an array are one step. Files of the 2022 client are read; it allowed a part of these types.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import math
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar, cast

from ..errors import UnsafePickle, WrongFormat

__all__ = ["dump_pickle", "load_pickle"]

# 2022 clients read protocol 4; protocol 5 names a numpy function that they refuse.
_PROTOCOL = 4

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, range, datetime.date, datetime.datetime,
          datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal)
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_MAPPINGS = (dict, collections.OrderedDict)
_DTYPE = re.compile(r"[?bhilqBHILQefdgFDGSUVOMm][0-9]{0,9}|[biufcSUVOMm][0-9]{1,9}")
_ALIGNED_STRUCT = 0x80  # NPY_ALIGNED_STRUCT of numpy's dtype flags


class _Refused(Exception):
    """What was met that is not permitted; the text is the ``found`` of UnsafePickle."""


def dump_pickle(value: Any) -> bytes:
    """Return ``value`` as a pickle that ``load_pickle`` reads.

    :raises UnsafePickle: a part of it is of another type.
    :raises WrongFormat: it is nested too deeply.
    """
    try:
        _check(value)
        return pickle.dumps(value, _PROTOCOL)
    except _Refused as refusal:
        raise UnsafePickle(what="This value", found=str(refusal)) from None
    except RecursionError:
        raise WrongFormat(what="This value", format="fit for a pickle", why="it is nested too deeply") from None


def load_pickle(file: BinaryIO, *, what: str) -> Any:
    """Read one pickle of plain data.

    :param what: the file's name, for the errors.
    :raises UnsafePickle: it holds or calls anything else; nothing of that was run.
    :raises WrongFormat: it is not a pickle, or broken.
    """
    reader = _Reader(file)
    try:
        value = reader.load()
        if reader.named:
            # A maker that is named but not called must not come out as a value.
            _check(value)
        return value
    except _Refused as refusal:
        raise UnsafePickle(what=what, found=str(refusal)) from None
    except Exception as error:  # a damaged or hostile pickle makes the unpickler raise nearly anything
        why = "it is damaged, or no pickle at all" if isinstance(error, LookupError) else str(error).rstrip(".")
        raise WrongFormat(what=what, format="a pickle of plain data", why=why or type(error).__name__) from error


# --- writing


def _check(value: Any) -> None:
    """Walk ``value``; types must match exactly, for a subclass would be written by its own name."""
    seen: set[int] = set()
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        kind = type(item)
        if kind in _PLAIN:
            if kind in (datetime.datetime, datetime.time):
                pending.append(item.tzinfo)
            continue
        if id(item) in seen:
            continue
        seen.add(id(item))
        if kind in _SEQUENCES:
            pending.extend(item)
        elif kind in _MAPPINGS:
            pending.extend(item.keys())
            pending.extend(item.values())
        elif kind is slice:
            pending.extend((item.start, item.stop, item.step))
        elif kind.__module__.partition(".")[0] == "numpy":
            pending.extend(_check_numpy(item))
        else:
            raise _Refused(_described(item))


def _check_numpy(item: Any) -> Iterable[Any]:
    """Return what is still to be checked: the items of an array of objects."""
    import numpy

    if type(item) is numpy.ndarray:
        dtype = item.dtype
    elif isinstance(item, numpy.dtype):
        dtype = item
    elif isinstance(item, numpy.generic):
        dtype = item.dtype
    else:
        raise _Refused(_described(item))
    if dtype.kind == "O":
        return item.flat if type(item) is numpy.ndarray else ()
    if _remade_dtype(dtype, dtype.__reduce__()[2]) != dtype:
        raise _Refused(f"the numpy dtype {dtype}")
    return ()


def _described(item: Any) -> str:
    kind = type(item)
    return f"a {kind.__module__}.{kind.__qualname__}"


# --- reading


class _Maker:
    """A permitted function under the name that pickles call it by. It is no class and has no attributes to abuse."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name = name
        self.make = make


class _Reader(pickle._Unpickler):
    """Python's unpickler with its dangerous steps narrowed; see the top of the module."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.named = False
        # numpy arrays and dtypes just made, whose state may still be set, by identity; kept alive by the value
        self._fresh: dict[int, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        self.named = True
        found = _BUILTIN_MAKERS.get((module, name)) or _numpy_name(module, name)
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent reference")

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        maker = self.stack[-1]
        if not isinstance(maker, _Maker) or not isinstance(arguments, tuple):
            raise _Refused("a call of something that is no function")
        for argument in arguments:
            self._fresh.pop(id(argument), None)
        try:
            made = maker.make(*arguments)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _Refused(f"a call of {maker.name} that pickle does not write ({error})") from error
        if maker.name in ("numpy.dtype", "numpy._reconstruct"):
            self._fresh[id(made)] = made
        self.stack[-1] = made

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if self._fresh.pop(id(target), None) is None:
            raise _Refused(f"a state for {_described(target)}")
        import numpy

        if isinstance(target, numpy.dtype):
            remade = _remade_dtype(target, state)
            for field in (remade.fields or {}).values():
                self._fresh.pop(id(field[0]), None)
            self._forget_dtypes(state)
            cast("Any", target).__setstate__(remade.__reduce__()[2])
        else:
            _check_array_state(state)
            self._forget_dtypes(state)
            target.__setstate__(state)

    def _forget_dtypes(self, state: tuple[Any, ...]) -> None:
        """Whatever a state uses must not be changed any more."""
        pending = list(state)
        while pending:
            item = pending.pop()
            self._fresh.pop(id(item), None)
            if isinstance(item, tuple):
                pending.extend(item)
            elif isinstance(item, dict):
                pending.extend(item.values())

    def _load_bytearray(self) -> None:
        # The usual step makes all of it before it reads: eight bytes of length could take all memory.
        length = int.from_bytes(self.read(8), "little")
        data = self.read(length)
        if len(data) != length:
            raise EOFError("it ends within an array of bytes")
        self.append(bytearray(data))

    def _load_refused(self) -> None:
        raise _Refused("an object made by its class")

    dispatch[pickle.REDUCE[0]] = _load_reduce
    dispatch[pickle.BUILD[0]] = _load_build
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
    for _opcode in (pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST):
        dispatch[_opcode[0]] = _load_refused
    del _opcode


def _want(condition: bool) -> None:
    if not condition:
        raise ValueError("other arguments")


def _exactly(kind: Callable[..., Any], *argument_kinds: tuple[type, ...], needed: int) -> Callable[..., Any]:
    """Return ``kind`` narrowed to arguments of exactly these types, the first ``needed`` of them given."""

    def make(*arguments: Any) -> Any:
        _want(needed <= len(arguments) <= len(argument_kinds))
        for argument, kinds in zip(arguments, argument_kinds, strict=False):
            _want(type(argument) in kinds)
        return kind(*arguments)

    return make


def _make_deque(items: Any = (), length_max: int | None = None) -> Any:
    _want(items in ((), []) and (length_max is None or type(length_max) is int))
    return collections.deque(maxlen=length_max)


_NUMBER = (int, float)
_INDEX = (int, type(None))
_ZONE = (datetime.timezone, type(None))
_BUILTIN_MAKERS: dict[tuple[str, str], _Maker] = {
    (module, name): _Maker(f"{module}.{name}", make)
    for module, name, make in (
        ("builtins", "complex", _exactly(complex, _NUMBER, _NUMBER, needed=2)),
        ("builtins", "range", _exactly(range, (int,), (int,), (int,), needed=3)),
        ("builtins", "slice", _exactly(slice, _INDEX, _INDEX, _INDEX, needed=3)),
        ("builtins", "set", _exactly(set, (list,), needed=1)),
        ("builtins", "frozenset", _exactly(frozenset, (list,), needed=1)),
        # bytearray(10**12) would take a terabyte
        ("builtins", "bytearray", _exactly(bytearray, (bytes,), needed=0)),
        ("datetime", "date", _exactly(datetime.date, (bytes,), needed=1)),
        ("datetime", "datetime", _exactly(datetime.datetime, (bytes,), _ZONE, needed=1)),
        ("datetime", "time", _exactly(datetime.time, (bytes,), _ZONE, needed=1)),
        ("datetime", "timedelta", _exactly(datetime.timedelta, (int,), (int,), (int,), needed=3)),
        ("datetime", "timezone", _exactly(datetime.timezone, (datetime.timedelta,), (str,), needed=1)),
        ("decimal", "Decimal", _exactly(decimal.Decimal, (str,), needed=1)),
        ("collections", "OrderedDict", _exactly(collections.OrderedDict, needed=0)),
        ("collections", "deque", _make_deque),
    )
}


# --- numpy, imported only when a pickle or value has something of it

_NDARRAY = _Maker("numpy.ndarray", lambda *_: _want(False))


def _numpy_name(module: str, name: str) -> Any:
    if module == "numpy":
        return {"ndarray": _NDARRAY, "dtype": _Maker("numpy.dtype", _make_dtype)}.get(name)
    if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return {"_reconstruct": _Maker("numpy._reconstruct", _make_array),
                "scalar": _Maker("numpy.scalar", _make_scalar)}.get(name)
    if module in ("numpy.core.numeric", "numpy._core.numeric"):
        return {"_frombuffer": _Maker("numpy._frombuffer", _make_array_of)}.get(name)
    return None


def _make_dtype(text: Any, align: Any = False, copy: Any = False) -> Any:
    import numpy

    _want(type(text) is str and _DTYPE.fullmatch(text) is not None and align in (False, 0) and copy in (True, False))
    # copy: numpy hands out one shared object for each basic type, and this one's state is set later
    return numpy.dtype(text, False, True)


def _make_array(kind: Any, shape: Any, typecode: Any) -> Any:
    import numpy

    _want(kind is _NDARRAY and shape == (0,) and typecode in (b"b", "b"))
    return numpy.zeros(0, dtype="i1")


def _make_scalar(dtype: Any, data: Any) -> Any:
    import numpy

    _want(isinstance(dtype, numpy.dtype) and not dtype.hasobject and type(data) is bytes
          and len(data) == dtype.itemsize)
    value = numpy.zeros((), dtype)
    if data:
        value = numpy.frombuffer(data, dtype=dtype, count=1).reshape(())
    return value[()]


def _make_array_of(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    import numpy

    _want(type(data) in (bytes, bytearray) and order in ("C", "F"))
    _want(_array_length(shape, dtype) * dtype.itemsize == len(data) and not dtype.hasobject)
    return numpy.frombuffer(data, dtype=dtype).reshape(shape, order=order) if data else numpy.zeros(shape, dtype)


def _array_length(shape: Any, dtype: Any) -> int:
    import numpy

    if not (isinstance(dtype, numpy.dtype) and type(shape) is tuple and len(shape) <= 32
            and all(type(length) is int and length >= 0 for length in shape)):
        raise _Refused("a numpy array of no shape or dtype")
    return math.prod(shape)


def _check_array_state(state: Any) -> None:
    """Check ``(1, shape, dtype, is Fortran order, bytes or list)``."""
    if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[3]) is not bool:
        raise _Refused("a numpy array whose state pickle does not write")
    _, shape, dtype, _, data = state
    length = _array_length(shape, dtype)
    fits = len(data) == length if dtype.kind == "O" and type(data) is list else (
        type(data) is bytes and not dtype.hasobject and len(data) == length * dtype.itemsize)
    if not fits:
        raise _Refused("a numpy array whose bytes do not fit its shape")


def _remade_dtype(dtype: Any, state: Any) -> Any:
    """Return the dtype that ``state`` describes, made by numpy's public constructors from the kind of ``dtype``.

    The state is ``(version, byte order, subarray, names, fields, size, alignment, flags[, (metadata, time unit)])``.
    """
    import numpy

    try:
        _, order, subarray, names, fields, size, _, flags, *rest = state
        char = dtype.char
        if subarray is not None:
            base, shape = subarray
            _want(isinstance(base, numpy.dtype) and not base.hasobject)
            return numpy.dtype((base, shape))
        if names is not None:
            parts = [fields[name] for name in names]
            _want(all(len(part) == 2 and isinstance(part[0], numpy.dtype) and not part[0].hasobject for part in parts))
            return numpy.dtype({"names": list(names), "formats": [part[0] for part in parts],
                                "offsets": [part[1] for part in parts], "itemsize": size},
                               align=bool(flags & _ALIGNED_STRUCT))
        if char in "mM":
            unit, count = rest[0][1][0], rest[0][1][1]
            unit = unit.decode("ascii") if isinstance(unit, bytes) else unit
            made = numpy.dtype(char + "8") if unit == "generic" else numpy.dtype(f"{char}8[{int(count)}{unit}]")
        elif char in "SUV":
            made = numpy.dtype(f"{char}{int(size) // (4 if char == 'U' else 1)}")
        else:
            made = numpy.dtype(char)
        return made.newbyteorder(order) if order in ("<", ">") else made
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise _Refused(f"a numpy dtype that numpy does not write ({error})") from error
