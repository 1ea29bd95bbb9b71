"""Text, JSON, arrays and pickles: round trips, the bytes of 2022, and what is refused."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client.formats import _npy_pieces

pytestmark = pytest.mark.usefixtures("store_dir")


def sha1_of(uri: str) -> str:
    return uri.removeprefix("sha1://")[:40]


# --- text


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 電気\n", "line\r\nline\rline\n", "\ufeffmark", "a\0b"])
def test_text_comes_back_as_it_was(text: str) -> None:
    uri = kf.store_text(text)
    assert uri.endswith("/file.txt")
    assert sha1_of(uri) == hashlib.sha1(text.encode()).hexdigest()
    assert kf.load_text(uri) == text


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="bytes"):
        kf.store_text(b"x")  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match="UTF-8"):
        kf.store_text("\ud800")


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.WrongFormat, match="text in UTF-8"):
        kf.load_text(kf.store_file(tmp_path / "x"))


# --- JSON


@pytest.mark.parametrize("value", [None, True, 1, 1.5, 10**30, "é", [], {}, {"b": [1, {"a": None}], "a": ""}])
def test_json_comes_back(value: Any) -> None:
    assert kf.load_json(kf.store_json(value)) == value


def test_json_has_the_bytes_of_2022() -> None:
    uri = kf.store_json({"b": 1, "a": [1.5, "é", None]})
    assert uri.endswith("/file.json")
    assert kf.load_text(uri) == '{"b":1,"a":[1.5,"\\u00e9",null]}'
    assert kf.load_text(kf.store_json([1], separators=(", ", ": "))) == "[1]"
    assert kf.load_text(kf.store_json([1], indent=1)) == "[\n 1\n]"


@pytest.mark.parametrize("value", [math.nan, [math.inf], {"a": -math.inf}, {1, 2}, object(), b"x", {(1, 2): 3}])
def test_what_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="JSON"):
        kf.store_json(value)


def test_json_that_refers_to_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(errors.InvalidArgument, match="JSON"):
        kf.store_json(value)


def test_not_a_number_is_read_where_others_wrote_it() -> None:
    assert math.isnan(kf.load_json(kf.store_text("NaN")))


def test_broken_json_is_an_error() -> None:
    for text in ("{", "", "[" * 100_000, "\ud7ff"):
        with pytest.raises(errors.WrongFormat, match="JSON"):
            kf.load_json(kf.store_text(text))


# --- arrays


def arrays() -> list[Any]:
    base = numpy.arange(24).reshape(2, 3, 4)
    return [
        base, base.astype("f4"), base > 3, base.astype(">i2"), base.astype("c16"), numpy.asfortranarray(base),
        base.transpose(1, 0, 2), base[::-1, :, ::2], base[:, 1:, :], base[0:0], numpy.array(7), numpy.zeros((0, 3)),
        numpy.array(["ab", "ü"]), numpy.array([b"ab", b"c"]), numpy.arange(3).astype("M8[ns]"),
        numpy.arange(3).astype("m8[s]"), numpy.zeros(3, dtype=[("a", "<i4"), ("b", "U3", (2,))]), numpy.zeros(2, "S0"),
        numpy.zeros(3, "V7"), numpy.broadcast_to(numpy.arange(3.0), (4, 3)), numpy.float32(2.5),
        numpy.zeros(2, dtype=[(f"field{i}", "i1") for i in range(5000)]),
    ]


@pytest.mark.parametrize("array", arrays(), ids=lambda array: f"{array.dtype.str}{array.shape}")
@pytest.mark.filterwarnings("ignore:Stored array in format 2.0")
def test_an_array_comes_back_with_the_bytes_that_numpy_saves(array: Any) -> None:
    saved = io.BytesIO()
    numpy.save(saved, array, allow_pickle=False)
    uri = kf.store_npy(array)
    assert uri.endswith("/file.npy")
    assert sha1_of(uri) == hashlib.sha1(saved.getvalue()).hexdigest()
    loaded = kf.load_npy(uri)
    assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
    assert loaded.tobytes() == array.tobytes()


def test_a_contiguous_array_is_stored_from_its_own_memory() -> None:
    for array in (numpy.arange(5_000_000.0).reshape(5, -1), numpy.asfortranarray(numpy.ones((1000, 1000)))):
        header, *pieces = _npy_pieces(b"header", array)
        assert header == b"header"
        assert sum(piece.nbytes for piece in pieces) == array.nbytes
        assert all(numpy.shares_memory(piece, array) for piece in pieces)


def test_a_scattered_array_is_gathered_in_pieces() -> None:
    array = numpy.arange(8_000_000).reshape(2, -1)[:, ::2]
    _, *pieces = _npy_pieces(b"header", array)
    assert len(pieces) > 2
    assert b"".join(pieces) == array.tobytes()


@pytest.mark.parametrize("mode", ["r", "c"])
def test_an_array_is_mapped(mode: Any) -> None:
    array = numpy.arange(1000.0)
    mapped = kf.load_npy(kf.store_npy(array), mmap_mode=mode)
    assert isinstance(mapped, numpy.memmap)
    assert numpy.array_equal(mapped, array)
    assert mapped.flags.writeable is (mode == "c")


def test_a_copy_on_write_map_leaves_the_store_alone() -> None:
    uri = kf.store_npy(numpy.arange(1000.0))
    mapped = kf.load_npy(uri, mmap_mode="c")
    mapped[:] = 0
    kf.verify(uri)


@pytest.mark.parametrize("mode", ["r+", "w+", "x"])
def test_a_map_that_writes_is_refused(mode: Any) -> None:
    uri = kf.store_npy(numpy.arange(3))
    with pytest.raises(errors.InvalidArgument, match="mmap_mode"):
        kf.load_npy(uri, mmap_mode=mode)


@pytest.mark.parametrize("array", [numpy.array([object()]), numpy.array(["a", None]), numpy.zeros(1, [("a", "O")]),
                                   numpy.ma.masked_array([1], [True])])
def test_arrays_without_bytes_of_their_own_are_refused(array: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"Python objects|mask"):
        kf.store_npy(array)


def test_an_array_of_objects_is_not_loaded(tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", numpy.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(errors.WrongFormat, match="Object arrays"):
        kf.load_npy(kf.store_file(tmp_path / "x.npy"))


def test_what_is_no_npy_file_is_an_error(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "x.npz", a=numpy.zeros(3))
    whole = io.BytesIO()
    numpy.save(whole, numpy.arange(100))
    (tmp_path / "cut.npy").write_bytes(whole.getvalue()[:-1])
    (tmp_path / "head.npy").write_bytes(whole.getvalue()[:20])
    for uri in (kf.store_text("no"), *(kf.store_file(tmp_path / name) for name in ("x.npz", "cut.npy", "head.npy"))):
        with pytest.raises(errors.WrongFormat, match=r"a \.npy file"):
            kf.load_npy(uri)
        with pytest.raises(errors.WrongFormat, match=r"a \.npy file"):
            kf.load_npy(uri, mmap_mode="r")


# --- pickles


def test_a_pickle_of_plain_data_comes_back() -> None:
    value = {"a": [1, (2.5, None)], "b": {datetime.date(2022, 1, 2)}, "c": numpy.arange(6).reshape(2, 3)}
    uri = kf.store_pkl(value)
    assert uri.endswith("/file.pkl")
    loaded = kf.load_pkl(uri)
    assert numpy.array_equal(loaded.pop("c"), value.pop("c"))  # type: ignore[arg-type]
    assert loaded == value


def test_a_pickle_of_anything_else_is_not_stored() -> None:
    with pytest.raises(errors.UnsafePickle, match="Path"):
        kf.store_pkl([Path("/")])


def test_a_manifest_is_ordinary_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_CHUNK_SIZE_BYTES", "64")
    uri = kf.store_npy(numpy.arange(100))
    manifest = uri.partition("?manifest=")[2]
    assert kf.load_json(manifest) == json.loads(kf.load_text(f"sha1://{manifest}"))
