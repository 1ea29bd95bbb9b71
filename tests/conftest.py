"""What holds for every test: a clean environment, loopback only, nothing skipped in silence, nothing left behind.

* The developer's ``HOME``, ``KACHERY_*`` and ``XDG_*`` variables do not reach the tests, nor do the programs that
  tests start write into the developer's directory for temporary files.
* Whatever listens, listens on loopback: a bind to another address of this process fails, and a program that a test
  started is looked at when the test has run.
* With ``KACHERY_TEST_NO_SKIP=1`` a skipped test is a failure, unless it is marked ``live``.
* At the end no process started by a test may be left, nor a directory for temporary files of theirs.
* Hypothesis makes the same examples on every run; ``--hypothesis-profile=explore`` makes new ones.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from . import forking

# Every program that a test starts inherits this variable; so one that has left our process tree is known by it.
_MARK = "KACHERY_TEST_RUN"
_KEPT = ("KACHERY_TEST_", "KACHERY_COVERAGE")
# How long what a test has ended may take to be gone, also on a busy machine; waited for only where something is left.
_END_SECONDS = float(os.environ.get("KACHERY_TEST_END_SECONDS", "20"))


class _Surroundings:
    """The environment of this run, made before any test module is imported."""

    def __init__(self) -> None:
        self.before = dict(os.environ)
        self.mark = uuid.uuid4().hex
        self.root = Path(tempfile.mkdtemp(prefix="kachery-fast-tests-")).resolve()
        self.complaints: list[str] = []
        # pytest's own directories stay where they are looked for.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        for name in [name for name in os.environ if name.startswith(("KACHERY_", "XDG_"))]:
            if not name.startswith(_KEPT):
                del os.environ[name]
        for variable, folder in (("HOME", "home"), ("TMPDIR", "tmp")):
            (self.root / folder).mkdir()
            os.environ[variable] = str(self.root / folder)
        os.environ[_MARK] = self.mark
        # Else each program that a test starts compiles all of its modules anew, for half a second of CPU time.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
        # Nor is anybody to be trusted here: each program would read the system's 150 authorities three times.
        os.environ["SSL_CERT_FILE"] = str(_make_authority(self.root))
        os.environ["SSL_CERT_DIR"] = str(self.root / "home")
        tempfile.tempdir = None
        # A shell's background job ignores Ctrl-C, and so would every program that a test starts and interrupts.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        os.environ.clear()
        os.environ.update(self.before)
        tempfile.tempdir = None
        shutil.rmtree(self.root, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """The living processes of this run, other than this one."""
        found = {child.pid: child for child in psutil.Process().children(recursive=True)}
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(_MARK) == self.mark:
                    found[process.pid] = process
            except (psutil.Error, OSError):
                continue  # ended meanwhile, or another user's
        return [process for process in found.values() if _lives(process)]


def _make_authority(directory: Path) -> Path:
    """Write a certificate that has signed nothing, and return its path: an empty file is an error to OpenSSL."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority of the tests")])
    now = datetime.now(timezone.utc)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(now)
                   .not_valid_after(now + timedelta(days=1)).sign(key, None))
    path = directory / "authority.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    return path


_surroundings: _Surroundings | None = None

