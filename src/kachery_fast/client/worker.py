"""The program of a worker process: takes calls of functions from the backend, one after the other.

It talks over one socket that it inherits, in messages of ``multiprocessing.connection``: ``("function", id, bytes)``
once for each function, pickled by cloudpickle; ``("job", Job)``, in which that function is left out; back come
``("begun",)`` before the function is called, and its ``Outcome``. When the socket closes, the backend is gone, and the
worker ends with everything that its functions have started.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from .running import Job, Outcome, describe_error, run_job

__all__ = ["main"]


def main(descriptor: int, path: list[str]) -> None:
    """Serve the backend at the other end of a socket.

    :param path: where the backend looks for modules.
    """
    os.set_inheritable(descriptor, False)  # a program started by a function must not hold it open
    sys.path[:] = path
    connection = Connection(descriptor)
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), name="kachery-fast-worker", daemon=True).start()
    functions: dict[str, bytes | Callable[..., Any]] = {}
    while True:
        message = jobs.get()
        if message[0] == "function":
            functions[message[1]] = message[2]
            continue
        outcome = _run(message[1], functions, connection)
        connection.send(outcome)


def _run(job: Job, functions: dict[str, bytes | Callable[..., Any]], connection: Connection) -> Outcome:
    try:
        function = functions[job.function_id]
        if isinstance(function, bytes):
            import pickle

            function = functions[job.function_id] = pickle.loads(function)  # noqa: S301 - from our own backend
    except BaseException as error:  # its module cannot be imported, for one
        return Outcome("error", error=describe_error(error))
    connection.send(("begun",))
    return run_job(replace(job, function=function))


def _receive(connection: Connection, jobs: queue.SimpleQueue[Any]) -> None:
    """Hand on what comes; in a thread of its own, so that the end of the backend is seen in the midst of a function."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            jobs.put(connection.recv())
    with contextlib.suppress(OSError):
        os.killpg(0, signal.SIGKILL)  # this process leads a group of its own
    os._exit(1)
