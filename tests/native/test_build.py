"""The source distribution has what a build and a test of it need, and nothing that the build makes."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def built(kind: str, source: Path, target: Path) -> Path:
    """Build an sdist or a wheel with the packages at hand; the archive."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "-o", str(target), str(source)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    (archive,) = target.iterdir()
    return archive


@pytest.mark.slow
def test_a_source_distribution_builds_a_wheel_that_works(tmp_path: Path) -> None:
    for module in ("build", "setuptools", "Cython"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the package {module} is not installed")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    archive = built("sdist", tmp_path / "checkout", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        if sys.version_info >= (3, 12):
            tar.extractall(tmp_path / "unpacked", filter="data")
        else:
            tar.extractall(tmp_path / "unpacked")
    package = "src/kachery_fast"
    wanted = {f"{package}/_core.{end}" for end in ("pyx", "pxd", "pyi")}
    wanted |= {f"{package}/_chunker.pyx", f"{package}/_chunker.pyi", f"{package}/_disk.h", f"{package}/py.typed"}
    wanted |= {f"{package}/{name}.{end}" for name in ("_sha1", "_relay") for end in ("c", "h")}
    wanted |= {"tests/native/kernel_check.c", "tests/vectors/manifests.jsonl", "benchmarks/digests.py"}
    assert wanted <= names
    assert {name for name in names if name.endswith((".c", ".so")) and name.startswith("src")} == {
        f"{package}/_sha1.c",
        f"{package}/_relay.c",
    }
    (source,) = (tmp_path / "unpacked").iterdir()
    wheel = built("wheel", source, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "installed")
    code = "from kachery_fast import _chunker, _core; print(_core.__file__, _core.Sha1(b'abc').hexdigest())"
    outcome = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    path, sha1 = outcome.stdout.split()
    assert path.startswith(str(tmp_path / "installed"))
    assert sha1 == "a9993e364706816aba3e25717850c26c9cd0d89d"
