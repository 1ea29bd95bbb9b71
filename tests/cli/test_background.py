"""Starting programs in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.cli.background import interruptions_held, log_tail, start_detached
from kachery_fast.errors import DiskError, NodeError


def script(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_program_is_ready_when_it_says_so_and_lives_on(tmp_path: Path) -> None:
    flag, log = tmp_path / "flag", tmp_path / "new" / "log"
    code = f"import os, time; print('hello', os.getcwd()); open({str(flag)!r}, 'w').close(); time.sleep(60)"
    pid = start_detached(script(code), log, flag.exists)
    try:
        assert os.getsid(pid) == pid != os.getsid(0)
        assert log.read_text() == "hello /\n"
    finally:
        end(pid)


def test_the_log_is_continued_and_the_environment_given(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    code = "import os, time; print(os.environ['KACHERY_TEST_WORD']); time.sleep(60)"
    pid = start_detached(script(code), log, lambda: "word" in log.read_text(),
                         environ={**os.environ, "KACHERY_TEST_WORD": "word"})
    end(pid)
    assert log.read_text() == "before\nword\n"


def test_a_program_that_ends_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("of another time\n")
    with pytest.raises(NodeError, match=r"exit code 3.*ends with: first \| second") as caught:
        start_detached(script("print('first'); print('second'); raise SystemExit(3)"), log, lambda: False)
    assert "another time" not in str(caught.value)


def test_a_program_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def ready() -> bool:
        while not log.stat().st_size:  # it is ended when it runs, not while it starts
            time.sleep(0.01)
        return False

    with pytest.raises(NodeError, match=r"not ready after 1 s"):
        start_detached(script("import os, time; print(os.getpid()); time.sleep(60)"), log, ready, 1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_start_is_waited_for_as_long_as_its_log_shows_progress(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.cli.background._TELL_SECONDS", 0.5)
    code = """
import time
for number in range(12):
    print('so far', number)
    time.sleep(0.25)
print('done')
time.sleep(60)
"""
    log, told = tmp_path / "log", list[str]()
    pid = start_detached(script(code), log, lambda: "done" in log.read_text(), 1.5, progress="so far", tell=told.append)
    end(pid)
    assert 0 < len(told) < 8
    assert "ends with: so far" in told[0]


def test_a_log_that_grows_without_progress_is_not_waited_for(tmp_path: Path) -> None:
    code = "import time\nwhile True: print('no answer'); time.sleep(0.1)"
    with pytest.raises(NodeError, match=r"not ready after 1 s"):
        start_detached(script(code), tmp_path / "log", lambda: False, 1.0, progress="so far")


def test_what_readiness_raises_ends_the_program(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def ready() -> bool:
        if log.stat().st_size:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        start_detached(script("import os, time; print(os.getpid()); time.sleep(60)"), log, ready)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="log"):
        start_detached(script("pass"), tmp_path / "file" / "log", lambda: True)


def test_the_tail_of_a_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "cannot be read" in log_tail(log)
    log.write_text("")
    assert "is empty" in log_tail(log)
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    begun = time.thread_time()  # of this thread alone, whatever else the machine does
    assert log_tail(log).endswith("line 99998 | line 99999")
    assert len(log_tail(log)) < 300
    assert time.thread_time() - begun < 1


def test_a_program_that_is_starting_when_ctrl_c_comes_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = subprocess.Popen

    def interrupted_start(*words: Any, **options: Any) -> Any:
        started.append(start(*words, **options))
        signal.raise_signal(signal.SIGINT)  # before anybody else has the process
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted_start)
    with pytest.raises(KeyboardInterrupt):
        start_detached(script("import time; time.sleep(60)"), tmp_path / "log", lambda: False)
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_signals_that_are_ignored_stay_ignored_for_what_is_started() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptions_held():
            done = subprocess.run(script("import signal; print(signal.getsignal(signal.SIGHUP).name)"),
                                  capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "SIG_IGN\n"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
