"""What the brokers of several hubs behind one address tell one another: messages, and whose tokens hold no more.

Something else carries it (``Relay``); here is what it says.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from ..errors import BadMessage

__all__ = ["REVOCATION_MARGIN_SECONDS", "Event", "Published", "Relay", "Revoked", "decode_event", "encode_event"]

REVOCATION_MARGIN_SECONDS = 5.0
"""A revocation at one hub also covers tokens that others issue this much later: until they hear of it, and as far as
their clocks differ. Tokens that are issued by who has heard of it carry a later time."""


class Relay(Protocol):
    """The way to the other brokers. They are given the events of each broker in the order that it sent them in."""

    def send(self, event: bytes) -> bool:
        """Take an event for all other brokers; False when too many wait already, and it is not taken."""


class Published(msgspec.Struct, tag="published"):
    """A protocol message, as its publisher's broker sent it out, without a serial.

    ``keys``: client ids and message ids by which a repetition is known.
    """

    body: dict[str, Any]
    size_bytes: int
    keys: list[tuple[str, str]]


class Revoked(msgspec.Struct, tag="revoked"):
    """No token of this client that was issued up to ``until`` (seconds since the epoch) holds any more."""

    client_id: str
    until: float


Event = Published | Revoked

_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode_event(event: Event) -> bytes:
    """Return an event as ``Relay.send`` takes it."""
    return msgspec.msgpack.encode(event)


def decode_event(data: bytes) -> Event:
    """Read an event. :raises BadMessage: it is none, or of a version that this program does not know."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadMessage(why=str(error)) from None
