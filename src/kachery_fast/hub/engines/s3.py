"""Buckets that speak S3: Amazon's, MinIO, Ceph, Cloudflare R2 and others.

URLs are presigned (AWS Signature Version 4, query parameters) by botocore's signer, without its client: that one reads
its description of the service for a quarter of a second, and connects where it is told. A PUT is signed with its exact
length, and with ``If-None-Match: *``.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from urllib.parse import quote, urlencode
from xml.sax.saxutils import escape

from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from ..outbound import Outbound
from . import ObjectRecord, SignedUrl
from .s3_settings import S3Credentials, S3Settings
from .xml_answers import S3_ADVICE
from .xml_bucket import XmlBucket

__all__ = ["S3Bucket"]


class S3Bucket(XmlBucket):
    """A ``BucketEngine`` over a bucket that speaks S3. Its arguments are those of ``XmlBucket``."""

    advice = S3_ADVICE
    tag_header = "etag"

    def __init__(
        self, settings: S3Settings, credentials: S3Credentials, outbound: Outbound, counter: Executor,
        clock: Callable[[], float],
    ) -> None:
        name = f"The bucket {settings.bucket!r} at {settings.endpoint or settings.region}"
        super().__init__(settings.bucket_url, settings.prefix, name, outbound, counter, clock)
        self._settings = settings
        self._credentials = Credentials(credentials.access_key, credentials.secret_key)

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False, node_id: str = "",
        crc32c: int | None = None,
    ) -> SignedUrl:
        """See ``BucketEngine``. The length is signed too; whoever sends the object sends it in any case."""
        headers = {} if replace or not self._settings.create_only else {"if-none-match": "*"}
        signed = {"content-length": str(size_bytes), **headers}
        return SignedUrl(self.signed_url("PUT", self.url(object_name), int(life_seconds), signed), headers)

    def sign_whole(self, object_name: str, data: bytes, life_seconds: float, *, replace: bool) -> SignedUrl:
        """See ``XmlBucket``."""
        return self.sign_put(object_name, len(data), life_seconds, replace=replace)

    def signed_url(self, method: str, url: str, life_seconds: int, headers: Mapping[str, str] | None = None,
                   query: Mapping[str, str] | None = None) -> str:
        """See ``XmlBucket``."""
        if query:
            url += f"?{urlencode(query, quote_via=quote)}"
        request = AWSRequest(method=method, url=url, headers=headers or {})
        signer = _Signer(self._credentials, "s3", self._settings.region, expires=life_seconds)
        return signer.presign(request, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.clock())))

    def if_same(self, tag: str) -> dict[str, str]:
        """See ``XmlBucket``: few stores compare when they remove."""
        return {}

    def remove_all(self, page: list[ObjectRecord]) -> None:
        """See ``XmlBucket``: a page's thousand objects at once."""
        keys = "".join(f"<Object><Key>{escape(self.key(found.name))}</Key></Object>" for found in page)
        body = f"<Delete><Quiet>true</Quiet>{keys}</Delete>".encode()
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        reply = self.ask("POST", f"{self._settings.bucket_url}/", {"content-md5": digest}, body, query={"delete": ""})
        self.check(reply, 200)
        if b"<Error>" in reply.body:
            raise self.unusable(reply)


class _Signer(S3SigV4QueryAuth):  # type: ignore[misc]
    """botocore's signer, at a time that is given."""

    def presign(self, request: AWSRequest, timestamp: str) -> str:
        request.context["timestamp"] = timestamp
        self._modify_request_before_signing(request)
        text = self.string_to_sign(request, self.canonical_request(request))
        self._inject_signature_to_request(request, self.signature(text, request))
        return str(request.url)
