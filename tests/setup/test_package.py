"""The packages: what the source distribution and the wheel hold, and that the wheel works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Everything that is committed, as far as a package can need it.
PARTS = ("src", "docs", "tests", "benchmarks", ".github", ".ci", "pyproject.toml", "setup.py", "MANIFEST.in",
         "Makefile", "README.md", "CHANGELOG.md", "LICENSE")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from it, without the network."""
    place = tmp_path_factory.mktemp("package")
    source = place / "source"
    source.mkdir()
    clutter = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=clutter)
        else:
            shutil.copy(ROOT / part, source)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", source],
                          cwd=place, env={**os.environ, "CFLAGS": "-O0"}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return place / "dist"


@pytest.mark.slow
def test_the_source_distribution_holds_what_it_takes_to_build_and_test(packages: Path) -> None:
    [path] = packages.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {f"src/kachery_fast/{file.name}" for file in (ROOT / "src" / "kachery_fast").iterdir()
              if file.suffix in (".pyx", ".pxd", ".pyi", ".h")}
    assert names >= native | {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml",
                              "src/kachery_fast/_sha1.c", "src/kachery_fast/_relay.c", "src/kachery_fast/py.typed",
                              "tests/conftest.py", "tests/native/kernel_check.c",
                              "tests/vectors/manifests.jsonl", "benchmarks/digests.py",
                              "docs/formats.md", ".github/workflows/tests.yml", ".ci/run",
                              ".ci/find-python"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert {name for name in names if name.endswith(".c") and name.startswith("src")} == {
        "src/kachery_fast/_sha1.c", "src/kachery_fast/_crc32c.c", "src/kachery_fast/_relay.c"}


@pytest.mark.slow
def test_the_wheel_holds_the_program_and_nothing_else(packages: Path) -> None:
    [path] = packages.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    files = [file for suffix in ("py", "html", "css", "js", "svg")
             for file in (ROOT / "src" / "kachery_fast").rglob(f"*.{suffix}")]
    assert len({file.suffix for file in files}) == 5
    assert {str(file.relative_to(ROOT / "src")) for file in files} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 3
    assert {"kachery_fast/py.typed", "kachery_fast/_core.pyi", "kachery_fast/_chunker.pyi",
            "kachery_fast/_checksum.pyi"} <= set(names)
    outside = [name for name in names if not name.startswith("kachery_fast/") and ".dist-info/" not in name]
    assert not outside
    assert not [name for name in names if name.endswith((".c", ".pyx"))]


@pytest.mark.slow
def test_the_wheel_works(packages: Path, tmp_path: Path) -> None:
    [path] = packages.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "recording").write_bytes(b"bytes")
    script = ("import kachery_fast as kf; assert kf.__file__.startswith('" + str(tmp_path) + "'); "
              "print(kf.load_file(kf.store_file('recording')))")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "KACHERY_STORAGE_DIR": str(tmp_path / "store")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == b"bytes"
