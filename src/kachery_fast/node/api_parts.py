"""What the parts of the node's local API share: reading a body, a line of a stream, and a fault told as an error."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
from aiohttp import web

from ..errors import BadMessage, NodeError

__all__ = ["fault_of", "read_body", "write_line"]

log = logging.getLogger("kachery_fast.node")


async def read_body(request: web.Request, kind: type[Any]) -> Any:
    """Return the JSON body of a request as a struct of this kind; no body is ``{}``.

    :raises BadMessage: it is not as documented.
    """
    data = await request.read()
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(why=f"the body of {request.path} is not as documented ({error})") from None


def fault_of(request: web.Request, error: Exception) -> NodeError:
    """Log a fault of the program, and return what a client is told of it."""
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return NodeError(what=f"a fault of the program: {error!r}")


async def write_line(response: web.StreamResponse, data: dict[str, Any]) -> None:
    """Send one JSON object as a line of its own."""
    await response.write(json.dumps(data).encode() + b"\n")
