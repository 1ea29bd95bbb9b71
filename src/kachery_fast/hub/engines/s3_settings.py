"""What an owner says of a bucket that speaks S3: where it is, and how it behaves."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

from ...errors import InvalidArgument
from ..outbound import check_endpoint, shown

__all__ = ["S3", "S3Credentials", "S3Settings", "check_credentials", "check_prefix", "check_settings"]

S3 = "s3"

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_REGION = re.compile(r"[a-z0-9-]{1,40}")
_PREFIX = re.compile(r"(?!.*(^|/)\.{1,2}(/|$))[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_KEY = re.compile(r"[!-~]{1,300}")


class S3Settings(msgspec.Struct, frozen=True, rename="camel"):
    """A bucket. ``endpoint``: the server's address, "" for Amazon's. ``prefix``: before the names of all objects.
    ``path_style``: the bucket is named in the path of URLs, and not in the host's name. ``public_reads``: everybody may
    read there who knows a name. ``create_only``: the store heeds ``If-None-Match: *``, and so never replaces a file."""

    bucket: str
    endpoint: str = ""
    region: str = ""
    prefix: str = ""
    path_style: bool = False
    public_reads: bool = False
    create_only: bool = True

    @property
    def url_base(self) -> str:
        """The base of object URLs."""
        return self.bucket_url + (f"/{self.prefix}" if self.prefix else "")

    @property
    def bucket_url(self) -> str:
        """The bucket's URL, without a slash at its end, but with a path where it has one."""
        domain = "amazonaws.com.cn" if self.region.startswith("cn-") else "amazonaws.com"
        parts = urlsplit(self.endpoint or f"https://s3.{self.region}.{domain}")
        if self.path_style:
            return f"{parts.scheme}://{parts.netloc}/{self.bucket}"
        return f"{parts.scheme}://{self.bucket}.{parts.netloc}"


class S3Credentials(msgspec.Struct, frozen=True):
    """An access key. Kept in the vault only; it has no text form."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "S3Credentials(…)"


def check_settings(settings: S3Settings) -> S3Settings:
    """Return the settings, complete. :raises InvalidArgument: one cannot be."""
    if _BUCKET.fullmatch(settings.bucket) is None or ".." in settings.bucket:
        raise InvalidArgument(what=f"{shown(settings.bucket.encode())!r} cannot be the name of a bucket.")
    endpoint = check_endpoint(settings.endpoint) if settings.endpoint else ""
    region = settings.region or ("us-east-1" if endpoint else "")
    if not region:
        raise InvalidArgument(what="Name the region of the bucket, such as eu-central-1.")
    if _REGION.fullmatch(region) is None:
        raise InvalidArgument(what=f"{shown(region.encode())!r} cannot be a region. One looks like eu-central-1.")
    prefix = check_prefix(settings.prefix)
    # The certificate of Amazon's names covers one label before it; an address has no names before it.
    path_style = settings.path_style or "." in settings.bucket
    return msgspec.structs.replace(settings, endpoint=endpoint, region=region, prefix=prefix, path_style=path_style)


def check_prefix(text: str) -> str:
    """Return what stands before the names of all objects, without slashes around it. :raises InvalidArgument: it
    cannot be."""
    prefix = text.strip("/")
    if len(prefix) > 200 or (prefix and _PREFIX.fullmatch(prefix) is None):
        raise InvalidArgument(what="A prefix is made of letters, digits, dots, dashes, underscores and slashes.")
    return prefix


def check_credentials(access_key: str, secret_key: str) -> S3Credentials:
    """Return credentials. :raises InvalidArgument: they cannot be; the error does not show them."""
    if _KEY.fullmatch(access_key) is None or _KEY.fullmatch(secret_key) is None:
        raise InvalidArgument(what="An access key and its secret are up to 300 characters each, without spaces.")
    return S3Credentials(access_key, secret_key)
