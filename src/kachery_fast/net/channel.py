"""Pub/sub of one kachery channel: six bands, each a channel of its own at the broker.

``Channel`` is the interface; ``AblyChannel`` reaches Ably, or the embedded broker that speaks Ably's protocol, over
the ``ably`` SDK, ``NatsChannel`` a NATS server over ``nats-py``; ``net.memory`` has the twin in memory. A message is
bytes; who may publish or subscribe on which band is written in the token, and enforced by the broker.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from ..config import Settings
from ..errors import BandUnreachable, NotPermitted, TooLarge
from .ably_client import AblyClient
from .band_client import TOO_LARGE_CODE, BandClient, SdkError

__all__ = ["AblyChannel", "Channel", "ClientChannel", "Message", "Receive"]

log = logging.getLogger("kachery_fast.net.channel")

SEEN_MAX = 4096
"""Message ids remembered for each band, so that what is replayed after a reconnect is not delivered twice."""

ATTEMPT_SECONDS = 3.0
"""How long one try of a publish or an attach waits for the broker's answer."""

OUTAGE_SECONDS_MAX = 15.0
"""When the SDK has not come back by then, its client is thrown away and a new one built."""

SILENCE_CHECK_SECONDS = 5.0
"""How often a connection is looked at that the SDK calls alive, and refused bands are asked for again."""

REWIND_SECONDS_MAX = 120
"""How far back a broker remembers (Ably's connection state time to live)."""

TOKEN_FRESH_SECONDS = 10.0
"""A refusal under a token younger than this is final."""

NOT_PERMITTED_CODES = frozenset({40160, 40161, 40012})


class Message(NamedTuple):
    """One message as it arrived. ``client_id`` is the sender as the broker vouches for it, "" when it does not."""

    band: str
    data: bytes
    client_id: str


Receive = Callable[[Message], None]


class Channel(Protocol):
    """Publish and subscribe on the bands of one kachery channel. Band names are ``<channel>-requestFiles`` etc."""

    async def connect(self) -> None:
        """Start, and wait for the first connection; goes on trying in the background when that takes too long.

        :raises BandUnreachable: not connected within ``connect_timeout_seconds``.
        """

    async def publish(self, band: str, data: bytes) -> None:
        """Publish; returns when the broker has acknowledged. A try whose outcome is unknown is repeated under the
        same id, so that the message is delivered once.

        :raises NotPermitted: the token does not cover publishing on this band.
        :raises TooLarge: longer than ``message_size_bytes_max``.
        :raises BandUnreachable: not acknowledged within ``publish_timeout_seconds``.
        """

    async def subscribe(self, band: str, receive: Receive) -> None:
        """Call ``receive`` with every message on the band from now on, this client's own included, across
        reconnects; each once. ``receive`` must not block.

        :raises NotPermitted: the token does not cover subscribing to this band; nothing is subscribed.
        :raises BandUnreachable: no answer within ``connect_timeout_seconds``; the subscription stands and begins
            when the broker is back.
        """

    @property
    def connected(self) -> bool:
        """Whether messages flow right now."""

    @property
    def why(self) -> str:
        """The last reason for not being connected, "" when there was none."""

    async def close(self) -> None:
        """Disconnect and end every task; nothing is received from then on."""


class _Subscription:
    """One band's receivers, and the ids of what they have got."""

    def __init__(self) -> None:
        self.receivers: list[Receive] = []
        self.attached = False
        self.seen: OrderedDict[tuple[str, str], None] = OrderedDict()

    def is_new(self, key: tuple[str, str]) -> bool:
        if key in self.seen:
            return False
        self.seen[key] = None
        while len(self.seen) > SEEN_MAX:
            self.seen.popitem(last=False)
        return True


