"""What the pickle reader takes, and that nothing else gets anything run."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import io
import os
import pickle
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.client.pickles import dump_pickle, load_pickle
from kachery_fast.errors import UnsafePickle, WrongFormat

UTC = datetime.timezone.utc


def load(data: bytes) -> Any:
    return load_pickle(io.BytesIO(data), what="this")


PLAIN = [
    None, True, 1, -(10**40), 1.5, 1j, "é", b"x", bytearray(b"x"), [], (), {}, set(), [1, [2, (3,)]], {"a": {"b": 1}},
    {1, 2}, frozenset([1]), range(3, 9, 2), slice(1, None), collections.OrderedDict(b=1, a=2),
    collections.deque([1, 2], 5), datetime.datetime(2022, 1, 2, tzinfo=UTC), datetime.date(2022, 1, 2),
    datetime.time(3, 4), datetime.timedelta(1, 2, 3), decimal.Decimal("1.50"),
    datetime.timezone(datetime.timedelta(hours=1), "CET"),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_come_back(value: Any) -> None:
    for data in (dump_pickle(value), *(pickle.dumps(value, protocol) for protocol in (3, 4, 5))):
        loaded = load(data)
        assert type(loaded) is type(value)
        assert loaded == value


def numpy_values() -> list[Any]:
    aligned = numpy.dtype([("a", "i1"), ("b", "f8")], align=True)
    return [
        numpy.arange(6).reshape(2, 3), numpy.asfortranarray(numpy.ones((2, 3))), numpy.zeros((0, 3)), numpy.array(5),
        numpy.arange(3).astype("M8[ns]"), numpy.arange(3).astype("m8[25s]"), numpy.array(["ab", "ü"]),
        numpy.array([b"a"]), numpy.zeros(2, aligned), numpy.zeros(2, [("a", "<i4"), ("b", "S5", (2,))]),
        numpy.zeros(2, [("a", [("b", "<f4")])]), numpy.zeros(2, "V3"), numpy.array([1, "a", None], dtype=object),
        numpy.float16(1.5), numpy.bool_(True), numpy.str_("x"), numpy.str_(""), numpy.datetime64("2022-01-02"),
        numpy.complex64(1j), numpy.zeros(1, aligned)[0], numpy.dtype("f4"), numpy.dtype(("f4", (2, 3))), aligned,
    ]


@pytest.mark.parametrize("value", numpy_values(), ids=repr)
def test_arrays_scalars_and_dtypes_come_back(value: Any) -> None:
    for data in (dump_pickle(value), *(pickle.dumps(value, protocol) for protocol in (3, 4, 5))):
        loaded = load(data)
        assert type(loaded) is type(value)
        if isinstance(value, numpy.dtype):
            assert loaded == value
            assert loaded.isalignedstruct == value.isalignedstruct
        else:
            assert loaded.dtype == value.dtype
            assert loaded.shape == value.shape
            assert loaded.tolist() == value.tolist() if value.dtype.hasobject else loaded.tobytes() == value.tobytes()


def test_one_array_in_two_places_stays_one() -> None:
    array = numpy.arange(3)
    first, second = load(dump_pickle([array, array]))
    assert first is second


def test_a_list_that_holds_itself_comes_back() -> None:
    value: list[Any] = [1]
    value.append(value)
    loaded = load(dump_pickle(value))
    assert loaded[1] is loaded


class _Subclass(dict):
    pass


@pytest.mark.parametrize("value", [object(), Path("/"), [len], {"a": _Subclass()}, numpy.ma.masked_array([1]),
                                   numpy.array([object()]), numpy.zeros(1, [("a", "O")]), numpy.random.default_rng(0),
                                   datetime.datetime, Ellipsis])
def test_other_types_are_not_written(value: Any) -> None:
    with pytest.raises(UnsafePickle):
        dump_pickle(value)


# --- what attackers write


class _Calls:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.answer = (call, arguments)

    def __reduce__(self) -> Any:
        return self.answer


def bombs(canary: str) -> dict[str, bytes]:
    make = f"touch {canary}"
    code = f"open({canary!r}, 'w').close()"
    reduce = pickle.dumps
    return {
        "os.system": reduce(_Calls(os.system, make)),
        "subprocess": reduce(_Calls(subprocess.call, ["touch", canary])),
        "eval": reduce(_Calls(eval, code)),
        "exec": reduce(_Calls(exec, code)),
        "in a list": reduce([1, {"a": _Calls(os.system, make)}]),
        "open": reduce(_Calls(open, canary, "w")),
        "protocol 0": b"cposix\nsystem\n(V" + make.encode() + b"\ntR.",
        "instance": b"(V" + make.encode() + b"\niposix\nsystem\n.",
        "object": b"(cposix\nsystem\nV" + make.encode() + b"\no.",
        "getattr": reduce(_Calls(getattr, "", "join")),
        "numpy's own exec": b"cnumpy.testing\nrun_string\n(V" + code.encode() + b"\ntR.",
        "numpy.load": b"\x80\x04cnumpy\nload\n(V" + canary.encode() + b"\ntR.",
        "numpy.fromfile": b"\x80\x04cnumpy\nfromfile\n(V/etc/hostname\ntR.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "new object": b"\x80\x04cnumpy\nndarray\n(K\x01t\x81.",
        "persistent": b"\x80\x04Vx\nQ.",
        "extension": b"\x80\x02\x82\x01.",
        "array by its class": b"\x80\x04cnumpy\nndarray\n(K\x01tR.",
        "endless bytes": b"\x80\x04cbuiltins\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x01tR.",
        "a function as a value": b"\x80\x04]cbuiltins\ncomplex\na.",
        "a class as a value": b"\x80\x04cnumpy\nndarray\n.",
        "state of a dict": b"\x80\x04}}Va\nK\x01sb.",
    }


@pytest.mark.parametrize("name", list(bombs("x")))
def test_bombs_are_refused_and_run_nothing(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(WrongFormat if name == "extension" else UnsafePickle):
        load(bombs(str(canary))[name])
    assert not canary.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "protocol 0", "instance", "object"])
def test_the_bombs_are_live(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with contextlib.suppress(Exception):
        pickle.loads(bombs(str(canary))[name])
    assert canary.exists()


def numpy_pickle(state: Any, text: str = "f8") -> bytes:
    """A pickle of a dtype with a state of the attacker's choice."""
    class Forged:
        def __reduce__(self) -> Any:
            return numpy.dtype, (text, False, True), state

    return pickle.dumps(Forged(), 4)


