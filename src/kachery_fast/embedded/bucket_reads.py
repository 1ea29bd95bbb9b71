"""Who may read from the embedded bucket: everybody what is on an open channel, else who has a signed URL.

A signed URL holds for one object, one method (GET, with or without a range, or HEAD) and a short life, as those that
Google Cloud Storage signs (https://cloud.google.com/storage/docs/access-control/signed-urls).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import parse_qsl

from ..errors import InvalidArgument, InvalidName, NotPermitted, UploadRefused, UrlExpired
from .bucket_names import is_object_name

__all__ = ["DownloadSigner", "ReadGate", "SignedGet"]

_QUERY = ("X-Kachery-Expires", "X-Kachery-Signature")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_METHODS = ("GET", "HEAD")


class SignedGet(NamedTuple):
    """Where to read an object, and until when: seconds since 1970."""

    url: str
    expires: int


class DownloadSigner:
    """Signs and verifies the URLs of reads by HMAC-SHA256 over method, object name and expiry.

    The text that is signed begins with the method, so that a secret shared with ``UploadSigner`` does no harm.

    :param secret: at least 16 bytes, known to the hub alone. :param clock: the time in seconds since 1970.
    """

    def __init__(self, secret: bytes, *, clock: Callable[[], float] = time.time) -> None:
        if len(secret) < 16:
            raise InvalidArgument(what="The bucket's signing secret must have at least 16 bytes.")
        self._secret = secret
        self._clock = clock

    def sign(self, object_name: str, life_seconds: float, base_url: str, *, method: str = "GET") -> SignedGet:
        """Sign reads of one object by ``method``, valid for ``life_seconds``. The object need not be there.

        :raises InvalidName: not an object's name. :raises InvalidArgument: it does not read.
        """
        if not is_object_name(object_name):
            raise InvalidName(name=object_name, kind="object", why="it is not <channel>/(sha1|feeds|task_results)/...")
        if method not in _METHODS:
            raise InvalidArgument(what=f"{method} does not read.")
        expires = int(self._clock() + life_seconds)
        values = (str(expires), self._signature(method, object_name, str(expires)))
        query = "&".join(f"{name}={value}" for name, value in zip(_QUERY, values, strict=True))
        return SignedGet(f"{base_url.rstrip('/')}/{object_name}?{query}", expires)

    def verify(self, method: str, object_name: str, query: str) -> None:
        """Check the query of a read.

        :raises UploadRefused: not signed here for this object and method. :raises UrlExpired: its life is over.
        """
        values = dict(parse_qsl(query, keep_blank_values=True))
        expires, signature = (values.get(name, "") for name in _QUERY)
        well_formed = (query.count("=") == len(_QUERY) == len(values) and _NUMBER.fullmatch(expires)
                       and signature.isascii())
        if not well_formed or not hmac.compare_digest(signature, self._signature(method, object_name, expires)):
            raise UploadRefused(action="the download", object=object_name, status=403,
                                why=f"the URL is not signed for {method} of this object and time")
        if self._clock() >= int(expires):
            raise UrlExpired(object=object_name, why=f"it expired at {expires}")

    def _signature(self, method: str, object_name: str, expires: str) -> str:
        text = "\n".join((method, object_name, expires))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


class ReadGate:
    """Lets reads of objects in, or not. Asked by every thread of the bucket, for every read; told by the hub.

    What was not said to be open is closed, so that neither a channel that is being deleted nor one that the hub has
    not heard of yet is read by strangers, and nothing tells whether there is such a channel or object.

    :param clock: seconds, monotonic.
    """

    def __init__(self, signer: DownloadSigner, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._signer = signer
        self._clock = clock
        # Replaced as a whole, so that readers need no lock.
        self._open: tuple[frozenset[str], float] = (frozenset(), 0.0)

    def open(self, channels: frozenset[str], for_seconds: float = math.inf) -> None:
        """Let everybody read what is on these channels (names in lower case) and no others, for ``for_seconds``."""
        self._open = channels, self._clock() + for_seconds

    def check(self, method: str, object_name: str, query: str) -> bool:
        """Let a read in; returns whether it needed a signature.

        :raises NotPermitted: it has none. :raises UploadRefused, UrlExpired: as ``DownloadSigner.verify``.
        """
        channel = object_name.partition("/")[0]
        channels, until = self._open
        # In lower case: on a file system that does not tell "Lab" from "lab", either is read by the other's name.
        if channel.lower() in channels and self._clock() < until:
            return False
        if not query:
            raise NotPermitted(who="Who has no signed URL", action="read", channel=channel, why="it is not public")
        self._signer.verify(method, object_name, query)
        return True
