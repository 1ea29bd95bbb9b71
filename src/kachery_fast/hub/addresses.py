"""The addresses of a server: for programs on its machine, and for other machines."""

from __future__ import annotations

import socket

__all__ = ["local_url", "public_url"]

_ANY_HOST = ("0.0.0.0", "::", "")  # noqa: S104 - compared, not listened on


def local_url(host: str, port: int) -> str:
    """Return the address, for programs on this machine, of a server that listens on ``host``."""
    return _url({**dict.fromkeys(_ANY_HOST, "127.0.0.1"), "::": "::1"}.get(host, host), port)


def public_url(host: str, port: int) -> str:
    """Return the address, for other machines, of a server that listens on ``host``; the best guess for all hosts."""
    return _url(_outbound_address() if host in _ANY_HOST else host, port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _outbound_address() -> str:
    """The address of the interface that leads out, else this machine's name.

    Connecting a datagram socket sends nothing; it only makes the system choose. 192.0.2.1 is reserved for
    documentation (RFC 5737).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
