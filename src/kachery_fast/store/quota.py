"""How much cached copies may take: our own setting, else ``maxCacheSizeGiB`` in ``kachery.yaml`` (2022)."""

from __future__ import annotations

import functools
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CacheConfigInvalid
from .disk import display
from .objects import read_small

__all__ = ["quota_of"]

_GIB = 1024**3
_CONFIG_SIZE_BYTES_MAX = 65536
_QUOTA_GIB_MAX = 2**53 / _GIB
_NAME = "maxCacheSizeGiB"
_SHOWN_LENGTH_MAX = 60

_log = logging.getLogger("kachery_fast.store")


def quota_of(storage_dir: Path, size_bytes_max: int) -> int | None:
    """Return the bound in bytes, None where there is none.

    :param size_bytes_max: the setting; 0 when ``kachery.yaml`` in the storage directory decides.
    :raises CacheConfigInvalid: that is no YAML, or its ``maxCacheSizeGiB`` is not a number from 0 on.
    :raises DiskError: it cannot be read.
    """
    if size_bytes_max:
        return size_bytes_max
    path = storage_dir / "kachery.yaml"
    data = read_small(path, _CONFIG_SIZE_BYTES_MAX)
    if data is None:
        return None
    import yaml  # only where the file is: it costs every start of the program

    try:
        found: Any = yaml.safe_load(data)
    except Exception as error:  # a tag that does not fit its value, such as !!bool maybe, raises whatever it likes
        why = (str(error).splitlines() or [""])[0][:_SHOWN_LENGTH_MAX] or type(error).__name__
        raise CacheConfigInvalid(path=display(path), why=f"it is not YAML ({why})") from None
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CacheConfigInvalid(path=display(path), why="it is not a mapping of names to values")
    for name in found:
        if name != _NAME and isinstance(name, str) and name.casefold().startswith("maxcache"):
            _tell_unknown(display(path), name[:_SHOWN_LENGTH_MAX])
    limit = found.get(_NAME)
    if limit is None:
        return None
    number = _number(limit)
    if number is None or not 0 <= number <= _QUOTA_GIB_MAX:
        raise CacheConfigInvalid(path=display(path), why=f"its {_NAME} is {_shown(limit)}, not a number from 0 to "
                                                         f"{_QUOTA_GIB_MAX:.0f}")
    return int(number * _GIB)


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):  # an int in Python
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9.]{1,20}([eE][+-]?[0-9]{1,3})?", value):  # text, in YAML 1.1
        with suppress(ValueError):
            return float(value)
    return value if isinstance(value, int | float) else None


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_LENGTH_MAX else text[:_SHOWN_LENGTH_MAX] + "…"


@functools.lru_cache(maxsize=64)
def _tell_unknown(path: str, name: str) -> None:
    """Once, though the file is read again and again."""
    _log.warning("%s: nothing is known of %r; the bound is named %s", path, name, _NAME)
