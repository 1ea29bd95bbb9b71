"""Who may compute and who may ask: what a result in the bucket says of its maker, and rights that are taken away."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.protocol.names import result_object_name
from kachery_fast.protocol.tasks import check_result, result_id
from tests.system.support import QUICK, wait_until
from tests.system.task_backends import ALL, backend, be, count


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("A", permissions=ALL)
        lab.add_node("B", permissions=["requestTasks", "requestFiles"])
        lab.add_node("C", permissions=["requestTasks", "requestFiles"])
        yield lab


def node_id(node: LabNode) -> str:
    return str(node.connection.info()["nodeId"])


def object_path(lab: Lab, found_as: str) -> Path:
    """Where the bucket keeps a result."""
    return lab.bucket_dir.parent / result_object_name(lab.channel, found_as)


def done(function: str, kwargs: dict[str, Any], **more: Any) -> kf.Task:
    task = kf.request_task(function, kwargs, **more)
    assert task.wait(60), task
    assert task.status == "finished", task.error_message
    return task


def test_a_result_in_the_bucket_says_who_computed_what_and_when(lab: Lab, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, lab.nodes["B"])
    log = str(tmp_path / "log")
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("pure-calculation", "lab/slow-square", {"x": 9, "log": log}), ("query", "lab/now", {"log": log}),
        ("pure-calculation", "lab/array", {"n": 1000})]
    with backend(lab.nodes["A"], tmp_path):
        for kind, function, kwargs in asked:
            before_ms = time.time() * 1000
            task = done(function, kwargs, type=kind)
            after_ms = time.time() * 1000
            found_as = result_id(kind, function, kwargs)
            data = object_path(lab, found_as).read_bytes()
            found = check_result(data, found_as, lab.channel)  # the signature, too
            assert (found.kind, found.function, found.kwargs, found.task) == (kind, function, kwargs, task.task_id)
            assert found.node_id == task.node == node_id(lab.nodes["A"])
            assert before_ms - 1000 <= found.started_ms <= found.finished_ms <= after_ms + 1000
            assert task.result_time is not None
            assert round(task.result_time.timestamp() * 1000) == found.finished_ms
            if function == "lab/array":
                assert found.result["format"] == "npy"
                assert kf.load_npy(found.result["file"]).shape == task.result.shape == (500, 2)
            else:
                assert found.result == {"json": task.result}
            if function == "lab/slow-square":
                assert found.finished_ms - found.started_ms >= 900, "it slept for a second"
            with pytest.raises(errors.ResultRefused, match="not signed by the node"):
                check_result(data.replace(b'"started":%d' % found.started_ms, b'"started":%d' % (found.started_ms - 1)),
                             found_as, lab.channel)


def test_a_result_of_a_node_that_may_no_more_provide_is_refused_and_computed_anew(
        lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    kwargs = {"x": 21, "log": str(log)}
    runner = lab.add_node("runner", permissions=ALL)
    maker = node_id(runner)
    with backend(runner, tmp_path / "first"):
        be(monkeypatch, lab.nodes["B"])
        task = done("lab/square", kwargs)
        assert task.node == maker
    assert object_path(lab, task.task_id).exists()
    lab.owner("revoke", lab.channel, maker, "provideTasks")
    lab.nodes["C"].connection.reload()  # else it may go by what the hub said a moment ago
    be(monkeypatch, lab.nodes["C"])
    refused = kf.request_task("lab/square", kwargs)
    assert refused.wait(60)
    with pytest.raises(errors.TaskNotTaken, match=rf"the node {maker[:16]}, which may not provide tasks") as caught:
        _ = refused.result
    assert ".." not in str(caught.value)
    with backend(lab.nodes["A"], tmp_path / "second"):
        anew = done("lab/square", kwargs)
    assert (anew.cached, anew.node) == (False, node_id(lab.nodes["A"]))
    assert anew.result == task.result
    assert count(log) == 2
    assert check_result(object_path(lab, task.task_id).read_bytes(), task.task_id, lab.channel).node_id == anew.node
    runner.program.stop()


def test_who_may_no_more_request_tasks_is_told_so(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, end = tmp_path / "started", tmp_path / "end"
    asker = lab.add_node("asker", permissions=["requestTasks", "requestFiles"])

    def refused() -> str:
        try:
            kf.request_task("lab/text", {"n": 3})
        except errors.NotPermitted as error:
            return str(error)
        return ""

    with backend(lab.nodes["A"], tmp_path):
        be(monkeypatch, asker)
        assert done("lab/text", {"n": 2}).result == "éé"
        waiting = kf.request_task("lab/wait", {"started": str(started), "end": str(end)})
        wait_until(started.exists, "it runs")
        assert not refused()
        lab.owner("revoke", lab.channel, node_id(asker), "requestTasks")
        wait_until(lambda: refused() != "", "the node has heard of it")
        assert re.search(f"requestTasks.*channel grant {lab.channel}", refused())
        assert waiting.wait(60), waiting
        with pytest.raises(errors.NotPermitted, match="requestTasks"):
            _ = waiting.result
        end.touch()
        lab.owner("grant", lab.channel, node_id(asker), "requestTasks")
        wait_until(lambda: not refused(), "it may again")
    asker.program.stop()
