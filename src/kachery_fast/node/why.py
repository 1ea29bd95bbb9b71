"""``kachery-fast why``: where a file is, and what everybody answers, without loading it."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from ..errors import KacheryError, ObjectMissing
from ..protocol.inquiry import Inquiry
from ..protocol.manifest import MANIFEST_SIZE_BYTES_MAX, parse_manifest
from ..protocol.messages import Failed, Offer, Want
from ..protocol.names import FileUri, object_name
from .link import ChannelLink

__all__ = ["ask_channel"]

# Enough to tell "all", "some" and "none" apart without a request for each chunk of a long file.
_CHUNKS_LOOKED_AT = 16


async def ask_channel(uri: FileUri, link: ChannelLink, wait_seconds: float) -> Inquiry:
    """Look into a channel's bucket and ask its nodes for a file.

    :param wait_seconds: how long to wait for answers; less when every node has answered.
    :return: the account; nothing is uploaded, for nobody is asked to.
    """
    inquiry = Inquiry(str(uri), link.name, link.providers())
    inquiry.bucket = await _look_into_bucket(uri, link)
    if not inquiry.providers:
        return inquiry
    request = secrets.token_hex(16)
    all_answered = asyncio.Event()
    failed: list[KacheryError] = []

    def hear(body: Any, sender: str) -> None:
        if isinstance(body, Offer):
            inquiry.note(sender, f"has it ({body.size} bytes, {body.load} objects queued)")
        elif isinstance(body, Failed):
            inquiry.note(sender, f"{body.reason}: {body.detail}" if body.detail else body.reason)
        if len(inquiry.answers) >= len(inquiry.providers):
            all_answered.set()

    def say_failed(error: KacheryError) -> None:
        failed.append(error)
        all_answered.set()

    link.listen(request, hear)
    try:
        link.say(Want, {"request": request, "sha1": uri.sha1, "manifest": uri.manifest_sha1}, say_failed)
        inquiry.rounds = 1
        try:
            await asyncio.wait_for(all_answered.wait(), wait_seconds)
        except TimeoutError:
            pass
        except asyncio.TimeoutError:
            pass
    finally:
        link.unlisten(request)
    if failed:
        raise failed[0]
    return inquiry


async def _look_into_bucket(uri: FileUri, link: ChannelLink) -> str:
    try:
        if uri.manifest_sha1 is None:
            size = await link.bucket.size(object_name(link.name, uri.sha1))
            return f"has it, {size} bytes"
        name = object_name(link.name, uri.manifest_sha1)
        data = await link.bucket.get_small(name, MANIFEST_SIZE_BYTES_MAX)
        chunks = parse_manifest(data, name=uri.manifest_sha1).chunks
        step = max(1, len(chunks) // _CHUNKS_LOOKED_AT)
        looked_at = chunks[::step]
        found = 0
        for chunk in looked_at:
            try:
                await link.bucket.size(object_name(link.name, chunk.sha1))
                found += 1
            except ObjectMissing:
                pass
        sample = f"of the {len(looked_at)} chunks looked at, {len(chunks)} in all"
        return f"has the manifest and {found} {sample}"
    except ObjectMissing:
        return "does not have it"
    except KacheryError as error:
        return error.message
