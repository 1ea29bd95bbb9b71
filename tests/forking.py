"""Programs of ours that tests start begin as copies of one process that has imported what they need.

Most of the processor time of a short command is the interpreter's start and the imports, 0.2 s and more; of a node
0.6 s, of a hub 1 s; and tests start thousands. So ``subprocess`` in the processes that run tests has
``python -m kachery_fast …`` forked: a process of its own all the same, a child of the one that asked, with its own
arguments, environment, directory, session and standard files, that is killed, waited for and ends as any other. What
it does not show is the start and the imports, so a program is started afresh

* where the interpreter would start differently, as by another variable ``PYTHONPATH`` or ``LC_ALL``;
* where ``KACHERY_TEST_FRESH`` is in its environment, which the whole run may have;
* when one of our programs starts another;
* where this is not Linux, the one system that forks children of somebody else.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import platform
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["begin", "end", "shared_processes"]

_PROGRAM = [sys.executable, "-m", "kachery_fast"]
_FRESH = "KACHERY_TEST_FRESH"
_ROOT = Path(__file__).resolve().parent.parent
# Read by the interpreter, or by what is loaded with it, before any of our code runs.
_READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_", "OPENSSL_", "SSL_", "TZ", _FRESH)
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_WORD = 8  # bytes of a number between the two
# clone(2) by processor. glibc has no function for it that returns twice.
_CLONE_CALL = {"x86_64": 56, "aarch64": 220}.get(platform.machine()) if sys.platform == "linux" else None
_CLONE_PARENT = 0x8000

# --- in the process that runs tests

_Popen = subprocess.Popen


class _Forker:
    """The process that forks. Each process that runs tests has one, from its first need on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ours, theirs = socket.socketpair()
        with theirs:
            self.process = _Popen([sys.executable, "-m", "tests.forking", str(theirs.fileno())], cwd=_ROOT,
                                  pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def fork(self, request: dict[str, Any], files: list[int]) -> int:
        """Return the id of a new process, a child of this one."""
        data = json.dumps(request).encode()
        with self._lock:
            socket.send_fds(self._ours, [len(data).to_bytes(_WORD, "little")], files)
            self._ours.sendall(data)
            word = self._ours.recv(_WORD, socket.MSG_WAITALL)
        assert len(word) == _WORD, "the process that forks our programs has ended"
        return int.from_bytes(word, "little")

    def end(self) -> None:
        self._ours.close()
        self.process.wait()


_forker: _Forker | None = None
_environ_at_start: dict[str, str] = {}


class _ForkingPopen(_Popen):
    """``subprocess.Popen`` that has our own programs forked."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, restore_signals: Any,
                       *who_and_where: Any) -> None:
        global _forker
        given = os.environ if env is None else env
        environ = {os.fsdecode(name): os.fsdecode(value) for name, value in given.items()}
        *others, session = who_and_where[:5]  # gid, gids, uid, umask; from Python 3.11 on the process group follows
        plain = not (executable or preexec_fn or pass_fds or shell) and others == [None, None, None, -1]
        ours = isinstance(args, list) and args[:len(_PROGRAM)] == _PROGRAM
        if not (plain and ours and _read_at_start(environ) == _environ_at_start and Path(cwd or ".").is_dir()):
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
                p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, *who_and_where)
            return
        _forker = _forker or _Forker()
        request = {"arguments": [os.fsdecode(word) for word in args[len(_PROGRAM):]], "environ": environ,
                   "directory": str(Path(cwd or ".").absolute()), "session": bool(session),
                   "ignored": [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_IGN]}
        files = [number if given == -1 else given for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = _forker.fork(request, files)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _read_at_start(environ: Any) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_READ_AT_START)}


def begin() -> None:
    """From now on have our programs forked, where that is possible and not unwanted."""
    global _environ_at_start
    _environ_at_start = _read_at_start(os.environ)
    if _CLONE_CALL is not None and not os.environ.get(_FRESH):
        subprocess.Popen = _ForkingPopen  # type: ignore[misc]


def end() -> None:
    """End the process that forks. What it has forked lives on."""
    global _forker
    subprocess.Popen = _Popen  # type: ignore[misc]
    if _forker is not None:
        _forker.end()
        _forker = None


def shared_processes() -> frozenset[int]:
    """The processes that are nobody's who runs a test."""
    return frozenset() if _forker is None else frozenset({_forker.process.pid})


# --- in the process that forks


# What functions import; but for numpy, which starts threads, and a child would have none of them.
_IMPORTED_LATE = ("ably", "rich.progress", "sqlalchemy.dialects.sqlite", "uvloop")
# To import these is to run the program, or to register functions.
_NOT_IMPORTED = ("kachery_fast.__main__", "kachery_fast.cli.demo")


def _import_everything() -> None:
    ours = [module.name for module in pkgutil.walk_packages([str(_ROOT / "src" / "kachery_fast")], "kachery_fast.")]
    for name in [*ours, *_IMPORTED_LATE]:
        if not name.startswith(_NOT_IMPORTED):
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1


def _clone() -> int:
    """Fork a child, not of this process, but of its parent; return its id, or 0 in it. This process has one thread."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    pid = int(ctypes.PyDLL(None, use_errno=True).syscall(_CLONE_CALL, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    return pid


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Make of this process what the one that asked would have started."""
    if request["session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        former = getattr(sys, name)
        again = open(former.fileno(), mode, encoding=former.encoding, errors=former.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, again)
        setattr(sys, f"__{name}__", again)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["directory"])
    sys.path[0] = request["directory"]
    sys.argv[1:] = request["arguments"]
    for number in _SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)


def _serve(connection: socket.socket) -> bool:
    """Fork until nobody asks any more; True in a child, which is to run the program."""
    while True:
        word, files, _, _ = socket.recv_fds(connection, _WORD, 3)
        if not word:
            return False
        request = json.loads(connection.recv(int.from_bytes(word, "little"), socket.MSG_WAITALL))
        pid = _clone()
        if pid == 0:
            connection.close()
            _become(request, files)
            return True
        for file in files:
            os.close(file)
        connection.sendall(pid.to_bytes(_WORD, "little"))


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the tests is theirs
    _import_everything()
    gc.collect()
    gc.freeze()
    if _serve(socket.socket(fileno=int(sys.argv[1]))):
        _run()


def _run() -> None:
    """Run the program, and end as the interpreter does, but for taking all modules apart: a tenth of a second."""
    try:
        runpy.run_module("kachery_fast", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        code = error.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main()
