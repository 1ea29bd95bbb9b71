"""Tasks: what a calculation costs whose result is known, beside one HTTP GET of that result.

Real processes (hub, node A with a task backend, node B) and the Python client, on loopback, both cores shared.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lab import CHANNEL, running_lab
from benchmarks.measure import Figure, Ratio, figure, pairs
from kachery_fast.cli.lab import LabNode
from kachery_fast.client.tasks import request_task
from kachery_fast.protocol.names import result_object_name
from kachery_fast.protocol.tasks import task_id

__all__ = ["cached_versus_get", "cached_versus_kept_get", "known_versus_get"]

FUNCTION = "bench.unit-summary.1"

# What a lab asks for again and again: a summary of a unit, about 1 kB of JSON.
BACKEND = f'''
import kachery_fast as kf

@kf.taskfunction({FUNCTION!r})
def summary(unit):
    return {{"unit": unit, "rate_hz": 12.5 + unit % 7, "waveform": [0.001 * ((unit * i) % 997) for i in range(82)]}}

kf.run_task_backend(on_ready=lambda channels: print("ready", flush=True))
'''


def cached_versus_get(directory: Path, requests: int = 60, count: int = 7) -> Figure:
    """A calculation whose result is in the bucket, asked for at a node that has never heard of it: median milliseconds
    from the call to the value, beside one GET of the object."""
    units = iter(range(requests * (count + 1)))
    measured = _measure(directory, requests, count, lambda: next(units), kept=False)
    return figure("cached calculation, p50 / one HTTP GET of its result", measured, unit="ms", bar="<= 2",
                  note=f"{requests} a run, each asked for once at this node, and checked; each GET over a connection "
                       "of its own, and unchecked")


def cached_versus_kept_get(directory: Path, requests: int = 60, count: int = 7) -> Figure:
    """The same, beside a GET over a connection that is open already."""
    units = iter(range(requests * (count + 1)))
    measured = _measure(directory, requests, count, lambda: next(units), kept=True)
    return figure("cached calculation, p50 / GET of its result over an open connection", measured, unit="ms",
                  bar="shown", note=f"{requests} a run, as above")


def known_versus_get(directory: Path, requests: int = 60, count: int = 7) -> Figure:
    """A calculation whose result this node has had before, and remembers, beside one GET of the object."""
    asked = iter(list(range(requests)) * (count + 1))
    measured = _measure(directory, requests, count, lambda: next(asked), kept=False)
    return figure("known calculation, p50 / one HTTP GET of its result", measured, unit="ms", bar="<= 2",
                  note=f"{requests} a run, asked for at this node before, in the unmeasured run")


def _measure(directory: Path, requests: int, count: int, next_unit: Callable[[], int], *, kept: bool) -> Ratio:
    with running_lab(directory, "A", "B") as lab:
        a, b = lab.nodes["A"], lab.nodes["B"]
        with _backend(a, directory), a.used():  # A's own requests bring the results into the bucket
            tasks = [request_task(FUNCTION, {"unit": unit}) for unit in range(requests * (count + 1))]
            for task in tasks:
                task.wait()
                _verify(task.result, task.result["unit"])
        asked: list[int] = []

        def ours() -> float:
            asked[:] = [next_unit() for _ in range(requests)]
            seconds = []
            for unit in asked:
                begun = time.perf_counter()
                task = request_task(FUNCTION, {"unit": unit})
                result = task.result
                seconds.append(time.perf_counter() - begun)
                if not task.cached:
                    raise AssertionError("it was not in the cache")
                _verify(result, unit)
            return 1000 * statistics.median(seconds)

        def rival() -> float:
            connection = http.client.HTTPConnection("127.0.0.1", lab.hub_port)
            seconds = []
            for unit in asked:
                path = "/bucket/" + result_object_name(CHANNEL, task_id(FUNCTION, {"unit": unit}))
                if not kept:
                    connection.close()
                begun = time.perf_counter()
                connection.request("GET", path)
                data = connection.getresponse().read()
                seconds.append(time.perf_counter() - begun)
                _verify(json.loads(data)["body"]["result"]["json"], unit)
            connection.close()
            return 1000 * statistics.median(seconds)

        with b.used():
            return pairs(ours, rival, count)


def _verify(result: Any, unit: int) -> None:
    if result["unit"] != unit or len(result["waveform"]) != 82 or result["rate_hz"] != 12.5 + unit % 7:
        raise AssertionError(f"this is not the summary of {unit}: {result}")


@contextmanager
def _backend(node: LabNode, directory: Path) -> Iterator[None]:
    script = directory / "summaries.py"
    script.write_text(BACKEND)
    process = subprocess.Popen([sys.executable, str(script)], env=node.environ, stdout=subprocess.PIPE)
    try:
        if process.stdout is None or process.stdout.readline() != b"ready\n":
            raise AssertionError("the task backend did not begin")
        yield
    finally:
        process.terminate()
        process.communicate()
