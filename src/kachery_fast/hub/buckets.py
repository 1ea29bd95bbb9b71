"""Which bucket a channel has: its owner's, or the hub's own.

What a channel has is read from the registry within the transaction that decides, so that a change holds at once, also
where it was made by another hub; what was made of a row (keys opened, signers) is kept for as long as the row is so.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..config import Settings
from .engines import BucketEngine
from .engines.directory import DIRECTORY, DirectoryBucket, DirectorySettings
from .engines.gcs_settings import GCS, GcsCredentials, GcsSettings
from .engines.s3_settings import S3, S3Credentials, S3Settings
from .outbound import Outbound
from .tables import channels, engines
from .vault import Vault

__all__ = [
    "BucketPlace", "BucketSettings", "Buckets", "EngineRow", "decode_settings", "find_bucket", "find_engines",
    "rows_of",
]

_KEPT_MAX = 256
_COUNTS_AT_ONCE = 4
# Of all owners' stores together.
_STORES_AT_ONCE = 32

T = TypeVar("T")

BucketSettings = S3Settings | GcsSettings | DirectorySettings


class EngineRow(NamedTuple):
    """An engine as it is in the registry."""

    id: str
    name: str
    kind: str
    settings: str
    secret: bytes


class BucketPlace(NamedTuple):
    """What nodes are told: the base of object URLs, whether each of them is signed, whoever may read there, and whether
    the bucket compares the CRC-32C of what is uploaded."""

    url_base: str
    signed_reads: bool
    crc32c: bool = False


_SETTINGS: dict[str, type[BucketSettings]] = {S3: S3Settings, GCS: GcsSettings, DIRECTORY: DirectorySettings}


def decode_settings(kind: str, text: str) -> BucketSettings:
    """Return what a row of the registry says of a bucket."""
    return msgspec.json.decode(text, type=_SETTINGS[kind])


def find_bucket(connection: Connection, channel: str) -> EngineRow | None:
    """Return the engine of a channel's bucket, None for the hub's own; runs inside ``Registry.call``."""
    row = connection.execute(
        sa.select(*(engines.c[name] for name in EngineRow._fields))
        .select_from(channels.join(engines, channels.c.bucket == engines.c.id))
        .where(channels.c.name == channel)).first()
    return None if row is None else EngineRow(*row)


def find_engines(connection: Connection, channel: str) -> tuple[EngineRow | None, EngineRow | None]:
    """Return the engines of a channel's bucket and of its messages, each None for the hub's own; runs inside
    ``Registry.call``. One question, for most have neither."""
    ids = connection.execute(sa.select(channels.c.bucket, channels.c.pubsub).where(channels.c.name == channel)).first()
    if ids is None or not any(ids):
        return None, None
    found = rows_of(connection, filter(None, ids))
    return found.get(ids.bucket), found.get(ids.pubsub)


def rows_of(connection: Connection, ids: Iterable[str]) -> dict[str, EngineRow]:
    """Return engines, by their ids; those that are not there are left out."""
    return {row.id: EngineRow(*row) for row in connection.execute(
        sa.select(*(engines.c[name] for name in EngineRow._fields)).where(engines.c.id.in_([*ids])))}


class Buckets:
    """The buckets of one hub. Its methods may be called from any thread.

    :param own: the hub's own. :param clock: seconds since the epoch.
    """

    def __init__(self, own: BucketEngine, vault: Vault, settings: Settings, clock: Callable[[], float]) -> None:
        self.own = own
        self.vault = vault
        self.settings = settings
        self.outbound = Outbound(settings)
        self._single_size_bytes_max = settings.chunk_size_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[EngineRow, BucketEngine] = OrderedDict()
        self._counter = ThreadPoolExecutor(_COUNTS_AT_ONCE, "hub-counter")
        self._threads = ThreadPoolExecutor(_STORES_AT_ONCE, "hub-stores")

    def use(self, row: EngineRow | None) -> BucketEngine:
        """Return the bucket of a row that ``find_bucket`` returned. The first one of a kind takes a moment.

        :raises CredentialsUnreadable: they were encrypted with another key.
        """
        if row is None:
            return self.own
        with self._lock:
            found = self._kept.pop(row, None) or self._made(row)
            self._kept[row] = found
            while len(self._kept) > _KEPT_MAX:
                self._kept.popitem(last=False)
            return found

    async def run(self, work: Callable[..., T], *arguments: object, own: bool) -> T:
        """Call what blocks on a bucket in a thread: on the hub's ``own``, or on an owner's, whose store may be slow, or
        may want to be: it keeps none from anything but an owner's store."""
        return await asyncio.get_running_loop().run_in_executor(
            None if own else self._threads, partial(work, *arguments))

    def of(self, connection: Connection, channel: str) -> BucketEngine:
        """Return the bucket of a channel; runs inside ``Registry.call``. Raises as ``use`` does."""
        return self.use(find_bucket(connection, channel))

    def place(self, row: EngineRow | None) -> BucketPlace:
        """Return what nodes are told of a bucket, which takes no credentials."""
        if row is None:
            return BucketPlace(self.own.url_base, False)
        settings = decode_settings(row.kind, row.settings)
        return BucketPlace(settings.url_base, not settings.public_reads, row.kind == GCS)

    def close(self) -> None:
        """Break off what is under way."""
        self.outbound.close()
        self._counter.shutdown(cancel_futures=True)
        self._threads.shutdown(cancel_futures=True)

    def _made(self, row: EngineRow) -> BucketEngine:
        opened = self.vault.open(row.id, row.settings, row.secret, row.name)
        settings = decode_settings(row.kind, row.settings)
        if isinstance(settings, DirectorySettings):
            return DirectoryBucket(settings, self._counter, self._clock)
        if isinstance(settings, GcsSettings):
            from .engines.gcs import GcsBucket

            return GcsBucket(settings, msgspec.json.decode(opened, type=GcsCredentials), self.outbound, self._counter,
                             self._clock, self._single_size_bytes_max)
        from .engines.s3 import S3Bucket  # its signer takes a quarter of a second, and many hubs have no use for it

        return S3Bucket(settings, msgspec.json.decode(opened, type=S3Credentials), self.outbound, self._counter,
                        self._clock)
