"""What buckets with an XML API have in common: S3's, and Google's, which answers as S3 does.

The hub does there what it has to by URLs that it signs for itself, over ``Outbound``. It does not see what nodes move:
what there is is counted by listing it, and nothing is known of reads.
"""

from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from datetime import datetime
from itertools import chain
from typing import Any
from urllib.parse import quote

from ...errors import EngineUnusable, ObjectMissing
from ...protocol.manifest import CHUNK_SIZE_BYTES_MAX
from ..outbound import Outbound, Reply, shown
from . import BucketTotals, ObjectRecord, SignedRead, SignedUrl
from .counting import Counts
from .xml_answers import advice_for, code_of, refusal_of

__all__ = ["PAGE_MAX", "XmlBucket"]

# What the hub asks for itself, it asks for at once.
_OWN_LIFE_SECONDS = 60
PAGE_MAX = 1000
_PAGES_MAX = 10_000


class XmlBucket(ABC):
    """Most of a ``BucketEngine``; what differs from service to service is added by one class for each.

    :param bucket_url: the bucket's URL, without a slash at its end. :param prefix: before the names of all objects, ""
        for none. :param name: what to call it in errors. :param counter: runs what counts objects. :param clock:
        seconds since the epoch.
    """

    watched = notes_reads = False
    advice: Mapping[str, str]
    """What to do about an error, by the service's codes."""
    tag_header: str
    """The header of an answer that tells an object from any that replaces it."""

    def __init__(
        self, bucket_url: str, prefix: str, name: str, outbound: Outbound, counter: Executor,
        clock: Callable[[], float],
    ) -> None:
        self.url_base = bucket_url + (f"/{prefix}" if prefix else "")
        self.name = name
        self.outbound = outbound
        self.clock = clock
        self._bucket_url = bucket_url
        self._prefix = prefix
        self.counts = Counts(lambda start: chain.from_iterable(self.pages(start)), counter, clock)

    @abstractmethod
    def signed_url(self, method: str, url: str, life_seconds: int, headers: Mapping[str, str] | None = None,
                   query: Mapping[str, str] | None = None) -> str:
        """Sign a request. :param headers: those to be signed too, beside ``host``. :param query: what it asks for."""

    @abstractmethod
    def sign_whole(self, object_name: str, data: bytes, life_seconds: float, *, replace: bool) -> SignedUrl:
        """Sign a PUT of these bytes."""

    @abstractmethod
    def if_same(self, tag: str) -> dict[str, str]:
        """The headers by which a DELETE removes that object alone which has this tag; none where that is not heeded."""

    @abstractmethod
    def remove_all(self, page: list[ObjectRecord]) -> None:
        """Remove the objects of a page."""

    def sign_get(self, object_name: str, life_seconds: float, *, head: bool = False) -> SignedRead:
        """See ``BucketEngine``."""
        url = self.signed_url("HEAD" if head else "GET", self.url(object_name), int(life_seconds))
        return SignedRead(url, (int(self.clock()) + int(life_seconds)) * 1000)

    def url(self, object_name: str) -> str:
        """The URL of an object, not signed."""
        return f"{self.url_base}/{quote(object_name, safe='/-_.~')}"

    def key(self, object_name: str) -> str:
        """What the service calls an object."""
        return f"{self._prefix}/{object_name}" if self._prefix else object_name

    # --- objects

    def totals(self, channel: str) -> BucketTotals:
        """See ``BucketEngine``: what the last count came to, which another one follows when it is old."""
        return self.counts.totals(channel)

    def size(self, object_name: str) -> int | None:
        """See ``BucketEngine``."""
        reply = self.ask("HEAD", self.url(object_name))
        if reply.status == 404:
            return None
        self.check(reply, 200)
        return _number(reply.headers.get("content-length", ""))

    def objects(self, channel: str, *, kind: str = "", after: str = "", limit: int) -> list[ObjectRecord]:
        """See ``BucketEngine``."""
        found: list[ObjectRecord] = []
        for page in self.pages(f"{channel}/{kind}/" if kind else f"{channel}/", after, min(limit, PAGE_MAX)):
            found += page
            if len(found) >= limit:
                break
        return found[:limit]

    def expire(self, object_name: str, unread_since: float) -> bool:
        """See ``BucketEngine``: nothing is known of reads. The store's own lifecycle rules can do it."""
        return False

    def sha1(self, object_name: str) -> str:
        """See ``BucketEngine``. :raises TooLarge: it is longer than any chunk."""
        return hashlib.sha1(self.read(object_name, CHUNK_SIZE_BYTES_MAX)[0], usedforsecurity=False).hexdigest()

    def read(self, object_name: str, limit_bytes: int) -> tuple[bytes, str]:
        """See ``BucketEngine``."""
        reply = self.ask("GET", self.url(object_name), limit_bytes=limit_bytes)
        if reply.status == 404 and code_of(reply) != "NoSuchBucket":
            raise ObjectMissing(object=object_name)
        self.check(reply, 200)
        return reply.body, reply.headers.get(self.tag_header, "")

    def write(self, object_name: str, data: bytes, *, replace: bool = False) -> bool:
        """See ``BucketEngine``."""
        signed = self.sign_whole(object_name, data, _OWN_LIFE_SECONDS, replace=replace)
        reply = self.outbound.request("PUT", signed.url, headers=signed.headers, body=data)
        if reply.status == 412:
            return False
        self.check(reply, 200, 201, 204)
        return True

    def remove(self, object_name: str, *, etag: str | None = None) -> bool:
        """See ``BucketEngine``. What is there is looked at just before: not every store compares when it removes."""
        reply = self.ask("HEAD", self.url(object_name))
        if reply.status == 404:
            return False
        self.check(reply, 200)
        tag = reply.headers.get(self.tag_header, "")
        if etag is not None and tag != etag:
            return False
        reply = self.ask("DELETE", self.url(object_name), {} if etag is None else self.if_same(tag))
        if reply.status == 412 and etag is not None:
            return False
        self.check(reply, 204, 200)
        self.counts.removed(object_name)
        return True

    def remove_channel(self, channel: str) -> int:
        """See ``BucketEngine``."""
        removed = 0
        for page in self.pages(f"{channel}/"):
            self.remove_all(page)
            removed += len(page)
        self.counts.forget(channel)
        return removed

    def pages(self, prefix: str, after: str = "", size: int = PAGE_MAX) -> Iterator[list[ObjectRecord]]:
        """Objects whose names begin so, in order, page by page."""
        for _ in range(_PAGES_MAX):
            query = {"list-type": "2", "max-keys": str(size), "prefix": self.key(prefix)}
            if after:
                query["start-after"] = self.key(after)
            reply = self.ask("GET", f"{self._bucket_url}/", query=query)
            self.check(reply, 200)
            found, more = self._listed(reply, prefix, after)
            if found:
                yield found
                after = found[-1].name
            if not more or not found:
                return

    def _listed(self, reply: Reply, prefix: str, after: str) -> tuple[list[ObjectRecord], bool]:
        """Read a page of a listing: only names that were asked for, and in order, so that it ends."""
        try:
            text = reply.body.decode("utf-8")
            if "<!" in text:  # a document type could define entities that grow without bound
                raise ValueError("it has a document type")
            page = ET.fromstring(text)  # noqa: S314 - without one, it is as long as it looks
            found = []
            for item in page.iterfind("{*}Contents"):
                name = (item.findtext("{*}Key") or "")[len(self.key("")):]
                if name.startswith(prefix) and name > after:
                    after = name
                    modified = datetime.fromisoformat((item.findtext("{*}LastModified") or "").replace("Z", "+00:00"))
                    size = _number(item.findtext("{*}Size") or "")
                    found.append(ObjectRecord(name, size, modified.timestamp(), None))
            return found, (page.findtext("{*}IsTruncated") or "") == "true"
        except (ET.ParseError, ValueError, OverflowError) as error:
            raise EngineUnusable(
                what=self.name, why=f"its list of objects cannot be read ({shown(str(error).encode())})",
                advice=self.advice[""]) from None

    # --- requests

    def ask(self, method: str, url: str, headers: dict[str, str] | None = None, body: bytes = b"", *,
            query: Mapping[str, str] | None = None, **options: Any) -> Reply:
        """Send a request by a URL that is signed for it."""
        signed = self.signed_url(method, url, _OWN_LIFE_SECONDS, headers, query)
        return self.outbound.request(method, signed, headers=headers, body=body, **options)

    def check(self, reply: Reply, *expected: int) -> None:
        """:raises EngineUnusable: the answer has another status."""
        if reply.status not in expected:
            raise self.unusable(reply)

    def unusable(self, reply: Reply) -> EngineUnusable:
        """The error that an answer means."""
        return EngineUnusable(what=self.name, why=refusal_of(reply), advice=advice_for(reply, self.advice))


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise EngineUnusable(what="The bucket", why="it does not tell an object's size",
                             advice="Is its address right?")
    return int(text)
