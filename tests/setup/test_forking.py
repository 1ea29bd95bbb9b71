"""Programs that are forked are what they would be if they had been started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PROGRAM = [sys.executable, "-m", "kachery_fast"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are forked on Linux alone")


def is_forked(process: subprocess.Popen[bytes]) -> bool:
    return "tests.forking" in psutil.Process(process.pid).cmdline()


def environment(place: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "KACHERY_STORAGE_DIR": str(place / "store"), **more}


@contextmanager
def running_hub(place: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A hub whose directory and log are given in relation to where it runs."""
    with (place / "log").open("wb") as log:
        process = subprocess.Popen([*PROGRAM, "hub", "--dir", "here", "--port", "0"], cwd=place, start_new_session=True,
                                   env=environment(place, **more), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not (place / "here" / "address").exists():
            assert (process.poll(), time.monotonic() < end) == (None, True), (place / "log").read_text()
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_program_has_its_own_session_directory_and_files_and_ends_well(tmp_path: Path) -> None:
    with running_hub(tmp_path) as process:
        assert is_forked(process)
        assert psutil.Process(process.pid).ppid() == os.getpid()
        assert os.getsid(process.pid) == process.pid
        assert {name: os.readlink(f"/proc/{process.pid}/fd/{name}") for name in "012"} == {
            "0": "/dev/null", "1": str(tmp_path / "log"), "2": str(tmp_path / "log")}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert "http://127.0.0.1" in (tmp_path / "log").read_text()


def test_a_program_is_killed_and_waited_for_as_any_child(tmp_path: Path) -> None:
    with running_hub(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        pid, status, _ = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert (pid, process.returncode) == (process.pid, -signal.SIGKILL)


def test_a_program_that_starts_otherwise_is_started(tmp_path: Path) -> None:
    with running_hub(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])) as hub:
        assert not is_forked(hub)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_is_ignored_here_is_ignored_there(tmp_path: Path, handler: signal.Handlers) -> None:
    former = signal.signal(signal.SIGHUP, handler)
    try:
        with running_hub(tmp_path) as process:
            assert is_forked(process)
            status = Path(f"/proc/{process.pid}/status").read_text()
            mask = int(status.partition("SigIgn:")[2].split()[0], 16)
            assert bool(mask >> (signal.SIGHUP - 1) & 1) == (handler == signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize(("name", "shown"), [("nö such".encode(), "nö such".encode()), (b"\xff", b"\\xff")])
def test_arguments_environment_exit_code_and_streams_are_its_own(tmp_path: Path, name: bytes, shown: bytes) -> None:
    (tmp_path / "there").write_bytes(b"x")
    done = subprocess.run([*PROGRAM, "store", "there", name], env=environment(tmp_path), cwd=tmp_path,
                          capture_output=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stdout == b"sha1://11f6ad8ec52a2984abaafd7c3b516503785c2072/there\n"
    assert b"There is no file " + shown + b". " in done.stderr
    assert (tmp_path / "store").is_dir()
