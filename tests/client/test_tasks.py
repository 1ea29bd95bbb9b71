"""Registering functions and asking for tasks, at a node that is on no channel and at one that says what a test wants.

Tasks between nodes are in tests/system.
"""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client import functions, tasks
from kachery_fast.client.storing import store_bytes
from kachery_fast.client.tasks import list_tasks, task_state
from kachery_fast.protocol.tasks import task_id
from tests.cli.commands import Program
from tests.client import task_functions
from tests.http_server import Handler, HttpServer


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, functions.TaskFunction]:
    """A registry of its own for each test."""
    fresh: dict[str, functions.TaskFunction] = {}
    monkeypatch.setattr(functions, "_registry", fresh)
    return fresh


# --- registering


def test_a_registered_function_stays_what_it_was(registry: dict[str, functions.TaskFunction]) -> None:
    def double(x: int) -> int:
        return 2 * x

    assert kf.taskfunction("lab/double", timeout_seconds=3)(double) is double
    assert double(4) == 8
    assert registry["lab/double"] == functions.TaskFunction("lab/double", "pure-calculation", double, 3, False)
    assert functions.find_function(double) == ("lab/double", registry["lab/double"])
    kf.taskfunction("lab/max", type="query")(max)
    kf.taskfunction("lab/act", type="action", idempotent=True)(task_functions.act)
    assert [function.to_dict()["kind"] for function in functions.registered_functions()] == [
        "pure-calculation", "query", "action"]


def test_a_cell_that_is_run_again_replaces_its_function(registry: dict[str, functions.TaskFunction]) -> None:
    cell = "import kachery_fast as kf\n@kf.taskfunction('lab/cell')\ndef f(x):\n    return x + {}\n"
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(cell.format(1), space)
    exec(cell.format(2), space)
    assert registry["lab/cell"].function(1) == 3


def test_two_functions_do_not_share_an_id() -> None:
    kf.taskfunction("lab/one")(task_functions.add)
    with pytest.raises(errors.InvalidArgument, match=r"'lab/one' is that of tests\.client\.task_functions\.add"):
        kf.taskfunction("lab/one")(task_functions.act)


async def coroutine() -> None:
    pass


@pytest.mark.parametrize(("arguments", "function", "pattern"), [
    ({"function_id": ""}, len, "cannot be the name"),
    ({"function_id": "x" * 201}, len, "200"),
    ({"function_id": "x", "type": "calculation"}, len, "kinds are"),
    ({"function_id": "x", "timeout_seconds": 0}, len, "above 0"),
    ({"function_id": "x", "timeout_seconds": float("nan")}, len, "above 0"),
    ({"function_id": "x", "timeout_seconds": float("inf")}, len, "above 0"),
    ({"function_id": "x", "type": "query", "idempotent": True}, len, "Only an action"),
    ({"function_id": "x"}, 7, "not a plain function"),
    ({"function_id": "x"}, coroutine, r"asyncio\.run"),
])
def test_what_cannot_be_a_task_is_refused(arguments: dict[str, Any], function: Any, pattern: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=pattern):
        kf.taskfunction(**arguments)(function)


def test_nothing_is_offered_where_nothing_is_registered(program: Program) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"No function is registered; put @kf\.taskfunction"):
        kf.run_task_backend()
    kf.taskfunction("lab/add")(task_functions.add)
    with pytest.raises(errors.InvalidArgument, match="as no id; there are: lab/add"):
        kf.run_task_backend(task_function_ids=[])


# --- a real node


def test_a_node_on_no_channel_says_so(node: Program) -> None:
    with pytest.raises(errors.ChannelUnknown, match="it is on: none"):
        kf.request_task("lab/add", {"x": 1}, channel="lab")
    with pytest.raises(errors.KacheryError, match=r"channel"):
        kf.request_task("lab/add", {"x": 1})
    assert list_tasks() == []
    with pytest.raises(errors.TaskUnknown):
        task_state("0" * 32)


# --- a node by the book


class Book:
    """Answers as node/task_api.py has it, with the states of ``states`` one after the other."""

    def __init__(self, program: Program) -> None:
        program.storage_dir.mkdir(parents=True, exist_ok=True)
        (program.storage_dir / "client-auth").write_text("c0de")
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.states: Callable[[str, dict[str, Any]], dict[str, Any]] = lambda path, body: state()
        book = self

        class Requests(Handler):
            def post(self) -> None:
                body = self.body()
                book.said.append((self.path, body))
                try:
                    self.answer(book.states(self.path, body))
                except errors.KacheryError as error:
                    self.answer(error.to_dict(), error.http_status)

        self.server = HttpServer(Requests)


