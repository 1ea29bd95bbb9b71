"""Both sides of a task over the network in memory: a node that runs functions, and one that asks by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kachery_fast.node.link import ChannelLink
from kachery_fast.node.slots import AdaptiveSlots
from kachery_fast.node.task_backends import Backend, TaskBackends
from kachery_fast.node.task_providing import TaskProviding
from kachery_fast.node.uploading import Uploader
from kachery_fast.protocol.names import result_object_name
from kachery_fast.protocol.task_bodies import TaskCancel, TaskDeclined, TaskRequest, TaskStatus
from kachery_fast.protocol.task_events import FunctionInfo, Report
from kachery_fast.protocol.tasks import TaskResult, check_result, result_id, task_id
from kachery_fast.store.tasks import TaskLedger
from tests.network import run_on
from tests.node.support import Network, Peer, network, nothing_left, until

FUNCTIONS = [FunctionInfo("sum.1", "pure-calculation"), FunctionInfo("now.1", "query"),
             FunctionInfo("mail.1", "action"), FunctionInfo("touch.1", "action", idempotent=True)]


class Runner:
    """A node's running side, and the backends that a test plays."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.backends = TaskBackends(peer.settings)
        self.ledger = TaskLedger(peer.settings.storage_dir)
        self.serve()

    def serve(self) -> None:
        """Take part in the channel."""
        peer = self.peer
        uploader = Uploader(peer.link, peer.store, peer.settings,
                            AdaptiveSlots(peer.settings.upload_concurrency, time.monotonic), peer.threads,
                            peer.hash_threads, peer.traffic)
        self.providing = TaskProviding(peer.link, peer.identity, peer.settings, self.backends, self.ledger, uploader,
                                       peer.threads)
        peer.link._on_request = lambda body, sender: (
            self.providing.heard(body, sender) if isinstance(body, TaskRequest | TaskCancel) else None)

    def connect(self, workers: int = 1, functions: list[FunctionInfo] | None = None) -> Backend:
        return self.backends.register("test", FUNCTIONS if functions is None else functions, workers, None)

    async def told(self, backend: Backend, kind: str = "run") -> dict[str, Any]:
        """What the backend is told next, which must be of this kind."""
        line = await asyncio.wait_for(backend.next_line(), 20)
        assert line["type"] == kind, line
        json.dumps(line)
        return line

    def report(self, backend: Backend, run: dict[str, Any], status: str, **fields: Any) -> None:
        self.backends.report(backend.info.id, Report(run["run"], status, **fields))

    async def ends(self, backend: Backend, asker: Asker, status: str = "finished", *, heard: str = "",
                   **fields: Any) -> Any:
        """The backend's next run ends so; return what the asker hears of it, which has the status ``heard``."""
        self.report(backend, await self.told(backend), status, **fields)
        return await asker.heard(heard or status)

    async def close(self) -> None:
        await self.providing.close()
        self.backends.close()
        self.ledger.close()


class Question:
    """One task that is asked for by hand at a node's end of a channel, and what is answered."""

    def __init__(self, link: ChannelLink, kind: str, function: str, task: str = "", **kwargs: Any) -> None:
        self.link = link
        self.kind, self.function, self.kwargs = kind, function, kwargs
        self.task = task or (task_id(function, kwargs) if kind == "pure-calculation" else secrets.token_hex(16))
        self.request = secrets.token_hex(16)
        self.answers: list[Any] = []
        link.listen(self.task, lambda body, _: self.answers.append(body))

    def ask(self) -> None:
        self.link.say(TaskRequest, {"request": self.request, "task": self.task, "function": self.function,
                                    "kind": self.kind, "kwargs": self.kwargs})

    def cancel(self) -> None:
        self.link.say(TaskCancel, {"request": self.request, "task": self.task})

    def statuses(self) -> list[str]:
        """What was said of it, without repetitions."""
        said = [body.status if isinstance(body, TaskStatus) else body.reason for body in self.answers]
        return [status for status, _ in itertools.groupby(said)]

    async def heard(self, status: str) -> Any:
        """The first word of this status, or the first refusal for this reason."""
        def found() -> Any:
            return next((body for body in self.answers if getattr(body, "status", None) == status
                         or (isinstance(body, TaskDeclined) and body.reason == status)), None)

        await until(found)
        return found()


class Asker(Question):
    """A node that asks for one task by hand, at once."""

    def __init__(self, peer: Peer, kind: str = "pure-calculation", function: str = "sum.1", task: str = "",
                 **kwargs: Any) -> None:
        super().__init__(peer.link, kind, function, task, **kwargs)
        self.peer = peer
        self.ask()

    @property
    def object_name(self) -> str:
        return result_object_name(self.peer.network.channel, result_id(self.kind, self.function, self.kwargs))

    def result(self) -> TaskResult:
        """The result in the bucket, checked."""
        data = self.peer.network.bucket.objects[self.object_name]
        return check_result(data, result_id(self.kind, self.function, self.kwargs), self.peer.network.channel)


@asynccontextmanager
async def running(root: Path, *names: str, **settings: Any) -> AsyncIterator[tuple[Network, list[Runner]]]:
    """A channel with an asker ``b`` and nodes that run functions."""
    async with network(root) as net:
        await net.peer("b", ["requestTasks"])
        runners = [Runner(await net.peer(name, **settings)) for name in names or ("a",)]
        try:
            yield net, runners
        finally:
            for runner in runners:
                await runner.close()


def served(loop_kind: str, root: Path, work: Callable[[Network, Runner, Backend], Awaitable[None]],
           **settings: Any) -> None:
    """Run ``work`` with an asker ``b``, and a node ``a`` that has a backend with one worker."""
    async def run() -> None:
        async with running(root, **settings) as (net, (a,)):
            await work(net, a, a.connect())
    with nothing_left(root):
        run_on(loop_kind, run(), 60)
