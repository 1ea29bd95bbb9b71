"""What is asked and answered over HTTP/1.1, and how the plainest of it is written and read.

Most small objects come as an answer of one piece: a status, a few fields, and as many bytes as they say. ``h11`` takes
a tenth of the whole time of a cached calculation to write such a request and to read its answer, so both are done here
where nothing can be in doubt; whatever is not as plain as that, ``h11`` reads (RFC 9112).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["PLAIN_SIZE_BYTES_MAX", "NotPlain", "Origin", "Received", "Request", "Response", "plain_answer",
           "plain_request"]

PLAIN_SIZE_BYTES_MAX = 65536
"""The longest answer, head and body, that is read here, and so on the event loop."""

# An idle connection takes so much at once, whatever its buffers are set to (tcp_wmem, its minimum).
_REQUEST_SIZE_BYTES_MAX = 4096
_REQUEST = re.compile(r"GET [!-~]+ HTTP/1\.1\r\n(?:[0-9A-Za-z-]+: [!-~](?:[ -~]*[!-~])?\r\n)+\r\n")
_HEAD = re.compile(rb"HTTP/1\.1 (200|[45][0-9]{2})(?: [ -~]*)?\r\n((?:[0-9A-Za-z-]+:[ -~]*\r\n)*)\r\n")
_LENGTH = re.compile(r"[0-9]{1,9}")


class Origin(NamedTuple):
    """Where a connection leads; connections are pooled by it."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """The host and the port, as the field ``Host`` has them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Request(NamedTuple):
    """A request without its body. ``name`` is what errors call the object; header names are lower case."""

    method: str
    origin: Origin
    target: str
    headers: Mapping[str, str]
    name: str


class Response(NamedTuple):
    """Status, headers (names in lower case) and the body of a small answer, cut off at 64 KiB when an error."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


class Received(NamedTuple):
    """What ``receive`` did: bytes put into memory (all or 0), and the whole object's size where the answer tells."""

    response: Response
    received_bytes: int
    object_size_bytes: int | None


class NotPlain(Exception):
    """An answer that only ``h11`` can read."""


def plain_request(request: Request) -> bytes | None:
    """Return the bytes of a GET; None when it is something else, too long, or has a letter that needs a closer look."""
    fields = "".join([f"{name}: {value}\r\n" for name, value in request.headers.items()])
    text = f"{request.method} {request.target} HTTP/1.1\r\nhost: {request.origin.authority}\r\n{fields}\r\n"
    lines = len(request.headers) + 3  # more were smuggled into a part
    if len(text) > _REQUEST_SIZE_BYTES_MAX or text.count("\n") != lines or _REQUEST.fullmatch(text) is None:
        return None
    return text.encode("ascii")


def plain_answer(data: bytes) -> Response | None:
    """Read the answer to a GET, after which the connection stays open; None when more of it must come.

    :param data: everything that has come since the request.
    :raises NotPlain: it is, or may be, something else than a head that came in one piece, and a short body whose
        length stands there once.
    """
    head = _HEAD.match(data)
    if head is None:
        raise NotPlain
    headers: dict[str, str] = {}
    for line in head[2].decode("ascii").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name = name.lower()
        if name in headers:
            raise NotPlain
        headers[name] = value.strip(" ")
    length = headers.get("content-length", "")
    ends = "transfer-encoding" in headers or "close" in headers.get("connection", "").lower()
    if ends or not _LENGTH.fullmatch(length):
        raise NotPlain
    size_bytes = head.end() + int(length)
    if size_bytes < len(data) or size_bytes > PLAIN_SIZE_BYTES_MAX:
        raise NotPlain
    return None if size_bytes > len(data) else Response(int(head[1]), headers, data[head.end():])
