"""Trying out a channel's bucket and bands: what a node does there, done by the hub, step by step.

Objects go by the same signed URLs that nodes get, over real HTTP; a message goes over a connection to the broker, with
a token of its own. Each step says how long it took, or what is wrong and what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial

from sqlalchemy.engine import Connection

from .._checksum import crc32c
from ..config import Settings
from ..errors import EngineUnusable, KacheryError
from ..net.channel import Channel, Message
from ..protocol.names import object_name
from . import channels
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .buckets import Buckets, EngineRow, find_bucket
from .engines import BucketEngine
from .engines.directory import DIRECTORY
from .engines.gcs_settings import GCS
from .engines.xml_answers import GCS_ADVICE, S3_ADVICE, advice_for, code_of, refusal_of
from .limits import RateLimiter
from .outbound import Reply
from .pubsubs import Pubsubs, find_pubsub

__all__ = ["TRIALS_PER_MINUTE_MAX", "TRYING_ACTS", "ChannelTried", "Trier"]

TRIALS_PER_MINUTE_MAX = 6
ECHO_SECONDS_MAX = 20.0
# As far as stores that speak S3 let clocks differ is 15 minutes; before that URLs live shorter, or longer, than meant.
CLOCKS_DIFFER_SECONDS_MAX = 60.0
_BAND = "trial"


class TryChannel(Request, tag="testChannel"):
    """Do in the bucket and on the bands of ``channel`` what nodes do: write, read, list and remove an object by signed
    URLs, and echo a message. Some times a minute; it takes some seconds where something is wrong."""

    channel: str


class Step(Answer):
    """One thing that was tried. ``why``: what is wrong, "" where nothing is; ``advice``: what to do about it."""

    name: str
    ok: bool
    seconds: float
    why: str = ""
    advice: str = ""


class ChannelTried(Answer):
    """What came of it. ``bucket``, ``pubsub``: their names; null: the hub's own. ``ok``: whether every step went
    well."""

    channel: str
    bucket: str | None
    pubsub: str | None
    ok: bool
    steps: list[Step]


class Trier:
    """Tries channels out. One for each hub, used on its event loop.

    :param local_url: returns the hub's address for programs on its machine. :param clock: seconds since the epoch.
    """

    def __init__(
        self, buckets: Buckets, pubsubs: Pubsubs, local_url: Callable[[], str], settings: Settings,
        clock: Callable[[], float],
    ) -> None:
        self._buckets = buckets
        self._pubsubs = pubsubs
        self._local_url = local_url
        self._settings = settings
        self._clock = clock
        self._rate = RateLimiter(TRIALS_PER_MINUTE_MAX / 60, 60.0)

    async def run(
        self, owner: str, channel: str, row: EngineRow | None, pubsub: EngineRow | None
    ) -> ChannelTried:
        """Try everything, with the rows of its bucket and its pub/sub service.

        :raises RateLimited: too often in the last minute.
        """
        self._rate.spend(owner, 1, self._clock(), who=owner,
                         limit=f"a channel can be tested {TRIALS_PER_MINUTE_MAX} times a minute")
        steps = await self._buckets.run(self._try_bucket, channel, row, own=row is None)
        steps.append(await self._try_bands(channel, pubsub))
        return ChannelTried(channel=channel, bucket=None if row is None else row.name,
                            pubsub=None if pubsub is None else pubsub.name, steps=steps,
                            ok=all(step.ok for step in steps))

    # --- the bucket

    def _try_bucket(self, channel: str, row: EngineRow | None) -> list[Step]:
        steps: list[Step] = []
        try:
            bucket = self._buckets.use(row)
        except KacheryError as error:
            return [Step(name="use the credentials", ok=False, seconds=0.0, why=error.message)]
        if row is not None and row.kind == DIRECTORY:
            return _try_directory(bucket, channel)
        advice = GCS_ADVICE if row is not None and row.kind == GCS else S3_ADVICE
        data = secrets.token_bytes(1000)
        name = object_name(channel, hashlib.sha1(data, usedforsecurity=False).hexdigest())
        with _step(steps, "look for an object that is not there"):
            reply = self._get(bucket, name)
            self._check_clocks(reply)
            if reply.status == 403 and code_of(reply) in ("", "AccessDenied") and row is not None:
                permission = "storage.objects.list" if row.kind == GCS else "s3:ListBucket"
                raise _failed(reply, f"If uploads go well, the permission to list is missing ({permission} on the "
                                     "bucket): without it, what is missing cannot be told from what is forbidden.")
            _check(reply, advice, 404, none="NoSuchBucket")
        with _step(steps, "upload an object"):
            _check(self._put(bucket, name, data), advice, 200, 201, 204)
        if not steps[-1].ok:
            return steps
        with _step(steps, "find that it is there already"):
            self._put_again(bucket, name, data, advice)
        with _step(steps, "read it"):
            reply = self._get(bucket, name)
            _check(reply, advice, 200)
            if reply.body != data:
                raise EngineUnusable(what="The bucket", why="it returns other bytes than were uploaded", advice="Is "
                                     "there anything on the way that changes them?")
        with _step(steps, "list it"):
            bucket.objects(channel, limit=1)
        with _step(steps, "remove it"):
            if not bucket.remove(name):
                raise EngineUnusable(what="The object", why="it was gone already", advice="Does something else remove "
                                     "what is in the bucket?")
        return steps

    def _put(self, bucket: BucketEngine, name: str, data: bytes) -> Reply:
        signed = bucket.sign_put(name, len(data), self._settings.url_life_seconds, crc32c=crc32c(data))
        return self._request("PUT", signed.url, signed.headers, data)

    def _put_again(self, bucket: BucketEngine, name: str, data: bytes, advice: Mapping[str, str]) -> None:
        signed = bucket.sign_put(name, len(data), self._settings.url_life_seconds, crc32c=crc32c(data))
        reply, once = self._request("PUT", signed.url, signed.headers, data), bool(signed.headers)
        if once and reply.status in (200, 201, 204):
            raise EngineUnusable(what="The bucket", why="it lets an object be replaced that is there already",
                                 advice="The store does not heed If-None-Match. Add the bucket with --no-create-only, "
                                        "to say that you know.")
        _check(reply, advice, 412, *(() if once else (200, 201, 204)))

    def _get(self, bucket: BucketEngine, name: str) -> Reply:
        return self._request("GET", bucket.sign_get(name, self._settings.url_life_seconds).url)

    def _request(self, method: str, url: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Reply:
        own = url.startswith("/")
        return self._buckets.outbound.request(method, (self._local_url() if own else "") + url, headers=headers,
                                              body=body, hub=own)

    def _check_clocks(self, reply: Reply) -> None:
        try:
            seconds = parsedate_to_datetime(reply.headers.get("date", "")).timestamp() - self._clock()
        except (TypeError, ValueError, OverflowError):
            return
        if abs(seconds) > CLOCKS_DIFFER_SECONDS_MAX:
            raise EngineUnusable(what="The bucket", why=f"its clock is {seconds:+.0f} s from the hub's",
                                 advice="Set the clock that is wrong: signed URLs are valid for a short time.")

    # --- the bands

    async def _try_bands(self, channel: str, row: EngineRow | None) -> Step:
        band, word, heard = f"{channel}-{_BAND}", secrets.token_bytes(16), asyncio.Event()

        def receive(message: Message) -> None:
            if message.data == word:
                heard.set()

        steps: list[Step] = []
        with _step(steps, "echo a message"):
            client = await self._pubsubs.open(channel, row, {band: ["publish", "subscribe"]}, self._local_url(),
                                              self._settings)
            try:
                await asyncio.wait_for(_echo(client, band, word, receive, heard.wait), ECHO_SECONDS_MAX)
            except asyncio.TimeoutError:
                raise EngineUnusable(what="The messages of the channel", why=f"none came back within "
                                     f"{ECHO_SECONDS_MAX:g} s", advice="The hub's log may say more.") from None
            finally:
                await client.close()
        return steps[0]


async def _echo(client: Channel, band: str, word: bytes, receive: Callable[[Message], None],
                heard: Callable[[], Awaitable[object]]) -> None:
    await client.connect()
    await client.subscribe(band, receive)
    await client.publish(band, word)
    await heard()


def _try_directory(bucket: BucketEngine, channel: str) -> list[Step]:
    """What can be seen of a folder from the hub's machine: nodes read and write there by themselves."""
    steps: list[Step] = []
    data = secrets.token_bytes(1000)
    name = object_name(channel, hashlib.sha1(data, usedforsecurity=False).hexdigest())
    with _step(steps, "find the folder, and write an object"):
        bucket.write(name, data)
    if steps[-1].ok:
        with _step(steps, "read it"):
            if bucket.read(name, len(data))[0] != data:
                raise EngineUnusable(what="The bucket", why="it returns other bytes than were written",
                                     advice="Is the disk well?")
        with _step(steps, "list it"):
            bucket.objects(channel, limit=1)
        with _step(steps, "remove it"):
            bucket.remove(name)
    return steps


