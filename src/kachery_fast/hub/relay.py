"""Carries what the brokers of several hubs tell one another, through the PostgreSQL that the hubs share.

Each hub process numbers its events. It writes them into the table ``relayed``, and says by NOTIFY up to which number;
the others, who LISTEN, read what they have not read yet. So an event may be of any length, the events of one process
keep their order, and who was cut off for a while catches up. What was missed all the same, as rows are kept for two
minutes only, shows as a gap, or by the time that has passed; ``lost`` is called then.

Source: https://www.postgresql.org/docs/current/sql-notify.html (order, and delivery after commit).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL

from ..errors import InvalidSetting, RegistryUnreachable
from .registry import connect_options, name_of

if TYPE_CHECKING:
    import psycopg

__all__ = ["Relay"]

_log = logging.getLogger("kachery_fast.hub")

_CHANNEL = "kachery_relay"
KEPT_SECONDS = 120.0
WAITING_SIZE_BYTES_MAX = 16 * 1024 * 1024
_BATCH_EVENTS_MAX = 200
_BATCH_SIZE_BYTES_MAX = 1024 * 1024
_READ_AT_ONCE = 200
# A sign of life, which comes back to its sender too: who does not hear his own has a dead connection.
_BEAT_SECONDS = 3.0
_SILENCE_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
_CLOSE_SECONDS = 2.0
# Of the advisory locks that say which key the running hubs have.
_KEY_LOCK = 0x6B616369

_WRITE = """
WITH written AS (
    INSERT INTO relayed (hub, number, time, body)
    SELECT %(hub)s::text, %(first)s + place - 1, %(time)s, body
    FROM unnest(%(bodies)s::bytea[]) WITH ORDINALITY AS events (body, place)
    ON CONFLICT DO NOTHING)
SELECT pg_notify(%(channel)s, concat_ws(' ', %(hub)s::text, %(first)s::text, %(last)s::text))"""
_READ = """
SELECT number, body FROM relayed WHERE hub = %s AND number > %s ORDER BY number LIMIT %s"""
_OTHER_KEYS = """
SELECT count(*) FROM pg_locks
WHERE locktype = 'advisory' AND classid::bigint = %s AND objsubid = 2 AND objid::bigint <> %s
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


