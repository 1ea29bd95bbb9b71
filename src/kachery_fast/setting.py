"""One row of the table of settings, and how a value for it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidSetting

__all__ = ["Setting", "convert"]

# What numbers of a unit may be at most: 65535 is the last port, a socket takes no timeout of 2**63 ns, and what counts
# anything else stays exact in a float.
_MAXIMA = {"port": 65535, "seconds": 1e8, "days": 1e5}
_MAXIMUM = 2**53

# A host's name (RFC 1123, and the underscore that many networks use), or an address, where of IPv6 with its zone.
_HOST = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?|[0-9a-f:]*:[0-9a-f:.]*(?:%[a-z0-9_.-]+)?",
                   re.IGNORECASE | re.ASCII)

_SEED = re.compile(r"[0-9a-f]{64}", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Setting:
    """One row of the table. ``minimum`` bounds numbers from below, ``maximum``, which goes by the unit, from above."""

    name: str
    default: Any
    unit: str
    env: str
    help: str
    minimum: float = 0

    @property
    def maximum(self) -> float:
        """The largest number that is allowed; no setting is infinite."""
        return _MAXIMA.get(self.unit, _MAXIMUM)


def convert(setting: Setting, value: Any, source: str) -> Any:
    """Return ``value`` as what the setting is of.

    :param source: where it comes from, for the error.
    :raises InvalidSetting: it cannot be that, or is not within the setting's bounds.
    """
    wanted = f"a number of {setting.unit}"
    try:
        if setting.unit == "path":
            wanted = "a path"
            return Path(str(value)).expanduser().absolute()
        if setting.unit == "host":
            wanted = "a host's name or address"
            return _host(str(value))
        if setting.unit == "secret key":
            return _secret_key(setting, str(value), source)
        if isinstance(setting.default, str):
            return str(value)
        number = type(setting.default)(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidSetting(name=setting.name, value=value, source=source, why=f"it must be {wanted}") from None
    if not number >= setting.minimum:  # so that NaN is refused too
        raise InvalidSetting(name=setting.name, value=value, source=source,
                             why=f"it must be at least {setting.minimum:g} {setting.unit}")
    if number > setting.maximum:
        raise InvalidSetting(name=setting.name, value=value, source=source,
                             why=f"it must be at most {setting.maximum:.16g} {setting.unit}")
    return number


def _secret_key(setting: Setting, text: str, source: str) -> str:
    """Return the seed of an Ed25519 key, 32 bytes as hex digits. What is wrong with it is told without showing it."""
    if not _SEED.fullmatch(text.strip()):
        raise InvalidSetting(name=setting.name, value="(not shown)", source=source,
                             why="it must be 64 hex digits; make a key with: kachery-fast node key")
    return text.strip().lower()


def _host(text: str) -> str:
    """Return a host's name or address, an IPv6 address without its brackets. :raises ValueError: it is neither."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    name = host if host.isascii() else host.encode("idna").decode("ascii")  # as the resolver does; may raise
    if not _HOST.fullmatch(name):
        raise ValueError(text)
    return host
