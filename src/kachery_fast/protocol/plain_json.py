"""Reading JSON that anybody may have written, in a time that follows from its length.

msgspec (0.22) is the quickest reader, but for numbers near the ends of what a double holds: below 1e-290 and above
1e289 each takes up to 30 us, with the lock of the interpreter held. ``[1e300,1e300,…]`` of 1 MiB would stop every
thread for five seconds. Where there are many, the reader of the standard library is asked, which takes 2 us for each.
"""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from typing import Any, NoReturn

import msgspec

from ..errors import InvalidArgument

__all__ = ["check_numbers", "decode", "decode_lines", "has_extreme_numbers"]

# 300 of them take 10 ms.
_EXTREMES_MAX = 300
_EXTREMES_IN_RESULT_MAX = 3000
_EXTREME_LENGTH_MIN = 5
_EXTREME = re.compile(rb"[\[,:\s]-?[0-9.]+[eE][+-]?0*(?:2[7-9][0-9]|[3-9][0-9]{2}|[1-9][0-9]{3,})")


def decode(data: bytes) -> Any:
    """Return what ``data`` says, as dicts, lists, texts, numbers, bools and None.

    :raises msgspec.DecodeError, UnicodeDecodeError, RecursionError: it is not JSON, or nested too deep.
    """
    return _slowly(data) if has_extreme_numbers(data) else msgspec.json.decode(data)


def decode_lines(data: bytes) -> list[Any]:
    """Return what the lines of ``data`` say, each by itself. Raises as ``decode`` does."""
    read = _slowly if has_extreme_numbers(data) else msgspec.json.decode
    return [read(line) for line in data.split(b"\n")]


def _slowly(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_float=_finite, parse_constant=_refuse)
    except ValueError as error:
        raise msgspec.DecodeError(str(error)) from None


def check_numbers(data: bytes) -> None:
    """Make sure that the JSON of a result can be read by msgspec within 0.1 s.

    :raises InvalidArgument: it has more than 3,000 extreme numbers.
    """
    if has_extreme_numbers(data, _EXTREMES_IN_RESULT_MAX):
        raise InvalidArgument(what=f"it has more than {_EXTREMES_IN_RESULT_MAX} numbers beyond 1e±270, which take long "
                                   "to read from JSON; an array may have them")


def has_extreme_numbers(data: bytes, count_max: int = _EXTREMES_MAX) -> bool:
    """Whether there are more than ``count_max`` numbers in JSON that msgspec is slow to read."""
    if len(data) < count_max * _EXTREME_LENGTH_MIN or data.count(b"e") + data.count(b"E") <= count_max:
        return False  # as is most that is read, at a tenth of the cost
    return next(islice(_EXTREME.finditer(data), count_max, None), None) is not None


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