def test_numbers_cannot_be_turned_into_pointers() -> None:
    """Flags 63 are those of Python objects: with them numpy would follow the eight bytes of each number."""
    flags = load(numpy_pickle((3, "<", None, None, None, -1, -1, 63))).flags
    assert flags == numpy.dtype("f8").flags


@pytest.mark.parametrize(("text", "state"), [
    ("V8", (3, "|", None, ("a",), {"a": (numpy.dtype("f8"), 4)}, 8, 1, 16)),  # reaches past the end
    ("V8", (3, "|", None, ("a",), {"a": (numpy.dtype("f8"), -8)}, 8, 1, 16)),
    ("V8", (3, "|", None, ("a",), {"a": (numpy.dtype("O"), 0)}, 8, 1, 0)),
    ("V8", (3, "|", None, ("a",), {}, 8, 1, 0)),
    ("V8", (3, "|", (numpy.dtype("O"), (1,)), None, None, 8, 1, 0)),
    ("M8", (4, "<", None, None, None, -1, -1, 0, (None, (b"x", 1, 1, 1)))),
    ("f8", "nothing"),
    ("S4", (3, "|", None, None, None, "x", 1, 0)),
])
def test_forged_dtypes_are_refused(text: str, state: Any) -> None:
    with pytest.raises(UnsafePickle, match="dtype"):
        load(numpy_pickle(state, text))


def array_pickle(shape: Any, dtype: Any, data: Any, version: int = 1) -> bytes:
    class Forged:
        def __reduce__(self) -> Any:
            return numpy.arange(0).__reduce__()[0], (numpy.ndarray, (0,), b"b"), (version, shape, dtype, False, data)

    return pickle.dumps(Forged(), 4)


@pytest.mark.parametrize(("shape", "dtype", "data"), [
    ((3,), numpy.dtype("f8"), b"12345678"),
    ((2**62, 2**62), numpy.dtype("f8"), b""),
    ((-1,), numpy.dtype("f8"), b"12345678"),
    ((1,), numpy.dtype("O"), struct.pack("P", 1)),
    ((2,), numpy.dtype("O"), [1]),
    ((1,), "f8", b"12345678"),
    ([1], numpy.dtype("f8"), b"12345678"),
    ((1,), numpy.dtype("f8"), "12345678"),
])
def test_arrays_whose_bytes_do_not_fit_are_refused(shape: Any, dtype: Any, data: Any) -> None:
    with pytest.raises(UnsafePickle, match="array"):
        load(array_pickle(shape, dtype, data))


def test_a_dtype_in_use_cannot_be_changed() -> None:
    """First an array of a dtype, then a longer item for the same dtype: reads would leave the array's memory."""
    array = (b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
            b"(K\x01(K\x01tcnumpy\ndtype\n(VV8\n\x89\x88tRq\x01\x89C\x0812345678tb")
    assert load(array + b".").tobytes() == b"12345678"
    with pytest.raises(UnsafePickle, match="a state"):
        load(array + b"0h\x01(K\x03V|\nNNNM\x10'K\x01K\x00tb.")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUES = st.recursive(SCALARS, lambda children: st.lists(children, max_size=4)
                      | st.tuples(children, children) | st.dictionaries(st.text(), children, max_size=4), max_leaves=20)


@given(VALUES)
def test_whatever_is_written_is_read(value: Any) -> None:
    assert load(dump_pickle(value)) == value


HONEST = pickle.dumps([numpy.zeros(2, [("a", "<i4"), ("b", "S5")]), numpy.float32(1), {"a": {1, 2}}, bytearray(b"x"),
                       numpy.array([1, "a"], dtype=object), datetime.timedelta(1), slice(1), numpy.arange(4)], 5)


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, len(HONEST) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_damaged_pickle_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(HONEST)
    for position, value in changes:
        data[position] = value
    with contextlib.suppress(UnsafePickle, WrongFormat):
        pickle.dumps(load(bytes(data)))  # touches every byte


def test_a_length_alone_takes_no_memory() -> None:
    for opcode in (b"\x96", b"\x8e", b"\x8d"):  # BYTEARRAY8, BINBYTES8, BINUNICODE8
        with pytest.raises(WrongFormat):
            load(b"\x80\x05" + opcode + (2**40).to_bytes(8, "little") + b"x.")


@pytest.mark.parametrize("data", [b"", b"x", b"\x80", b"\x80\x04", b"\x80\x04]", b"\x80\x63N.", b".", b"\x80\x04h\x05.",
                                  b"\x80\x04X\xff\xff\xff\x7fabc."])
def test_what_is_no_pickle_is_an_error(data: bytes) -> None:
    with pytest.raises(WrongFormat, match="a pickle"):
        load(data)


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(WrongFormat, match="nested too deeply"):
        dump_pickle(value)
