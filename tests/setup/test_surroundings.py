"""What conftest.py promises: each promise is broken by a small suite in a process of its own, and seen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HEAD = "import os, socket, subprocess, sys, tempfile, pytest\nfrom pathlib import Path\n"


def run_suite(place: Path, test: str, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run one test file under our conftest, with these options and variables besides."""
    for name in ("__init__.py", "conftest.py", "forking.py"):
        shutil.copy(TESTS / name, place / name)
    (place / "pytest.ini").write_text("[pytest]\nmarkers = live\n")
    (place / "test_it.py").write_text(HEAD + test)
    given = {name: value for name, value in os.environ.items() if not name.startswith(("KACHERY_", "PYTEST_"))}
    environ = {**given, "PYTEST_DEBUG_TEMPROOT": str(place), **environ}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis",
                           *options, "test_it.py"],
                          cwd=place, env=environ, capture_output=True, text=True, timeout=250)


# One test after the other, and as make test runs them.
SHARED: list[tuple[str, ...]] = [(), ("-n", "2", "--benchmark-disable")]
shared = pytest.mark.parametrize("options", SHARED, ids=["one process", "two processes"])

SKIPPING = """
def test_called():
    pytest.skip('not here: called')
@pytest.mark.skip(reason='not here: marked')
def test_marked():
    pass
@pytest.fixture
def f():
    pytest.skip('not here: in a fixture')
def test_in_a_fixture(f):
    pass
"""


def test_a_skip_is_a_failure_when_none_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text(HEAD + "pytest.skip('not here: module', allow_module_level=True)\n")
    all_of_it = ("--continue-on-collection-errors", "test_module.py")
    mild = run_suite(tmp_path, SKIPPING, *all_of_it)
    assert (mild.returncode, "4 skipped" in mild.stdout) == (0, True), mild.stdout
    for options in SHARED:
        strict = run_suite(tmp_path, SKIPPING, *options, *all_of_it, KACHERY_TEST_NO_SKIP="1")
        assert strict.returncode not in (0, 5)
        assert re.search(r"1 failed, 3 errors", strict.stdout), strict.stdout
        for how in ("called", "marked", "in a fixture", "module"):
            assert f"not here: {how}" in strict.stdout


def test_a_live_test_may_skip_and_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    test = ("@pytest.mark.live\ndef test_it():\n    pytest.skip('no account')\n"
            "@pytest.mark.xfail(strict=True)\ndef test_that():\n    assert False\n")
    assert run_suite(tmp_path, test, KACHERY_TEST_NO_SKIP="1").returncode == 0


def test_the_developers_surroundings_stay_outside(tmp_path: Path) -> None:
    test = ("def test_it():\n"
            "    assert 'KACHERY_CHANNEL' not in os.environ and 'XDG_DATA_HOME' not in os.environ\n"
            "    assert 'KACHERY_TEST_SOMETHING' in os.environ\n"
            "    assert Path.home() != Path('/home/developer') and not list(Path.home().iterdir())\n")
    done = run_suite(tmp_path, test, KACHERY_CHANNEL="mine", XDG_DATA_HOME="/x", HOME="/home/developer",
                     KACHERY_TEST_SOMETHING="1")
    assert done.returncode == 0, done.stdout


def test_nothing_listens_beyond_loopback(tmp_path: Path) -> None:
    own = run_suite(tmp_path, "def test_it():\n    with socket.socket() as s:\n        s.bind(('0.0.0.0', 0))\n")
    assert own.returncode == 1
    assert "not loopback" in own.stdout
    child = ("LISTEN = 'import socket; s = socket.create_server((\"0.0.0.0\", 0)); print(1, flush=True); input()'\n"
             "@pytest.fixture\ndef child():\n"
             "    p = subprocess.Popen([sys.executable, '-c', LISTEN], stdin=-1, stdout=-1)\n"
             "    yield p\n    p.communicate()\n"
             "def test_it(child):\n    child.stdout.readline()\n")
    other = run_suite(tmp_path, child)
    assert other.returncode == 1
    assert "beyond loopback" in other.stdout
    assert run_suite(tmp_path, child.replace("0.0.0.0", "127.0.0.1")).returncode == 0


@shared
def test_a_process_that_is_left_fails_the_run_and_is_ended(tmp_path: Path, options: tuple[str, ...]) -> None:
    test = ("def test_it():\n"
            "    p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
            "    print(f'left {p.pid} left')\n    p.returncode = 0\n    assert sys.argv\n")
    done = run_suite(tmp_path, test.replace("assert sys.argv", "Path('pid').write_text(str(p.pid))"), *options,
                     KACHERY_TEST_END_SECONDS="1")
    assert done.returncode == 1
    assert "was left running" in done.stdout
    pid = int((tmp_path / "pid").read_text())
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        state = "gone"
    assert state in ("Z", "gone")


@shared
def test_a_temporary_directory_that_is_left_fails_the_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run_suite(tmp_path, "def test_it():\n    tempfile.mkdtemp(prefix='stray-')\n", *options)
    assert done.returncode == 1
    assert "stray-" in done.stdout
    clean = run_suite(tmp_path, "def test_it(tmp_path):\n    with tempfile.TemporaryDirectory():\n        pass\n",
                      *options)
    assert clean.returncode == 0, clean.stdout