@pytest.fixture
def book(program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    book = Book(program)
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(book.server.port))
    yield book
    book.server.close()


def state(status: str = "waiting", revision: int = 1, **more: Any) -> dict[str, Any]:
    return {"request": "r1", "task": "t1", "function": "lab/f", "kind": "pure-calculation", "channel": "demo",
            "status": status, "progress": None, "text": "", "cached": False, "result": None, "resultTime": None,
            "node": "", "nodeLabel": "", "error": None, "revision": revision, **more}


def test_what_is_asked_for_is_what_was_registered(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    kf.taskfunction("lab/act", type="action")(task_functions.act)
    monkeypatch.setenv("KACHERY_CHANNEL", "demo")
    book.states = lambda path, body: state("finished")
    kf.request_task(task_functions.act, {"path": "x"})
    kf.request_task("lab/act", {"path": "x"}, channel="other")
    kf.request_task("lab/else", type="query", task_id="a" * 32)
    bodies = [body for _, body in book.said]
    assert [(body["function"], body["kind"], body["channel"], body["kwargs"]) for body in bodies] == [
        ("lab/act", "action", "demo", {"path": "x"}), ("lab/act", "action", "other", {"path": "x"}),
        ("lab/else", "query", "demo", {})]
    assert len({body["id"] for body in bodies}) == 3
    assert bodies[2]["id"] == "a" * 32
    assert all(len(body["id"]) == 32 for body in bodies)


def test_a_task_that_has_ended_at_once_costs_one_call(book: Book) -> None:
    book.states = lambda path, body: state("finished", result={"json": [1]}, cached=True, resultTime=5000,
                                           node="ab", nodeLabel="A")
    task = kf.request_task("lab/f", {"x": 1})
    assert task.wait(0)
    assert (task.status, task.result, task.cached, task.node, task.node_label) == ("finished", [1], True, "ab", "A")
    assert task.result_time is not None
    assert task.result_time.isoformat() == "1970-01-01T00:00:05+00:00"
    assert task.result is task.result
    assert [path for path, _ in book.said] == ["/api/task/request"]
    assert book.said[0][1]["id"] is None
    assert book.said[0][1]["waitFor"] == "look", "it does not wait for what has to be run"


def test_waiting_goes_on_from_what_was_seen(book: Book) -> None:
    answers = iter([state(revision=3), state("queued", 4), state("running", 7, progress=0.5, text="half"),
                    state("finished", 9, result={"json": None})])
    book.states = lambda path, body: next(answers)
    task = kf.request_task("lab/f")
    assert task.wait()
    assert task.result is None
    assert [body.get("seen") for _, body in book.said] == [None, 3, 4, 7]


def test_a_wait_ends_in_time_and_a_look_costs_a_call_now_and_then(
        book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(body["waitMsec"] / 1000)
        return state("running", progress=0.25, text="on")

    book.states = answer
    task = kf.request_task("lab/f")
    begun = time.monotonic()
    assert not task.wait(0.3)
    assert 0.25 < time.monotonic() - begun < tasks._SLICE_SECONDS
    before = len(book.said)
    monkeypatch.setattr(tasks, "_FRESH_SECONDS", 0.0)
    assert task.status == "running"
    monkeypatch.setattr(tasks, "_FRESH_SECONDS", 60.0)
    assert (task.status, task.progress, task.text, task.error_message) == ("running", 0.25, "on", None)
    assert len(book.said) - before == 1
    with pytest.raises(errors.TaskPending, match=r"'t1' \('lab/f'\) has not ended .* it is running"):
        _ = task.result


def test_a_node_that_has_forgotten_is_asked_again_by_the_same_id(book: Book) -> None:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/api/task/wait":
            raise errors.TaskUnknown(task=body["request"])
        return state("finished" if len(book.said) > 1 else "waiting")

    book.states = answer
    task = kf.request_task("lab/act", type="action")
    assert task.wait(10)
    requests = [body for path, body in book.said if path == "/api/task/request"]
    assert len(requests) == 2
    assert requests[0]["id"] == requests[1]["id"]


def test_what_went_wrong_is_raised_as_it_is(book: Book) -> None:
    failed = errors.TaskFailed(function="lab/f", type="ValueError", reason="no", traceback="Traceback\n")
    book.states = lambda path, body: state("error", error=failed.to_dict())
    task = kf.request_task("lab/f")
    for _ in range(2):
        with pytest.raises(errors.TaskFailed, match="'lab/f' raised ValueError: no"):
            _ = task.result
    assert (task.error_message, task.traceback) == (failed.message, "Traceback\n")
    book.states = lambda path, body: state("cancelled")
    with pytest.raises(errors.Cancelled, match="lab/f"):
        _ = kf.request_task("lab/f").result
    book.states = lambda path, body: state("error")
    with pytest.raises(errors.NodeError, match="does not say"):
        _ = kf.request_task("lab/f").result


@pytest.mark.parametrize("result", [{}, {"file": 7, "format": "npy"}, [], "text"])
def test_a_result_that_makes_no_sense_is_an_error(book: Book, result: Any) -> None:
    book.states = lambda path, body: state("finished", result=result)
    with pytest.raises(errors.NodeError):
        _ = kf.request_task("lab/f").result


def test_results_that_are_files_are_loaded(book: Book) -> None:
    import numpy as np

    files = {"npy": kf.store_npy(np.arange(3)), "json": kf.store_json({"a": 1}), "text": kf.store_text("ü")}
    found = {}
    for file_format, uri in files.items():
        given = {"file": uri, "format": file_format}
        book.states = lambda path, body, given=given: state("finished", result=given)  # type: ignore[misc]
        found[file_format] = kf.request_task("lab/f").result
    assert list(found["npy"]) == [0, 1, 2]
    assert (found["json"], found["text"]) == ({"a": 1}, "ü")
    given = {"file": files["text"], "format": "bytes"}
    book.states = lambda path, body: state("finished", result=given)
    assert kf.request_task("lab/f").result == "ü".encode()
    big = bytes(20_000_000)
    given = {"file": store_bytes(big, "big.dat"), "format": "bytes"}
    book.states = lambda path, body: state("finished", result=given)
    tracemalloc.start()
    assert kf.request_task("lab/f").result == big
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1.5 * len(big), "it is in memory once"
    unknown = {"file": files["text"], "format": "pickle"}
    book.states = lambda path, body: state("finished", result=unknown)
    with pytest.raises(errors.NodeError, match="pickle"):
        _ = kf.request_task("lab/f").result


def test_taking_back_is_told_to_the_node(book: Book) -> None:
    book.states = lambda path, body: state("cancelled" if path == "/api/task/cancel" else "running")
    task = kf.request_task("lab/f")
    task.cancel()
    assert book.said[-1] == ("/api/task/cancel", {"request": "r1"})
    assert task.status == "cancelled"


def test_more_tasks_than_threads_can_be_awaited_at_once(book: Book) -> None:
    """The first hundred end last, so that the others only get their turn if nobody keeps a thread."""
    ended = threading.Event()
    begun = time.monotonic()

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        number = body.get("kwargs", {}).get("x") if path == "/api/task/request" else int(body["request"])
        if path == "/api/task/request":
            return {**state("waiting"), "request": str(number)}
        if number == 149:
            ended.set()
        if number < 100 and not ended.wait(body["waitMsec"] / 1000):
            return {**state("running"), "request": str(number)}
        return {**state("finished", result={"json": number}), "request": str(number)}

    async def ask() -> list[Any]:
        tasks = [kf.request_task("lab/f", {"x": x}) for x in range(150)]
        return list(await asyncio.gather(*tasks))

    book.states = answer
    assert asyncio.run(ask()) == list(range(150))
    assert time.monotonic() - begun < 60


def test_the_identity_of_a_calculation_is_that_of_2022() -> None:
    canonical = b'{"functionId":"lab/f","kwargs":{"a":1,"b":[2,"x"]}}'
    import hashlib

    assert task_id("lab/f", {"b": [2, "x"], "a": 1}) == hashlib.sha1(canonical).hexdigest()


def test_the_front_door_has_the_names(tmp_path: Path) -> None:
    assert {"Task", "report_progress", "request_task", "run_task_backend", "taskfunction"} <= set(kf.__all__)
    assert kf.Task.__name__ == "Task"