class ClientChannel:
    """A ``Channel`` over clients of a service, one after the other.

    A client reconnects by itself after an ordinary break, where it can. Where it cannot (a token refused, a final
    state, an outage longer than ``OUTAGE_SECONDS_MAX``), this class takes a new one and asks the broker to rewind over
    the time that was missed.
    """

    def __init__(self, name: str, *, new_client: Callable[[], BandClient], client_id: str, settings: Settings,
                 on_state: Callable[[bool, str], None] | None = None) -> None:
        """
        :param name: the kachery channel, for messages.
        :param client_id: whom the tokens are for.
        :param on_state: called with (connected, why) at each change.
        """
        self.name = name
        self.client_id = client_id
        self._new_client = new_client
        self._settings = settings
        self._on_state = on_state
        self._subscriptions: dict[str, _Subscription] = {}
        self._refused: set[str] = set()
        self._client: BandClient | None = None
        self._latest: BandClient | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._closed = False
        self._heard_until: float | None = None
        self._why = ""

    @property
    def connected(self) -> bool:
        """Whether messages flow right now."""
        return self._up.is_set() and not self._closed

    @property
    def why(self) -> str:
        """The last reason for not being connected, "" when there was none."""
        return self._why

    async def connect(self) -> None:
        """Start, and wait for the first connection. See ``Channel.connect``."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name=f"channel {self.name}")
        await self._wait_up(asyncio.get_running_loop().time() + self._settings.connect_timeout_seconds)

    async def close(self) -> None:
        """Disconnect and end every task. See ``Channel.close``."""
        self._closed = True
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            while not supervisor.done():
                # Until Python 3.12, asyncio.wait_for may swallow a cancellation; so it is repeated.
                supervisor.cancel()
                await asyncio.wait([supervisor], timeout=1.0)
        if self._latest is not None:
            await self._latest.close()
        self._set_state(False, "the channel was closed")
        # Whoever waits for a connection sees that there will be none.
        self._up.set()

    # --- publishing

    async def publish(self, band: str, data: bytes) -> None:
        """Publish on a band. See ``Channel.publish``."""
        limit = self._settings.message_size_bytes_max
        if len(data) > limit:
            raise TooLarge(what=f"a message on {band}", size=len(data), limit=limit, setting="message_size_bytes_max")
        deadline = asyncio.get_running_loop().time() + self._settings.publish_timeout_seconds
        message_id = secrets.token_urlsafe(12)
        await self._ask(band, "publish", deadline,
                        lambda client, seconds: client.publish(band, data, message_id, seconds))

    async def _ask(self, band: str, action: str, deadline: float,
                   call: Callable[[BandClient, float], Awaitable[None]]) -> None:
        """Try ``call`` on whatever client is connected until it succeeds, is refused for good, or time is up."""
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            await self._wait_up(deadline)
            client, remaining = self._client, deadline - loop.time()
            if client is not None and remaining > 0:
                try:
                    await call(client, min(ATTEMPT_SECONDS, remaining))
                    return
                except SdkError as error:
                    self._why = error.why
                    if not await self._renewed(client, error):
                        self._raise_if_final(error, action, band)
            attempt += 1
            await asyncio.sleep(max(0.0, min(self._pause_seconds(attempt), deadline - loop.time())))

    async def _renewed(self, client: BandClient, error: SdkError) -> bool:
        """After a refusal under a token that is not new: fetch another, which may cover what was granted since."""
        age_seconds = asyncio.get_running_loop().time() - client.token_seconds
        if error.code not in NOT_PERMITTED_CODES or age_seconds < TOKEN_FRESH_SECONDS:
            return False
        try:
            await client.renew()
        except SdkError as failure:
            log.info("channel %s: no new token: %s", self.name, failure.why)
            return False
        return True

    def _raise_if_final(self, error: SdkError, action: str, band: str) -> None:
        if error.code in NOT_PERMITTED_CODES:
            raise NotPermitted(who=self.client_id or "this node", action=f"{action} on {band}", channel=self.name,
                               why=error.why.rstrip(".")) from None
        if error.code == TOO_LARGE_CODE:
            raise TooLarge(what=f"a message on {band}", size="?", limit="?", setting="the broker's limit") from None

    # --- subscribing

    async def subscribe(self, band: str, receive: Receive) -> None:
        """Subscribe to a band. See ``Channel.subscribe``."""
        subscription = self._subscriptions.get(band)
        if subscription is not None:
            subscription.receivers.append(receive)
            return
        subscription = self._subscriptions[band] = _Subscription()
        subscription.receivers.append(receive)
        deadline = asyncio.get_running_loop().time() + self._settings.connect_timeout_seconds
        receive_all = self._receive
        try:
            await self._ask(band, "subscribe", deadline,
                            lambda client, seconds: client.attach(band, receive_all, None, seconds))
        except NotPermitted:
            self._subscriptions.pop(band, None)
            raise
        subscription.attached = True

    def _receive(self, band: str, data: Any, client_id: str, message_id: str) -> None:
        subscription = self._subscriptions.get(band)
        if subscription is None or self._closed or not subscription.is_new((client_id, message_id)):
            return
        if isinstance(data, str):
            data = data.encode()
        elif not isinstance(data, (bytes, bytearray)):
            # The daemons of 2022 publish an object, which the SDK has parsed.
            data = json.dumps(data, separators=(",", ":")).encode()
        message = Message(band, bytes(data), client_id)
        for receive in list(subscription.receivers):
            try:
                receive(message)
            except Exception:
                log.exception("a receiver of %s failed", band)

    # --- the connection's life

    async def _wait_up(self, deadline: float) -> None:
        remaining = deadline - asyncio.get_running_loop().time()
        try:
            if remaining <= 0:
                raise asyncio.TimeoutError
            await asyncio.wait_for(self._up.wait(), remaining)
        except asyncio.TimeoutError:
            raise BandUnreachable(channel=self.name, why=self._why or "no answer in time") from None
        if self._closed:
            raise BandUnreachable(channel=self.name, why="the channel was closed")

    async def _supervise(self) -> None:
        """Keep a client alive for ever; between two clients pause with back-off and full jitter."""
        attempt = 0
        while not self._closed:
            client = self._latest = self._new_client()
            self._client, was_up = client, False
            try:
                was_up = await self._serve(client)
            except Exception as error:
                # Whatever the SDK comes up with, the next client may fare better.
                log.exception("the client of channel %s failed", self.name)
                client.why = f"{type(error).__name__}: {error}"
            finally:
                self._client = None
                if was_up:
                    # Not the moment the break was noticed: a peer that hangs is silent for long before that.
                    self._heard_until = client.heard_seconds
                self._set_state(False, client.why)
                await client.close()
            attempt = 0 if was_up else attempt + 1
            await asyncio.sleep(self._pause_seconds(attempt))

    async def _serve(self, client: BandClient) -> bool:
        """Follow one client's states until it must be replaced; return whether it was ever connected."""
        was_up = False
        loop = asyncio.get_running_loop()
        client.start()
        deadline = loop.time() + OUTAGE_SECONDS_MAX
        while not self._closed:
            try:
                wait_seconds = SILENCE_CHECK_SECONDS if self.connected else max(deadline - loop.time(), 0.0)
                state = await asyncio.wait_for(client.next_state(), wait_seconds)
            except asyncio.TimeoutError:
                if self.connected and not client.silent:
                    await self._ask_again(client)
                    continue
                client.why = client.why or "nothing was heard of the broker"
                return was_up
            self._why = client.why or self._why
            if not state.usable or (
                    state.up and not was_up and not await self._attach(client, set(self._subscriptions))):
                return was_up
            was_up = was_up or state.up
            if self.connected and not state.up:
                deadline = loop.time() + OUTAGE_SECONDS_MAX
            self._set_state(state.up, client.why)
        return was_up

    async def _ask_again(self, client: BandClient) -> None:
        """Ask for the bands that were refused to this client: what was withdrawn may have been given back."""
        if not self._refused:
            return
        try:
            await client.renew()
        except SdkError as error:
            log.info("channel %s: no new token: %s", self.name, error.why)
            return
        await self._attach(client, set(self._refused))

    async def _attach(self, client: BandClient, bands: set[str]) -> bool:
        """Attach a client to bands that were subscribed, from where the one before it was last heard.

        :returns: False when the broker did not answer; a band that is not permitted any more is only logged.
        """
        rewind = None
        if self._heard_until is not None:
            missed_seconds = asyncio.get_running_loop().time() - self._heard_until
            rewind = f"{min(math.ceil(missed_seconds) + 2, REWIND_SECONDS_MAX)}s"
        subscriptions = [(band, subscription) for band, subscription in self._subscriptions.items() if band in bands]
        calls = [client.attach(band, self._receive, rewind if subscription.attached else None, ATTEMPT_SECONDS)
                 for band, subscription in subscriptions]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        former, self._refused = self._refused, set()
        for (band, subscription), answer in zip(subscriptions, answers, strict=True):
            subscription.attached = subscription.attached or answer is None
            if isinstance(answer, SdkError):
                if answer.code not in NOT_PERMITTED_CODES:
                    self._refused = former
                    return False
                self._refused.add(band)
                if band not in former:
                    log.warning("channel %s: %s is not subscribed again: %s", self.name, band, answer.why)
            elif isinstance(answer, BaseException):
                raise answer
        return True

    def _set_state(self, up: bool, why: str) -> None:
        if up == self._up.is_set():
            return
        if up:
            self._up.set()
        else:
            self._up.clear()
            self._why = why
        log.info("channel %s is %s %s", self.name, "connected" if up else "not connected", "" if up else f"({why})")
        if self._on_state is not None:
            try:
                self._on_state(up, "" if up else why)
            except Exception:
                log.exception("the listener to the state of channel %s failed", self.name)

    def _pause_seconds(self, attempt: int) -> float:
        cap = min(self._settings.retry_cap_seconds, 4.0)
        return random.uniform(0, min(cap, self._settings.retry_base_seconds * 2 ** min(attempt, 16)))  # noqa: S311


class AblyChannel(ClientChannel):
    """A ``Channel`` over the ``ably`` SDK."""

    def __init__(self, name: str, *, endpoint: str, tls: bool, token: Callable[[], Awaitable[dict[str, Any]]],
                 client_id: str, settings: Settings, on_state: Callable[[bool, str], None] | None = None,
                 address: str = "") -> None:
        """
        :param endpoint: ``host:port`` of the broker, or Ably's ("main").
        :param token: fetches a fresh TokenDetails map; may raise, and is then called again later.
        :param address: the IP address to connect to, where that of the endpoint was looked up before.
        """
        super().__init__(name, client_id=client_id, settings=settings, on_state=on_state, new_client=lambda: AblyClient(
            endpoint, tls=tls, token=self._token, client_id=client_id, address=address,
            message_size_bytes_max=settings.message_size_bytes_max))
        self._token = token
