"""The short acts of the demo: a feed that is followed while it grows, and a calculation that another node runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..client.feed_sources import NodeSource
from ..client.feeds import Feed
from ..errors import NodeError
from .demo_functions import CROSSINGS
from .lab import Lab, LabNode, Program

__all__ = ["Timed", "calculate", "follow"]

Timed = Callable[[str, int, Callable[[], Any]], Any]

_MESSAGES = 40
_PAUSE_SECONDS = 0.05
_PATIENCE_SECONDS = 60.0


def follow(a: LabNode, b: LabNode, timed: Timed) -> dict[str, Any]:
    """Make a feed on A, follow it on B, and append to it meanwhile; return its URI and how late messages were seen.

    :raises NodeError: B did not see what A wrote, in order.
    """
    uri = str(a.json("feed", "create", "notebook")["uri"])
    notebook = _feed(a, uri).load_subfeed("trials")
    reader = _feed(b, uri).load_subfeed("trials", channel=b.settings.channel)
    appended: list[float] = []
    seen: list[tuple[int, float]] = []
    failures: list[BaseException] = []

    def read() -> None:
        end = time.monotonic() + _PATIENCE_SECONDS
        try:
            while len(seen) <= _MESSAGES and time.monotonic() < end:
                for message in reader.get_next_messages(wait_msec=1000):
                    seen.append((message["trial"], time.monotonic()))
        except BaseException as error:
            failures.append(error)

    def work() -> None:
        notebook.append_message({"trial": 0, "note": "the session begins"})
        follower = threading.Thread(target=read, name="demo-reader", daemon=True)
        follower.start()
        begun = time.monotonic()
        while not seen and not failures and time.monotonic() < begun + _PATIENCE_SECONDS:
            time.sleep(_PAUSE_SECONDS)
        for trial in range(1, _MESSAGES + 1):
            notebook.append_message({"trial": trial, "response": "left" if trial % 3 else "right"})
            appended.append(time.monotonic())
            time.sleep(_PAUSE_SECONDS)
        follower.join(_PATIENCE_SECONDS)

    timed(f"follow a feed on B while A appends {_MESSAGES} messages", 0, work)
    if failures or [trial for trial, _ in seen] != list(range(_MESSAGES + 1)):
        raise NodeError(what=f"B saw {[trial for trial, _ in seen]} of what A wrote ({failures or 'no error'})")
    delays = sorted(max(0.0, when - sent) for (_, when), sent in zip(seen[1:], appended, strict=True))
    return {"uri": reader.uri, "messages": len(seen), "medianDelaySeconds": delays[len(delays) // 2],
            "longestDelaySeconds": delays[-1]}


def _feed(node: LabNode, uri: str) -> Feed:
    feed_id = uri.removeprefix("feed://").partition("/")[0]
    return Feed(NodeSource(node.settings, feed_id), f"feed://{feed_id}", node.settings)


def calculate(lab: Lab, a: LabNode, b: LabNode, uri: str, size: int, timed: Timed) -> dict[str, Any]:
    """Have A's task backend count something in the recording for B; then ask again, with the backend gone.

    :raises NodeError: the second answer is another, or did not come from the cache.
    """
    functions = Path(__file__).with_name("demo_functions.py")
    backend = Program(["task", "backend", str(functions)], a.environ, lab.directory / "backend.log")
    arguments = ["task", "request", CROSSINGS, "--kwargs", f'{{"uri": "{uri}", "threshold": 1000}}']
    try:
        timed("start a task backend on A", 0, lambda: _start(backend))
        first = timed("B asks for a calculation, which A runs", size, lambda: b.json(*arguments))
    finally:
        backend.stop()
    again = timed("B asks again, the backend is gone: from the cache", 0, lambda: b.json(*arguments))
    if again["result"] != first["result"] or not again["cached"]:
        raise NodeError(what=f"the second answer is {again}, the first was {first}")
    return {"function": CROSSINGS, "result": first["result"]["json"], "node": first["node"]}


def _start(backend: Program) -> None:
    backend.start()
    backend.wait_until(lambda: backend.has_printed("Offering"), "the task backend")
