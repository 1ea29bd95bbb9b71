"""An upload that goes on where it broke off: a resumable session of Google Cloud Storage.

A POST to a signed URL begins a session and returns its address. The bytes are PUT there, all of what is left at once,
as Google advises; after a break the session is asked how far it got. It takes one range after the other, so there is
nothing to gain from several at once. See Google's "Performing resumable uploads", for the XML API.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol
from urllib.parse import urlsplit

from ..errors import BucketUnreachable, KacheryError, Stalled, UploadRefused
from .http1 import Progress
from .plain import Response

__all__ = ["put_resumable"]

_RANGE = re.compile(r"bytes=0-(\d{1,18})")
_DONE = (200, 201)
_INCOMPLETE = 308
# The session has ended, or was lost.
_GONE = (404, 410)

Send = Callable[[str, int, dict[str, str], Progress | None], Awaitable[Response]]
"""Sends the bytes from one on: (URL, their first one's number, headers, progress)."""


class _Client(Protocol):
    async def send_small(self, url: str, data: bytes, *, headers: Mapping[str, str] | None = None,
                         method: str = "PUT") -> Response:
        """As of ``RangeClient``."""


class _Tries(Protocol):
    count: int

    async def failed(self, error: KacheryError, **details: object) -> None:
        """Wait, or raise."""

    async def answered(self, answer: Response, action: str) -> None:
        """Wait, or raise what an answer means."""


async def put_resumable(
    client: _Client, url: str, headers: dict[str, str], size_bytes: int, tries: _Tries, progress: Progress | None,
    send: Send,
) -> bool:
    """Upload an object in a session; False when there was one already.

    :param url: signed, for the POST that begins a session, with ``headers``. :param tries: those of this upload; only
        tries in a row that bring nothing are counted.
    :raises UrlExpired: the URL must be signed anew. :raises UploadRefused: the bucket does not want it.
    :raises FileChanged: the file ends too early. :raises Stalled, BucketUnreachable: after all tries.
    """
    upload = _Upload(client, url, headers, size_bytes, tries, progress, send)
    while True:
        try:
            answer = await upload.go_on()
        except (Stalled, BucketUnreachable) as error:
            await tries.failed(error)
            continue
        if answer is None:
            continue
        if answer.status in _DONE:
            upload.tell(size_bytes)
            return True
        if answer.status == 412:
            upload.tell(0)
            return False
        await tries.answered(answer, "the upload")


class _Upload:
    """One upload. ``session``: its address, "" before it began; ``at``: how far it got; None: that must be asked."""

    def __init__(
        self, client: _Client, url: str, headers: dict[str, str], size_bytes: int, tries: _Tries,
        progress: Progress | None, send: Send,
    ) -> None:
        self._client = client
        self._url = url
        self._headers = headers
        self._size_bytes = size_bytes
        self._tries = tries
        self._progress = progress
        self._send = send
        self._session = ""
        self._at: int | None = 0
        self._best = 0
        self._told = 0

    async def go_on(self) -> Response | None:
        """Take the next step; return what was answered, None when there is another step to take at once.

        :raises Stalled, BucketUnreachable: there was no answer. :raises UploadRefused: the session is elsewhere.
        """
        if not self._session:
            return await self._begin()
        total, at = self._size_bytes, self._at
        if at is None:
            answer = await self._client.send_small(self._session, b"", headers={"content-range": f"bytes */{total}"})
        else:
            self._at = None  # whatever comes of it
            span = f"bytes {at}-{total - 1}/{total}" if at < total else f"bytes */{total}"
            # The bytes' hash goes with the last of them, too.
            headers = {name: value for name, value in self._headers.items() if name == "x-goog-hash"}
            answer = await self._send(self._session, at, {**headers, "content-range": span}, self._moved)
        if answer.status in _GONE:
            self._session = ""
            self.tell(0)
            await self._tries.failed(BucketUnreachable(
                object=urlsplit(self._url).path, why="the bucket has lost the upload", attempts=1))
            return None
        if answer.status != _INCOMPLETE:
            return answer
        found = _RANGE.fullmatch(answer.headers.get("range", ""))
        self._at = min(int(found[1]) + 1, total) if found else 0
        self.tell(self._at)
        if self._at > self._best:
            self._best, self._tries.count = self._at, 0
        elif at is not None:  # it took nothing of what was sent
            await self._tries.failed(BucketUnreachable(
                object=urlsplit(self._url).path, why="the bucket takes no more bytes", attempts=1))
        return None

    async def _begin(self) -> Response | None:
        answer = await self._client.send_small(self._url, b"", headers=self._headers, method="POST")
        if answer.status not in _DONE:
            return answer
        session = answer.headers.get("location", "")
        if urlsplit(session)[:2] != urlsplit(self._url)[:2]:
            raise UploadRefused(action="the upload", object=urlsplit(self._url).path, status=answer.status,
                                why="it points elsewhere, and redirects are not followed")
        self._session, self._at = session, 0
        return None

    def tell(self, at: int) -> None:
        """Report that so many bytes, and no more, have arrived."""
        if at != self._told:
            self._moved(at - self._told)

    def _moved(self, count: int) -> None:
        self._told += count
        if self._progress is not None:
            self._progress(count)
