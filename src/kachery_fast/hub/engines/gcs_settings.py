"""What an owner says of a bucket of Google Cloud Storage: where it is, and by which account it is used."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import msgspec

from ...errors import InvalidArgument
from ..outbound import check_endpoint, shown
from .s3_settings import check_prefix

__all__ = [
    "GCS", "GOOGLE_URL", "GcsCredentials", "GcsSettings", "check_gcs_credentials", "check_gcs_settings", "is_google",
]

GCS = "gcs"
GOOGLE_URL = "https://storage.googleapis.com"
EXPIRE_DAYS_MAX = 36_500

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_EMAIL = re.compile(r"[A-Za-z0-9._-]{1,100}@[A-Za-z0-9.-]{1,200}")
_KEY = re.compile(r"[!-~]{1,300}")
# Google's have 2,048; each signature by a longer one would keep the hub from everything else for longer.
_RSA_BITS = range(2048, 3073)


class GcsSettings(msgspec.Struct, frozen=True, rename="camel"):
    """A bucket. ``endpoint``: the server's address, "" for Google's. ``prefix``: before the names of all objects.
    ``public_reads``: everybody may read there who knows a name. ``expire_days``: objects below the prefix go at that
    age; 0: never."""

    bucket: str
    endpoint: str = ""
    prefix: str = ""
    public_reads: bool = False
    expire_days: int = 0

    @property
    def server_url(self) -> str:
        """The address of the server."""
        return self.endpoint or GOOGLE_URL

    @property
    def bucket_url(self) -> str:
        """The bucket's URL, without a slash at its end."""
        return f"{self.server_url}/{self.bucket}"

    @property
    def url_base(self) -> str:
        """The base of object URLs."""
        return self.bucket_url + (f"/{self.prefix}" if self.prefix else "")


class GcsCredentials(msgspec.Struct, frozen=True):
    """A service account's name and private key, or an HMAC key, or both. Kept in the vault only; no text form."""

    client_email: str = ""
    private_key: str = ""
    access_key: str = ""
    secret_key: str = ""

    def __repr__(self) -> str:
        return "GcsCredentials(…)"


class _KeyFile(msgspec.Struct):
    """Of a service account's key file. Its URLs are not read: Google's own are known, and others would be an owner's
    choice of whom the hub talks to."""

    client_email: str
    private_key: str
    type: str = ""


def check_gcs_settings(settings: GcsSettings) -> GcsSettings:
    """Return the settings, complete. :raises InvalidArgument: one cannot be."""
    if _BUCKET.fullmatch(settings.bucket) is None or ".." in settings.bucket:
        raise InvalidArgument(what=f"{shown(settings.bucket.encode())!r} cannot be the name of a bucket.")
    endpoint = check_endpoint(settings.endpoint) if settings.endpoint else ""
    prefix = check_prefix(settings.prefix)
    if not 0 <= settings.expire_days <= EXPIRE_DAYS_MAX:
        raise InvalidArgument(what=f"Objects can expire after 1 to {EXPIRE_DAYS_MAX} days.")
    if settings.expire_days and not prefix:
        raise InvalidArgument(what="Objects that are to expire need a prefix of their own: all below it goes.")
    return msgspec.structs.replace(settings, endpoint=endpoint, prefix=prefix)


def is_google(endpoint: str) -> bool:
    """Whether an address is one of Google's own."""
    parts = urlsplit(endpoint or GOOGLE_URL)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".googleapis.com") and parts.port in (None, 443)


def check_gcs_credentials(service_account: str, access_key: str, secret_key: str) -> GcsCredentials:
    """Return credentials. :param service_account: the text of its key file, "" for none.

    :raises InvalidArgument: they cannot be; the error does not show them.
    """
    hmac_key = [access_key, secret_key]
    if any(hmac_key) and any(_KEY.fullmatch(part) is None for part in hmac_key):
        raise InvalidArgument(what="An HMAC key is an access ID and a secret, of up to 300 characters, without spaces.")
    if not service_account:
        if not access_key:
            raise InvalidArgument(what="Give a service account's key, or an HMAC key, or both.")
        return GcsCredentials(access_key=access_key, secret_key=secret_key)
    try:
        found = msgspec.json.decode(service_account, type=_KeyFile)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        found = _KeyFile("", "")
    known = found.type == "service_account" and _EMAIL.fullmatch(found.client_email) is not None
    if not known or not _is_key(found.private_key):
        raise InvalidArgument(what="That is not the key of a service account: JSON, with client_email and private_key.")
    return GcsCredentials(found.client_email, found.private_key, access_key, secret_key)


def _is_key(text: str) -> bool:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(text.encode(), None)
    except (ValueError, TypeError, UnicodeError, UnsupportedAlgorithm):
        return False
    return isinstance(key, RSAPrivateKey) and key.key_size in _RSA_BITS
