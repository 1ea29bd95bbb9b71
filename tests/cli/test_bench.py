"""bench cpu."""

from __future__ import annotations

from pathlib import Path

from kachery_fast import _core
from tests.cli.commands import Program


def test_every_kernel_is_measured_and_compared(tmp_path: Path) -> None:
    program = Program(tmp_path / "store")
    found = program.json("bench", "cpu", "--size", "1", "--runs", "1")
    assert [row["kernel"] for row in found["kernels"]] == ["hashlib", *_core.KERNELS]
    assert all(row["one"] > 0 for row in found["kernels"])
    assert all(row["both"] > 0 for row in found["kernels"][1:])
    assert found["chosen"] in _core.KERNELS
    assert found["equal"] is True
    text = program.ok("bench", "cpu", "--size", "1", "--runs", "1")
    assert "All digests are equal." in text
    program.env["KACHERY_SHA1_KERNEL"] = "abacus"
    done = program.run("bench", "cpu", "--size", "1", "--runs", "1")
    assert done.returncode == 2
    assert "abacus" in done.stderr
