"""The embedded pub/sub broker: the Ably realtime protocol over websockets, mounted into the hub's HTTP server.

What it offers: publish, subscribe, capabilities by channel name, tokens renewed in place, resume after a broken
connection, replay from a bounded ring. What it does not: presence, history, deltas, push. Everything is in memory:
a broker that starts anew knows nothing of the one before, and a client that attaches with a serial of that one gets
the whole ring, so that whatever was published between its peers' return and its own still reaches it.

Brokers of several hubs behind one address are one to their clients: a ``Relay`` carries what is published at one of
them, and what is revoked, to the others. A client that moves from one to another is as one whose broker has restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from aiohttp import hdrs, web

from ..errors import BadMessage
from .broker_connection import Connection, Session
from .broker_limits import BrokerLimits
from .broker_relay import REVOCATION_MARGIN_SECONDS, Published, Relay, Revoked, decode_event, encode_event
from .broker_rest import Rest
from .broker_rings import Ring, RingLimits, Rings
from .broker_traffic import OVERHEAD_BYTES, Meter
from .broker_wire import SUBSCRIBE, Action, Fault, frame
from .tokens import LIFE_SECONDS_MAX, Claims, TokenKey, check_token, make_token

__all__ = ["Broker", "BrokerLimits", "TokenKey", "is_websocket"]

log = logging.getLogger("kachery_fast.embedded.broker")

_OLD = Fault(40142, 401, "The token is from before the broker's start. Ask the hub for a new one.")


def is_websocket(request: web.BaseRequest) -> bool:
    """Say whether a request asks for a websocket, and so belongs to the broker."""
    return request.headers.get(hdrs.UPGRADE, "").lower() == "websocket"


class Broker:
    """All connections and channels of one hub process. Use it on one running event loop; ``close`` it at the end."""

    def __init__(self, *, keys: TokenKey, clock: Callable[[], float] = time.time,
                 limits: BrokerLimits | None = None, relay: Relay | None = None,
                 vouch: Callable[[Claims], Awaitable[bool]] | None = None) -> None:
        """
        :param keys: the key whose tokens are accepted, and which ``issue_token`` signs with.
        :param clock: seconds since the epoch; tokens and the age of messages go by it.
        :param vouch: says whether what a token from before the start grants would be granted now. None: nobody does,
            and each client needs a new one after a restart.
        :param relay: the way to the brokers that have the same key, if there are any; it calls ``receive``.
        """
        self.key = keys
        self.clock = clock
        self.limits = limits or BrokerLimits()
        self.incarnation = secrets.token_hex(6)
        self.counters: Counter[str] = Counter()
        self.rings = Rings(self.incarnation, RingLimits(
            self.limits.ring_messages_max, self.limits.ring_size_bytes_max, self.limits.ring_total_size_bytes_max,
            self.limits.connection_state_seconds))
        self.meter = Meter(clock)
        self._started = _floor_ms(clock())
        self._connections: dict[str, Connection] = {}
        self._connections_of: Counter[str] = Counter()
        self._sessions: dict[str, Session] = {}
        self._numbers = 0
        self._revoked: dict[str, float] = {}
        self._relay = relay
        self._vouch = vouch
        self._rest = Rest(keys, clock, self.issue_token)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False

    # --- the hub's side

    def routes(self) -> list[web.RouteDef]:
        """Return ``GET /`` (websocket upgrades; anything else is 426), ``POST /keys/{key_name}/requestToken`` and
        ``GET /time``. A hub with a page of its own at ``/`` calls ``serve`` from there when ``is_websocket``."""
        return [
            web.get("/", self.serve),
            web.post("/keys/{key_name}/requestToken", self._rest.request_token),
            web.get("/time", self._rest.time),
        ]

    def issue_token(self, client_id: str, capability: Mapping[str, Sequence[str]],
                    life_seconds: float) -> dict[str, Any]:
        """Return a TokenDetails map for a client: ``token``, ``issued``, ``expires`` (ms), ``clientId``,
        ``capability`` (JSON text).

        :param capability: channel name -> operations, ``{"lab-requestFiles": ["publish"]}``; names are exact.
        """
        issued = _floor_ms(self.clock())
        if client_id in self._revoked:
            issued = max(issued, self._revoked[client_id] + 0.001)
        return make_token(self.key, client_id, capability, issued, life_seconds)

    async def revoke(self, client_id: str) -> int:
        """Refuse every token of ``client_id`` issued until now and cut its connections; return how many were cut.

        Not kept over a restart; tokens from before it hold only where ``vouch`` says so. Other brokers
        hear of it at once; how many connections they cut is not counted.
        """
        margin = 0.0 if self._relay is None else REVOCATION_MARGIN_SECONDS
        # Later than what is issued after a revocation at this same time, or within its margin.
        until = max(_floor_ms(self.clock()) + margin, self._revoked.get(client_id, -1.0) + 0.001)
        if self._relay is not None and not self._relay.send(encode_event(Revoked(client_id, until))):
            log.warning("the other hubs cannot be told that the tokens of %s hold no more", client_id[:16])
        return self._revoke(client_id, until)

    def _revoke(self, client_id: str, until: float) -> int:
        self._revoked[client_id] = max(until, self._revoked.get(client_id, 0.0))
        mine = [connection for connection in self._connections.values()
                if connection.session.client_id == client_id and connection.claims.issued <= until]
        kept = {connection.session.id for connection in self._connections.values()} - {
            connection.session.id for connection in mine}
        for session in list(self._sessions.values()):
            if session.client_id == client_id and session.id not in kept:
                self.forget(session)
        for connection in mine:
            connection.disconnect(Fault(40141, 401, "The token was revoked."))
        return len(mine)

    def receive(self, event: bytes) -> None:
        """Act on what another broker has sent to the relay."""
        try:
            told = decode_event(event)
        except BadMessage as error:
            log.warning("another hub sent what this one does not understand: %s", error.message)
            return
        if isinstance(told, Revoked):
            self._revoke(told.client_id, told.until)
            return
        ring = self.ring(str(told.body.get("channel")))
        if ring is None or any(key in ring.keys for key in told.keys):
            self.counters["relayed_dropped"] += 1
            return
        self.counters["relayed"] += len(told.body["messages"])
        self._spread(ring, told, None)

    def forget_tokens(self) -> None:
        """Take no token from before now, and cut all connections: some revocations may not have been heard of."""
        self._started = _floor_ms(self.clock())
        self._sessions.clear()
        for connection in list(self._connections.values()):
            connection.disconnect(Fault(40142, 401, "Other hubs were out of reach. Ask the hub for a new token."))

    def stats(self) -> dict[str, int]:
        """Return counters since the start, and how many connections, sessions, channels and ring bytes there are."""
        return {**self.counters, "connections": len(self._connections), "sessions": len(self._sessions),
                "channels": len(self.rings.by_name), "ring_bytes": self.rings.size_bytes}

    async def close(self) -> None:
        """Tell every client to come back later, close all connections, and end the broker's tasks."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        for connection in list(self._connections.values()):
            connection.disconnect(Fault(80003, 400, "The broker is stopping."))
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    # --- websockets

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Handle ``GET /``: authenticate, connect or resume, and speak the protocol until the client leaves."""
        if not is_websocket(request):
            return web.Response(status=426, text="This is a websocket.\n", headers={hdrs.UPGRADE: "websocket"})
        websocket = web.WebSocketResponse(
            compress=False, max_msg_size=self.limits.frame_size_bytes_max, timeout=self.limits.close_seconds,
            heartbeat=30.0)
        await websocket.prepare(request)
        claims = await self._admit(request)
        transport = request.transport
        if transport is None or self._closed:
            await websocket.close()
            return websocket
        if isinstance(claims, Fault):
            self.counters["connects_refused"] += 1
            # A fault that may pass is a DISCONNECTED, so that the client comes back; the others are final.
            action = Action.DISCONNECTED if claims.status == 429 else Action.ERROR
            transport.write(frame({"action": action, "error": claims.to_map()},
                                  request.query.get("format") == "msgpack"))
            await websocket.close()
            return websocket
        self._start_ticking()
        session, error = self._session(claims, request.query)
        connection = Connection(self, session, claims, request.query, websocket, transport)
        self._connections[session.id] = connection
        self._connections_of[session.client_id] += 1
        self.counters["connects"] += 1
        try:
            connection.send_connected(error)
            await connection.run()
        finally:
            self._connections_of[session.client_id] -= 1
            if not self._connections_of[session.client_id]:
                del self._connections_of[session.client_id]
            session.left_seconds = connection.loop.time()
            if self._connections.get(session.id) is connection:
                del self._connections[session.id]
            # The close that was begun elsewhere sends what is left; the handler must not end before it.
            await connection.closed()
        return websocket

    async def _admit(self, request: web.Request) -> Claims | Fault:
        query = request.query
        token = query.get("access_token") or query.get("accessToken") or ""
        if not token:
            # A key in a URL ends up in logs, and it grants everything: only tokens are taken.
            return Fault(40101, 401, "Only tokens are accepted here; basic authentication is not.")
        claims = self.check(token)
        if claims is _OLD and self._vouch is not None:
            before = check_token(self.key, token, self.clock())
            if isinstance(before, Claims) and await self._vouch(before):
                # What was revoked meanwhile was decided after this was looked up, and is known here by now.
                claims = self.check(token, vouched=True)
        if isinstance(claims, Fault):
            return claims
        if (len(self._connections) >= self.limits.connections_max
                or self._connections_of[claims.client_id] >= self.limits.connections_per_client_max):
            return Fault(42900, 429, "Too many connections.")
        asked = query.get("clientId", "") or claims.client_id
        if claims.client_id == "*":
            return claims._replace(client_id=asked)
        if asked != claims.client_id:
            return Fault(40102, 401, "The clientId asked for is not the token's.")
        return claims

    def check(self, token: str, *, vouched: bool = False) -> Claims | Fault:
        """Verify a token: form, signature, times, and that it was issued after this broker's start (unless
        ``vouched``) and after the last revocation of its client. The latter two have a code that makes a client fetch
        a new token."""
        claims = check_token(self.key, token, self.clock())
        if isinstance(claims, Fault):
            return claims
        if claims.issued < self._started and not vouched:
            return _OLD
        if claims.issued <= self._revoked.get(claims.client_id, -1.0):
            return Fault(40141, 401, "The token was revoked. Ask the hub for a new one.")
        return claims

    def _session(self, claims: Claims, query: Any) -> tuple[Session, Fault | None]:
        """Resume the session whose connection key the client shows, else begin one."""
        key = query.get("resume", "")
        session = self._sessions.get(key) if key else None
        if session is not None and session.client_id == claims.client_id:
            before = self._connections.pop(session.id, None)
            if before is not None:
                before.close()
            self.counters["resumes"] += 1
            return session, None
        if len(self._sessions) >= 2 * self.limits.connections_max:
            self._drop_oldest_session()
        self._numbers += 1
        session = Session(self.incarnation, self._numbers, claims.client_id)
        self._sessions[session.key] = session
        return session, (Fault(80008, 400, "The connection could not be recovered.") if key else None)

    def _drop_oldest_session(self) -> None:
        for key, session in self._sessions.items():
            if session.id not in self._connections:
                del self._sessions[key]
                return

    def forget(self, session: Session) -> None:
        """Make a session impossible to resume."""
        self._sessions.pop(session.key, None)

    # --- channels

    def ring(self, name: str) -> Ring | None:
        """Return a channel's ring, or ``None`` when there are too many channels for a new one."""
        if name not in self.rings.by_name and len(self.rings.by_name) >= self.limits.channels_max:
            return None
        return self.rings.get(name)

    def publish(self, sender: Connection, name: str, serial: int, messages: list[dict[str, Any]], size_bytes: int,
                serials: list[str]) -> Fault | None:
        """Number the messages, keep them, and send them to every member that may subscribe.

        A message whose own id its client has sent already, as far as the ring remembers, is left out.

        :param serials: receives one serial for each message that was sent.
        """
        ring = self.ring(name)
        if ring is None:
            return Fault(42900, 429, "Too many channels.")
        session = sender.session
        base, fresh, keys = f"{session.id}:{serial}", [], []
        for index, message in enumerate(messages):
            if "id" in message:
                key = (message.get("clientId", session.id), message["id"])
                if key in ring.keys or key in keys:
                    self.counters["repeated"] += 1
                    continue
                keys.append(key)
            else:
                message["id"] = f"{base}:{index}"
            fresh.append(message)
        if not fresh:
            return None
        body = {"action": Action.MESSAGE, "id": base, "channel": name, "connectionId": session.id,
                "timestamp": int(self.clock() * 1000), "messages": fresh}
        whole = Published(body, size_bytes + OVERHEAD_BYTES * len(fresh), keys)
        if self._relay is not None and not self._relay.send(encode_event(whole)):
            return Fault(50003, 503, "The other hubs are out of reach.")
        serial_text = self._spread(ring, whole, sender)
        self.counters["published"] += len(fresh)
        serials.extend(f"{serial_text}:{index}" for index in range(len(fresh)))
        return None

    def _spread(self, ring: Ring, message: Published, sender: Connection | None) -> str:
        """Keep a message, send it to the members, and return its serial."""
        body = message.body
        self.meter.note(ring.name, len(body["messages"]), message.size_bytes)
        entry = self.rings.append(ring, body, now=min(self.clock(), body["timestamp"] / 1000),
                                  size_bytes=message.size_bytes, sender=body["connectionId"], keys=tuple(message.keys))
        for member, modes in list(ring.members.items()):
            if modes & SUBSCRIBE and (member.echo or member is not sender):
                member.deliver(entry.outbound)
        return str(body["channelSerial"])

    # --- time

    def _start_ticking(self) -> None:
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.limits.tick_seconds)
            self.tick()

    def tick(self) -> None:
        """Do what is due: heartbeats, requests for new tokens, ends of tokens, forgetting."""
        now, elapsed = self.clock(), asyncio.get_running_loop().time()
        for connection in list(self._connections.values()):
            if connection.closing:
                continue
            if now >= connection.claims.expires:
                self.counters["expired"] += 1
                connection.disconnect(Fault(40142, 401, "The token has expired."))
            elif now >= connection.renew_at:
                connection.renew_at = connection.claims.expires
                connection.send({"action": Action.AUTH})
            elif elapsed - connection.sent_seconds >= self.limits.idle_seconds / 2:
                connection.send({"action": Action.HEARTBEAT})
        self.rings.expire(now)
        self.meter.expire()
        for key, session in list(self._sessions.items()):
            gone = session.id not in self._connections
            if gone and elapsed - session.left_seconds > self.limits.connection_state_seconds:
                del self._sessions[key]
        for client_id in [name for name, at in self._revoked.items() if now - at > LIFE_SECONDS_MAX]:
            del self._revoked[client_id]
        self._rest.expire(now)
        self._relieve()

    def _relieve(self) -> None:
        """Cut the connections that hold the most unsent bytes, until all together hold what they may."""
        held = sorted(((connection.unsent_bytes, session_id) for session_id, connection in self._connections.items()
                       if not connection.closing), reverse=True)
        excess = sum(size_bytes for size_bytes, _ in held) - self.limits.send_total_bytes_max
        for size_bytes, session_id in held:
            if excess <= 0:
                break
            self._connections[session_id].cut_slow()
            excess -= size_bytes

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine in the background; ``close`` waits for it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _floor_ms(seconds: float) -> float:
    return int(seconds * 1000) / 1000