class Relay:
    """One process's end of it, used on its event loop.

    :param url: of the PostgreSQL database. :param key: the hub's key; hubs that run with another one are refused.
    :param clock: seconds since the epoch.
    """

    def __init__(self, url: URL, key: str, clock: Callable[[], float]) -> None:
        self._arguments = url.get_dialect()().create_connect_args(url)[1]
        self._name = name_of(url)
        self._key_number = int.from_bytes(hashlib.sha256(f"relay {key}".encode()).digest()[:4], "big") >> 1
        self._clock = clock
        self.hub = secrets.token_hex(8)
        self._waiting: deque[bytes] = deque()
        self._waiting_size_bytes = 0
        self._sent = 0
        self._wake = asyncio.Event()
        self._read: dict[str, int] = {}
        self._heard_seconds = 0.0
        self._task: asyncio.Task[None] | None = None

    async def start(self, receive: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        """Connect; from now on events come and go.

        :param receive: called for each event of another process. :param lost: called when some may have been missed.
        :raises InvalidSetting: other hubs that run on the database have another key.
        :raises RegistryUnreachable: PostgreSQL is away.
        """
        import psycopg

        self._receive, self._lost = receive, lost
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.get_running_loop().create_task(self._run(started))
        try:
            await started
        except psycopg.Error as error:
            raise RegistryUnreachable(registry=self._name, why=_reason(error)) from error

    def send(self, event: bytes) -> bool:
        """See ``embedded.broker_relay.Relay``."""
        if self._waiting_size_bytes + len(event) > WAITING_SIZE_BYTES_MAX:
            return False
        self._waiting.append(event)
        self._waiting_size_bytes += len(event)
        self._wake.set()
        return True

    async def close(self) -> None:
        """Send what waits, if that is possible soon, and disconnect."""
        if self._task is None:
            return
        end = asyncio.get_running_loop().time() + _CLOSE_SECONDS
        while self._waiting and not self._task.done() and asyncio.get_running_loop().time() < end:
            await asyncio.wait([self._task], timeout=0.01)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    # --- connected

    async def _run(self, started: asyncio.Future[None]) -> None:
        import psycopg

        while True:
            try:
                async with await self._connect() as listening, await self._connect() as working:
                    await self._serve(listening, working, started)
            except Exception as error:
                if not started.done():
                    started.set_exception(error)
                    return
                known = isinstance(error, (psycopg.Error, asyncio.TimeoutError, InvalidSetting))
                _log.warning("the other hubs are out of reach through %s: %s", self._name, _reason(error),
                             exc_info=not known)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        import psycopg

        return await psycopg.AsyncConnection.connect(**self._arguments, **connect_options(), autocommit=True)

    async def _serve(self, listening: psycopg.AsyncConnection[Any], working: psycopg.AsyncConnection[Any],
                     started: asyncio.Future[None]) -> None:
        """Do everything that there is to do, until a connection fails."""
        await self._compare_keys(listening)
        # Who reads late reads all the same, and a lost event harms nobody whose PostgreSQL has lost it too.
        await working.execute("SET synchronous_commit = off")
        await listening.execute(f"LISTEN {_CHANNEL}")
        loop = asyncio.get_running_loop()
        if self._heard_seconds and loop.time() - self._heard_seconds > KEPT_SECONDS / 2:
            self._lose()
        for row in await (await working.execute(
                "SELECT hub, min(number) - 1, max(number) FROM relayed WHERE hub <> %s GROUP BY hub", [self.hub]
                )).fetchall():
            self._read.setdefault(row[0], row[1])
            await self._catch_up(working, row[0], row[2])
        self._heard_seconds = loop.time()
        if not started.done():
            started.set_result(None)
        tasks = [loop.create_task(work) for work in (
            self._write_for_ever(working), self._beat_for_ever(working), self._listen(listening, working))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _compare_keys(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Hold a lock by the number of this hub's key for as long as it is connected, and look for others.

        :raises InvalidSetting: there are some.
        """
        await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", [_KEY_LOCK, self._key_number])
        row = await (await connection.execute(_OTHER_KEYS, [_KEY_LOCK, self._key_number])).fetchone()
        if row is not None and row[0]:
            raise InvalidSetting(name="hub_key_file", value="(not shown)", source="the settings", why=(
                "other hubs that run on the same registry have another key. Give all of them the same key, by "
                "KACHERY_HUB_KEY_FILE or as the file hub-key in their directories"))

    async def _write_for_ever(self, working: psycopg.AsyncConnection[Any]) -> None:
        while True:
            await self._wake.wait()
            bodies, size_bytes = [], 0
            for event in self._waiting:
                bodies.append(event)
                size_bytes += len(event)
                if len(bodies) == _BATCH_EVENTS_MAX or size_bytes > _BATCH_SIZE_BYTES_MAX:
                    break
            if bodies:
                await working.execute(_WRITE, {
                    "hub": self.hub, "first": self._sent + 1, "last": self._sent + len(bodies), "bodies": bodies,
                    "time": int(self._clock() * 1000), "channel": _CHANNEL})
                # Only now: after a failure they are written again, under the same numbers.
                self._sent += len(bodies)
                self._waiting_size_bytes -= size_bytes
                for _ in bodies:
                    self._waiting.popleft()
            if not self._waiting:
                self._wake.clear()

    async def _beat_for_ever(self, working: psycopg.AsyncConnection[Any]) -> None:
        while True:
            await working.execute("SELECT pg_notify(%s, %s)", [_CHANNEL, self.hub])
            await working.execute("DELETE FROM relayed WHERE time < %s", [int((self._clock() - KEPT_SECONDS) * 1000)])
            await asyncio.sleep(_BEAT_SECONDS)
            if asyncio.get_running_loop().time() - self._heard_seconds > _SILENCE_SECONDS:
                raise asyncio.TimeoutError("nothing was heard for too long")

    async def _listen(self, listening: psycopg.AsyncConnection[Any], working: psycopg.AsyncConnection[Any]) -> None:
        async for notice in listening.notifies():
            self._heard_seconds = asyncio.get_running_loop().time()
            hub, *numbers = notice.payload.split(" ")
            if hub != self.hub and len(numbers) == 2:
                first, last = map(int, numbers)
                # What one that is new to us wrote before is not for us: it was read at the start, or is older.
                self._read.setdefault(hub, first - 1)
                await self._catch_up(working, hub, last)

    async def _catch_up(self, working: psycopg.AsyncConnection[Any], hub: str, last: int) -> None:
        """Read what a process has written up to a number."""
        while self._read[hub] < last:
            rows = await (await working.execute(_READ, [hub, self._read[hub], _READ_AT_ONCE])).fetchall()
            for number, body in rows:
                if number != self._read[hub] + 1:
                    self._lose()
                self._read[hub] = number
                try:
                    self._receive(bytes(body))
                except Exception:  # the next one may be better
                    _log.exception("an event of another hub failed")
            if not rows:  # gone already
                self._lose()
                self._read[hub] = last

    def _lose(self) -> None:
        _log.warning("events of other hubs were missed; all connections to the broker are begun anew")
        self._lost()


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
