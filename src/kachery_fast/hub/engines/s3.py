"""Buckets that speak S3: Amazon's, MinIO, Ceph, Cloudflare R2 and others.

URLs are presigned (AWS Signature Version 4, query parameters) by botocore's signer, without its client: that one reads
its description of the service for a quarter of a second, and connects where it is told. What the hub itself does in a
bucket goes by such URLs too, over ``Outbound``. A PUT is signed with its exact length, and with ``If-None-Match: *``.

The hub does not see what moves: what there is is counted by listing it, and nothing is known of reads.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from datetime import datetime
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode
from xml.sax.saxutils import escape

from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from ...errors import EngineUnusable, KacheryError, ObjectMissing
from ...protocol.manifest import CHUNK_SIZE_BYTES_MAX
from ..outbound import Outbound, Reply, shown
from . import BucketTotals, KindTotal, ObjectRecord, SignedRead, SignedUrl
from .s3_answers import advice_for, code_of, refusal_of
from .s3_settings import S3Credentials, S3Settings

__all__ = ["RECOUNT_SECONDS", "S3Bucket"]

_log = logging.getLogger("kachery_fast.hub")

RECOUNT_SECONDS = 600.0
# What the hub asks for itself, it asks for at once.
_OWN_LIFE_SECONDS = 60
_PAGE = 1000
_PAGES_MAX = 10_000
_KINDS = ("feeds", "sha1", "task_results")


class _Counted(NamedTuple):
    totals: BucketTotals
    at: float


class S3Bucket:
    """A ``BucketEngine`` over a bucket that speaks S3.

    :param counter: runs what counts objects. :param clock: seconds since the epoch.
    """

    watched = False

    def __init__(
        self, settings: S3Settings, credentials: S3Credentials, outbound: Outbound, counter: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._credentials = Credentials(credentials.access_key, credentials.secret_key)
        self._outbound = outbound
        self._counter = counter
        self._clock = clock
        self._lock = threading.Lock()
        self._counted: dict[str, _Counted] = {}
        self._counting: set[str] = set()
        self.url_base = settings.url_base

    # --- signing

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False, node_id: str = ""
    ) -> SignedUrl:
        """See ``BucketEngine``. The length is signed too; whoever sends the object sends it in any case."""
        headers = {} if replace or not self._settings.create_only else {"if-none-match": "*"}
        signed = {"content-length": str(size_bytes), **headers}
        return SignedUrl(self._sign("PUT", self._url(object_name), int(life_seconds), signed), headers)

    def sign_get(self, object_name: str, life_seconds: float, *, head: bool = False) -> SignedRead:
        """See ``BucketEngine``."""
        url = self._sign("HEAD" if head else "GET", self._url(object_name), int(life_seconds))
        return SignedRead(url, (int(self._clock()) + int(life_seconds)) * 1000)

    def _sign(self, method: str, url: str, life_seconds: int, headers: dict[str, str] | None = None) -> str:
        request = AWSRequest(method=method, url=url, headers=headers or {})
        signer = _Signer(self._credentials, "s3", self._settings.region, expires=life_seconds)
        return signer.presign(request, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock())))

    def _url(self, object_name: str) -> str:
        return f"{self.url_base}/{quote(object_name, safe='/-_.~')}"

    # --- objects

    def totals(self, channel: str) -> BucketTotals:
        """See ``BucketEngine``: what the last count came to, which another one follows when it is old."""
        with self._lock:
            counted = self._counted.get(channel)
            if (counted is None or self._clock() - counted.at >= RECOUNT_SECONDS) and channel not in self._counting:
                self._counting.add(channel)
                self._counter.submit(self._count, channel)
        return counted.totals if counted is not None else BucketTotals(dict.fromkeys(_KINDS, KindTotal()), False)

    def _count(self, channel: str) -> None:
        at = self._clock()
        kinds = dict.fromkeys(_KINDS, KindTotal())
        try:
            for found in self._all(f"{channel}/"):
                kind = found.name.split("/", 2)[1]
                before = kinds.get(kind, KindTotal())
                kinds[kind] = KindTotal(before.objects + 1, before.size_bytes + found.size_bytes)
        except KacheryError as error:
            _log.warning("channel %s: what is in its bucket could not be counted: %s", channel, error)
        except Exception:
            _log.exception("channel %s: what is in its bucket could not be counted", channel)
        else:
            with self._lock:
                self._counted[channel] = _Counted(BucketTotals(kinds, True), at)
        finally:
            with self._lock:
                self._counting.discard(channel)

    def size(self, object_name: str) -> int | None:
        """See ``BucketEngine``."""
        reply = self._ask("HEAD", self._url(object_name))
        if reply.status == 404:
            return None
        self._check(reply, 200)
        return _number(reply.headers.get("content-length", ""))

    def objects(self, channel: str, *, kind: str = "", after: str = "", limit: int) -> list[ObjectRecord]:
        """See ``BucketEngine``."""
        found: list[ObjectRecord] = []
        for page in self._pages(f"{channel}/{kind}/" if kind else f"{channel}/", after, min(limit, _PAGE)):
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
        reply = self._ask("GET", self._url(object_name), limit_bytes=limit_bytes)
        if reply.status == 404 and code_of(reply) != "NoSuchBucket":
            raise ObjectMissing(object=object_name)
        self._check(reply, 200)
        return reply.body, reply.headers.get("etag", "")

    def write(self, object_name: str, data: bytes, *, replace: bool = False) -> bool:
        """See ``BucketEngine``."""
        signed = self.sign_put(object_name, len(data), _OWN_LIFE_SECONDS, replace=replace)
        reply = self._outbound.request("PUT", signed.url, headers=signed.headers, body=data)
        if reply.status == 412:
            return False
        self._check(reply, 200, 201, 204)
        return True

    def remove(self, object_name: str, *, etag: str | None = None) -> bool:
        """See ``BucketEngine``. What is there is looked at just before: not every store compares when it removes."""
        reply = self._ask("HEAD", self._url(object_name))
        if reply.status == 404:
            return False
        self._check(reply, 200)
        if etag is not None and reply.headers.get("etag", "") != etag:
            return False
        self._check(self._ask("DELETE", self._url(object_name)), 204, 200)
        return True

    def remove_channel(self, channel: str) -> int:
        """See ``BucketEngine``: by a thousand at a time."""
        removed = 0
        for page in self._pages(f"{channel}/"):
            keys = "".join(f"<Object><Key>{escape(self._key(found.name))}</Key></Object>" for found in page)
            body = f"<Delete><Quiet>true</Quiet>{keys}</Delete>".encode()
            digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            reply = self._ask("POST", f"{self._settings.bucket_url}/?delete=", {"content-md5": digest}, body)
            self._check(reply, 200)
            if b"<Error>" in reply.body:
                raise self._unusable(reply)
            removed += len(page)
        with self._lock:
            self._counted.pop(channel, None)
        return removed

    def _all(self, prefix: str) -> Iterator[ObjectRecord]:
        for page in self._pages(prefix):
            yield from page

    def _pages(self, prefix: str, after: str = "", size: int = _PAGE) -> Iterator[list[ObjectRecord]]:
        """Objects whose names begin so, in order, page by page."""
        for _ in range(_PAGES_MAX):
            query = {"list-type": "2", "max-keys": str(size), "prefix": self._key(prefix)}
            if after:
                query["start-after"] = self._key(after)
            reply = self._ask("GET", f"{self._settings.bucket_url}/?{urlencode(query, quote_via=quote)}")
            self._check(reply, 200)
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
                name = (item.findtext("{*}Key") or "")[len(self._key("")):]
                if name.startswith(prefix) and name > after:
                    after = name
                    modified = datetime.fromisoformat((item.findtext("{*}LastModified") or "").replace("Z", "+00:00"))
                    size = _number(item.findtext("{*}Size") or "")
                    found.append(ObjectRecord(name, size, modified.timestamp(), None))
            return found, (page.findtext("{*}IsTruncated") or "") == "true"
        except (ET.ParseError, ValueError, OverflowError) as error:
            raise EngineUnusable(
                what=self._name, why=f"its list of objects cannot be read ({shown(str(error).encode())})",
                advice="Is it a server that speaks S3?") from None

    def _key(self, name: str) -> str:
        return f"{self._settings.prefix}/{name}" if self._settings.prefix else name

    # --- requests

    @property
    def _name(self) -> str:
        return f"The bucket {self._settings.bucket!r} at {self._settings.endpoint or self._settings.region}"

    def _ask(self, method: str, url: str, headers: dict[str, str] | None = None, body: bytes = b"",
             **options: Any) -> Reply:
        signed = self._sign(method, url, _OWN_LIFE_SECONDS, headers)
        return self._outbound.request(method, signed, headers=headers, body=body, **options)

    def _check(self, reply: Reply, *expected: int) -> None:
        if reply.status not in expected:
            raise self._unusable(reply)

    def _unusable(self, reply: Reply) -> EngineUnusable:
        return EngineUnusable(what=self._name, why=refusal_of(reply), advice=advice_for(reply))


class _Signer(S3SigV4QueryAuth):  # type: ignore[misc]
    """botocore's signer, at a time that is given."""

    def presign(self, request: AWSRequest, timestamp: str) -> str:
        request.context["timestamp"] = timestamp
        self._modify_request_before_signing(request)
        text = self.string_to_sign(request, self.canonical_request(request))
        self._inject_signature_to_request(request, self.signature(text, request))
        return str(request.url)


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise EngineUnusable(what="The bucket", why="it does not tell an object's size",
                             advice="Is it a server that speaks S3?")
    return int(text)
