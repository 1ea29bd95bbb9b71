"""Canonical JSON (RFC 8785) and the hashes made of it.

The network of 2022 signed and hashed JavaScript's ``JSON.stringify`` with keys sorted by UTF-16 code unit, which is
RFC 8785 for every value a JavaScript program can hold (WIRE-2022.md §1).
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
import rfc8785

from ..errors import BadMessage

__all__ = ["canonical_bytes", "object_sha1"]

_EXACT_INTEGER_MAX = 2**53 - 1
_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder()
# Where the quick encoder may write what RFC 8785 writes in another way: an integral float, an integer of 16 digits, an
# exponent; and beyond U+FFFF keys are in another order.
_INTEGRAL = re.compile(rb"\.0(?![0-9])")
_LONG_OR_EXPONENT = re.compile(rb"[:,\[]-?(?:[0-9]{16}|[0-9.]+e)")
_BEYOND_FFFF = re.compile(rb"[\xf0-\xf4]")


def canonical_bytes(value: Any) -> bytes:
    """Return the canonical JSON of ``value`` (dict, list, str, int, float, bool, None) in UTF-8.

    Integers that a double cannot hold exactly are written as the nearest double, as JavaScript would.

    :raises BadMessage: the value is not JSON: another type, NaN, infinity, a lone surrogate, a key that is no string.
    """
    quick = _quick_bytes(value)
    if quick is not None:
        return quick
    try:
        return rfc8785.dumps(_as_javascript(value))
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError, OverflowError) as error:
        raise BadMessage(why=f"it is not JSON ({error})") from None


def object_sha1(value: Any) -> str:
    """Return the SHA-1 of the canonical JSON of ``value``, as 40 hex digits."""
    return hashlib.sha1(canonical_bytes(value), usedforsecurity=False).hexdigest()


def _quick_bytes(value: Any) -> bytes | None:
    """Return the canonical JSON, if the quick encoder surely writes it: 5 us for a message of 400 bytes, not 25.

    What reads back as the same value holds nothing that is not JSON.
    """
    if not isinstance(value, (dict, list)):
        return None
    try:
        data = _encoder.encode(value)
        if (_INTEGRAL.search(data) or _LONG_OR_EXPONENT.search(data)
                or (not data.isascii() and _BEYOND_FFFF.search(data)) or _decoder.decode(data) != value):
            return None
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError, OverflowError):
        return None
    return data


def _as_javascript(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_javascript(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_javascript(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT_INTEGER_MAX:
        return float(value)
    return value
