"""Where a file's manifest, or the file as one object, is: in the local store or in a channel's bucket."""

from __future__ import annotations

import logging

from ..errors import KacheryError, ManifestInvalid, NotInStore, ObjectMissing, TooLarge
from ..protocol.manifest import MANIFEST_SIZE_BYTES_MAX, Manifest, parse_manifest
from ..protocol.names import object_name
from ..protocol.request_events import Locate, Located, LocatedAbsent, LocateEvent, LocateFailed
from ..store.files import FileStore
from .link import ChannelLink
from .threads import in_thread
from .tools import Tools

__all__ = ["locate", "report"]

log = logging.getLogger("kachery_fast.node")


async def locate(sha1: str, what: Locate, link: ChannelLink, tools: Tools) -> LocateEvent:
    """Look for the manifest of the file ``sha1``, or for it as one object; the answer is an event.

    A damaged manifest in the bucket is reported to the hub, and is as good as absent once the hub has removed it.
    """
    while True:
        bucket = link.bucket
        found = await _look(sha1, what.manifest_sha1, link, tools)
        if isinstance(found, LocatedAbsent) and what.announced:
            await link.look_again()  # who announced it may have heard first that the channel has another
        if isinstance(found, Located) or link.bucket is bucket:
            return found


async def _look(sha1: str, manifest_sha1: str | None, link: ChannelLink, tools: Tools) -> LocateEvent:
    name = object_name(link.name, manifest_sha1 or sha1)
    try:
        if manifest_sha1 is None:
            return Located(None, None, await link.bucket.size(name, ahead=(name,)))
        manifest = await in_thread(tools.disk_threads, _read_local, tools.store, manifest_sha1)
        if manifest is None:
            data = await link.bucket.get_small(name, MANIFEST_SIZE_BYTES_MAX)
            # That of a 2 TB file is 10 MB to parse.
            manifest = await in_thread(tools.disk_threads, lambda: parse_manifest(data, name=manifest_sha1))
        return Located(manifest, manifest_sha1, manifest.size)
    except ObjectMissing:
        return LocatedAbsent()
    except (ManifestInvalid, TooLarge) as error:
        if manifest_sha1 is not None and await report(link, manifest_sha1, ""):
            return LocatedAbsent()
        why = ManifestInvalid(manifest=manifest_sha1, why=error.message) if isinstance(error, TooLarge) else error
        return LocateFailed(why)
    except KacheryError as error:
        return LocateFailed(error)


async def report(link: ChannelLink, sha1: str, found: str) -> bool:
    """Show the hub a damaged object; True when it has removed it. ``found`` is the SHA-1 of its bytes, if known."""
    try:
        return await link.hub.report_corrupt(link.name, sha1, found)
    except KacheryError as error:
        log.warning("the damaged object %s could not be reported: %s", sha1, error)
        return False


def _read_local(store: FileStore, manifest_sha1: str) -> Manifest | None:
    try:
        with store.open(manifest_sha1) as file:
            return parse_manifest(file.read(MANIFEST_SIZE_BYTES_MAX + 1), name=manifest_sha1)
    except NotInStore:
        return None
    except (KacheryError, OSError) as error:
        log.warning("the local copy of the manifest %s is unusable: %s", manifest_sha1, error)
        return None
