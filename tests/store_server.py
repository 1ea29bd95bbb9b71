"""What the stores of the tests have in common: each is a process of its own, with one bucket and one account.

Before a store does what it is asked for, a gate looks at the request: here is how it fails, how long it takes, and what
the account may do. A test tells the gate how to be. Run as a program a store prints its port.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from kachery_fast.cli.lab import Lab

BUCKET = "lab-bucket"
Server = TypeVar("Server", bound="StoreServer")

# --- as a test sees it


class StoreServer(ABC):
    """A running store.

    ``place`` and ``credentials`` together are ``settings``, which the owner's ``action`` takes; ``secrets`` are what of
    them nobody is to see again. ``operations`` has the store's names of "upload", "read", "list" and "remove".
    """

    kind: ClassVar[str]
    action: ClassVar[str]
    operations: ClassVar[Mapping[str, str]]

    process_id = 0

    def __init__(self, port: int) -> None:
        self.port = port
        self.host = f"127.0.0.1:{port}"
        self.url = f"http://{self.host}"
        self.place: dict[str, Any] = {"bucket": BUCKET, "endpoint": self.url}
        self.credentials: dict[str, str] = {}
        self.secrets: Sequence[str] = ()

    @classmethod
    @contextmanager
    def running(cls: type[Server]) -> Iterator[Server]:
        """Start one with an empty bucket; end its process at the end."""
        process = subprocess.Popen([sys.executable, "-m", cls.__module__, *cls.arguments()], stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
        try:
            assert process.stdout is not None
            server = cls(int(process.stdout.readline()))
            server.process_id = process.pid
            server.reset()
            yield server
        finally:
            process.terminate()
            process.communicate(timeout=20)

    @classmethod
    def arguments(cls) -> list[str]:
        """What its program is to know."""
        return []

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.place, **self.credentials}

    def set(self, **state: Any) -> None:
        """Change how it is: ``denied`` (operations), ``offset`` (of its clock, in seconds), ``public`` (reads need no
        signature), ``bucket`` (whether there is one, empty), ``slow`` (seconds that each request takes), ``fault`` of
        each request whose number is a multiple of ``every``, if its method is ``faulty`` or that is empty: a status
        (429, 503), with which ``retry_after`` comes, or 0 for a reset connection, ``uploads_max`` (after so many ones
        more, uploading is not permitted any more).
        """
        self._tell(state)

    def reset(self) -> None:
        """Begin anew, with an empty bucket."""
        self._tell({"reset": True})

    def deny(self, *names: str) -> None:
        """Forbid these of ``operations``, and nothing else."""
        self.set(denied=[self.operations[name] for name in names])

    def remove_bucket(self) -> None:
        """Have the bucket be gone."""
        self.set(bucket=False)

    def requests(self) -> list[str]:
        """What was asked for since the last reset: each as ``METHOD PATH``."""
        return self._tell({})

    def use_bucket(self, lab: Lab, *options: str) -> Any:
        """Have the lab's channel use the bucket, by the command of its owner."""
        return lab.owner("bucket", lab.channel, *self.place_options(), *self.write_credentials(lab.directory), *options)

    def place_options(self) -> list[str]:
        """Options of the commands that say where the bucket is."""
        return [f"--{self.kind}", BUCKET, "--endpoint", self.url]

    @abstractmethod
    def write_credentials(self, directory: Path) -> list[str]:
        """Write files of credentials, and return the options that name them."""

    def _tell(self, state: dict[str, Any]) -> list[str]:
        request = urllib.request.Request(f"{self.url}/_gate", data=json.dumps(state).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            asked: list[str] = json.loads(answer.read())
        return asked


def key_file(access_key: str, secret_key: str) -> str:
    """A file of credentials as those of S3 are, with one profile, ``lab``."""
    return f"[lab]\naws_access_key_id = {access_key}\naws_secret_access_key={secret_key}\n"


# --- in its own process


class Gate(ABC):
    """How a store is just now."""

    UPLOAD: ClassVar[str]  # the operation
    STATE: ClassVar[Mapping[str, Any]]  # of this store alone, after a reset

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.state: dict[str, Any] = {}
        self.requests: list[str] = []
        self._counted = 0

    @abstractmethod
    def begin(self, bucket: bool) -> None:
        """Forget all objects; have an empty bucket, or none."""

    def control(self, body: bytes) -> bytes:
        """Answer a test."""
        told = json.loads(body)
        with self.lock:
            if told.pop("reset", False):
                told = {"denied": [], "offset": 0, "public": False, "bucket": True, "slow": 0, "fault": None,
                        "every": 1, "faulty": "", "retry_after": "1", "uploads_max": None, **self.STATE}
                self.requests.clear()
                self._counted = 0
            self.state.update(told)
            if "bucket" in told:
                self.begin(told["bucket"])
            return json.dumps(self.requests).encode()

    def count(self, method: str) -> int | None:
        """Count a request, take the time for it, and return its fault, if any."""
        with self.lock:
            self._counted += 1
            failing = self._counted % self.state["every"] == 0 and self.state["faulty"] in ("", method)
            fault: int | None = self.state["fault"] if failing else None
        time.sleep(self.state["slow"])
        return fault

    def forbids(self, operation: str) -> bool:
        """Whether the account may not do this. To have asked for an upload counts."""
        with self.lock:
            if operation == self.UPLOAD and self.state["uploads_max"] is not None:
                self.state["uploads_max"] -= 1
                if self.state["uploads_max"] < 0:
                    self.state.update(uploads_max=None, denied=[self.UPLOAD])
            return operation in self.state["denied"]


def reset(connection: socket.socket) -> None:
    """Reset it at once, whatever files its server has made of it: ``close`` would wait for these."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())


def announce(port: int) -> None:
    """Tell who started this program."""
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
