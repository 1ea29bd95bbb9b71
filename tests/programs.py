"""Foreign programs that tests and benchmarks hold ours against."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Debian keeps the programs of each PostgreSQL apart.
_POSTGRESQL = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin", *_POSTGRESQL])


def need_program(name: str) -> str:
    """The path of an installed program; skips the test with the reason when it is absent."""
    path = shutil.which(name, path=_PATH)
    if path is None:
        pytest.skip(f"the program {name} is not installed")
    return path


def need_root() -> None:
    """Skip the test unless it runs as root, as mounting and changing users need."""
    if os.geteuid() != 0:
        pytest.skip("this needs root: it mounts a file system or changes users")
