"""Canonical JSON (RFC 8785) and the hashes made of it.

The network of 2022 signed and hashed JavaScript's ``JSON.stringify`` with keys sorted by UTF-16 code unit, which is
RFC 8785 for every value a JavaScript program can hold (WIRE-2022.md §1).
"""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from ..errors import BadMessage

__all__ = ["canonical_bytes", "object_sha1"]

_EXACT_INTEGER_MAX = 2**53 - 1


def canonical_bytes(value: Any) -> bytes:
    """Return the canonical JSON of ``value`` (dict, list, str, int, float, bool, None) in UTF-8.

    Integers that a double cannot hold exactly are written as the nearest double, as JavaScript would.

    :raises BadMessage: the value is not JSON: another type, NaN, infinity, a lone surrogate, a key that is no string.
    """
    try:
        return rfc8785.dumps(_as_javascript(value))
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError, OverflowError) as error:
        raise BadMessage(why=f"it is not JSON ({error})") from None


def object_sha1(value: Any) -> str:
    """Return the SHA-1 of the canonical JSON of ``value``, as 40 hex digits."""
    return hashlib.sha1(canonical_bytes(value), usedforsecurity=False).hexdigest()


def _as_javascript(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_javascript(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_javascript(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT_INTEGER_MAX:
        return float(value)
    return value
