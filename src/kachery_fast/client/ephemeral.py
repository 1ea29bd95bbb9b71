"""A node for the time of one program or notebook, with its identity in memory: for CI and hosted notebooks.

It is a process of its own that ends with this one, however this one ends: it watches a pipe whose other end is here.
Its key goes to it through that pipe, never into a file, a command line or an environment.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from ..config import load_settings
from ..errors import DiskError, InvalidArgument, KacheryError, NodeError
from .access import check_online

__all__ = ["EphemeralNode", "ephemeral_node"]

_STOP_SECONDS = 20.0
_TAIL_SIZE_BYTES = 2000
_PROGRAM = "import sys; sys.path[:] = {path!r}; from kachery_fast.cli.ephemeral import main; main()"
_KEY = "KACHERY_NODE_PRIVATE_KEY"
# What would lead clients of this process past the node, and the key, which is the node's alone.
_HIDDEN = (_KEY, "KACHERY_CLIENT_AUTH_CODE", "KACHERY_CLIENT_AUTH_FILE", "KACHERY_DIRECT_HUB")

logger = logging.getLogger("kachery_fast.client")


def ephemeral_node(link: str | None = None, *, hub: str | None = None, channel: str | None = None,
                   label: str | None = None, directory: str | Path | None = None) -> EphemeralNode:
    """Start a node that lives as long as this program, and make it the node of this process.

        with kf.ephemeral_node("http://hub-machine:20440/join/CODE"):
            kf.load_file(uri)

    Its identity is new, and leaves the channel at the end, unless ``KACHERY_NODE_PRIVATE_KEY`` holds one.

    :param link: an invitation to a channel. :param hub: the address of a hub where the node of that key is a member
        already, in place of an invitation. With neither the node is on no channel.
    :param channel: the channel to ask on when none is named; the only one where the node is on one.
    :param label: the node's name for people; the host's name when None.
    :param directory: where its storage directory is made, the system's place for temporary files when None. It holds
        whatever is loaded, and is removed at the end.
    :return: the node, connected to its channels. It ends with the ``with`` block, by ``close``, or with the program.
    :raises InvalidArgument: there is a key, and neither ``link`` nor ``hub``.
    :raises KacheryError: the invitation does not hold, the hub is out of reach, or the node cannot start.
    """
    return EphemeralNode({"link": link or "", "hub": hub or "", "channel": channel or "", "label": label or ""},
                         directory)


class EphemeralNode:
    """A running node, made by ``ephemeral_node``.

    ``node_id``: its public key. ``port``: of its local API, on 127.0.0.1. ``storage_dir``: its local store, which is
    removed at the end. ``channels``: the names of those it is on.
    """

    node_id: str
    port: int
    storage_dir: Path
    channels: list[str]

    def __init__(self, order: dict[str, Any], directory: str | Path | None) -> None:
        settings = load_settings()
        check_online(settings, "Running a node")
        seed = settings.node_private_key
        if seed and not (order["link"] or order["hub"]):
            raise InvalidArgument(what=f"{_KEY} holds the key of a node, and nothing says where that is a member. Name "
                                       "its hub (--hub URL, in Python hub=) or, the first time, an invitation (--join "
                                       "LINK, in Python link=); or take the variable away, for a node on no channel.")
        self._owner_pid = os.getpid()
        self._former: dict[str, str | None] = {}
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="kachery-node-", dir=directory)).absolute()
        except OSError as error:
            raise DiskError(action="the making", path=f"a directory in {directory or tempfile.gettempdir()}",
                            why=error.strerror or str(error)) from None
        self._log_path = self._directory / "node.log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start({**order, "directory": str(self._directory), "seed": seed or secrets.token_hex(32),
                         "stays": bool(seed)})
            self._set_environment(order["channel"])
        except BaseException:
            self._end()
            raise
        atexit.register(self.close)

    def _start(self, order: dict[str, Any]) -> None:
        environ = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
        with self._log_path.open("ab") as log:
            process = self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-c", _PROGRAM.format(path=sys.path)], env=environ, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True)  # Ctrl-C reaches only who is to end it
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer, or its log, says why
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        said = self._next_word(process)
        if not said:
            raise NodeError(what=f"it did not start. {self._log_tail()}")
        if "ready" not in said:
            raise KacheryError.from_dict(said["failed"])
        found = said["ready"]
        self.node_id, self.port, self.channels = found["nodeId"], found["port"], found["channels"]
        self.storage_dir = Path(found["storageDir"])

    def _next_word(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Return what the node says next, empty at the end; a warning of it is passed on."""
        for line in process.stdout or ():
            try:
                said: dict[str, Any] = json.loads(line)
            except ValueError:
                return {}
            if "stillMember" not in said:
                return said
            found = said["stillMember"]
            logger.warning("The node has ended and is still a member of %s at %s: ask its owner to remove it by: "
                           "kachery-fast channel remove-node %s %s --hub %s (%s)", found["channel"], found["hub"],
                           found["channel"], found["nodeId"], found["hub"], found["why"])
        return {}

    def _set_environment(self, channel: str) -> None:
        new = {"KACHERY_STORAGE_DIR": str(self.storage_dir), "KACHERY_DAEMON_HOST": "127.0.0.1",
               "KACHERY_DAEMON_PORT": str(self.port)}
        hidden: tuple[str, ...] = _HIDDEN
        if channel or len(self.channels) == 1:
            new["KACHERY_CHANNEL"] = channel or self.channels[0]
        elif os.environ.get("KACHERY_CHANNEL") not in self.channels:  # of another node
            hidden = (*_HIDDEN, "KACHERY_CHANNEL")
        self._former = {name: os.environ.get(name) for name in (*new, *hidden)}
        for name in hidden:
            os.environ.pop(name, None)
        os.environ.update(new)

    def close(self) -> None:
        """End the node, remove what it stored, and restore the environment. May be repeated."""
        if os.getpid() != self._owner_pid:
            return  # a copy of this object in a forked process
        atexit.unregister(self.close)
        former, self._former = self._former, {}
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._end()

    def _end(self) -> None:
        """End the process, by SIGKILL if it does not end by SIGTERM, and remove its directory."""
        process, self._process = self._process, None
        try:
            if process is not None:
                self._stop(process)
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        by_itself = process.poll()
        if by_itself:
            logger.warning("the node ended by itself, with exit code %d. %s", by_itself, self._log_tail())
        try:
            process.terminate()  # closing the pipe is not enough where a forked process holds it too
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("the node did not end in %g s and was killed", _STOP_SECONDS)
            process.kill()
            process.wait()
        else:
            while self._next_word(process):
                pass
        finally:
            process.stdout.close()  # type: ignore[union-attr]
            if process.returncode is None:  # a second Ctrl-C: the node has been told, and sees to the rest by itself
                process.returncode = 0

    def _log_tail(self) -> str:
        try:
            data = self._log_path.read_bytes()[-_TAIL_SIZE_BYTES:]
        except OSError:
            return "It left no log."
        lines = data.decode("utf-8", "replace").strip().splitlines()
        return f"Its log ends with: {' | '.join(line.strip() for line in lines[-5:])}" if lines else "Its log is empty."

    def __enter__(self) -> EphemeralNode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EphemeralNode({getattr(self, 'node_id', '')[:16]!r})"
