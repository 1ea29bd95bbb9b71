"""What crosses the wire between the embedded broker and its clients: actions, flags, faults, frames.

Source: https://ably.com/docs/client-lib-development-guide/protocol, and the Python (3.1) and JavaScript (1.2, 2.28)
SDKs as observed. A protocol message is one map, as JSON in a text frame or as msgpack in a binary frame
(query ``format=msgpack``). A client that asked for one of them may send either.
"""

from __future__ import annotations

import base64
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec

from ..errors import BadMessage
from ..protocol.plain_json import has_extreme_numbers

__all__ = ["MODES", "Action", "Fault", "Inbound", "Outbound", "decode", "frame",
           "message_size_bytes", "read_message"]

RESUMED = 1 << 2
PUBLISH = 1 << 17
SUBSCRIBE = 1 << 18
MODES = {"publish": PUBLISH, "subscribe": SUBSCRIBE}
MODES_ALL = PUBLISH | SUBSCRIBE
MODES_ANY = 0b11111 << 16
"""Every mode bit a client may ask for, presence included."""


class Action(IntEnum):
    """The protocol message's ``action``."""

    HEARTBEAT = 0
    ACK = 1
    NACK = 2
    CONNECTED = 4
    DISCONNECT = 5
    DISCONNECTED = 6
    CLOSE = 7
    CLOSED = 8
    ERROR = 9
    ATTACH = 10
    ATTACHED = 11
    DETACH = 12
    DETACHED = 13
    PRESENCE = 14
    MESSAGE = 15
    SYNC = 16
    AUTH = 17
    OBJECT = 19
    ANNOTATION = 21


class Fault(NamedTuple):
    """An Ably error: ``code`` from https://ably.com/docs/platform/errors/codes, an HTTP status, and a sentence.

    The SDKs act on the numbers: codes 40140 to 40149 make a client fetch a new token; a DISCONNECTED with a status
    from 500 to 504 leaves the Python SDK without a transport for ever, so none is ever sent.
    """

    code: int
    status: int
    message: str

    def to_map(self) -> dict[str, Any]:
        """Return the map that stands under ``error``."""
        return {"code": self.code, "statusCode": self.status, "message": self.message}


class Credentials(msgspec.Struct, rename="camel"):
    """What AUTH carries."""

    access_token: str = ""


class Inbound(msgspec.Struct, rename="camel"):
    """A protocol message from a client. Fields that the broker has no use for are ignored."""

    action: int
    id: str | None = None
    channel: str | None = None
    channel_serial: str | None = None
    flags: int | None = None
    msg_serial: int | None = None
    params: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    presence: list[Any] | None = None
    auth: Credentials | None = None


_json_decoder = msgspec.json.Decoder(Inbound)
_msgpack_decoder = msgspec.msgpack.Decoder(Inbound)


def decode(data: str | bytes) -> Inbound:
    """Read one protocol message: text is JSON, bytes are msgpack.

    :raises BadMessage: it is neither, or its fields are not of their types.
    """
    try:
        if isinstance(data, str) and has_extreme_numbers(data.encode()):
            raise BadMessage(why="it has many numbers that take long to read")
        return _json_decoder.decode(data) if isinstance(data, str) else _msgpack_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadMessage(why=str(error)) from None


def read_message(raw: dict[str, Any]) -> dict[str, Any]:
    """Keep the fields of an application message that are a publisher's to set: name, data, encoding, extras, id,
    clientId.

    :raises BadMessage: one of them is not of its type.
    """
    message: dict[str, Any] = {}
    for name in ("name", "encoding", "id", "clientId"):
        value = raw.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise BadMessage(why=f"{name} must be text")
        message[name] = value
    data = raw.get("data")
    if data is not None:
        if not isinstance(data, (str, bytes)):
            raise BadMessage(why="data must be text or bytes, with an encoding")
        message["data"] = data
    extras = raw.get("extras")
    if extras is not None:
        if not isinstance(extras, dict):
            raise BadMessage(why="extras must be a map")
        message["extras"] = extras
    return message


def message_size_bytes(message: dict[str, Any]) -> int:
    """Return what a message counts against the limit: name, data, encoding, id, client id and extras."""
    size = 0
    for name, value in message.items():
        if name == "extras":
            size += len(msgspec.msgpack.encode(value))
        else:
            size += len(value) if isinstance(value, bytes) else len(value.encode())
    return size


class Outbound:
    """A protocol message to many clients, encoded at most once for each format."""

    __slots__ = ("_json", "_msgpack", "body")

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self._json: bytes | None = None
        self._msgpack: bytes | None = None

    def frame(self, binary: bool) -> bytes:
        """Return the whole websocket frame, header included."""
        if binary:
            if self._msgpack is None:
                self._msgpack = frame(self.body, True)
            return self._msgpack
        if self._json is None:
            self._json = frame(self.body, False)
        return self._json


def frame(body: dict[str, Any], binary: bool) -> bytes:
    """Encode ``body`` and put the header of an unmasked, unfragmented websocket frame before it (RFC 6455, 5.2).

    A server's frames carry no mask, so that one encoding serves every client.
    """
    if binary:
        payload, first = msgspec.msgpack.encode(body), 0x82
    else:
        payload, first = msgspec.json.encode(_textual(body)), 0x81
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


def _textual(body: dict[str, Any]) -> dict[str, Any]:
    """Return ``body`` with binary data as base64 text, said so in ``encoding``, as JSON has no bytes."""
    messages = body.get("messages")
    if not messages or not any(isinstance(message.get("data"), bytes) for message in messages):
        return body
    rewritten = []
    for message in messages:
        data = message.get("data")
        if isinstance(data, bytes):
            encoding = message.get("encoding")
            message = {**message, "data": base64.b64encode(data).decode(),
                       "encoding": f"{encoding}/base64" if encoding else "base64"}
        rewritten.append(message)
    return {**body, "messages": rewritten}
