"""What an owner and joining nodes change at a hub, and whether all that was acknowledged is there afterwards."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kachery_fast.config import Settings
from kachery_fast.errors import KacheryError
from kachery_fast.net.hub import HubClient, OwnerClient
from kachery_fast.protocol.signing import private_key, public_id

__all__ = ["Changes"]


class Changes:
    """Changes one thing after the other for as long as it is let; remembers what the hub acknowledged.

    On a channel of each turn's own: it is made, described, a node is invited and joins, and is granted a permission.
    What fails because the hub is away is left; what follows from it is not tried.

    :param name: what its channels' names begin with.
    """

    def __init__(self, name: str, url: str, token: str, settings: Settings) -> None:
        self._name = name
        self._url = url
        self._settings = settings
        self._owner = OwnerClient(url, token, settings)
        self._turn = 0
        self.acknowledged: dict[str, dict[str, Any]] = {}
        self.failed = 0

    @property
    def count(self) -> int:
        """How many changes were acknowledged."""
        return sum(len(what) for what in self.acknowledged.values())

    async def make_for_ever(self) -> None:
        """Go on until cancelled."""
        while True:
            try:
                await self._take_turn()
            except KacheryError:
                self.failed += 1
                await asyncio.sleep(0)

    async def _take_turn(self) -> None:
        self._turn += 1
        channel = f"{self._name}-{self._turn}"
        await self._owner.call("createChannel", name=channel)
        done = self.acknowledged[channel] = {"made": True}
        await self._owner.call("changeChannel", channel=channel, description=f"turn {self._turn}")
        done["description"] = f"turn {self._turn}"
        code = (await self._owner.call("invite", channel=channel, permissions=["requestFiles"]))["code"]
        done["invited"] = True
        key = _key(channel)
        async with HubClient(self._url, key, self._settings) as node:
            await node.join(code, channel)
        done["member"] = public_id(key)
        await self._owner.call("grant", channel=channel, node=public_id(key), permissions=["provideFiles"])
        done["granted"] = ["provideFiles", "requestFiles"]

    async def lost(self) -> list[str]:
        """Return what was acknowledged and is not there."""
        lost = []
        for channel, done in self.acknowledged.items():
            try:
                shown = await self._owner.call("showChannel", channel=channel)
            except KacheryError as error:
                lost.append(f"{channel}: {error}")
                continue
            members = {member["node"]: sorted(member["granted"]) for member in shown["members"]}
            node = public_id(_key(channel))
            there = {"made": True, "description": shown["description"], "member": node if node in members else None,
                     "invited": bool(shown["invitations"] or members), "granted": members.get(node)}
            lost += [f"{channel}: {what} is {there[what]!r}, not {value!r}" for what, value in done.items()
                     if there[what] != value]
        return lost

    async def close(self) -> None:
        """Close the connections."""
        await self._owner.close()


def _key(channel: str) -> Ed25519PrivateKey:
    return private_key(hashlib.sha256(channel.encode()).digest())
