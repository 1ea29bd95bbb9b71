"""Objects of a bucket by URL: put, get, head; what each status means; retries.

A bucket is anything with the manners of Google Cloud Storage and S3 (ARCHITECTURE §2): range GET, PUT to a signed URL
that creates (or, where it was signed so, replaces) an object, 404 missing, 403 refused, 412 exists.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import quote

from ..config import Settings
from ..errors import (
    BucketUnreachable,
    KacheryError,
    NotPermitted,
    ObjectMissing,
    PartialTransfer,
    Stalled,
    UploadRefused,
    UrlExpired,
    WrongSize,
)
from .foreign import one_line
from .ranges import Meter, Progress, RangeClient, Response
from .resumable import put_resumable
from .targets import FileSpan, Target, rest_of, size_of

__all__ = ["Bucket", "FileSpan", "HttpBucket", "ReadUrls", "SignedUpload", "Target", "check_leave"]

T = TypeVar("T")

_log = logging.getLogger("kachery_fast.net")
_PASSING = frozenset({408, 409, 421, 425, 429})
# Of S3, each with the status 400: it was changed on the way, and its sender paused for too long.
_PASSING_CODES = ("<Code>BadDigest<", "<Code>RequestTimeout<")
_REFUSED = frozenset({401, 403})
_REASON_SIZE_BYTES_MAX = 65536


class SignedUpload(NamedTuple):
    """Leave to PUT one object: its name, the signed URL, and the headers that the signature covers. ``resumable``: to
    begin a session that takes it, instead."""

    object_name: str
    url: str
    headers: dict[str, str]
    resumable: bool = False


def check_leave(upload: SignedUpload, *schemes: str) -> None:
    """A channel may get a bucket of another kind while uploads wait. :raises UrlExpired: this is leave for that."""
    if not upload.url.startswith(schemes):
        raise UrlExpired(object=upload.object_name, why="the channel has another bucket by now")


class ReadUrls(Protocol):
    """Where objects are read that not everybody may read."""

    async def url(self, object_name: str, *, head: bool, ahead: Iterable[str], refused: str) -> str | None:
        """Return the signed URL of an object; None when it needs no signature.

        :param head: for HEAD, and not for GET. :param ahead: what will be read (by GET) next, signed along with it.
        :param refused: the URL, signed or not, that the bucket did not take (any more); "" at first.
        :raises KacheryError: it cannot be had.
        """


class Bucket(Protocol):
    """What a node needs of a bucket; ``HttpBucket`` and ``memory.MemoryBucket`` have it.

    ``ahead`` of the methods that read: the names of what will be read next. It is looked at only where reads are
    signed, so that leave for many objects is asked for at once.
    """

    splices: bool
    """Whether a ``FileSpan`` is filled past this process's memory, at half the cost of a mapping (``splice``)."""

    async def get_into(self, object_name: str, target: Target, *, progress: Progress | None = None,
                       ahead: Iterable[str] = ()) -> None:
        """Receive a whole object into memory or a ``FileSpan``, which has exactly its size in bytes.

        A broken transfer goes on from the byte it reached. ``progress`` may be called from another thread, with the
        bytes received since its last call, or with a negative number when bytes are received again.

        :raises ObjectMissing, UploadRefused: 404; 401 or 403. :raises WrongSize: the object is of another size.
        :raises PartialTransfer, Stalled, BucketUnreachable: still so after ``retry_attempts_max`` tries in a row.
        :raises DiskFull, DiskError: the file of a ``FileSpan`` took no more.
        """

    async def get_small(self, object_name: str, limit_bytes: int, *, fresh: bool = False,
                        ahead: Iterable[str] = ()) -> bytes:
        """Return a small object.

        :param fresh: past any cache on the way, for objects that may be replaced.
        :raises TooLarge: it is longer than ``limit_bytes``; else as ``get_into``.
        """

    async def size(self, object_name: str, *, ahead: Iterable[str] = ()) -> int:
        """Return an object's size in bytes. :raises ObjectMissing: else as ``get_into``."""

    async def put_from(self, upload: SignedUpload, fd: int, offset: int, length: int, *,
                       progress: Progress | None = None) -> bool:
        """Upload ``length`` bytes of the open file ``fd`` from byte ``offset`` on; False when it was there already.

        :raises UrlExpired: the URL must be signed anew. :raises UploadRefused: the bucket does not want it.
        :raises FileChanged: the file ends too early. :raises Stalled, BucketUnreachable: after all tries.
        """

    async def put_bytes(self, upload: SignedUpload, data: bytes) -> bool:
        """Upload ``data``, a few MiB at most; True when it is there now, False when another object was there already.

        A PUT that was signed to replace an object never finds one there. Raises as ``put_from`` does.
        """


