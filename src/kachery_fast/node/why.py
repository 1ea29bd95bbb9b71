"""``kachery-fast why``: where a file is, and what everybody answers, without loading it."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from ..errors import BandUnreachable, KacheryError, ObjectMissing
from ..protocol.bodies import Failed, Offer, Progress, Want
from ..protocol.inquiry import Inquiry
from ..protocol.manifest import MANIFEST_SIZE_BYTES_MAX, parse_manifest
from ..protocol.names import FileUri, object_name
from .link import ChannelLink

__all__ = ["ask_channel"]

# Enough to tell "all", "some" and "none" apart without a request for each chunk of a long file.
_CHUNKS_LOOKED_AT = 16


async def ask_channel(uri: FileUri, link: ChannelLink, wait_seconds: float) -> tuple[Inquiry, str]:
    """Look into a channel's bucket and ask its nodes for a file.

    :param wait_seconds: how long to wait for answers; less when every node has answered.
    :return: the account, and it as a line, which also says when nobody could be asked; nothing is uploaded, for
        nobody is asked to.
    """
    inquiry = Inquiry(str(uri), link.name, link.providers())
    inquiry.bucket = await _look_into_bucket(uri, link)
    trouble = await _ask_nodes(uri, link, inquiry, wait_seconds) if inquiry.providers else None
    return inquiry, inquiry.tried() if trouble is None else f"bucket: {inquiry.bucket}; {trouble.message}"


async def _ask_nodes(uri: FileUri, link: ChannelLink, inquiry: Inquiry, wait_seconds: float) -> KacheryError | None:
    """Note what each node answers; return why they could not be asked."""
    request = secrets.token_hex(16)
    answered: set[str] = set()
    over = asyncio.Event()
    failures: list[KacheryError] = []

    def hear(body: Any, sender: str) -> None:
        if isinstance(body, Progress):
            if sender not in answered:
                inquiry.note(sender, "is looking it up")
            return
        if isinstance(body, Offer):
            inquiry.note(sender, f"has it ({body.size} bytes, {body.load} objects queued)")
        elif isinstance(body, Failed):
            inquiry.note(sender, f"{body.reason}: {body.detail}" if body.detail else body.reason)
        answered.add(sender)
        if answered >= inquiry.providers.keys():
            over.set()

    def say_failed(error: KacheryError) -> None:
        failures.append(error)
        over.set()

    link.listen(request, hear)
    try:
        link.say(Want, {"request": request, "sha1": uri.sha1, "manifest": uri.manifest_sha1}, say_failed)
        await asyncio.wait_for(over.wait(), wait_seconds)
    except asyncio.TimeoutError:
        pass
    finally:
        link.unlisten(request, hear)
    if failures:
        return failures[0]
    if not link.connected and not answered:
        return BandUnreachable(channel=link.name, why=link.why or "not connected")
    inquiry.rounds = 1
    return None


async def _look_into_bucket(uri: FileUri, link: ChannelLink) -> str:
    try:
        if uri.manifest_sha1 is None:
            size = await link.bucket.size(object_name(link.name, uri.sha1))
            return f"has it, {size} bytes"
        name = object_name(link.name, uri.manifest_sha1)
        data = await link.bucket.get_small(name, MANIFEST_SIZE_BYTES_MAX)
        chunks = parse_manifest(data, name=uri.manifest_sha1).chunks
        looked_at = chunks[::max(1, len(chunks) // _CHUNKS_LOOKED_AT)]
        answers = await asyncio.gather(*(_has(link, chunk.sha1) for chunk in looked_at), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return f"has the manifest and {answers.count(True)} of the {len(looked_at)} chunks looked at, " \
               f"{len(chunks)} in all"
    except ObjectMissing:
        return "does not have it"
    except KacheryError as error:
        return error.message


async def _has(link: ChannelLink, sha1: str) -> bool:
    try:
        await link.bucket.size(object_name(link.name, sha1))
    except ObjectMissing:
        return False
    return True
