"""One channel as a node sees it: its bands, its bucket, its members, and the hub that keeps it.

Everything heard on a band passes here first: signature, freshness, and whether the sender may say such a thing, by the
hub's list of members. What is said is stamped, signed and sent in batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ..config import Settings
from ..errors import (
    BadMessage,
    BandUnreachable,
    KacheryError,
    NodeError,
    NotPermitted,
    SignatureInvalid,
    StaleMessage,
)
from ..net.bands import open_bands
from ..net.bucket import Bucket, HttpBucket
from ..net.channel import Channel, Message
from ..net.hub import HubClient
from ..net.ranges import RangeClient
from ..protocol.access import Permission
from ..protocol.hub_bodies import ChannelInfo, Member, PubsubInfo, PubsubToken
from ..protocol.messages import BODIES_2022, CHANNEL_CHANGED, BandBody, decode_band, encode_band
from ..protocol.names import band_name
from ..protocol.signing import FreshnessGuard
from .directory_bucket import DirectoryBucket
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .identity import Identity
from .outbox import OUTBOX_MAX, OnSayFailed, Outbox, Outgoing
from .rules import BANDS_HEARD, HEARD_BY_SELF, RULES, key_of, look_at
from .signed_reads import SignedReads

__all__ = ["ChannelLink", "Listener"]

log = logging.getLogger("kachery_fast.node")

_STRANGER_REFRESH_SECONDS = 1.0
# Messages of strangers that wait for the hub's word on them; further ones are dropped.
_STRANGERS_WAITING_MAX = 256
# Messages remembered against repetition, each for four minutes: of one node about 400 a second, for an owner that
# pushes several feeds or a node that runs many tasks. Full, they take about 100 MB.
_REMEMBERED_MAX = 400_000
_REMEMBERED_OF_ONE_MAX = 100_000

Listener = Callable[[Any, str], None]


class ChannelLink:
    """A node's end of one channel.

    :param refresh: has the hub asked for the members anew, and returns when ``update`` was called with its answer.
    :param on_request: receives what nodes ask for, ``(body, sender)``.
    :param wants_request: looks at what nodes ask for before its signature is checked; False drops it.
    :param open_channel: makes the way to the bands, as ``open_bands`` does.
    """

    def __init__(self, info: ChannelInfo, hub: HubClient, identity: Identity, settings: Settings, ranges: RangeClient,
                 *, refresh: Callable[[], Awaitable[None]], on_request: Listener,
                 wants_request: Callable[[dict[str, Any]], bool] = lambda _body: True,
                 open_channel: Callable[..., Channel] = open_bands) -> None:
        self.info = info
        self.hub = hub
        self._loop = asyncio.get_running_loop()
        self._reads = SignedReads(hub, info.name, settings.sign_batch_max, private=info.private)
        self.on_restored: list[Callable[[], None]] = []
        self.on_members: list[Callable[[], None]] = []
        self.on_bucket: list[Callable[[], None]] = []
        self._identity = identity
        self._settings, self._ranges = settings, ranges
        self.bucket = self._open_bucket(info.bucket_url)
        self._refresh = refresh
        self._on_request = on_request
        self._wants_request = wants_request
        self._open_channel = open_channel
        self._members: dict[str, Member] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self._guard = FreshnessGuard(settings.message_age_seconds_max, _REMEMBERED_MAX,
                                    signer_entries_max=_REMEMBERED_OF_ONE_MAX)
        self._outbox = Outbox()
        self._channel: Channel | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closings: set[asyncio.Task[None]] = set()
        self._refreshing: asyncio.Task[None] | None = None
        self._told = False
        self._refreshed_at = float("-inf")
        self._strangers_waiting = 0
        self._was_connected = False
        self.update(info)

    @property
    def name(self) -> str:
        """The channel's name."""
        return self.info.name

    @property
    def connected(self) -> bool:
        """Whether messages flow."""
        return self._channel is not None and self._channel.connected

    @property
    def why(self) -> str:
        """Why messages do not flow."""
        return "not started" if self._channel is None else self._channel.why

    def may(self, permission: Permission) -> bool:
        """Whether this node has a permission here."""
        return permission.value in self.info.permissions

    def refusal(self, permission: Permission) -> NotPermitted | None:
        """Return why this node may not do here what takes a permission; None when it may."""
        if self.may(permission):
            return None
        name = permission.value
        return NotPermitted(who="This node", action=re.sub("([A-Z])", r" \1", name).lower(), channel=self.name,
                            why=f"the permission {name} is not in force; the channel's owner grants it with: "
                                f"kachery-fast channel grant {self.name} {self._identity.node_id} {name}")

    def providers(self, permission: Permission = Permission.PROVIDE_FILES) -> dict[str, str]:
        """The other nodes that have a permission, by which they provide something: node id -> label."""
        return {node_id: member.label for node_id, member in self._members.items()
                if node_id != self._identity.node_id and permission.value in member.permissions}

    def member_may(self, node_id: str, permission: Permission) -> bool:
        """Whether a node, this one or another, has a permission here, by the hub's last word."""
        member = self._members.get(node_id)
        return member is not None and permission.value in member.permissions

    async def check_member(self, node_id: str, permission: Permission) -> bool:
        """As ``member_may``; before the answer is no the hub is asked, as the node may have joined just now."""
        if not self.member_may(node_id, permission):
            await self.look_again()
        return self.member_may(node_id, permission)

    def _open_bucket(self, url: str) -> Bucket:
        if url.startswith("file:"):
            return DirectoryBucket(url, self._settings.stall_seconds)
        return HttpBucket(url, self._ranges, self._settings, reads=self._reads)

    def update(self, info: ChannelInfo) -> None:
        """Take over what the hub says now."""
        former, moved = self._members, info.bucket_url != self.info.bucket_url
        if moved:
            self._reads.forget()
            self.bucket = self._open_bucket(info.bucket_url)
        self._reads.private = info.private
        self.info = info
        self._members = {member.node_id: member for member in info.members}
        for hears in list(self.on_bucket) if moved else ():
            hears()
        if {node_id: member.permissions for node_id, member in former.items()} != {
                node_id: member.permissions for node_id, member in self._members.items()}:
            for changed in list(self.on_members):
                changed()

    # --- life

    async def start(self) -> None:
        """Connect; goes on trying in the background when the bands are out of reach."""
        begin_task(self._send_for_ever(), self._tasks)
        await self.connect()

    async def connect(self) -> None:
        """Connect to the bands anew, with the permissions that are in force now."""
        old, pubsub = self._channel, self.info.pubsub
        self._channel = self._open_channel(
            self.name, pubsub, hub_url=self.hub.url, token=partial(self._token, pubsub),
            client_id=self._identity.node_id, settings=self._settings, on_state=self._state_changed)
        bands = [band for band, permission in BANDS_HEARD if self.may(permission)]
        if bands:
            begin_task(self._connect(self._channel, bands), self._tasks)
        if old is not None:
            # Ends also when this wait is cancelled, as it is when the hub is dropped meanwhile.
            await asyncio.shield(begin_task(old.close(), self._closings))

    async def close(self) -> None:
        """Disconnect; what was not sent yet is dropped."""
        try:
            await end_tasks([*self._tasks, *([self._refreshing] if self._refreshing else [])])
            await asyncio.gather(*self._closings, self._reads.close(), return_exceptions=True)
        finally:
            if self._channel is not None:
                await self._channel.close()

    async def _connect(self, channel: Channel, bands: list[str]) -> None:
        with contextlib.suppress(KacheryError):
            await channel.connect()
        for kind in bands:
            try:
                await channel.subscribe(band_name(self.name, kind), self._receive)
            except KacheryError as error:
                log.warning("channel %s: %s", self.name, error)

    async def _token(self, of: PubsubInfo) -> PubsubToken:
        """Fetch a token for the service that a connection is to; that of another one is not told there."""
        token = await self.hub.pubsub_token(self.name)
        if token.pubsub is not None and token.pubsub != of:
            # The next look at the hub would tell, and have this node connect there.
            begin_task(self.look_again(), self._tasks)
            raise BandUnreachable(channel=self.name, why="its messages go by another service now")
        return token

    def _state_changed(self, connected: bool, why: str) -> None:
        log.info("channel %s: %s", self.name, "connected" if connected else f"not connected ({why})")
        if connected and self._was_connected:
            for restored in list(self.on_restored):
                restored()
        self._was_connected = self._was_connected or connected

    # --- saying

    def say(self, kind: type[Any], fields: dict[str, Any], on_failed: OnSayFailed | None = None) -> None:
        """Queue a message for its band. ``on_failed`` hears when it could not be sent."""
        band = RULES[kind].band
        if kind in BODIES_2022:
            body = kind(**fields)
        else:
            body = kind(channel=self.name, time=0, id=secrets.token_hex(16), **fields)
        for dropped in self._outbox.add(Outgoing(band, body, on_failed)):
            self._loop.call_soon(dropped.failed, BandUnreachable(
                channel=self.name, why=f"{OUTBOX_MAX} messages wait to be sent already"))
        if kind in HEARD_BY_SELF and self.may(RULES[kind].permission) and self.may(RULES[kind].heard_by):
            self._loop.call_soon(self._deliver, body, self._identity.node_id)

    async def _send_for_ever(self) -> None:
        earliest = float("-inf")
        while True:
            await self._outbox.filled.wait()
            # What is said meanwhile goes out with it.
            await asyncio.sleep(max(earliest - self._loop.time(), 0.0))
            batch = self._outbox.take(self._settings.message_size_bytes_max)
            try:
                await self._send(batch)
            except NotPermitted as error:
                begin_task(self._sending_refused(batch, error), self._tasks)
            except KacheryError as error:
                self._sending_failed(batch, error)
            except Exception as error:
                why = logged_fault(error, f"channel {self.name}: sending a message")
                self._sending_failed(batch, NodeError(what=why))
            limit = self.info.pubsub.messages_per_second_max
            earliest = self._loop.time() + 1 / limit if limit else float("-inf")

    async def _send(self, batch: list[Outgoing]) -> None:
        for outgoing in batch:
            if not isinstance(outgoing.body, BODIES_2022):
                outgoing.body.time = self.hub.now_ms()
        data = encode_band([outgoing.body for outgoing in batch], self._identity.key)
        if self._channel is None:
            raise BandUnreachable(channel=self.name, why="not started")
        while True:
            channel = self._channel
            try:
                return await channel.publish(band_name(self.name, batch[0].band), data)
            except BandUnreachable:
                if channel is self._channel:  # else it was closed for another, by which it goes
                    raise

    async def _sending_refused(self, batch: list[Outgoing], error: NotPermitted) -> None:
        """The broker knows bands alone; the hub, which permission is in force no more."""
        log.warning("channel %s: %s", self.name, error)
        try:
            await self.look_again()
        finally:  # also when the hub says that this node is on the channel no more, and this is cancelled
            for outgoing in batch:
                outgoing.failed(self.refusal(RULES[type(outgoing.body)].permission) or error)

    def _sending_failed(self, batch: list[Outgoing], error: KacheryError) -> None:
        log.warning("channel %s: %s", self.name, error)
        for outgoing in batch:
            outgoing.failed(error)

    # --- hearing

    def listen(self, key: str, listener: Listener) -> None:
        """Hand answers to ``listener(body, sender)``: to a request of this node's own (``key``: the request's id),
        about a subfeed (``rules.feed_key``), or about a task (its id)."""
        self._listeners.setdefault(key, []).append(listener)

    def unlisten(self, key: str, listener: Listener) -> None:
        """End ``listen``."""
        left = [known for known in self._listeners.get(key, ()) if known != listener]
        if left:
            self._listeners[key] = left
        else:
            self._listeners.pop(key, None)

    def _receive(self, message: Message) -> None:
        if message.data == CHANNEL_CHANGED:
            if not self._told:
                self._told = True
                begin_task(self._look_anew(), self._tasks)
            return
        entries = decode_band(message.data, size_bytes_max=2 * self._settings.message_size_bytes_max,
                              concerns=self._concerns)
        for entry in entries:
            if isinstance(entry, (BadMessage, SignatureInvalid)):
                log.warning("channel %s: dropped a message of %s: %s", self.name, message.client_id[:16], entry)
                continue
            body, sender = entry
            if sender == self._identity.node_id:
                continue
            rule = RULES[type(body)]
            if message.band != band_name(self.name, rule.band) or (message.client_id and message.client_id != sender):
                log.warning("channel %s: dropped a %s of %s on the wrong band or by another's connection",
                            self.name, type(body).__name__, sender[:16])
                continue
            if self._fresh(body, sender):
                self._dispatch(body, sender, rule.permission)

    def _concerns(self, body: dict[str, Any]) -> bool:
        """Whether a message, not yet verified, is for this node at all."""
        rule, key = look_at(body)
        if rule is None:
            return False
        if rule.key:
            return key in self._listeners
        provider = body.get("provider")
        return (provider is None or provider == self._identity.node_id) and self._wants_request(body)

    def _fresh(self, body: BandBody, sender: str) -> bool:
        if isinstance(body, BODIES_2022):
            return True
        try:
            if body.channel != self.name:
                raise BadMessage(why=f"it was signed for the channel {body.channel!r}")
            self._guard.check(sender, body.id, body.time, self.hub.now_ms() / 1000)
        except (BadMessage, StaleMessage) as error:
            log.warning("channel %s: dropped a message of %s: %s", self.name, sender[:16], error)
            return False
        return True

    def _dispatch(self, body: BandBody, sender: str, permission: Permission) -> None:
        if self.member_may(sender, permission):
            self._deliver(body, sender)
        elif self._strangers_waiting < _STRANGERS_WAITING_MAX:
            self._strangers_waiting += 1
            begin_task(self._deliver_after_refresh(body, sender, permission), self._tasks)
        else:
            log.warning("channel %s: dropped a %s of %s, as too many of strangers wait", self.name,
                        type(body).__name__, sender[:16])

    async def _deliver_after_refresh(self, body: BandBody, sender: str, permission: Permission) -> None:
        """A stranger may be a member that joined after the last look: look again, but not at every message."""
        try:
            await self.look_again()
        finally:
            self._strangers_waiting -= 1
        if self.member_may(sender, permission):
            self._deliver(body, sender)
        else:
            log.warning("channel %s: ignored a %s of %s, which lacks %s", self.name, type(body).__name__, sender[:16],
                        permission.value)

    async def _look_anew(self) -> None:
        """Ask the hub after what is being asked just now, which may have been answered before it had news."""
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        self._told = False
        await self.look_again()

    async def look_again(self) -> None:
        """Have the hub asked, at most each second; who comes meanwhile waits for the same answer."""
        if self._refreshing is None:
            self._refreshing = self._loop.create_task(self._refresh_soon())
            self._refreshing.add_done_callback(self._refreshed)
        await asyncio.wait([self._refreshing])

    async def _refresh_soon(self) -> None:
        await asyncio.sleep(self._refreshed_at + _STRANGER_REFRESH_SECONDS - self._loop.time())
        await self._refresh()

    def _refreshed(self, refreshing: asyncio.Task[None]) -> None:
        self._refreshing, self._refreshed_at = None, self._loop.time()
        if not refreshing.cancelled() and refreshing.exception() is not None:
            log.error("channel %s: the hub could not be asked: %r", self.name, refreshing.exception())

    def _deliver(self, body: BandBody, sender: str) -> None:
        if not RULES[type(body)].key:
            self._on_request(body, sender)
            return
        for listener in list(self._listeners.get(key_of(body), ())):
            listener(body, sender)
