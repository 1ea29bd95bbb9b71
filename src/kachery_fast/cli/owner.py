"""What the commands for people with an account at a hub share: which hub, whose token, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from ..config import Settings, load_settings
from ..errors import DiskError, InvalidArgument
from .output import json_option

__all__ = ["ask_hub", "count_text", "hub_options", "moment_text", "read_hub_file", "read_secret", "split_list"]

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
    """Have an action performed, and return its answer.

    :param hub_url: as of ``--hub``; None for this machine's. :param token: as of ``--token``.
    :raises InvalidArgument: no hub or no token is known. :raises KacheryError: as of ``net.hub.OwnerClient.call``.
    """
    import asyncio  # here, as "node --help" has no use for it

    settings = load_settings(hub_token=token)
    url, token = _find_hub(settings, hub_url)

    async def ask() -> dict[str, Any]:
        from ..net.hub import OwnerClient

        async with OwnerClient(url, token, settings) as client:
            return await client.call(action, **fields)

    return asyncio.run(ask())


def read_secret(path: str) -> str:
    """Return what a file has in its one line; no error shows it."""
    try:
        lines = Path(path).expanduser().read_text("utf-8").split()
    except OSError as error:
        raise DiskError(action="reading", path=path, why=error.strerror) from None
    except UnicodeDecodeError:
        lines = []
    if len(lines) != 1:
        raise InvalidArgument(what=f"{path} is to have one line with the key, and nothing else.")
    return lines[0]


def _find_hub(settings: Settings, hub_url: str | None) -> tuple[str, str]:
    """Return address and token of the hub that was named, or of the one on this machine."""
    local_url = read_hub_file(settings.hub_dir, "address")
    url = hub_url or local_url
    if not url:
        raise InvalidArgument(what=f"No hub was named, and none runs on {settings.hub_dir}. Pass --hub URL, or start "
                                   "one with: kachery-fast hub")
    token = settings.hub_token
    if not token and local_url is not None and url.rstrip("/") == local_url:
        # The token in the directory is this hub's; it is never sent to another.
        token = read_hub_file(settings.hub_dir, "owner-token") or ""
    if not token:
        raise InvalidArgument(what=f"The hub {url} wants its owner's token. Set KACHERY_HUB_TOKEN, or pass --token; "
                                   "the hub's own machine keeps it in the file owner-token of the hub's directory.")
    return url, token


def read_hub_file(directory: Path, name: str) -> str | None:
    """Return what a hub on this machine keeps in a file of its directory: its ``address`` while it runs, or the
    ``owner-token``; None when it is not there.

    :raises DiskError: it cannot be read.
    """
    path = directory / name
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(action="reading", path=str(path), why=error.strerror) from None


def count_text(number: int, what: str) -> str:
    """Return ``1 node`` or ``3 nodes``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def moment_text(time_ms: int) -> str:
    """Return a time, in ms since the epoch, by this machine's clock."""
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")


def split_list(text: str) -> list[str]:
    """Return what stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
