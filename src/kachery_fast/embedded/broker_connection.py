"""One client's connection to the embedded broker: the realtime protocol, spoken from the server's side."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import WSMsgType, web

from ..errors import BadMessage
from .broker_wire import (
    MODES,
    MODES_ALL,
    MODES_ANY,
    RESUMED,
    SUBSCRIBE,
    Action,
    Fault,
    Inbound,
    Outbound,
    decode,
    frame,
    message_size_bytes,
    read_message,
)
from .tokens import Claims, allows

if TYPE_CHECKING:
    from .broker import Broker
    from .broker_rings import Ring

__all__ = ["Connection", "Session"]

RENEWAL_SECONDS = 30.0
"""A client is asked for a new token this long before its own ends (half its life when that is less)."""

CHANNEL_NAME_LENGTH_MAX = 512

NACKS_MAX = 256
"""Refused serials remembered for each session, so that a resent one is refused again."""

CLIENT_IDS_DIFFER = Fault(40012, 400, "The message's clientId is not the connection's.")


class Session:
    """What outlives a broken connection for ``connection_state_seconds``: its identity and its publishing state."""

    __slots__ = ("client_id", "id", "key", "last_serial", "left_seconds", "refused")

    def __init__(self, incarnation: str, number: int, client_id: str) -> None:
        self.id = f"{incarnation}-{number}"
        self.key = f"{self.id}!{secrets.token_urlsafe(16)}"
        self.client_id = client_id
        self.last_serial = -1
        self.left_seconds = 0.0
        self.refused: dict[int, Fault] = {}


class Connection:
    """Frames in, frames out. Frames go to the transport at once, in order, so that a message is with the operating
    system for every receiver before its publisher's ACK is; a transport that holds too much is cut."""

    def __init__(self, broker: Broker, session: Session, claims: Claims, query: Any, websocket: web.WebSocketResponse,
                 transport: asyncio.Transport) -> None:
        self.broker = broker
        self.session = session
        self.claims = claims
        self.binary = query.get("format") == "msgpack"
        self.echo = query.get("echo", "true") != "false"
        version = query.get("v", "")
        self.version = int(version) if version.isdecimal() and len(version) < 4 else 2
        self.websocket = websocket
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.attached: dict[str, Ring] = {}
        self.closing = False
        self._closing_task: asyncio.Task[None] | None = None
        self.sent_seconds = self.loop.time()
        self.renew_at = 0.0
        self.allowance = broker.limits.inbound_burst_max
        self.allowance_seconds = self.sent_seconds
        self.accept(claims)

    # --- out

    def accept(self, claims: Claims) -> None:
        """Take over a token's claims; when the capability shrank, detach what it no longer covers."""
        now = self.broker.clock()
        self.claims = claims
        self.renew_at = claims.expires - min(RENEWAL_SECONDS, max(claims.expires - now, 0.0) / 2)
        for name in list(self.attached):
            granted = self._granted(name, None)
            if granted:
                self.attached[name].members[self] &= granted
            else:
                self._leave(name)
                self.send(_channel_error(name, _not_permitted("subscribe", name)))

    def send(self, body: dict[str, Any]) -> None:
        """Send one protocol message to this client."""
        self.send_frame(frame(body, self.binary))

    def deliver(self, outbound: Outbound) -> None:
        """Send one of a channel's messages."""
        self.broker.counters["delivered"] += 1
        self.send_frame(outbound.frame(self.binary))

    def send_frame(self, data: bytes) -> None:
        """Hand a whole websocket frame to the transport; cut the connection when it holds too much unsent."""
        if self.closing or self.transport.is_closing():
            return
        self.transport.write(data)
        self.sent_seconds = self.loop.time()
        if self.unsent_bytes > self.broker.limits.send_queue_bytes_max:
            self.cut_slow()

    @property
    def unsent_bytes(self) -> int:
        """What the transport holds and the operating system has not taken yet."""
        return self.transport.get_write_buffer_size()

    def cut_slow(self) -> None:
        """Cut a client that does not keep up; it may resume."""
        self.broker.counters["slow_consumers"] += 1
        self.disconnect(Fault(80020, 400, "This client reads too slowly; its connection was cut."))

    def send_connected(self, error: Fault | None = None) -> None:
        """Send CONNECTED: the answer to a connect, and to a token renewed in place."""
        limits, session = self.broker.limits, self.session
        details: dict[str, Any] = {
            "connectionKey": session.key,
            "maxMessageSize": limits.message_size_bytes_max,
            "maxFrameSize": limits.frame_size_bytes_max,
            "maxInboundRate": limits.inbound_rate_max,
            "serverId": self.broker.incarnation,
            "connectionStateTtl": int(limits.connection_state_seconds * 1000),
            "maxIdleInterval": int(limits.idle_seconds * 1000),
        }
        if session.client_id:
            details["clientId"] = session.client_id
        body: dict[str, Any] = {"action": Action.CONNECTED, "connectionId": session.id, "connectionKey": session.key,
                                "connectionDetails": details}
        if error is not None:
            body["error"] = error.to_map()
        self.send(body)

    def disconnect(self, fault: Fault, action: Action = Action.DISCONNECTED) -> None:
        """Say why, then close; what is unsent after ``close_seconds`` is dropped."""
        if self.closing:
            return
        if not self.transport.is_closing():
            self.transport.write(frame({"action": action, "error": fault.to_map()}, self.binary))
        self.close()

    def close(self) -> None:
        """Close the websocket in the background; nothing is sent any more."""
        if not self.closing:
            self.closing = True
            self.leave_all()
            self._closing_task = self.broker.spawn(self._close())

    async def closed(self) -> None:
        """Wait until a close that was begun has sent what it could."""
        if self._closing_task is not None:
            await asyncio.wait([self._closing_task])

    async def _close(self) -> None:
        try:
            await asyncio.wait_for(self.websocket.close(), self.broker.limits.close_seconds)
        except (asyncio.TimeoutError, OSError, RuntimeError):
            self.transport.abort()

    # --- in

    async def run(self) -> None:
        """Read frames until the client leaves."""
        try:
            async for message in self.websocket:
                if self.closing or message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                    break
                await self._pace()
                self.broker.counters["frames_in"] += 1
                try:
                    self.handle(decode(message.data))
                except BadMessage as error:
                    self.disconnect(Fault(40000, 400, str(error)), Action.ERROR)
        finally:
            self.leave_all()

    async def _pace(self) -> None:
        """Hold a client to its inbound rate by not reading on: TCP slows it down, and nothing is refused."""
        limits, now = self.broker.limits, self.loop.time()
        earned = (now - self.allowance_seconds) * limits.inbound_rate_max
        self.allowance = min(self.allowance + earned, limits.inbound_burst_max) - 1.0
        self.allowance_seconds = now
        if self.allowance < 0.0:
            self.broker.counters["paced"] += 1
            await asyncio.sleep(-self.allowance / limits.inbound_rate_max)

    def handle(self, inbound: Inbound) -> None:
        """Act on one protocol message."""
        if self.closing:
            return
        if self.broker.clock() >= self.claims.expires and inbound.action not in (Action.AUTH, Action.CLOSE):
            self.disconnect(Fault(40142, 401, "The token has expired."))
            return
        handler = _HANDLERS.get(inbound.action)
        if handler is not None:
            handler(self, inbound)

    def _heartbeat(self, inbound: Inbound) -> None:
        self.send({"action": Action.HEARTBEAT} if inbound.id is None
                  else {"action": Action.HEARTBEAT, "id": inbound.id})

    def _auth(self, inbound: Inbound) -> None:
        claims = self.broker.check(inbound.auth.access_token if inbound.auth is not None else "")
        if isinstance(claims, Fault):
            action = Action.DISCONNECTED if 40140 <= claims.code < 40150 else Action.ERROR
            self.disconnect(claims, action)
        elif claims.client_id not in ("*", self.session.client_id):
            self.disconnect(Fault(40102, 401, "The new token is for another clientId."), Action.ERROR)
        else:
            self.accept(claims)
            self.send_connected()

    def _close_asked(self, _inbound: Inbound) -> None:
        self.broker.forget(self.session)
        self.send({"action": Action.CLOSED})
        self.close()

    def _attach(self, inbound: Inbound) -> None:
        name = inbound.channel or ""
        granted = self._granted(name, inbound.flags)
        if not granted:
            self.send(_channel_error(name, _not_permitted("attach", name)))
            return
        ring = self.broker.ring(name)
        if ring is None or (name not in self.attached
                            and len(self.attached) >= self.broker.limits.attachments_max):
            self.send(_channel_error(name, Fault(42900, 429, "Too many channels.")))
            return
        rewind = (inbound.params or {}).get("rewind")
        rewind = str(rewind) if isinstance(rewind, (str, int)) else None
        replay = self.broker.rings.replay(ring, inbound.channel_serial, rewind, self.broker.clock())
        self.attached[name] = ring
        ring.members[self] = granted
        self.send({"action": Action.ATTACHED, "channel": name, "channelSerial": replay.serial,
                   "flags": granted | (RESUMED if replay.resumed else 0), "params": inbound.params or {}})
        if granted & SUBSCRIBE:
            for entry in replay.entries:
                if self.echo or entry.sender != self.session.id:
                    self.deliver(entry.outbound)

    def _detach(self, inbound: Inbound) -> None:
        name = inbound.channel or ""
        self._leave(name)
        self.send({"action": Action.DETACHED, "channel": name})

    def _publish(self, inbound: Inbound) -> None:
        serial, session = inbound.msg_serial, self.session
        if serial is None or inbound.channel is None:
            raise BadMessage(why="a MESSAGE needs a channel and a msgSerial")
        if serial <= session.last_serial and serial not in session.refused:
            self._acknowledge(serial, [])
            return
        session.last_serial = max(serial, session.last_serial)
        serials: list[str] = []
        fault = session.refused.get(serial) or self._accept_messages(inbound, serials)
        if fault is None:
            self._acknowledge(serial, serials)
            return
        session.refused[serial] = fault
        while len(session.refused) > NACKS_MAX:
            del session.refused[next(iter(session.refused))]
        self._refuse(serial, fault)

    def _accept_messages(self, inbound: Inbound, serials: list[str]) -> Fault | None:
        name, session = inbound.channel or "", self.session
        if len(name) > CHANNEL_NAME_LENGTH_MAX or not allows(self.claims.capability, name, "publish"):
            return _not_permitted("publish", name)
        if len(inbound.messages or []) > self.broker.limits.messages_per_publish_max:
            return Fault(40009, 413, "Too many messages in one publish.")
        try:
            messages = [read_message(raw) for raw in inbound.messages or []]
            size_bytes = sum(message_size_bytes(message) for message in messages)
        except (BadMessage, UnicodeError) as error:
            return Fault(40013, 400, str(error))
        limit = self.broker.limits.message_size_bytes_max
        if size_bytes > limit:
            return Fault(40009, 413, f"The messages are {size_bytes} bytes; the limit is {limit}.")
        for message in messages:
            if session.client_id != "*":
                if message.get("clientId", session.client_id) != session.client_id:
                    return CLIENT_IDS_DIFFER
                if session.client_id:
                    message["clientId"] = session.client_id
            elif message.get("clientId") == "*":
                return CLIENT_IDS_DIFFER
        return self.broker.publish(self, name, inbound.msg_serial or 0, messages, size_bytes, serials)

    def _acknowledge(self, serial: int, serials: list[str]) -> None:
        body: dict[str, Any] = {"action": Action.ACK, "msgSerial": serial, "count": 1}
        if self.version >= 5 and serials:
            body["res"] = [{"serials": serials}]
        self.send(body)

    def _refuse(self, serial: int, fault: Fault) -> None:
        self.broker.counters["refused"] += 1
        self.send({"action": Action.NACK, "msgSerial": serial, "count": 1, "error": fault.to_map()})

    def _unsupported(self, inbound: Inbound) -> None:
        if inbound.msg_serial is not None:
            self.session.last_serial = max(inbound.msg_serial, self.session.last_serial)
            self._refuse(inbound.msg_serial, Fault(40000, 400, "This broker offers messages only, no presence."))

    # --- channels

    def _granted(self, name: str, flags: int | None) -> int:
        """Return the mode bits that the token grants on a channel, cut to those the client asked for, if any."""
        granted = 0
        if len(name) > CHANNEL_NAME_LENGTH_MAX:
            return granted
        for operation, bit in MODES.items():
            if allows(self.claims.capability, name, operation):
                granted |= bit
        asked = (flags or 0) & MODES_ANY
        return granted & (asked or MODES_ALL)

    def _leave(self, name: str) -> None:
        ring = self.attached.pop(name, None)
        if ring is not None:
            ring.members.pop(self, None)

    def leave_all(self) -> None:
        """Detach from every channel: no message reaches this client from now on."""
        for name in list(self.attached):
            self._leave(name)


_HANDLERS: dict[int, Callable[[Connection, Inbound], None]] = {
    Action.HEARTBEAT: Connection._heartbeat,
    Action.AUTH: Connection._auth,
    Action.CLOSE: Connection._close_asked,
    Action.DISCONNECT: lambda connection, _inbound: connection.close(),
    Action.ATTACH: Connection._attach,
    Action.DETACH: Connection._detach,
    Action.MESSAGE: Connection._publish,
    Action.PRESENCE: Connection._unsupported,
    Action.OBJECT: Connection._unsupported,
    Action.ANNOTATION: Connection._unsupported,
}


def _channel_error(name: str, fault: Fault) -> dict[str, Any]:
    return {"action": Action.ERROR, "channel": name, "error": fault.to_map()}


def _not_permitted(operation: str, name: str) -> Fault:
    return Fault(40160, 401, f"The token does not allow to {operation} on {name!r}.")
