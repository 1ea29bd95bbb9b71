"""The way to a channel's bands, by what the hub says of where they are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from ..config import Settings
from ..protocol.hub_bodies import PubsubInfo, PubsubToken
from .channel import AblyChannel, Channel, ClientChannel
from .nats_client import NatsClient

__all__ = ["NatsChannel", "open_bands"]


class NatsChannel(ClientChannel):
    """A ``Channel`` over ``nats-py``. A NATS server keeps nothing: what is said while a subscriber is away is not heard
    by it, and messages have no sender but the one who signed them."""

    def __init__(self, name: str, *, url: str, token: Callable[[], Awaitable[PubsubToken]], client_id: str,
                 settings: Settings, on_state: Callable[[bool, str], None] | None = None, address: str = "") -> None:
        """See ``ClientChannel`` and ``NatsClient``."""
        super().__init__(name, client_id=client_id, settings=settings, on_state=on_state, new_client=lambda: NatsClient(
            url, token=token, client_id=client_id, address=address))


def open_bands(
    name: str, pubsub: PubsubInfo, *, hub_url: str, token: Callable[[], Awaitable[PubsubToken]], client_id: str,
    settings: Settings, on_state: Callable[[bool, str], None] | None = None, address: str = "",
) -> Channel:
    """Return the bands of a kachery channel, not connected yet.

    :param hub_url: where the bands are when ``pubsub`` names no place. :param token: fetches a fresh token.
    :param address: the IP address to connect to, where that of the service was looked up before.
    """
    if pubsub.kind == "nats":
        return NatsChannel(name, url=pubsub.endpoint, token=token, client_id=client_id, settings=settings,
                           on_state=on_state, address=address)

    async def details() -> dict[str, Any]:
        found = await token()
        return {"token": found.token, "issued": found.issued, "expires": found.expires,
                "capability": found.capability, "clientId": found.client_id}

    endpoint, tls = pubsub.endpoint, pubsub.tls
    if not endpoint:
        parts = urlsplit(hub_url)
        endpoint, tls = parts.netloc, parts.scheme == "https"
    return AblyChannel(name, endpoint=endpoint, tls=tls, token=details, client_id=client_id, settings=settings,
                       on_state=on_state, address=address)
