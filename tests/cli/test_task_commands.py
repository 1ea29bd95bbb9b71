"""The commands of ``task``, against a hub, a node and a backend in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast import errors
from kachery_fast.cli.lab import Lab, LabNode
from tests.system.support import QUICK, wait_until
from tests.system.task_backends import ALL, FUNCTIONS, Backend


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabNode]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        node = lab.add_node("A", permissions=ALL)
        place = tmp_path_factory.mktemp("functions")
        (place / "functions.py").write_text(FUNCTIONS)
        running = Backend(node, [sys.executable, "-m", "kachery_fast", "task", "backend", "functions.py"], place)
        try:
            running.wait_for("Offering")
            yield node
        finally:
            assert running.end() == 0


def refused(node: LabNode, code: int, *arguments: str) -> str:
    done = node.run(*arguments)
    assert (done.returncode, done.stdout) == (code, b""), done
    line = done.stderr.decode()
    assert line.startswith("Error: ")
    assert line.count("\n") == 1
    return line


def text_of(node: LabNode, *arguments: str) -> str:
    done = node.run(*arguments)
    assert (done.returncode, done.stderr) == (0, b""), done
    return done.stdout.decode()


def test_a_result_is_printed_as_json(node: LabNode, tmp_path: Path) -> None:
    printed = text_of(node, "task", "request", "lab/square", "x=5", f"log={tmp_path / 'log'}")
    assert json.loads(printed) == {"square": 25, "offset": 100}
    state = node.json("task", "request", "lab/square", "--kwargs", json.dumps({"x": 4, "log": str(tmp_path / "log")}),
                      "x=5")
    assert (state["status"], state["cached"], state["result"]) == (
        "finished", True, {"json": {"square": 25, "offset": 100}})
    assert json.loads(text_of(node, "task", "request", "lab/text", "n=2")) == "éé"


def test_a_file_is_printed_as_its_uri(node: LabNode) -> None:
    uri = text_of(node, "task", "request", "lab/bytes", "n=512").strip()
    assert uri.startswith("sha1://")
    assert node.run("cat", uri).stdout == bytes(range(256)) * 2


def test_an_action_is_done(node: LabNode, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert text_of(node, "task", "request", "--type", "action", "lab/act", f"log={log}") == "Done.\n"
    state = node.json("task", "request", "--type", "action", "lab/act", f"log={log}")
    again = node.json("task", "request", "--type", "action", "--id", state["task"], "lab/act", f"log={log}")
    assert again["status"] == "finished"
    assert len(log.read_text().splitlines()) == 2


def test_a_task_that_is_not_waited_for_is_looked_at_later(node: LabNode, tmp_path: Path) -> None:
    started, end = tmp_path / "started", tmp_path / "end"
    words = ["lab/wait", f"started={started}", f"end={end}"]
    request, status = text_of(node, "task", "request", *words, "--timeout", "0").split()[:2]
    assert status in ("waiting", "queued", "running")
    wait_until(started.exists, "it runs")
    wait_until(lambda: "running 50 % waiting for the end" in text_of(node, "task", "status", request), "progress")
    line = next(line for line in text_of(node, "task", "list").splitlines() if line.startswith(request))
    assert "lab/wait  demo  running 50 %" in line
    line = refused(node, errors.TaskPending.exit_code, "task", "request", *words, "--timeout", "0.5")
    assert "has not ended after" in line
    end.touch()
    assert json.loads(text_of(node, "task", "request", *words)) == "done"
    lines = text_of(node, "task", "status", request).splitlines()
    assert lines[0].endswith("finished")
    assert [line.split()[0] for line in lines[1:]] == ["by", "computed", '"done"']
    assert node.json("task", "status", request)["result"] == {"json": "done"}
    assert request in [state["request"] for state in node.json("task", "list")]


def test_what_goes_wrong_is_one_line_and_an_exit_code(node: LabNode) -> None:
    line = refused(node, 1, "task", "request", "lab/fail", "how=raise")
    assert "'lab/fail' raised ValueError: no spikes in 7" in line
    assert "died" in refused(node, 1, "task", "request", "lab/fail", "how=kill")
    assert "did not end within" in refused(node, errors.TaskHung.exit_code, "task", "request", "lab/hang")
    assert "lab/never" in refused(node, 3, "task", "request", "lab/never")
    assert "NAME=VALUE" in refused(node, 2, "task", "request", "lab/text", "n")
    assert "--kwargs is not JSON" in refused(node, 2, "task", "request", "lab/text", "--kwargs", "{")
    assert "JSON object" in refused(node, 2, "task", "request", "lab/text", "--kwargs", "[1]")
    assert "NaN" in refused(node, 2, "task", "request", "lab/text", "n=NaN").replace("nan", "NaN")
    assert "knows no task" in refused(node, 3, "task", "status", "0" * 32)
    done = node.run("task", "request", "lab/fail", "how=raise", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)
    assert (error["error"], error["details"]["type"]) == ("TaskFailed", "ValueError")
    failed = next(state for state in node.json("task", "list") if state["status"] == "error" and "raise" in str(state))
    assert "    ValueError: no spikes in 7" in text_of(node, "task", "status", failed["request"]).splitlines()


def test_ctrl_c_takes_the_request_back(node: LabNode, tmp_path: Path) -> None:
    started = tmp_path / "started"
    process = node.begin("task", "request", "lab/wait", f"started={started}", f"end={tmp_path / 'end'}")
    wait_until(lambda: started.exists() and started.read_text() != "", "it runs")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"Interrupted.\n")
    pid = int(started.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker is gone")


def test_a_terminal_shows_how_it_stands(node: LabNode, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    started, end = tmp_path / "started", tmp_path / "end"
    process = subprocess.Popen(
        [sys.executable, "-m", "kachery_fast", "task", "request", "lab/wait", f"started={started}", f"end={end}"],
        env=node.environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    try:
        shown, until = "", time.monotonic() + 60
        while "running 50 % waiting for the end" not in shown and time.monotonic() < until:
            if select.select([ours], [], [], 0.1)[0]:
                shown += os.read(ours, 4096).decode()
        assert "running 50 % waiting for the end" in shown
        end.touch()
        assert process.communicate(timeout=30)[0] == b'"done"\n'
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(("source", "content", "code", "pattern"), [
    ("absent.py", None, 3, "There is no file absent.py"),
    ("absent_module", None, 2, "There is no module 'absent_module'"),
    ("broken.py", "import kachery_fast\n1 / 0\n", 2, "broken.py cannot be imported: ZeroDivisionError: division"),
    ("needy.py", "import absent_module\n", 2, "No module named 'absent_module'"),
    ("empty.py", "", 2, "No function is registered"),
    ("notes.txt", "hello", 2, "is not a Python file"),
])
def test_a_backend_of_nothing_is_refused(node: LabNode, tmp_path: Path, source: str, content: str | None, code: int,
                                         pattern: str) -> None:
    if content is not None:
        (tmp_path / source).write_text(content)
    done = subprocess.run([sys.executable, "-m", "kachery_fast", "task", "backend", source], env=node.environ,
                          cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert pattern in done.stderr
    if source == "broken.py":
        assert "broken.py, line 2" in done.stderr


def test_a_backend_without_a_node_or_a_permission_says_so(node: LabNode, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(FUNCTIONS)
    done = node.run("task", "backend", str(tmp_path / "one.py"), "--channel", "elsewhere")
    assert done.returncode == 3
    assert b"is not on the channel 'elsewhere'" in done.stderr
    done = node.run("task", "backend", str(tmp_path / "one.py"), "--function", "lab/absent")
    assert done.returncode == 2
    assert b"as 'lab/absent'; there are: lab/square" in done.stderr
    alone = subprocess.run([sys.executable, "-m", "kachery_fast", "task", "backend", str(tmp_path / "one.py")],
                           env={**node.environ, "KACHERY_DAEMON_PORT": "9"}, capture_output=True, timeout=60,
                           check=False)
    assert alone.returncode == 5
    assert b"node start" in alone.stderr