class HttpBucket:
    """A bucket at a base URL (``{base_url}/{object name}``).

    :param reads: asked for the URL of each read, and once more when the bucket refuses it. None: everything is public.
    :param sleep: waits for a number of seconds; :param uniform: draws the jitter, ``random.uniform``-like.
    """

    def __init__(self, base_url: str, client: RangeClient, settings: Settings, *, reads: ReadUrls | None = None,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
                 uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._base_url = base_url.rstrip("/")
        self.splices = sys.platform == "linux" and base_url.startswith("http://")
        self._client = client
        self._settings = settings
        self._reads = reads
        self._sleep = sleep
        self._uniform = uniform

    async def get_into(self, object_name: str, target: Target, *, progress: Progress | None = None,
                       ahead: Iterable[str] = ()) -> None:
        size, at = size_of(target), 0
        tries, place = _Tries(self, object_name), _Place(self, object_name, ahead)
        while True:
            url = await place.url()
            try:
                received = await self._client.receive(url, rest_of(target, at), start=at or None, total=size,
                                                      progress=progress)
            except (PartialTransfer, Stalled, BucketUnreachable) as error:
                got = int(error.details.get("received", 0))
                at += got
                if got >= self._settings.small_read_size_bytes:
                    tries.count = 0  # it moves: only tries in a row that bring nothing are counted
                    place.renewed = False
                if at == size:
                    return
                await tries.failed(error, received=at, expected=size)
                continue
            answer = received.response
            if answer.status == (206 if at else 200):
                return
            if place.renew(answer):
                continue
            if answer.status == 416:
                raise WrongSize(object=object_name, found=answer.headers.get("content-range", "fewer"), expected=size)
            if at and answer.status == 200:  # a server without ranges: from the start
                if progress is not None:
                    progress(-at)
                at = 0
            await tries.answered(answer, "the download")

    async def get_small(self, object_name: str, limit_bytes: int, *, fresh: bool = False,
                        ahead: Iterable[str] = ()) -> bytes:
        def get(url: str) -> Awaitable[Response]:
            if fresh and "?" not in url:  # as the network of 2022 did: no cache knows this URL; a signed one, none may
                url += f"?cb={secrets.token_hex(5)}"
            return self._client.get_small(url, limit_bytes)
        return (await self._small(object_name, get, _Place(self, object_name, ahead))).body

    async def size(self, object_name: str, *, ahead: Iterable[str] = ()) -> int:
        try:
            answer = await self._small(object_name, self._client.head, _Place(self, object_name, ahead, head=True))
            length: str | None = answer.headers.get("content-length")
        except UploadRefused as refused:
            length = await self._size_by_get(object_name, ahead, refused)
        if length is None or not length.isdecimal():
            raise BucketUnreachable(object=object_name, why="it does not tell the object's size", attempts=1)
        return int(length)

    async def _size_by_get(self, object_name: str, ahead: Iterable[str], refused: UploadRefused) -> str | None:
        """Ask for the first byte where HEAD was refused: no answer to HEAD says why."""
        try:
            answer = await self._small(object_name, lambda url: self._client.get_small(
                url, _REASON_SIZE_BYTES_MAX, {"range": "bytes=0-0"}), _Place(self, object_name, ahead))
        except NotPermitted:  # this node may look whether an object is there, but not read it
            raise refused from None
        return answer.headers.get("content-range", "").rpartition("/")[2] or answer.headers.get("content-length")

    async def put_from(self, upload: SignedUpload, fd: int, offset: int, length: int, *,
                       progress: Progress | None = None) -> bool:
        check_leave(upload, "http://", "https://")
        if upload.resumable:
            return await put_resumable(
                self._client, upload.url, upload.headers, length, _Tries(self, upload.object_name), progress,
                lambda url, at, headers, told: self._client.send(url, fd, offset + at, length - at, headers=headers,
                                                                 progress=told, fresh=True))
        return await self._put(upload.object_name, progress, lambda meter: self._client.send(
            upload.url, fd, offset, length, headers=upload.headers, progress=meter.told))

    async def put_bytes(self, upload: SignedUpload, data: bytes) -> bool:
        check_leave(upload, "http://", "https://")
        if upload.resumable:
            return await put_resumable(
                self._client, upload.url, upload.headers, len(data), _Tries(self, upload.object_name), None,
                lambda url, at, headers, _told: self._client.send_small(url, data[at:], headers=headers, fresh=True))
        return await self._put(upload.object_name, None, lambda _meter: self._client.send_small(
            upload.url, data, headers=upload.headers))

    async def _put(self, object_name: str, progress: Progress | None,
                   send: Callable[[Meter], Awaitable[Response]]) -> bool:
        tries = _Tries(self, object_name)
        while True:
            meter = Meter(progress)
            answer: Response | None = None
            try:
                answer = await send(meter)
            except (Stalled, BucketUnreachable) as error:
                await tries.failed(error)
            if answer is not None:
                if answer.status in (200, 201, 204):
                    return True
                if answer.status == 412:
                    return False
                await tries.answered(answer, "the upload")
            meter.undo()

    async def _small(self, object_name: str, ask: Callable[[str], Awaitable[Response]], place: _Place) -> Response:
        tries = _Tries(self, object_name)
        while True:
            url = await place.url()
            try:
                answer = await ask(url)
            except (PartialTransfer, Stalled, BucketUnreachable) as error:
                await tries.failed(error)
                continue
            if answer.status in (200, 206):
                return answer
            if place.renew(answer):
                continue
            await tries.answered(answer, "the download")

    def _url(self, object_name: str) -> str:
        return f"{self._base_url}/{quote(object_name)}"


class _Place:
    """Where one object is read. ``renewed``: whether another URL was asked for since something moved."""

    def __init__(self, bucket: HttpBucket, object_name: str, ahead: Iterable[str], *, head: bool = False) -> None:
        self.renewed = False
        self._bucket = bucket
        self._object_name = object_name
        self._ahead = ahead
        self._head = head
        self._last = self._refused = ""

    async def url(self) -> str:
        """The URL for the next try. :raises KacheryError: it is to be signed, and cannot be."""
        reads, refused, self._refused = self._bucket._reads, self._refused, ""
        signed = None
        if reads is not None:
            signed = await reads.url(self._object_name, head=self._head, ahead=self._ahead, refused=refused)
        self._last = self._bucket._url(self._object_name) if signed is None else signed
        return self._last

    def renew(self, answer: Response) -> bool:
        """Whether it is worth another try, by another URL: the channel may have become private, the leave expired."""
        if answer.status not in _REFUSED or self.renewed or self._bucket._reads is None:
            return False
        self.renewed, self._refused = True, self._last
        return True


class _Tries:
    """The tries of one operation: decides whether to wait and go on, or to raise."""

    def __init__(self, bucket: HttpBucket, object_name: str) -> None:
        self._bucket = bucket
        self._object_name = object_name
        self.count = 0

    async def failed(self, error: KacheryError, **details: object) -> None:
        """No answer: wait, or raise ``error`` under the object's name when it was the last try."""
        self.count += 1
        if self.count >= self._bucket._settings.retry_attempts_max:
            raise type(error)(**{**error.details, **details, "object": self._object_name, "attempts": self.count,
                                 "what": f"The transfer of {self._object_name}"}) from error
        await self._pause(0.0, error.message)

    async def answered(self, answer: Response, action: str) -> None:
        """An answer that is no success: raise what it means, or wait when it may pass.

        :raises ObjectMissing, UrlExpired, UploadRefused: 404; an expired signature; any other refusal.
        :raises BucketUnreachable: a passing trouble (5xx, 429 and the like) on the last try.
        """
        text = answer.body.decode("utf-8", "replace")
        why = _reason(text) or "no reason given"
        name = self._object_name
        if answer.status == 404 and action == "the download" and "NoSuchBucket" not in text:
            raise ObjectMissing(object=name)
        if answer.status in (400, 401, 403) and ("expired" in text.lower() or (action == "the upload" and not text)):
            raise UrlExpired(object=name, why=why)
        passing = answer.status >= 500 or answer.status in _PASSING or any(code in text for code in _PASSING_CODES)
        if not passing and answer.status not in (200, 206):
            if 300 <= answer.status < 400:
                why = "it points elsewhere, and redirects are not followed"
            raise UploadRefused(action=action, object=name, why=why, status=answer.status)
        self.count += 1
        if self.count >= self._bucket._settings.retry_attempts_max:
            raise BucketUnreachable(object=name, why=f"HTTP {answer.status}: {why}", attempts=self.count)
        await self._pause(_retry_after_seconds(answer.headers), f"HTTP {answer.status}")

    async def _pause(self, floor_seconds: float, why: str) -> None:
        """Exponential back-off with full jitter, and no shorter than the bucket asked for (up to twice the cap)."""
        settings = self._bucket._settings
        ceiling = min(settings.retry_cap_seconds, settings.retry_base_seconds * 2 ** (self.count - 1))
        floor_seconds = min(floor_seconds, 2 * settings.retry_cap_seconds)
        seconds = max(floor_seconds, self._bucket._uniform(0.0, ceiling))
        _log.info("%s: %s; trying again in %.1f s", self._object_name, why, seconds)
        await self._bucket._sleep(seconds)


def _reason(text: str) -> str:
    """What a bucket says: of an error of S3's or Google's (XML), its code and message; Google's details say more."""
    parts = [found[1] for name in ("Code", "Message", "Details")
             if (found := re.search(f"<{name}>([^<]*)</{name}>", text))]
    said = ": ".join([*(part.rstrip(".") for part in parts[:-1]), *parts[-1:]]) or text
    return one_line(said)


def _retry_after_seconds(headers: Mapping[str, str]) -> float:
    """RFC 9110 §10.2.3: seconds, or a date, which is read against the answer's own Date; 0.0 when absent."""
    text = headers.get("retry-after", "")
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - parsedate_to_datetime(headers["date"])).total_seconds())
    except (KeyError, TypeError, ValueError, IndexError):
        return 0.0
