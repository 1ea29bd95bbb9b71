"""A real NATS server with an operator, and an account whose seed the tests have: started by them, on loopback."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kachery_fast.protocol.nkeys import ACCOUNT, OPERATOR, Nkey

from .programs import need_program

__all__ = ["NatsServer", "new_key", "running_nats"]

_START_TRIES = 1000


def new_key(kind: int) -> Nkey:
    """A random one."""
    return Nkey(kind, Ed25519PrivateKey.generate())


class NatsServer:
    """A server in a directory of its own. It comes back on its ports with ``start``."""

    def __init__(self, directory: Path) -> None:
        self._program = need_program("nats-server")
        self.directory = directory
        self.operator, self.account, self.signer = new_key(OPERATOR), new_key(ACCOUNT), new_key(ACCOUNT)
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: Mapping[str, int] = {"nats": -1, "ws": -1}
        directory.mkdir(exist_ok=True)

    def url(self, scheme: str = "nats") -> str:
        """Where it listens; ``nats`` or ``ws``."""
        return f"{scheme}://127.0.0.1:{self._ports[scheme]}"

    @property
    def hosts(self) -> str:
        """As the setting hub_engine_hosts takes it."""
        return " ".join(f"127.0.0.1:{port}" for port in self._ports.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of addNats."""
        return {"url": self.url(), "account": self.account.public, "seed": self.signer.seed}

    def start(self) -> None:
        """Start it, and wait until it listens."""
        config = self.directory / "nats.conf"
        config.write_text(f"""
            listen: "127.0.0.1:{self._ports['nats']}"
            websocket {{ listen: "127.0.0.1:{self._ports['ws']}", no_tls: true }}
            operator: {self._token(self.operator, "operator", {})}
            resolver: MEMORY
            resolver_preload: {{ {self.account.public}: {self._account_token()} }}
            ports_file_dir: "{self.directory}"
            log_file: "{self.directory}/log"
            """)
        self._process = subprocess.Popen([self._program, "--config", str(config), "--debug"],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ports = self.directory / f"nats-server_{self._process.pid}.ports"
        for _ in range(_START_TRIES):
            if ports.exists() and (text := ports.read_text()).endswith("}"):
                told = json.loads(text)
                self._ports = {"nats": _port_of(told["nats"]), "ws": _port_of(told["websocket"])}
                return
            try:
                self._process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            break
        raise AssertionError(self.log())

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None

    def stop(self) -> None:
        """Have it say goodbye."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None

    def log(self) -> str:
        """What it has said."""
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    def _account_token(self) -> str:
        unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
        return self._token(self.account, "account", {
            "limits": {**unlimited, "wildcards": True}, "signing_keys": [self.signer.public]})

    def _token(self, subject: Nkey, kind: str, claims: dict[str, Any]) -> str:
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        body = {"jti": secrets.token_hex(16), "iat": 1_700_000_000, "iss": self.operator.public, "name": kind,
                "sub": subject.public, "nats": {**claims, "type": kind, "version": 2}}
        text = ".".join(_web(json.dumps(part).encode()) for part in (head, body))
        return f"{text}.{_web(self.operator.sign(text.encode()))}"


@contextmanager
def running_nats(directory: Path) -> Iterator[NatsServer]:
    """Start a server, and end it at the end."""
    server = NatsServer(directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def _port_of(urls: Sequence[str]) -> int:
    return int(urls[0].rpartition(":")[2])


def _web(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
