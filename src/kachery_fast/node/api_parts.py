"""What the parts of the node's local API share: reading a body, finding a channel, an answer or a line of one, and a
fault told as an error."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from ..errors import BadMessage, ChannelUnknown, HubUnreachable, KacheryError, NodeError
from ..protocol.access import Permission
from .faults import logged_fault
from .link import ChannelLink

if TYPE_CHECKING:
    from .node import Node

__all__ = ["Nothing", "answer_with", "fault_of", "permitted_link", "read_body", "tell_work", "write_line"]

_PROGRESS_INTERVAL_SECONDS = 0.25

T = TypeVar("T")


class Nothing(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request that says nothing."""


async def read_body(request: web.Request, kind: type[Any]) -> Any:
    """Return the JSON body of a request as a struct of this kind; no body is ``{}``.

    :raises BadMessage: it is not as documented.
    """
    data = await request.read()
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(why=f"the body of {request.path} is not as documented ({error})") from None


async def permitted_link(node: Node, what: object, channel: str | None, permission: Permission, *,
                         suffices: Callable[[ChannelLink], object] = lambda _link: True) -> ChannelLink:
    """Return the channel for a request; who joined it, or was granted something, a moment ago is not overlooked.

    :param what: what the channel is wanted for, for the errors.
    :param suffices: whether the channel will do as it is known; when not, the hubs are asked anew before it is taken.
    :raises NotPermitted: this node has not that permission there.
    :raises NoChannel, ChannelUnknown, HubUnreachable, InvalidArgument: as ``Node.link_for``.
    """
    with contextlib.suppress(ChannelUnknown, HubUnreachable):
        link = node.link_for(what, channel)
        if link.may(permission) and suffices(link):
            return link
    await node.look_again()
    link = node.link_for(what, channel)
    refusal = link.refusal(permission)
    if refusal is not None:
        raise refusal
    return link


def answer_with(answer: dict[str, Any]) -> web.Response:
    """Return an answer of JSON, in which ``msgspec.Raw`` stands as it is."""
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def fault_of(request: web.Request, error: Exception) -> NodeError:
    """Log a fault of the program, and return what a client is told of it."""
    return NodeError(what=logged_fault(error, f"{request.method} {request.path}"))


async def write_line(response: web.StreamResponse, data: dict[str, Any]) -> None:
    """Send one JSON object as a line of its own."""
    await response.write(json.dumps(data).encode() + b"\n")


async def tell_work(request: web.Request, work: Coroutine[Any, Any, T], progress: Callable[[], dict[str, Any]],
                    done: Callable[[T], dict[str, Any]]) -> web.StreamResponse:
    """Answer with lines that say how far ``work`` is, and a last one with what came of it, or its error.

    A client that closes the connection withdraws its wish: the work is cancelled.

    :param progress: the members of a line of progress, made about four times a second. :param done: those of the last
        one.
    """
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    task = asyncio.ensure_future(work)
    try:
        await response.prepare(request)
        while not task.done():
            await write_line(response, {"type": "progress", **progress()})
            await asyncio.wait([task], timeout=_PROGRESS_INTERVAL_SECONDS)
        last = {"type": "done", **done(task.result())}
    except ConnectionError:
        raise
    except Exception as error:  # the head is out: the error is the last line
        told = error if isinstance(error, KacheryError) else fault_of(request, error)
        last = {"type": "error", **told.to_dict()}
    finally:
        task.cancel()
        await asyncio.wait([task])
    await write_line(response, last)
    return response
