"""Signed URLs of Google Cloud Storage: its V4 signing process, by an RSA or an HMAC key, at a time that is given.

Both keys sign the same canonical request; the URLs of an RSA key are those of google-cloud-storage to the byte. That
library has no HMAC keys, and takes the time from the machine's clock. See Google's "V4 signing process with your own
program" and "Canonical requests".
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote, urlsplit

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .gcs_settings import GcsCredentials

__all__ = ["GcsSigner"]


class GcsSigner:
    """Signs by the HMAC key where there is one, as that is faster; else by the service account's.

    :param clock: seconds since the epoch.
    """

    def __init__(self, credentials: GcsCredentials, clock: Callable[[], float]) -> None:
        self._credentials = credentials
        self._clock = clock
        self._account = credentials.access_key or credentials.client_email
        self._key: RSAPrivateKey | None = None
        if not credentials.access_key:
            key = load_pem_private_key(credentials.private_key.encode(), None)
            assert isinstance(key, RSAPrivateKey), "it was looked at before it was kept"
            self._key = key

    def sign(self, method: str, url: str, life_seconds: int, headers: Mapping[str, str] | None = None,
             query: Mapping[str, str] | None = None) -> str:
        """Return ``url`` signed for a method, with these headers (their names in lower case) and what it asks for."""
        parts = urlsplit(url)
        at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock()))
        scope = f"{at[:8]}/auto/storage/goog4_request"
        algorithm = "GOOG4-HMAC-SHA256" if self._key is None else "GOOG4-RSA-SHA256"
        named = sorted({"host": parts.netloc, **(headers or {})}.items())
        signed = ";".join(name for name, _ in named)
        asked = "&".join(sorted(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in {
            **(query or {}), "X-Goog-Algorithm": algorithm, "X-Goog-Credential": f"{self._account}/{scope}",
            "X-Goog-Date": at, "X-Goog-Expires": str(life_seconds), "X-Goog-SignedHeaders": signed}.items()))
        canonical = "\n".join([method, parts.path, asked, *(f"{name}:{value}" for name, value in named), "", signed,
                               "UNSIGNED-PAYLOAD"])
        text = "\n".join([algorithm, at, scope, hashlib.sha256(canonical.encode()).hexdigest()]).encode()
        return f"{url}?{asked}&X-Goog-Signature={self._signature(text, scope).hex()}"

    def _signature(self, text: bytes, scope: str) -> bytes:
        if self._key is not None:
            return self._key.sign(text, PKCS1v15(), SHA256())
        key = b"GOOG4" + self._credentials.secret_key.encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, text, "sha256")
