"""The nodes of the hub's load: a process of its own, told by JSON lines what to do, that answers with JSON lines.

So its share of the two processors can be told from the hub's.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import httpx
from httpx._transports import default
from tests.hub.crowd import Crowd, spread
from tests.hub.crowd_nodes import channel_of, crowd_key

from kachery_fast.net.hub import HubClient
from kachery_fast.net.loop import run_on_loop
from kachery_fast.protocol.names import ObjectName


class AskingCrowd(Crowd):
    """One that asks for signed URLs as well."""

    async def connect(self, first: int, count: int, real_every: int) -> dict[str, Any]:
        """See ``Crowd.connect``. Its nodes are no garbage, and looking for some among them would take a while."""
        answer = await super().connect(first, count, real_every)
        gc.collect()
        gc.freeze()
        return answer

    async def sign(self, nodes: int, seconds: float, *, at_once: int = 0, rate: float = 0.0,
                   download: bool = False) -> dict[str, Any]:
        """Ask for signed URLs, one a request, in the name of one node after the other, each on its connection.

        :param at_once: requests that are under way all the time; else ``rate``: requests a second, evenly.
        """
        clients = [HubClient(self.place.url, crowd_key(number), self.place.settings) for number in range(nodes)]
        times_ms: list[float] = []
        turns = count()

        async def one() -> None:
            number = next(turns) % nodes
            channel = channel_of(number, self.place.per_channel)
            begun = time.perf_counter()
            if download:
                await clients[number].sign_downloads(ObjectName(channel, "file", ""), [secrets.token_hex(20)])
            else:
                await clients[number].sign_uploads(channel, [(secrets.token_hex(20), 20 << 20)])
            times_ms.append(1000 * (time.perf_counter() - begun))

        async def keep_asking(going: Callable[[], bool]) -> None:
            while going():
                await one()

        await asyncio.gather(*(keep_asking(lambda: len(times_ms) < nodes) for _ in range(16)))  # connects all
        times_ms.clear()
        begun = time.perf_counter()
        if rate:
            asking = []
            while time.perf_counter() - begun < seconds:
                asking.append(asyncio.create_task(one()))
                await asyncio.sleep(max(0.0, begun + len(asking) / rate - time.perf_counter()))
            await asyncio.gather(*asking)
        else:
            await asyncio.gather(*(
                keep_asking(lambda: time.perf_counter() - begun < seconds) for _ in range(at_once)))
        elapsed = time.perf_counter() - begun
        for client in clients:
            await client.close()
        return {"requests": len(times_ms), "per_second": len(times_ms) / elapsed, **spread(times_ms)}


async def _serve() -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of what the SDK leaves behind
    # Each client of the SDK makes one, for 25 ms; a machine has one node, and this process has many.
    vars(default)["create_ssl_context"] = functools.cache(httpx.create_ssl_context)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    crowd = AskingCrowd(**json.loads(await reader.readline()))
    while line := await reader.readline():
        command = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            answer = await getattr(crowd, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, it is told
            answer = {"error": repr(error)}
        answer["crowd_share"] = (time.process_time() - cpu) / (time.perf_counter() - wall)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run_on_loop(_serve())
    os._exit(0)  # thousands of connections need no farewell
