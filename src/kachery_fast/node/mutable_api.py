"""The part of the local API for mutables: for clients that are not the owner of the storage directory.

    POST /api/mutable/get     {"key"}                      -> {"found", "value"}
    POST /api/mutable/set     {"key", "value", "update"}   -> {"changed"}
    POST /api/mutable/delete  {"key"}                      -> {"changed"}
    POST /api/mutable/list    {}                           -> {"mutables": [{"key", "value"}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from ..errors import ClientAuthRefused, TooLarge
from ..store.mutables import ADMITTED_KEY, DATABASE_NAME, MutableStore
from .api_parts import Nothing, read_body
from .threads import in_thread

if TYPE_CHECKING:
    from .node import Node

__all__ = ["MutableKey", "MutableSet", "check_mutable_key", "mutable_routes", "on_mutables"]

T = TypeVar("T")

# What a client takes in one answer is bounded; this leaves room for the rest of it.
_LIST_SIZE_BYTES_MAX = 48 * 1024 * 1024


class MutableKey(msgspec.Struct, forbid_unknown_fields=True):
    """Which mutable."""

    key: Any


class MutableSet(msgspec.Struct, forbid_unknown_fields=True):
    """What a mutable is to be; without ``update`` only where it has no value."""

    key: Any
    value: Any
    update: bool = True


async def on_mutables(node: Node, work: Callable[[MutableStore], T]) -> T:
    """Return what ``work`` makes of the node's mutables.

    :raises KacheryError: as ``MutableStore``.
    """
    settings = node.settings

    def run() -> T:
        # Opened for each request, as clients do it: requests are few, and nothing has to be closed at the end.
        with MutableStore(settings.storage_dir, value_size_bytes_max=settings.mutable_size_bytes_max) as mutables:
            return work(mutables)

    return await in_thread(node.api_threads, run)


def mutable_routes(node: Node) -> list[web.RouteDef]:
    """Return the routes of this part of the API of ``node``."""
    on = partial(on_mutables, node)

    async def get(request: web.Request) -> web.Response:
        asked = await read_body(request, MutableKey)
        check_mutable_key(asked.key)
        found, value = await on(lambda mutables: mutables.get(asked.key))
        return web.json_response({"found": found, "value": value})

    async def set_value(request: web.Request) -> web.Response:
        asked = await read_body(request, MutableSet)
        check_mutable_key(asked.key)
        changed = await on(lambda mutables: mutables.set(asked.key, asked.value, update=asked.update))
        return web.json_response({"changed": changed})

    async def delete(request: web.Request) -> web.Response:
        asked = await read_body(request, MutableKey)
        check_mutable_key(asked.key)
        return web.json_response({"changed": await on(lambda mutables: mutables.delete(asked.key))})

    async def list_all(request: web.Request) -> web.Response:
        await read_body(request, Nothing)
        return web.Response(body=await on(_encode_list), content_type="application/json")

    return [web.post("/api/mutable/get", get), web.post("/api/mutable/set", set_value),
            web.post("/api/mutable/delete", delete), web.post("/api/mutable/list", list_all)]


def check_mutable_key(key: object) -> None:
    """Who was let in may not let others in: :raises ClientAuthRefused: the key is that of the codes."""
    if key == ADMITTED_KEY:
        raise ClientAuthRefused(why=f"only the node's owner may read and change the mutable {ADMITTED_KEY!r}",
                                path=DATABASE_NAME)


def _encode_list(mutables: MutableStore) -> bytes:
    rows: list[bytes] = []
    size_bytes = 0
    for key, value in mutables.items():
        if key == ADMITTED_KEY:
            continue
        rows.append(json.dumps({"key": key, "value": value}).encode())
        size_bytes += len(rows[-1]) + 1
        if size_bytes > _LIST_SIZE_BYTES_MAX:
            raise TooLarge(what="The list of all mutables", size=f"more than {size_bytes}", limit=_LIST_SIZE_BYTES_MAX,
                           setting="a fixed limit; the owner of the storage directory can list them directly")
    return b'{"mutables":[%b]}' % b",".join(rows)
