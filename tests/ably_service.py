"""A broker that speaks Ably's protocol, in a process of its own, as if it were Ably: it takes the tokens that are
signed with its API key, knows nothing of hubs, and notes who published when. Run as a program it prints its port."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from kachery_fast.embedded.broker import Broker, TokenKey

KEY = TokenKey("app.key", "0123456789abcdef0123456789abcdef")
API_KEY = f"{KEY.name}:{KEY.secret}"
_ROOT = Path(__file__).parent.parent


class AblyService:
    """A running one. ``stop`` and ``start``: it comes back on its port."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """As the setting hub_engine_hosts takes it."""
        return f"127.0.0.1:{self.port}"

    def published(self) -> dict[str, list[float]]:
        """When each client published, in seconds since the epoch."""
        found: dict[str, list[float]] = self._ask("published")
        return found

    def listeners(self, band: str) -> int:
        """How many clients listen on a band."""
        return int(self._ask(f"listeners/{band}"))

    def _ask(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.host}/{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process = subprocess.Popen([sys.executable, "-m", "tests.ably_service", str(self.port)], cwd=_ROOT,
                                         stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=20)
            self._process = None


@contextmanager
def running_ably() -> Iterator[AblyService]:
    """Start one, and end it at the end."""
    service = AblyService()
    try:
        service.start()
        yield service
    finally:
        service.kill()


class _Noting(Broker):
    """Notes who published when."""

    def __init__(self) -> None:
        # As if it had been there for a while: the tokens are of whole seconds.
        super().__init__(keys=KEY, clock=time.time)
        self._started -= 60
        self.published: dict[str, list[float]] = {}

    def publish(self, sender: Any, name: str, serial: int, *rest: Any) -> Any:
        self.published.setdefault(sender.session.client_id, []).append(time.time())
        return super().publish(sender, name, serial, *rest)


async def _serve(port: int) -> None:
    broker = _Noting()

    async def published(_request: web.Request) -> web.Response:
        return web.json_response(broker.published)

    async def listeners(request: web.Request) -> web.Response:
        return web.json_response(len(broker.rings.subscribers(request.match_info["band"])))

    application = web.Application()
    application.add_routes([*broker.routes(), web.get("/published", published),
                            web.get("/listeners/{band}", listeners)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
