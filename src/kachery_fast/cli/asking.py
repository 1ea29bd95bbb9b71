"""Asking a hub as the owner of channels: which hub, whose token, and how its answers are worded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from ..config import Settings, load_settings
from ..errors import DiskError, InvalidArgument
from .output import json_option

__all__ = ["ask_hub", "count_of", "hub_options", "moment"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def hub_options(function: _Function) -> _Function:
    """Add ``--hub``, ``--token`` and ``--json``."""
    for option in (
        json_option,
        click.option("--token", help="The owner's token; better in KACHERY_HUB_TOKEN, where other users of this "
                                     "machine do not see it."),
        click.option("--hub", "hub_url", metavar="URL", help="The hub. [default: the one that runs on this machine]"),
    ):
        function = option(function)
    return function


def ask_hub(hub_url: str | None, token: str | None, action: str, /, **fields: Any) -> dict[str, Any]:
    """Perform an action at the hub that was named, or at the one on this machine; return its answer.

    :raises InvalidArgument: there is no hub, or no token for it. :raises KacheryError: it could not be done.
    """
    settings = load_settings(hub_token=token)
    url, token = _find_hub(settings, hub_url)

    async def ask() -> dict[str, Any]:
        from ..net.hub import OwnerClient

        async with OwnerClient(url, token, settings) as client:
            return await client.call(action, **fields)

    return asyncio.run(ask())


def _find_hub(settings: Settings, hub_url: str | None) -> tuple[str, str]:
    """Return address and token of the hub that was named, or of the one on this machine."""
    local_url = _read(settings.hub_dir / "address")
    url = hub_url or local_url
    if not url:
        raise InvalidArgument(what=f"No hub was named, and none runs on {settings.hub_dir}. Pass --hub URL, or start "
                                   "one with: kachery-fast hub")
    token = settings.hub_token
    if not token and local_url is not None and url.rstrip("/") == local_url:
        # The token in the directory is this hub's; it is never sent to another.
        token = _read(settings.hub_dir / "owner-token") or ""
    if not token:
        raise InvalidArgument(what=f"The hub {url} wants its owner's token. Set KACHERY_HUB_TOKEN, or pass --token; "
                                   "the hub's own machine keeps it in the file owner-token of the hub's directory.")
    return url, token


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(action="reading", path=str(path), why=error.strerror) from None


def count_of(number: int, what: str) -> str:
    """As "1 node", "2 nodes"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def moment(time_ms: int) -> str:
    """A time, given in ms since the epoch, for people of this machine."""
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")
