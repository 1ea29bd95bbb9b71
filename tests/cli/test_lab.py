"""What the lab is made of; how it works is seen in all the tests of the system."""

from __future__ import annotations

import signal
import socket
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.cli.lab import Lab, free_port


def test_a_free_port_is_given_to_nobody_else_before_its_server_starts() -> None:
    port = free_port()
    given = set()
    for _ in range(40_000):  # more than there are
        with socket.socket() as anyone:
            anyone.bind(("127.0.0.1", 0))
            given.add(anyone.getsockname()[1])
    assert len(given) > 1000
    assert port not in given
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(server.getsockname()):
        pass


# Found by Python in the directory that PYTHONPATH names, before the program begins.
SLOW_HUB = """
import asyncio, sys
if sys.orig_argv[2:5] == ["kachery_fast", "hub", "--dir"]:
    from kachery_fast.net.hub import OwnerClient
    call = OwnerClient.call
    async def slow_call(self, *words, **fields):
        if words == ("createChannel",):
            await asyncio.sleep(4)
        return await call(self, *words, **fields)
    OwnerClient.call = slow_call
"""


def test_a_hub_that_has_started_has_its_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_HUB)
    with Lab(tmp_path / "lab", environ={"PYTHONPATH": str(tmp_path)}) as lab:
        lab.start_hub()
        assert lab.invite().startswith(lab.hub_url)


def test_a_program_that_is_starting_when_ctrl_c_comes_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    start = subprocess.Popen

    def interrupted_start(*words: Any, **options: Any) -> Any:
        process = start(*words, **options)
        started.append(process)
        signal.raise_signal(signal.SIGINT)  # before anybody else has the process
        return process

    with Lab(tmp_path / "lab") as lab:
        monkeypatch.setattr(subprocess, "Popen", interrupted_start)
        with pytest.raises(KeyboardInterrupt):
            lab.start_hub()
        assert lab.hub.running
    assert [process.returncode for process in started] != [None]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("change", ["closed = 1", "admin = 0"])
def test_a_hub_runs_on_when_its_own_owner_was_shut_out_by_another_admin(tmp_path: Path, change: str) -> None:
    with Lab(tmp_path / "lab") as lab:
        lab.start_hub()
        assert lab.hub.stop() == 0
        registry = sqlite3.connect(lab.hub_dir / "hub.db")
        with registry:
            registry.execute(f"UPDATE owners SET {change}")
        registry.close()
        lab.hub.start()
        lab.hub.wait_until(lambda: lab.hub.has_printed("cannot tell what to do next"), "the hub")
        with socket.create_connection(("127.0.0.1", lab.hub_port)):
            pass
        assert lab.hub.stop() == 0
