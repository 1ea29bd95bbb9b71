"""How much cached copies may take: our own setting, else ``maxCacheSizeGiB`` in ``kachery.yaml`` (2022)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CacheConfigInvalid
from .disk import display
from .objects import read_small

__all__ = ["quota_of"]

_GIB = 1024**3
_CONFIG_SIZE_BYTES_MAX = 65536
_QUOTA_GIB_MAX = 2**53 / _GIB


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CacheConfigInvalid(path=display(path), why=f"it is not YAML ({str(error).splitlines()[0]})") from None
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CacheConfigInvalid(path=display(path), why="it is not a mapping of names to values")
    limit = found.get("maxCacheSizeGiB")
    if limit is None:
        return None
    # A bool is an int in Python, and YAML has .nan and .inf.
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= _QUOTA_GIB_MAX:
        raise CacheConfigInvalid(path=display(path), why=f"its maxCacheSizeGiB is {limit!r}, not a number from 0 to "
                                                         f"{_QUOTA_GIB_MAX:.0f}")
    return int(limit * _GIB)
