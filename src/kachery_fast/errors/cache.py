"""What goes wrong when files are pinned, evicted, removed and restored."""

from __future__ import annotations

from .general import InvalidArgument
from .tree import KacheryError

__all__ = [
    "CacheConfigInvalid", "CacheElsewhere", "CacheOfAnother", "FilePinned", "NotInTrash", "OnlyCopyHere",
    "StoredMeanwhile",
]


class CacheConfigInvalid(InvalidArgument):
    """{path} cannot be used: {why}. Nothing is evicted while that is so; write maxCacheSizeGiB as a number, such as
    200, or set KACHERY_CACHE_SIZE_BYTES_MAX."""


class CacheElsewhere(KacheryError):
    """Which files are cached copies, and which are pinned, is in {path}, which is for the machine of the node alone:
    {machine}. Two machines must not open it. Nothing was changed; do it there."""

    exit_code = 4
    http_status = 403


class CacheOfAnother(KacheryError):
    """Which files are cached copies, and which are pinned, is in {path}, which is for the user {owner} alone: the owner
    of the storage directory. Nothing was changed; do it as that user, who has to run the node as well."""

    exit_code = 4
    http_status = 403


class NotInTrash(KacheryError):
    """sha1://{sha1} is not in the trash of {store}. It may have been emptied; load it from a channel."""

    exit_code = 3
    http_status = 404


class FilePinned(KacheryError):
    """sha1://{sha1} is pinned, and was left where it is. Take the pin away first: kachery-fast unpin sha1://{sha1}"""

    exit_code = 9
    http_status = 409


class OnlyCopyHere(KacheryError):
    """sha1://{sha1} was stored on this machine, not fetched from a channel, so this may be the only machine that has
    it. It was left where it is; remove it all the same with --force."""

    exit_code = 9
    http_status = 409


class StoredMeanwhile(KacheryError):
    """sha1://{sha1} was stored on this machine at the moment when it was to be removed. It was left where it is; remove
    it once more if it has to go."""

    exit_code = 9
    http_status = 409
