"""How the size and the chunks of a file become known: from the bucket, or from a manifest that a node has offered."""

from __future__ import annotations

from ..errors import CorruptFile, KacheryError, ManifestInvalid
from .asking import Asking, RequestLimits
from .bodies import Offer
from .inquiry import Inquiry
from .manifest import CHUNK_SIZE_BYTES_MAX
from .providers import ProviderPool
from .request_events import Locate, Located, LocatedAbsent, LocateEvent

__all__ = ["Locating"]

_EMPTY_SHA1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709"


class Locating:
    """The search for the cut of one file.

    ``manifest_sha1`` is the manifest that is looked for, or was found; None: the file as one object.
    """

    def __init__(self, sha1: str, manifest_sha1: str | None, pool: ProviderPool, asking: Asking, inquiry: Inquiry,
                 limits: RequestLimits) -> None:
        self.manifest_sha1 = manifest_sha1
        self.object_absent = False
        self.retry_at: float | None = None
        self._sha1 = sha1
        self._uri_manifest_sha1 = manifest_sha1
        self._pool = pool
        self._asking = asking
        self._inquiry = inquiry
        self._limits = limits
        self._looking = False
        self._failures = 0
        self._announced_by: str | None = None

    @property
    def busy(self) -> bool:
        """Whether the bucket is being looked at, or soon will be again."""
        return self._looking or self.retry_at is not None

    def look(self) -> Locate:
        """Look in the bucket."""
        self._looking, self.retry_at = True, None
        return Locate(self.manifest_sha1, announced=self._announced_by is not None)

    def is_sane(self, offer: Offer) -> bool:
        """Whether an offer can be of this file at all."""
        return offer.sha1 == self._sha1 and (offer.size > 0 if offer.manifest is not None
                                             else self._fits_one_piece(offer.size))

    def announced(self, node_id: str) -> Locate:
        """That node says that the manifest is in the bucket."""
        self._announced_by = node_id
        return self.look()

    def handle(self, event: LocateEvent, now: float) -> Located | None:
        """Take the bucket's answer; return it when it settles the cut.

        :raises CorruptFile: the manifest that the URI names is another file's.
        :raises KacheryError: the bucket failed, and there is no more patience with it.
        """
        if not self._looking:
            return None
        self._looking = False
        if isinstance(event, Located):
            self._failures = 0
            return self._judge(event)
        if isinstance(event, LocatedAbsent):
            self._failures = 0
            self._absent(now)
        else:
            self._failed(event.error, now)
        return None

    def refuse(self, error: KacheryError) -> None:
        """The manifest is not this file's, or no manifest. One that was offered is given up.

        :raises KacheryError: ``error``, when it is the manifest that the URI names.
        """
        if self.manifest_sha1 == self._uri_manifest_sha1:
            raise error
        self._pool.refuse_manifest(self.manifest_sha1, "offered a manifest that does not make this file")
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what was found."""
        self.manifest_sha1, self._announced_by = self._uri_manifest_sha1, None

    def choose(self) -> Offer | None:
        """Choose an offer to go by: of the manifest that the URI names where there is one."""
        return self._pool.choose_cut(self._uri_manifest_sha1)

    def _judge(self, event: Located) -> Located | None:
        if event.manifest is not None and event.manifest.sha1 != self._sha1:
            self.refuse(CorruptFile(path=f"the manifest {event.manifest_sha1}", found=event.manifest.sha1,
                                    sha1=self._sha1,
                                    advice="The URI puts together a file and another file's manifest."))
            return None
        if event.manifest is None and not self._fits_one_piece(event.size):
            self._inquiry.bucket = f"has one object of {event.size} bytes, which cannot be loaded as it is"
            return None
        return event

    def _absent(self, now: float) -> None:
        if self._announced_by is not None and self._asking.moved_lately(now):
            self._announced_by = None  # it may have put it into the bucket that the channel has left
        elif self._announced_by is not None:
            self._pool.strike(self._announced_by, "announced its manifest, which the bucket does not have")
            self._announced_by = None
        else:
            self._inquiry.bucket = "does not have it"
            self.object_absent = self.manifest_sha1 is None

    def _failed(self, error: KacheryError, now: float) -> None:
        if isinstance(error, ManifestInvalid):
            self.refuse(error)
            return
        self._inquiry.bucket = error.message
        if not self._asking.bears(error, now):
            raise error
        self._failures += 1
        pause = self._limits.retry_base_seconds * 2.0 ** min(self._failures, 16)
        self.retry_at = now + min(pause, self._limits.retry_cap_seconds)

    def _fits_one_piece(self, size: int) -> bool:
        return 0 < size <= CHUNK_SIZE_BYTES_MAX or (size == 0 and self._sha1 == _EMPTY_SHA1)
