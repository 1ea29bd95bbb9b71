"""Signed upload URLs a second, on one core: ours beside those of the services' own libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.store_server import BUCKET

from benchmarks.measure import Figure, figure, pairs, rate
from benchmarks.objects import CHUNK_SIZE_BYTES, object_names
from benchmarks.stores import by_account, by_hmac_key, s3_bucket, s3_client
from kachery_fast.hub.engines import SignedUrl
from kachery_fast.hub.engines.gcs import GcsBucket

__all__ = ["sign_gcs", "sign_gcs_hmac", "sign_s3"]

LIFE_SECONDS = 3600
CRC32C = 0xE3069283
[OBJECT] = object_names(1)


def sign_s3(directory: Path, urls: int = 1000, count: int = 7) -> Figure:
    """URLs of S3, beside botocore's client."""
    endpoint = "https://s3.example.org"
    bucket, client = s3_bucket(endpoint), s3_client(endpoint)
    asked = {"Bucket": BUCKET, "Key": OBJECT, "ContentLength": CHUNK_SIZE_BYTES, "IfNoneMatch": "*"}
    return _signing("S3 / botocore", lambda: bucket.sign_put(OBJECT, CHUNK_SIZE_BYTES, LIFE_SECONDS).url,
                    lambda: str(client.generate_presigned_url("put_object", asked, LIFE_SECONDS)), urls, count)


def sign_gcs(directory: Path, urls: int = 200, count: int = 7) -> Figure:
    """URLs of Google by a service account's key, beside google-cloud-storage."""
    from tests.google import google_client

    bucket, blob = by_account(), google_client().bucket(BUCKET).blob(OBJECT)
    headers = _put(bucket).headers
    return _signing("Google, RSA / google-cloud-storage", lambda: _put(bucket).url,
                    lambda: str(blob.generate_signed_url(LIFE_SECONDS, method="PUT", headers=headers, version="v4")),
                    urls, count, bar=">= 0.9")


def sign_gcs_hmac(directory: Path, urls: int = 1000, count: int = 7) -> Figure:
    """URLs of Google by an HMAC key, beside botocore, for which such keys are made: Google's library takes none."""
    bucket, client = by_hmac_key(), s3_client("https://storage.googleapis.com", region="auto")
    asked = {"Bucket": BUCKET, "Key": OBJECT, "ContentLength": CHUNK_SIZE_BYTES}
    return _signing("Google, HMAC / botocore", lambda: _put(bucket).url,
                    lambda: str(client.generate_presigned_url("put_object", asked, LIFE_SECONDS)), urls, count,
                    same=False)


def _put(bucket: GcsBucket) -> SignedUrl:
    return bucket.sign_put(OBJECT, CHUNK_SIZE_BYTES, LIFE_SECONDS, crc32c=CRC32C)


def _signing(who: str, ours: Callable[[], str], theirs: Callable[[], str], urls: int, count: int, *,
             bar: str = ">= 1.0", same: bool = True) -> Figure:
    """:param same: both give the same URL within the same second."""
    if same and not any(ours() == theirs() for _ in range(10)):
        raise AssertionError(f"the URLs differ: {ours()} {theirs()}")

    def many(sign: Callable[[], str]) -> Callable[[], float]:
        return rate(lambda: [sign() for _ in range(urls)], urls)

    note = f"{urls} upload URLs, one thread; {'the same to the byte' if same else 'each as its service documents it'}"
    return figure(f"signed URLs of {who}", pairs(many(ours), many(theirs), count), unit="1/s", bar=bar, note=note)
