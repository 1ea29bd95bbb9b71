"""Where a channel's objects are, for those who are on no channel: one unsigned question to a hub."""

from __future__ import annotations

import asyncio
import random
import re

import msgspec

from ..config import Settings
from ..errors import ChannelPrivate, HubError, InvalidArgument
from .exchange import Exchange, check_hub_url

__all__ = ["find_bucket_url"]

_PRINTABLE = re.compile(r"[!-~]+")


class _Answer(msgspec.Struct):
    url: str
    private: bool = False


async def find_bucket_url(hub_url: str, channel: str, settings: Settings) -> str:
    """Return the base of the URLs of a channel's objects, as a hub of 2022 tells it too (WIRE-2022.md, part A).

    :raises InvalidArgument: ``hub_url`` is no hub's address. :raises NotOnHub: it has no such channel.
    :raises ChannelPrivate: not everybody may read there.
    :raises HubUnreachable, HubError: it cannot be asked, or its answer makes no sense.
    """
    exchange = Exchange(hub_url, settings, None, settings.retry_attempts_max, asyncio.sleep, random.uniform)
    try:
        data = await exchange.post("/api/getChannelBucketBaseUrl",
                                   lambda: msgspec.json.encode({"channelName": channel}))
    finally:
        await exchange.close()
    try:
        answer = msgspec.json.decode(data, type=_Answer)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HubError(url=exchange.url, why=f"it does not say where the channel's bucket is ({error})") from None
    if answer.private:
        raise ChannelPrivate(channel=channel)
    url = answer.url
    whole = exchange.url + url if url.startswith("/") else url
    try:
        return check_hub_url(whole if _PRINTABLE.fullmatch(whole) else "")  # what holds for its address holds here
    except InvalidArgument:
        raise HubError(url=exchange.url, why=f"it says that the bucket of the channel {channel!r} is at {url[:200]!r}, "
                                             "which is no http:// or https:// address") from None
