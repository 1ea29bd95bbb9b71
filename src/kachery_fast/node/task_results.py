"""The results of tasks that this node has run, in the bucket of a channel: looked for before a run, shared after it."""

from __future__ import annotations

import asyncio
import logging

from ..config import Settings
from ..errors import (
    BucketUnreachable,
    HubError,
    HubUnreachable,
    NodeError,
    ObjectMissing,
    PartialTransfer,
    RateLimited,
    ResultRefused,
    StaleMessage,
    Stalled,
    TooLarge,
)
from ..net.bucket import SignedUpload
from ..protocol.access import Permission
from ..protocol.hub_bodies import SignedObject
from ..protocol.names import parse_file_uri, result_object_name
from ..protocol.task_events import Store
from ..protocol.tasks import RESULT_FRAME_SIZE_BYTES, check_result, result_id, sign_result
from .identity import Identity
from .link import ChannelLink
from .uploading import Uploader, crc32c_of, put_signed

__all__ = ["TaskResults"]

log = logging.getLogger("kachery_fast.node")

# Arguments and result, both bounded, with room for those of nodes with larger limits.
_RESULT_OBJECT_SIZE_BYTES_MAX = 64 * 1024 * 1024
# A bad result that is there is reported, and has gone when it is tried again.
_PUT_TRIES_MAX = 3
_PASSING = (BucketUnreachable, HubError, HubUnreachable, PartialTransfer, RateLimited, StaleMessage, Stalled)
_RETRY_SECONDS_MIN = 0.05


class TaskResults:
    """The results on one channel. :param uploader: brings the files of results into the bucket."""

    def __init__(self, link: ChannelLink, identity: Identity, settings: Settings, uploader: Uploader) -> None:
        self._link = link
        self._identity = identity
        self._uploader = uploader
        self._size_bytes_max = settings.task_result_size_bytes_max
        self._patience_seconds = settings.patience_seconds
        self._retry_base_seconds = max(settings.retry_base_seconds, _RETRY_SECONDS_MIN)
        self._retry_cap_seconds = settings.retry_cap_seconds

    async def has(self, found_as: str) -> bool:
        """Whether a good result is in the bucket; a bad one is reported, and gone then.

        :raises KacheryError: hub or bucket did not answer.
        """
        channel = self._link.name
        try:
            data = await self._link.bucket.get_small(result_object_name(channel, found_as),
                                                     _RESULT_OBJECT_SIZE_BYTES_MAX, fresh=True)
            found = check_result(data, found_as, channel)
            if await self._link.check_member(found.node_id, Permission.PROVIDE_TASKS):
                return True
            raise ResultRefused(task=found_as, why=f"the node {found.node_id[:16]} may not provide tasks")
        except ObjectMissing:
            return False
        except (ResultRefused, TooLarge) as error:
            log.warning("channel %s: %s", channel, error)
            await self._link.hub.report_bad_result(channel, found_as)
            return False

    async def share(self, effect: Store, started_ms: int) -> None:
        """Put the result of a run that has just ended into the bucket, its file first.

        It may have taken hours to compute, so a hub or a bucket that is away is waited for, ``patience_seconds`` long.

        :raises KacheryError: it could not be shared.
        """
        loop = asyncio.get_running_loop()
        found_as = result_id(effect.kind, effect.function, effect.kwargs)
        finished_ms = max(started_ms, self._link.hub.now_ms())  # the clock may have been set back meanwhile
        data = sign_result(channel=self._link.name, task=effect.task, function=effect.function, kind=effect.kind,
                           kwargs=effect.kwargs, result=effect.result, key=self._identity.key,
                           started_ms=started_ms, finished_ms=finished_ms)
        if "json" in effect.result and len(data) > self._size_bytes_max + RESULT_FRAME_SIZE_BYTES:
            raise TooLarge(what=f"The result of {effect.function!r}", size=len(data), limit=self._size_bytes_max,
                           setting="task_result_size_bytes_max")
        end, pause = loop.time() + self._patience_seconds, self._retry_base_seconds
        while True:
            try:
                await self._share(effect, found_as, data)
                return
            except _PASSING as error:
                if loop.time() + pause > end:
                    raise
                log.warning("channel %s: the result of %s cannot be shared yet: %s", self._link.name, effect.function,
                            error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._retry_cap_seconds)

    async def _share(self, effect: Store, found_as: str, data: bytes) -> None:
        if "file" in effect.result:
            await self._uploader.put_file(parse_file_uri(effect.result["file"]))

        async def sign() -> list[SignedObject]:
            return [await self._link.hub.sign_task_result(self._link.name, found_as, len(data),
                                                          replace=effect.kind == "query",
                                                          crc32c=crc32c_of(self._link, data))]

        async def put(leave: SignedUpload) -> bool:
            return await self._link.bucket.put_bytes(leave, data) or await self.has(found_as)

        for _ in range(_PUT_TRIES_MAX):
            (leave,) = await sign()
            if await put_signed(self._link, leave, put, sign):
                return
        raise NodeError(what=f"the result of {effect.function!r} could not be put into the bucket, where another one "
                             "is that nobody may have made")
