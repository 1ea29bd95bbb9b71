"""A lab on one machine: a hub and nodes, each in a process and a directory of its own, driven by the command line.

The demo, the tests and the benchmarks run on it, so all of them go through what a user goes through. Only inviting and
joining call what those commands call: a program each, for every node, took a seventh of the tests' time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..client.connection import NodeConnection
from ..config import load_settings
from ..errors import KacheryError, NodeError
from .background import interruptions_held, log_tail

__all__ = ["Lab", "LabNode", "Program", "free_port"]

_READY_SECONDS = 60.0
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.02


class Program:
    """One ``kachery-fast`` process that serves.

    :param arguments: the command line after ``kachery-fast``. :param log_path: where its output goes.
    """

    def __init__(self, arguments: Sequence[str], environ: dict[str, str], log_path: Path) -> None:
        self.arguments = list(arguments)
        self.environ = environ
        self.log_path = log_path
        self.peak_rss_bytes = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0

    @property
    def pid(self) -> int:
        """The process id. :raises NodeError: it does not run."""
        if self._process is None:
            raise NodeError(what=f"kachery-fast {' '.join(self.arguments)} does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and not ended here."""
        return self._process is not None

    def start(self) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches only who is to end it."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log, interruptions_held():
            self._log_begin = log.tell()
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "kachery_fast", *self.arguments], env=self.environ, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True)

    def has_printed(self, text: str) -> bool:
        """Whether its log holds this text since it was started."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_begin)
            return text.encode() in log.read()

    def wait_until(self, ready: Callable[[], bool], name: str) -> None:
        """Wait until it is ready.

        :param ready: asked again and again. :param name: what to call it in an error.
        :raises NodeError: it has ended by itself, or was not ready in time; the error shows the end of its log.
        """
        end = time.monotonic() + _READY_SECONDS
        while not ready():
            self._check()
            if time.monotonic() > end:
                raise NodeError(what=f"{name} was not ready in time. {log_tail(self.log_path, self._log_begin)}")
            time.sleep(_POLL_SECONDS)

    def _check(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise NodeError(what=f"kachery-fast {' '.join(self.arguments)} ended with exit code "
                                 f"{self._process.returncode}. {log_tail(self.log_path, self._log_begin)}")

    def tell_to_stop(self) -> None:
        """Send SIGTERM, and wait for nothing."""
        if self._process is not None and self._process.returncode is None:
            self._note_peak(self._process.pid)
            os.kill(self._process.pid, signal.SIGTERM)  # not reaped yet, so the id is still its own

    def _note_peak(self, pid: int) -> None:
        """Linux tells a program's own peak only while it lives; its ``ru_maxrss`` counts whoever started it too."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    self.peak_rss_bytes = max(self.peak_rss_bytes, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        """End it by SIGTERM, by SIGKILL if it does not, and return its exit code; 0 if it does not run."""
        if self._process is None:
            return 0
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as kill -9 does."""
        if self._process is not None:
            self._end(signal.SIGKILL)

    def _end(self, number: int) -> int:
        process = self._process
        if process is None or process.returncode is not None:
            self._process = None
            return 0 if process is None else int(process.returncode)
        self._note_peak(process.pid)
        os.kill(process.pid, number)
        end = time.monotonic() + _STOP_SECONDS
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > end:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        if sys.platform == "darwin":
            self.peak_rss_bytes = max(self.peak_rss_bytes, usage.ru_maxrss)  # bytes there
        self._process = None
        return process.returncode


class LabNode:
    """A node of the lab: its storage directory, port, process, and the commands of its user."""

    def __init__(self, lab: Lab, name: str, **environ: str) -> None:
        self.name = name
        self.storage_dir = lab.directory / name
        self.port = free_port()
        self.environ = {**lab.environ, "KACHERY_STORAGE_DIR": str(self.storage_dir),
                        "KACHERY_DAEMON_PORT": str(self.port), "KACHERY_CHANNEL": lab.channel, **environ}
        self.program = Program(["node", "start"], self.environ, lab.directory / f"{name}.log")
        self.settings = load_settings(self.environ)

    @property
    def connection(self) -> NodeConnection:
        """A client's connection to it."""
        return NodeConnection(self.settings)

    def join(self, link: str) -> dict[str, Any]:
        """Do what ``kachery-fast node join LINK`` does while the node does not run."""
        from ..node import membership

        return membership.join(self.settings, link, label=self.name)

    def start(self, *, connected: bool = True) -> None:
        """Start the process and wait until it answers, and, where it is on a channel, until messages flow."""
        self.program.start()
        self.program.wait_until(lambda: self._is_ready(connected), f"the node {self.name}")

    def _is_ready(self, connected: bool) -> bool:
        try:
            found = self.connection.info()
        except KacheryError:
            return False
        channels = [channel for hub in found["hubs"] for channel in hub["channels"]]
        return not connected or (bool(channels) and all(channel["connected"] for channel in channels))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within this, the process is a client of this node: the settings in its environment are the node's alone."""
        before = dict(os.environ)
        for name in [name for name in before if name.startswith("KACHERY_")]:
            del os.environ[name]
        os.environ.update({name: value for name, value in self.environ.items() if name.startswith("KACHERY_")})
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def run(self, *arguments: str, timeout_seconds: float = 600.0) -> subprocess.CompletedProcess[bytes]:
        """Run ``kachery-fast ARGUMENTS`` as this node's user."""
        return subprocess.run([sys.executable, "-m", "kachery_fast", *arguments],  # noqa: S603 - our own program
                              env=self.environ, check=False, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=timeout_seconds)

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``kachery-fast ARGUMENTS`` as this node's user, and return the process."""
        return subprocess.Popen([sys.executable, "-m", "kachery_fast", *arguments],  # noqa: S603 - our own program
                                env=self.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def json(self, *arguments: str) -> Any:
        """Run a command with ``--json`` and return its result.

        :raises KacheryError: the error that the command ended with.
        """
        return result_of(self.run(*arguments, "--json"))


class Lab:
    """A hub, its channel, and nodes; ``close`` ends every process, whatever happened.

    :param directory: where everything is kept; not removed by ``close``. :param channel: the channel's name.
    :param environ: settings for all processes, by environment variable.
    """

    def __init__(self, directory: Path, channel: str = "demo", environ: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.channel = channel
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith("KACHERY_") or name.startswith("KACHERY_TEST_")}
        self.environ = {**clean, **(environ or {})}
        self.hub_dir = directory / "hub"
        self.hub_port = free_port()
        self.hub = Program(["hub", "--dir", str(self.hub_dir), "--port", str(self.hub_port), "--channel", channel,
                            "--owner", "lab@localhost"], self.environ, directory / "hub.log")
        self.nodes: dict[str, LabNode] = {}

    @property
    def hub_url(self) -> str:
        """The hub's address."""
        return f"http://127.0.0.1:{self.hub_port}"

    @property
    def bucket_dir(self) -> Path:
        """Where the embedded bucket keeps the channel's objects."""
        return self.hub_dir / "bucket" / self.channel

    def start_hub(self) -> None:
        """Start the hub, also again on what it has kept, and wait until it is ready and the channel exists."""
        self.hub.start()
        self.hub.wait_until(lambda: self.hub.has_printed("kachery-fast node join"), "the hub")  # said last

    @property
    def owner_token(self) -> str:
        """The token of the channel's owner."""
        return (self.hub_dir / "owner-token").read_text(encoding="ascii").strip()

    def owner(self, *arguments: str) -> Any:
        """Run ``kachery-fast channel ARGUMENTS --json`` as the channel's owner and return its result."""
        environ = {**self.environ, "KACHERY_HUB_TOKEN": self.owner_token}
        return result_of(subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-m", "kachery_fast", "channel", *arguments, "--hub", self.hub_url, "--json"],
            env=environ, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=60))

    def invite(self, *permissions: str) -> str:
        """Make an invitation to the channel, for one node, and return its link."""
        from ..net.hub import OwnerClient

        async def ask() -> dict[str, Any]:
            async with OwnerClient(self.hub_url, self.owner_token, load_settings(self.environ)) as owner:
                return await owner.call("invite", channel=self.channel, uses=1,
                                        permissions=list(permissions) or ["requestFiles", "provideFiles"])

        return str(asyncio.run(ask())["link"])

    def add_node(self, name: str, *, start: bool = True, permissions: Sequence[str] = (), **environ: str) -> LabNode:
        """Make a node, join it to the channel, and start it."""
        node = self.nodes[name] = LabNode(self, name, **environ)
        node.join(self.invite(*permissions))
        if start:
            node.start()
        return node

    def close(self) -> None:
        """End every process, whatever happens meanwhile; a second Ctrl-C makes it quicker, and leaves nothing either.
        """
        programs = [*(node.program for node in self.nodes.values()), self.hub]
        for program in programs:
            program.tell_to_stop()
        try:
            for program in programs:
                program.stop()
        except BaseException:
            for program in programs:
                program.kill()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def result_of(done: subprocess.CompletedProcess[bytes]) -> Any:
    """Return the JSON that a command printed.

    :raises KacheryError: the error that it printed instead.
    """
    try:
        found = json.loads(done.stdout)
    except ValueError:
        text = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
        raise NodeError(what=f"the command ended with exit code {done.returncode}: {text[-2000:]}") from None
    if not done.returncode:
        return found
    error = KacheryError.from_dict(found)
    if error.exit_code != done.returncode:
        raise NodeError(what=f"the command ended with exit code {done.returncode}, and says: {error}")
    raise error


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on, and that for a minute nobody else is given.

    The first end of a connection to close waits in TIME_WAIT (RFC 9293 §3.6): the system gives that end's port to
    nobody who asks for any port, but to a server, which asks for it with SO_REUSEADDR.
    """
    with socket.socket() as listener, socket.socket() as visitor:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits must allow it as well
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        visitor.connect(listener.getsockname())
        listener.accept()[0].close()
        visitor.recv(1)  # the other end has closed, and so before this one
        return int(listener.getsockname()[1])
