"""What an owner does to have a folder as a bucket, which the hub's machine and the nodes' share."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from sqlalchemy.engine import Connection

from ..embedded.bucket_mark import mark
from .actions import Act, Actor, At, Done, Outside, Request, Scope
from .engine_actions import AddedBucket, EngineLine, add_bucket
from .engines.directory import DIRECTORY, DirectorySettings, check_folder
from .vault import Vault

__all__ = ["DIRECTORY_ACTS"]


class AddDirectoryBucket(Request, tag="addDirectoryBucket"):
    """Have the hub know a folder of yours as the bucket ``name``; ``setBucket`` then lets a channel use it.

    ``folder``: its path, the same on the hub's machine and on those of all nodes (NFS, Lustre, GPFS); below one that
    the hub's admin has named. The hub marks it by a file of a secret name, by which nodes know it. Who may read and
    write there is a matter of the file system alone.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    folder: Annotated[str, Meta(min_length=1, max_length=4000)]


async def _mark(request: AddDirectoryBucket, outside: Outside) -> None:
    """Before the folder is in the registry: whom the disk refuses, has none."""
    buckets = outside.buckets

    def work() -> None:
        folder = check_folder(request.folder, buckets.settings)
        mark(folder, _number(folder, buckets.vault))

    await asyncio.get_running_loop().run_in_executor(None, work)


def _add(connection: Connection, actor: Actor, request: AddDirectoryBucket, at: At) -> Done:
    folder = Path(request.folder).resolve()
    settings = DirectorySettings(str(folder), _number(folder, at.vault))
    return add_bucket(connection, actor, at, AddedBucket(request.name, DIRECTORY, settings, None))


def _number(folder: Path, vault: Vault) -> str:
    return vault.number_of(f"directory:{folder}")


DIRECTORY_ACTS = (Act(AddDirectoryBucket, EngineLine, Scope.MANAGE, _add, first=_mark),)
