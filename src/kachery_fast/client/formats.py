"""Text, JSON, numpy arrays and pickles as stored files, with the bytes that the client of 2022 writes.

The same value so gets the same URI as in 2022: compact ASCII JSON in the order given, text in UTF-8, arrays as
``numpy.save`` writes them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast

from ..errors import FileElsewhere, InvalidArgument, WrongFormat
from ..store.disk import translated
from .files import load, load_bytes
from .progress import ProgressCallback
from .storing import chosen_label, store_bytes, store_pieces

if TYPE_CHECKING:
    import numpy

__all__ = [
    "load_json",
    "load_npy",
    "load_pkl",
    "load_text",
    "load_whole",
    "store_json",
    "store_npy",
    "store_pkl",
    "store_text",
]

# A header is parsed as a Python literal, which takes about a hundred times its length in memory; numpy's own limit of
# 10,000 bytes would refuse some 500 fields.
_NPY_HEADER_SIZE_BYTES_MAX = 1024 * 1024
_NPY_MAGIC = b"\x93NUMPY"
_PIECE_SIZE_BYTES = 8 * 1024 * 1024


def load_whole(uri: str, *, channel: str | None = None, progress: ProgressCallback | None = None,
               direct: str | None = None) -> bytes:
    """Return the bytes of a file, which is loaded into the store; they are in memory once.

    :param channel, progress, direct: as ``load_file``, which also lists what may be raised.
    """
    with _opened(uri, channel, progress, direct) as file:
        return file.read()


@contextmanager
def _opened(uri: str, channel: str | None, progress: ProgressCallback | None,
            direct: str | None) -> Iterator[BinaryIO]:
    """Open a file where it is loaded to; what has no place on this machine is read into memory."""
    path = None
    with suppress(FileElsewhere):
        path = load(uri, channel=channel, progress=progress, direct=direct).path
    if path is None:
        yield io.BytesIO(load_bytes(uri, channel=channel))
        return
    with translated("reading", path), Path(path).open("rb") as file:
        yield file


# --- text


def store_text(text: str, basename: str | None = None, *, label: str | None = None) -> str:
    """Store text as UTF-8, line ends as they are, and return its content URI.

    :param basename, label: the label in the URI, "file.txt" without either.
    :raises InvalidArgument: it is not text, or has lone surrogates, which UTF-8 cannot hold.
    """
    if not isinstance(text, str):
        raise InvalidArgument(what=f"store_text takes text, not {type(text).__name__}.")
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgument(what=f"This text has no UTF-8 form: {error}.") from None
    return store_bytes(data, chosen_label(label, basename, "file.txt"))


def load_text(uri: str, *, channel: str | None = None, progress: ProgressCallback | None = None,
              direct: str | None = None) -> str:
    """Return the text of a file in UTF-8, line ends as they are.

    :param channel, progress, direct: as ``load_file``, which also lists what else may be raised.
    :raises WrongFormat: it is not UTF-8.
    """
    data = load_whole(uri, channel=channel, progress=progress, direct=direct)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WrongFormat(what=uri, format="text in UTF-8", why=str(error).rstrip(".")) from None


# --- JSON


def store_json(object: Any, basename: str | None = None, *, label: str | None = None,  # noqa: A002 - name of 2022
               separators: tuple[str, str] = (",", ":"), indent: int | str | None = None) -> str:
    """Store a value as JSON and return its content URI.

    NaN and the infinities are refused: JSON has none, and other readers choke on them. Keys keep their order.

    :param object: None, bool, int, float, str, and lists, tuples and dicts of these.
    :param basename, label: the label in the URI, "file.json" without either.
    :param separators, indent: as of ``json.dumps``.
    :raises InvalidArgument: a part of it is not JSON.
    """
    try:
        text = json.dumps(object, separators=separators, indent=indent, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(what=f"This value cannot be stored as JSON: {error}.") from None
    return store_bytes(text.encode("ascii"), chosen_label(label, basename, "file.json"))


def load_json(uri: str, *, channel: str | None = None, progress: ProgressCallback | None = None,
              direct: str | None = None) -> Any:
    """Return the value of a JSON file. NaN and Infinity are read where another program wrote them.

    :param channel, progress, direct: as ``load_file``, which also lists what else may be raised.
    :raises WrongFormat: it is not JSON.
    """
    data = load_whole(uri, channel=channel, progress=progress, direct=direct)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WrongFormat(what=uri, format="JSON", why=str(error).rstrip(".")) from None


# --- numpy


def store_npy(array: numpy.ndarray[Any, Any], basename: str | None = None, *, label: str | None = None) -> str:
    """Store an array as a .npy file and return its content URI.

    A contiguous array, in C or Fortran order, is hashed and written from its own memory; another is copied piece by
    piece. It must not change meanwhile.

    :param array: any shape and dtype but Python objects; what is no array is made one.
    :param basename, label: the label in the URI, "file.npy" without either.
    :raises InvalidArgument: an array of Python objects, or a masked array, whose mask a .npy file cannot hold.
    """
    import numpy

    if isinstance(array, numpy.ma.MaskedArray):
        raise InvalidArgument(what="A .npy file cannot hold a mask; store array.data and array.mask apart.")
    try:
        array = numpy.asarray(array)
    except ValueError as error:
        raise InvalidArgument(what=f"This is not an array: {error}.") from None
    if array.dtype.hasobject:
        raise InvalidArgument(what=f"An array of dtype {array.dtype} holds Python objects, which have no bytes of "
                                   "their own. Give it a dtype of numbers or fixed-length text, or use store_pkl.")
    label = chosen_label(label, basename, "file.npy")
    header = _npy_header(array)
    return store_pieces(lambda: _npy_pieces(header, array), len(header) + array.nbytes, label)


def load_npy(uri: str, *, channel: str | None = None, mmap_mode: Literal["r", "c"] | None = None,
             progress: ProgressCallback | None = None, direct: str | None = None) -> numpy.ndarray[Any, Any]:
    """Return the array of a .npy file.

    :param mmap_mode: "r" maps the file read-only, "c" copy-on-write; None reads it into memory. The modes that write
        to the file are refused: its name is the hash of its bytes.
    :param channel, progress, direct: as ``load_file``, which also lists what else may be raised.
    :raises InvalidArgument: another ``mmap_mode``.
    :raises WrongFormat: not a .npy file, or one of Python objects.
    """
    import numpy

    if mmap_mode not in (None, "r", "c"):
        raise InvalidArgument(what=f"mmap_mode={mmap_mode!r} would change a stored file; use 'r', 'c' or None.")
    # A map is of a file that has a path.
    path = None if mmap_mode is None else load(uri, channel=channel, progress=progress, direct=direct).path
    with _opened(uri, channel, progress, direct) as file:
        if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
            raise WrongFormat(what=uri, format="a .npy file", why="it does not begin like one")
        file.seek(0)
        try:
            found = numpy.load(file if path is None else path, mmap_mode=mmap_mode, allow_pickle=False,
                               max_header_size=_NPY_HEADER_SIZE_BYTES_MAX)
        except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, RecursionError) as error:
            raise WrongFormat(what=uri, format="a .npy file", why=str(error).rstrip(".")) from error
    return cast("numpy.ndarray[Any, Any]", found)


def _npy_header(array: numpy.ndarray[Any, Any]) -> bytes:
    """Return the header that ``numpy.save`` writes, in the lowest version of the format that can say it."""
    from numpy.lib import format as npy

    buffer = io.BytesIO()
    description = npy.header_data_from_array_1_0(array)
    for write in (npy.write_array_header_1_0, npy.write_array_header_2_0):
        try:
            write(buffer, description)
        except ValueError:  # too long, or a field's name is not Latin-1
            buffer.seek(0)
            buffer.truncate()
            continue
        if buffer.tell() <= _NPY_HEADER_SIZE_BYTES_MAX:
            return buffer.getvalue()
    raise InvalidArgument(what="The names of this array's fields do not fit the header of a .npy file; use fewer, in "
                               "Latin letters.")


def _npy_pieces(header: bytes, array: numpy.ndarray[Any, Any]) -> Iterator[Any]:
    """Yield the header, then the array's bytes in the order that the header promises."""
    import numpy

    yield header
    if array.nbytes == 0:
        return
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        array = array.T
    if array.flags.c_contiguous:
        view = numpy.frombuffer(array, dtype=numpy.uint8)
        for start in range(0, view.size, _PIECE_SIZE_BYTES):
            yield view[start : start + _PIECE_SIZE_BYTES]
        return
    # Scattered: numpy gathers it, some mebibytes at a time.
    pieces: Any = numpy.nditer(array, flags=["external_loop", "buffered", "zerosize_ok"], order="C",
                               buffersize=max(_PIECE_SIZE_BYTES // array.itemsize, 1))
    for piece in pieces:
        yield piece.tobytes("C")


# --- pickles


def store_pkl(x: Any, basename: str | None = None, *, label: str | None = None) -> str:
    """Store plain data as a pickle and return its content URI; ``load_pkl`` lists the types.

    :param basename, label: the label in the URI, "file.pkl" without either.
    :raises UnsafePickle: a part of it is of another type.
    """
    from .pickles import dump_pickle

    return store_bytes(dump_pickle(x), chosen_label(label, basename, "file.pkl"))


def load_pkl(uri: str, *, channel: str | None = None, progress: ProgressCallback | None = None,
             direct: str | None = None) -> Any:
    """Return the value of a pickle of plain data: None, numbers, text, bytes, lists, tuples, dicts, sets, ranges,
    slices, deques, dates and times, decimals, and numpy arrays, scalars and dtypes of these.

    :param channel, progress, direct: as ``load_file``, which also lists what else may be raised.
    :raises UnsafePickle: it holds or calls anything else; nothing of that was run.
    :raises WrongFormat: it is not a pickle.
    """
    from .pickles import load_pickle

    with _opened(uri, channel, progress, direct) as file:
        return load_pickle(file, what=uri)
