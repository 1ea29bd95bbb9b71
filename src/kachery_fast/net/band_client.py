"""What a channel needs of a client of a pub/sub service: one connection, which may end, and is then replaced.

``ably_client`` has the one for Ably, ``nats_client`` that for NATS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..errors import KacheryError

__all__ = ["NOT_PERMITTED_CODE", "TOO_LARGE_CODE", "BandClient", "Listener", "SdkError", "State"]

NOT_PERMITTED_CODE = 40160
TOO_LARGE_CODE = 40009

Listener = Callable[[str, Any, str, str], None]
"""Called with band, data, client id and message id."""


class SdkError(KacheryError):
    """{why}"""

    @property
    def code(self) -> int:
        """Ably's error code, or that which Ably has for it; 0 for none."""
        return int(self.details.get("code") or 0)

    @property
    def why(self) -> str:
        """What went wrong, as the SDK or the broker says it."""
        return str(self.details.get("why", ""))


class State(NamedTuple):
    """``usable`` is False when this client will not come back by itself."""

    up: bool
    usable: bool


class BandClient(Protocol):
    """A connection: started once, followed by ``next_state``, closed once. ``why``: the last thing that went wrong;
    ``token_seconds``: by the loop's clock, when its token was new."""

    why: str
    token_seconds: float

    @property
    def heard_seconds(self) -> float:
        """By the loop's clock, when the service was last heard."""

    def start(self) -> None:
        """Begin to connect."""

    async def next_state(self) -> State:
        """Wait for the next change of the connection's state."""

    @property
    def silent(self) -> bool:
        """Whether nothing was heard for longer than should be."""

    async def publish(self, band: str, data: bytes, message_id: str, timeout_seconds: float) -> None:
        """Publish one message under an id of ours; returns when the service has taken it.

        :raises SdkError: refused, not connected, or no answer in time.
        """

    async def attach(self, band: str, listener: Listener, rewind: str | None, timeout_seconds: float) -> None:
        """Have ``listener`` called with what arrives on a band, from ``rewind`` ("30s") ago where the service can.

        :raises SdkError: refused, or no answer in time.
        """

    async def renew(self) -> None:
        """Fetch a new token and take it up without a break. :raises SdkError: no token, or refused."""

    async def close(self) -> None:
        """Close the connection and end what it has running."""
