"""Buckets of Google Cloud Storage.

Nodes get V4-signed URLs of its XML API. A PUT is signed with its length (``x-goog-content-length-range``), to create
and not to replace (``x-goog-if-generation-match: 0``), and with the CRC-32C that a node tells, which Google compares;
a long object by a POST that begins a resumable session. What the hub itself does goes by google-cloud-storage where
there is a service account, and else by the XML API too.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from ..._checksum import crc32c
from ...errors import EngineUnusable
from ..outbound import Outbound
from . import ObjectRecord, SignedUrl
from .gcs_settings import GcsCredentials, GcsSettings
from .gcs_signing import GcsSigner
from .xml_answers import GCS_ADVICE
from .xml_bucket import PAGE_MAX, XmlBucket

if TYPE_CHECKING:
    from .gcs_library import GcsLibrary

__all__ = ["GcsBucket"]


class GcsBucket(XmlBucket):
    """A ``BucketEngine`` over a bucket of Google's. Its other arguments are those of ``XmlBucket``.

    :param single_size_bytes_max: a longer object is uploaded in a resumable session, which costs a request more.
    """

    advice = GCS_ADVICE
    tag_header = "x-goog-generation"

    def __init__(
        self, settings: GcsSettings, credentials: GcsCredentials, outbound: Outbound, counter: Executor,
        clock: Callable[[], float], single_size_bytes_max: int,
    ) -> None:
        name = f"The bucket {settings.bucket!r} at {settings.endpoint or 'Google Cloud Storage'}"
        super().__init__(settings.bucket_url, settings.prefix, name, outbound, counter, clock)
        self._settings = settings
        self._credentials = credentials
        self._single_size_bytes_max = single_size_bytes_max
        self._signer = GcsSigner(credentials, clock)
        self._making = threading.Lock()
        self._made: GcsLibrary | None = None

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False, node_id: str = "",
        crc32c: int | None = None,
    ) -> SignedUrl:
        """See ``BucketEngine``. A node that tells no CRC-32C is of a version that knows no sessions either."""
        resumable = crc32c is not None and size_bytes > self._single_size_bytes_max
        return self._sign_upload(object_name, size_bytes, life_seconds, replace, crc32c, resumable=resumable)

    def sign_whole(self, object_name: str, data: bytes, life_seconds: float, *, replace: bool) -> SignedUrl:
        """See ``XmlBucket``."""
        return self._sign_upload(object_name, len(data), life_seconds, replace, crc32c(data), resumable=False)

    def _sign_upload(
        self, object_name: str, size_bytes: int, life_seconds: float, replace: bool, crc32c: int | None, *,
        resumable: bool,
    ) -> SignedUrl:
        headers = {"x-goog-content-length-range": f"{size_bytes},{size_bytes}"}
        if not replace:
            headers["x-goog-if-generation-match"] = "0"
        if crc32c is not None:
            headers["x-goog-hash"] = f"crc32c={base64.b64encode(crc32c.to_bytes(4, 'big')).decode()}"
        if resumable:
            headers["x-goog-resumable"] = "start"
        url = self.signed_url("POST" if resumable else "PUT", self.url(object_name), int(life_seconds), headers)
        return SignedUrl(url, headers, resumable)

    def signed_url(self, method: str, url: str, life_seconds: int, headers: Mapping[str, str] | None = None,
                   query: Mapping[str, str] | None = None) -> str:
        """See ``XmlBucket``."""
        return self._signer.sign(method, url, life_seconds, headers, query)

    def if_same(self, tag: str) -> dict[str, str]:
        """See ``XmlBucket``."""
        return {"x-goog-if-generation-match": tag}

    def pages(self, prefix: str, after: str = "", size: int = PAGE_MAX) -> Iterator[list[ObjectRecord]]:
        """See ``XmlBucket``."""
        library = self._library()
        if library is None:
            yield from super().pages(prefix, after, size)
            return
        cut = len(self.key(""))
        for page in library.pages(self.key(prefix), self.key(after) if after else "", size):
            yield [found._replace(name=found.name[cut:]) for found in page]

    def remove(self, object_name: str, *, etag: str | None = None) -> bool:
        """See ``BucketEngine``. Google itself compares the generation."""
        library = self._library()
        if library is None:
            return super().remove(object_name, etag=etag)
        removed = library.remove(self.key(object_name), etag)
        if removed:
            self.counts.removed(object_name)
        return removed

    def remove_all(self, page: list[ObjectRecord]) -> None:
        """See ``XmlBucket``."""
        library = self._library()
        if library is not None:
            library.remove_all([self.key(found.name) for found in page])
            return
        for found in page:
            self.check(self.ask("DELETE", self.url(found.name)), 204, 200, 404)

    def set_up(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What there is to be set for the whole bucket: what it is, and what does it, which may raise."""
        library = self._library()
        if library is None:
            raise EngineUnusable(what=self.name, why="the hub has no key of a service account for it",
                                 advice="An HMAC key can only read and write objects: set rules at Google yourself.")
        yield "let browsers read (CORS)", library.allow_browsers
        if self._settings.expire_days:
            yield f"remove objects of {self._settings.expire_days} days (lifecycle)", library.expire

    def _library(self) -> GcsLibrary | None:
        """The library, which takes a second to load, made when it is first wanted; None without a service account."""
        if not self._credentials.private_key:
            return None
        with self._making:
            if self._made is None:
                from .gcs_library import GcsLibrary

                self._made = GcsLibrary(self._settings, self._credentials, self.outbound, self.name)
            return self._made
