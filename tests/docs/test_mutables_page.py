"""The page on mutables says what is so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kachery_fast.config import SETTINGS
from kachery_fast.store import mutables

from .test_pages import ROOT, blocks

PAGE = ROOT / "docs" / "mutables.md"


def test_the_example_runs_as_it_says(tmp_path: Path) -> None:
    (example,) = blocks(PAGE, "python")
    checks = """
assert uri == "sha1://f572d396fae9206628714fb2ce00f72e94f2258f/a.dat"
assert settings == kf.get({"animal": "m17", "rig": 2}) == {"gain": 1.5, "channels": [0, 4, 7]}
assert first is True
assert kf.delete("lock") is False
"""
    subprocess.run([sys.executable, "-W", "error", "-c", example + checks], check=True, timeout=60,
                   env={**os.environ, "KACHERY_STORAGE_DIR": str(tmp_path)})


def test_the_limits_and_names_are_those_of_the_program() -> None:
    text = PAGE.read_text("utf-8")
    (limit,) = [setting for setting in SETTINGS if setting.name == "mutable_size_bytes_max"]
    assert limit.default == 1024 * 1024
    assert f"1 MiB as JSON (`{limit.env}`), a key 16 KiB" in text
    assert f"`{mutables.DATABASE_NAME}`" in text
