"""What the parts of the local API of 2022 share: its bodies, its answers, and its way of telling errors.

The API is what kachery-client 1.2 says to a node (docs/formats.md). Every answer that is not 200 is plain text: the
client of 2022 shows it to its user as it stands.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from ..errors import BadMessage, TooLarge

__all__ = ["MISSING_CODE", "WRONG_CODE", "answer_success", "read_legacy_body", "tell_in_text", "wait_seconds_of"]

# As they stood in 2022, since clients and their users know them.
MISSING_CODE = ("Missing client auth code in daemon request. You probably need to upgrade kachery-daemon or kachery.")
WRONG_CODE = "Incorrect or invalid client authorization code."

_WAIT_SECONDS_MAX = 24 * 3600.0


async def read_legacy_body(request: web.Request, kind: type[Any], size_bytes_max: int) -> Any:
    """Return the JSON body of a request as a struct of this kind.

    :raises BadMessage: it is not JSON, a field is missing, unknown or of another type.
    :raises TooLarge: it is longer than ``size_bytes_max``.
    """
    length = request.content_length
    try:
        if length is not None and length > size_bytes_max:
            raise web.HTTPRequestEntityTooLarge(size_bytes_max, length)
        data = await request.clone(client_max_size=size_bytes_max).read()
    except web.HTTPRequestEntityTooLarge:
        raise TooLarge(what=f"The body of {request.path}", size=length or f"more than {size_bytes_max}",
                       limit=size_bytes_max, setting="a limit of the local API; store what is long as a file") from None
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(why=f"Invalid request in {request.path.rsplit('/', 1)[-1]}: {error}") from None


def wait_seconds_of(msec: float) -> float:
    """Return how long a client is kept waiting: old scripts say a million seconds where they mean for ever."""
    return min(msec / 1000, _WAIT_SECONDS_MAX)


def answer_success(**fields: Any) -> web.Response:
    """Return ``{"success": true, …}``; ``msgspec.Raw`` stands as it is."""
    return web.Response(body=msgspec.json.encode({"success": True, **fields}), content_type="application/json",
                        charset="utf-8")


def tell_in_text(message: str, status: int) -> web.Response:
    """Return an error as plain text."""
    return web.Response(text=message, status=status)
