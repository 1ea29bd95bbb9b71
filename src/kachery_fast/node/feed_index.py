"""Reading the index of a subfeed from the bucket, within bounds whatever somebody put there."""

from __future__ import annotations

from ..errors import TooLarge
from ..protocol.feed_segments import INDEX_SIZE_BYTES_MAX, Index, parse_index
from ..protocol.names import subfeed_object_name
from .link import ChannelLink
from .threads import in_thread
from .tools import FeedTools

__all__ = ["read_index"]

# Nearly every index is shorter: this tells of 900 segments, some 900 MB of messages.
_SHORT_SIZE_BYTES = 64 * 1024


async def read_index(link: ChannelLink, feed_id: str, subfeed: str, tools: FeedTools) -> Index:
    """Return the index of a subfeed, past caches.

    Long ones wait for each other, since somebody who put them in the place of many could otherwise fill the memory.

    :raises ObjectMissing: there is none. :raises BadMessage: it is no good. Else as ``Bucket.get_small``.
    """
    name = subfeed_object_name(link.name, feed_id, subfeed)
    try:
        return parse_index(await link.bucket.get_small(name, _SHORT_SIZE_BYTES, fresh=True))
    except TooLarge:
        async with tools.indexes:
            data = await link.bucket.get_small(name, INDEX_SIZE_BYTES_MAX, fresh=True)
            return await in_thread(tools.threads, parse_index, data)