# A change is judged by what it does, not by the luck of the draw.
# Nor by the clock: beside other programs any example may take a second, and so may the making of it.
_patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("fixed", _patient, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", _patient, derandomize=False)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    global _surroundings
    if _surroundings is None:
        _surroundings = _Surroundings()
        sys.addaudithook(_refuse_outside)
        forking.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    global _surroundings
    if _surroundings is not None:
        _surroundings.restore()
        _surroundings = None


# --- loopback only


def _refuse_outside(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: a socket of this process binds to loopback or not at all."""
    if event != "socket.bind" or _surroundings is None:
        return
    bound, address = arguments
    if bound.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(str(address[0])):
        raise AssertionError(f"a test binds to {address[0]!r}, which is not loopback")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if _must_not_skip(report) and item.get_closest_marker("live") is None:
        _fail(report)
    if report.when == "call" and report.passed:
        outside = _outside_listeners(_descendants(os.getpid()))
        if outside:
            report.outcome = "failed"
            report.longrepr = f"listening beyond loopback: {', '.join(outside)}"
    return report


def _outside_listeners(process_ids: list[int]) -> list[str]:
    """What these programs listen on, other than loopback."""
    found = []
    for process_id in process_ids:
        try:
            child = psutil.Process(process_id)
            connections = child.net_connections("inet")
        except (psutil.Error, OSError):
            continue
        found += [f"{child.name()} on {connection.laddr.ip}:{connection.laddr.port}" for connection in connections
                  if connection.status == psutil.CONN_LISTEN and not _is_loopback(connection.laddr.ip)]
    return found


# The processes of the stores.
_stores: set[int] = set()


def _descendants(process_id: int) -> list[int]:
    """The processes below one, without those that tests share: these listen on no network, or were looked at.

    By what Linux tells of each thread, as this is asked after each test: psutil looks through all processes.
    """
    try:
        found = [int(child) for task in os.listdir(f"/proc/{process_id}/task")
                 for child in Path(f"/proc/{process_id}/task/{task}/children").read_text().split()]
    except OSError:  # another system; or the process, or a thread of it, has ended
        try:
            found = [child.pid for child in psutil.Process(process_id).children()]
        except psutil.Error:
            return []
    shared = forking.shared_processes() | _stores
    if "tests.postgresql" in sys.modules:
        shared |= sys.modules["tests.postgresql"].shared_processes()
    found = [child for child in found if child not in shared]
    return [*found, *(below for child in found for below in _descendants(child))]


# --- nothing skipped in silence


# What takes long goes first, so that at the end no process runs it while the others have nothing left to do.
_LONG = ("system", "setup", "legacy", "browser", "cli", "hub", "node", "client")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {item: item.path.parent.name for item in items}
    items.sort(key=lambda item: _LONG.index(folders[item]) if folders[item] in _LONG else len(_LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what collecting made, for good, out of the garbage collections after each network test: 0.3 s in each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if _must_not_skip(report):
        _fail(report)
    return report


def _must_not_skip(report: pytest.TestReport | pytest.CollectReport) -> bool:
    wanted = os.environ.get("KACHERY_TEST_NO_SKIP", "") == "1"
    return wanted and report.outcome == "skipped" and not hasattr(report, "wasxfail")


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"KACHERY_TEST_NO_SKIP=1, but this was skipped: {why}"


# --- nothing left behind


@pytest.fixture(scope="session")
def looked_at() -> Callable[[int], None]:
    """Look at once whether a server of several tests listens beyond loopback, and not after each of them."""
    def look(process_id: int) -> None:
        assert not _outside_listeners([process_id])
        _stores.add(process_id)

    return look


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Complain of what the tests left: processes, and entries of the directory for temporary files.

    Where xdist shares the tests among processes, each of these looks after its own, and the first passes it on.
    """
    if _surroundings is None:
        return
    complaints = _surroundings.complaints
    if "tests.postgresql" in sys.modules:
        sys.modules["tests.postgresql"].stop_shared()
    forking.end()
    if not getattr(session.config.option, "numprocesses", None):
        _look_for_leftovers(_surroundings)
    if complaints and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["complaints"] = complaints


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """xdist: one of the processes that run the tests has ended."""
    if _surroundings is not None:
        _surroundings.complaints += getattr(node, "workeroutput", {}).get("complaints", [])


def _look_for_leftovers(surroundings: _Surroundings) -> None:
    complaints = surroundings.complaints
    end = time.monotonic() + _END_SECONDS
    left = surroundings.processes()
    while left and time.monotonic() < end:  # ended by their tests, but not gone yet
        time.sleep(0.05)
        left = [process for process in left if _lives(process)]
    for process in left:
        complaints.append(f"process {process.pid} was left running: {' '.join(_command(process))}")
        process.kill()
    complaints += [f"left in the directory for temporary files: {path.name}"
                   for path in sorted((surroundings.root / "tmp").iterdir())]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _surroundings is not None and _surroundings.complaints:
        terminalreporter.section("left behind by the tests", red=True, bold=True)
        for complaint in _surroundings.complaints:
            terminalreporter.write_line(complaint)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return ["?"]