@contextmanager
def _step(steps: list[Step], name: str) -> Iterator[None]:
    """Add what came of what is done within."""
    begun = time.perf_counter()
    why = advice = ""
    try:
        yield
    except EngineUnusable as error:
        why, advice = str(error.details.get("why")), str(error.details.get("advice"))
    except KacheryError as error:
        why = error.message
    steps.append(Step(name=name, ok=not why, seconds=round(time.perf_counter() - begun, 3), why=why, advice=advice))


def _check(reply: Reply, advice: Mapping[str, str], *expected: int, none: str = "-") -> None:
    """:raises EngineUnusable: the answer has another status, or that code."""
    if reply.status not in expected or code_of(reply) == none:
        raise _failed(reply, advice_for(reply, advice))


def _failed(reply: Reply, advice: str) -> EngineUnusable:
    return EngineUnusable(what="The bucket", why=refusal_of(reply), advice=advice)


def _try(connection: Connection, actor: Actor, request: TryChannel, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "test it")
    return Done(partial(_run, actor.owner, request.channel, find_bucket(connection, request.channel),
                        find_pubsub(connection, request.channel)))


async def _run(
    owner: str, channel: str, bucket: EngineRow | None, pubsub: EngineRow | None, outside: Outside
) -> Answer:
    answer: Answer = await outside.try_channel(owner, channel, bucket, pubsub)
    return answer


TRYING_ACTS = (Act(TryChannel, ChannelTried, Scope.MANAGE, _try, changes=False),)
