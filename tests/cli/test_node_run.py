"""node run, node key and ephemeral_node, with a real hub, a real other node, and real processes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab
from kachery_fast.client.connection import NodeConnection
from kachery_fast.config import load_settings
from kachery_fast.errors import InvalidSetting, KacheryError, NodeError, NotPermitted
from kachery_fast.node.identity import load_identity
from kachery_fast.protocol.signing import private_key, public_id
from tests.cli.commands import PROGRAM, Program
from tests.system.support import QUICK, make_recording, store, wait_until

SEED = bytes(range(100, 132))
NODE_ID = public_id(private_key(SEED))
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("other")
        yield lab


@pytest.fixture(scope="module")
def uri(lab: Lab) -> str:
    return store(lab.nodes["other"], make_recording(lab.directory / "recording", 600_000))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    return place


def run(lab: Lab, place: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, "node", "run", "--dir", str(place), *arguments], env={**lab.environ, **environ},
                          capture_output=True, text=True, timeout=90, check=False)


def members(lab: Lab) -> set[str]:
    return {node["node"] for node in lab.owner("show", "demo")["members"]}


def processes_of(place: Path) -> list[int]:
    """The processes that have this path in their open files, as a node has its log."""
    found = []
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(str(place) in os.readlink(descriptor) for descriptor in process.iterdir()):
                found.append(int(process.parent.name))
        except OSError:
            continue
    return found


def hold(lab: Lab, place: Path, *, stderr: int | None = None,
         **environ: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Begin a run whose command goes on until it is ended, and return it with the command's environment."""
    code = f"{SHOW}; import sys, time; sys.stdout.flush(); time.sleep(600)"
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would the command
    process = subprocess.Popen([*PROGRAM, "node", "run", "--dir", str(place), "--join", lab.invite(), "--",
                                sys.executable, "-c", code], env={**lab.environ, **environ}, stdout=subprocess.PIPE,
                               stderr=stderr, stdin=subprocess.DEVNULL, text=True, start_new_session=True)
    signal.signal(signal.SIGHUP, former)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def test_a_command_loads_through_its_node_and_nothing_is_left(lab: Lab, uri: str, place: Path) -> None:
    before = members(lab)
    done = run(lab, place, "--join", lab.invite(), "--label", "ci", "--", "sh", "-c",
               f"{sys.executable} -m kachery_fast load '{uri}' && exit 7")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.startswith(str(place))
    assert not list(place.iterdir())
    assert not processes_of(place)
    assert members(lab) == before


def test_the_key_is_nowhere_on_the_disk_nor_with_the_command(lab: Lab, place: Path) -> None:
    process, environ = hold(lab, place, KACHERY_NODE_PRIVATE_KEY=SEED.hex(), KACHERY_DIRECT_HUB="http://127.0.0.1:9")
    try:
        assert not {"KACHERY_NODE_PRIVATE_KEY", "KACHERY_DIRECT_HUB"} & set(environ)
        assert (environ["KACHERY_DAEMON_HOST"], environ["KACHERY_CHANNEL"]) == ("127.0.0.1", "demo")
        forms = [SEED, SEED.hex().encode(), base64.b64encode(SEED)[:40],
                 base64.b64encode(bytes.fromhex("302e020100300506032b657004220420") + SEED)[24:60]]
        files = [path for path in place.rglob("*") if path.is_file()]
        assert {"kachery-node-id", "public.pem", "node.log"} <= {path.name for path in files}
        for path in files:
            assert path.name != "private.pem"
            assert not any(form in path.read_bytes() for form in forms), path
        for pid in processes_of(place):
            for name in ("cmdline", "environ"):
                if pid != process.pid:
                    assert SEED.hex().encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert NodeConnection(load_settings(environ)).info()["nodeId"] == NODE_ID
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(place.iterdir())
    lab.owner("remove-node", "demo", NODE_ID)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_and_then_the_node(lab: Lab, place: Path, number: signal.Signals) -> None:
    before = members(lab)
    process, _ = hold(lab, place)
    assert len(members(lab)) == len(before) + 1
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert not list(place.iterdir())
    assert not processes_of(place)
    assert members(lab) == before


def test_a_node_ends_when_who_started_it_is_killed(lab: Lab, place: Path) -> None:
    before = members(lab)
    process, environ = hold(lab, place)
    process.kill()
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    try:
        wait_until(lambda: not list(place.iterdir()), "the directory is removed")
        wait_until(lambda: not processes_of(place), "the node has ended")
        assert members(lab) == before
        assert not NodeConnection(load_settings(environ)).is_running()
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the command, which was alone by then


def test_an_identity_of_the_environment_keeps_its_permissions(lab: Lab, uri: str, place: Path) -> None:
    key = {"KACHERY_NODE_PRIVATE_KEY": f" {SEED.hex().upper()}\n"}
    done = run(lab, place, "--join", lab.invite("requestFiles"), "--", "true", **key)
    assert (done.returncode, done.stderr) == (0, "")
    assert NODE_ID in members(lab)
    lab.owner("grant", "demo", NODE_ID, "requestFeeds")
    second = run(lab, place, "--hub", lab.hub_url, "--", *PROGRAM, "node", "info", "--json", **key)
    [hub] = json.loads(second.stdout)["hubs"]
    assert set(hub["channels"][0]["permissions"]) == {"requestFiles", "requestFeeds"}
    assert run(lab, place, "--hub", lab.hub_url, "--", *PROGRAM, "load", uri, **key).returncode == 0
    lab.owner("remove-node", "demo", NODE_ID)


def test_what_cannot_be_done_is_said_and_nothing_is_left(lab: Lab, place: Path) -> None:
    unknown = run(lab, place, "--hub", lab.hub_url, "--", "true")
    assert (unknown.returncode, "not registered" in unknown.stderr) == (NotPermitted.exit_code, True)
    assert "COMMAND" not in run(lab, place, "--join", "nonsense", "--", "true").stderr
    none = run(lab, place)
    assert (none.returncode, "kachery-fast node run --join LINK -- " in none.stderr) == (2, True)
    absent = run(lab, place, "--", "/no/such/program")
    assert (absent.returncode, "'/no/such/program' cannot be run" in absent.stderr) == (2, True)
    other = run(lab, place, "--join", lab.invite(), "--channel", "elsewhere", "--", "true")
    assert (other.returncode, "elsewhere" in other.stderr) == (3, True)
    assert not list(place.iterdir())
    assert len(members(lab)) == 1


def test_a_key_wants_a_hub_or_an_invitation(place: Path, tmp_path: Path) -> None:
    program = Program(tmp_path / "store", KACHERY_NODE_PRIVATE_KEY=SEED.hex())
    done = program.run("node", "run", "--dir", str(place), "--", "true")
    assert (done.returncode, "--hub URL" in done.stderr, "--join LINK" in done.stderr) == (2, True, True)
    assert SEED.hex() not in done.stderr
    assert not list(place.iterdir())


def test_with_neither_hub_nor_invitation_the_node_is_on_no_channel(place: Path, tmp_path: Path) -> None:
    program = Program(tmp_path / "store", KACHERY_CHANNEL="of-another-node")
    environ = json.loads(program.ok("node", "run", "--dir", str(place), "--", sys.executable, "-c", SHOW))
    assert "KACHERY_CHANNEL" not in environ
    assert environ["KACHERY_STORAGE_DIR"].startswith(str(place))


@pytest.mark.parametrize("text", ["ab" * 31, "ab" * 33, "xy" * 32, "ab " * 32, "nonsense"])
def test_a_bad_key_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    program = Program(tmp_path / "store", KACHERY_NODE_PRIVATE_KEY=text)
    for words in (["node", "start"], ["node", "run", "--", "true"]):
        done = program.run(*words)
        assert done.returncode == InvalidSetting.exit_code
        assert "KACHERY_NODE_PRIVATE_KEY" in done.stderr
        assert "64 hex digits" in done.stderr
        assert text not in done.stderr


def test_a_node_of_an_identity_in_memory_starts_as_any_other(tmp_path: Path) -> None:
    program = Program(tmp_path / "store", KACHERY_NODE_PRIVATE_KEY=SEED.hex())
    with program.node() as started:
        assert started["nodeId"] == NODE_ID
        assert not (program.storage_dir / "private.pem").exists()


def test_the_key_of_another_node_is_not_overwritten(tmp_path: Path) -> None:
    load_identity(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NodeError, match="KACHERY_NODE_PRIVATE_KEY"):
        load_identity(tmp_path, SEED.hex())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_variable_that_was_forgotten_once_does_not_lock_the_node_out(tmp_path: Path) -> None:
    program = Program(tmp_path / "store", KACHERY_NODE_PRIVATE_KEY=SEED.hex())
    with program.node():
        pass
    del program.env["KACHERY_NODE_PRIVATE_KEY"]
    link = "http://127.0.0.1:1/join/0123456789abcdef"
    for words in (["start"], ["start", "--detach"], ["join", link], ["leave", "demo"]):
        done = program.run("node", *words)
        assert done.returncode == NodeError.exit_code
        assert "If the node was started with KACHERY_NODE_PRIVATE_KEY, set the variable as it was then." in done.stderr
    program.env["KACHERY_NODE_PRIVATE_KEY"] = SEED.hex()
    with program.node() as started:
        assert started["nodeId"] == NODE_ID


@pytest.mark.parametrize("how", ["command", "notebook"])
def test_a_node_that_cannot_leave_its_channel_says_how_to_remove_it(place: Path, tmp_path: Path, how: str) -> None:
    with Lab(tmp_path / "lab", environ=QUICK) as lab:
        lab.start_hub()
        link = lab.invite()
        if how == "command":
            process, _ = hold(lab, place, stderr=subprocess.PIPE)
        else:
            code = (f"import os, kachery_fast as kf\nwith kf.ephemeral_node({link!r}, directory={str(place)!r}):\n"
                    " print('{}', flush=True)\n input()")
            process = subprocess.Popen([sys.executable, "-c", code], env=lab.environ, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            assert process.stdout is not None
            process.stdout.readline()
        (node_id,) = members(lab)
        lab.hub.stop()
        if how == "command":
            process.terminate()
        _, told = process.communicate(None if how == "command" else "\n", timeout=60)
        assert process.returncode == (128 + signal.SIGTERM if how == "command" else 0)
        removal = f"kachery-fast channel remove-node demo {node_id} --hub {lab.hub_url}"
        assert f"is still a member of demo at {lab.hub_url}: ask its owner to remove it by: {removal} (" in told
        assert not list(place.iterdir())
        lab.start_hub()
        assert members(lab) == {node_id}
        lab.owner(*removal.split()[2:-2])
        assert members(lab) == set()


def test_a_key_is_made_with_its_node_id(tmp_path: Path) -> None:
    program = Program(tmp_path / "store")
    first, second = program.json("node", "key"), program.json("node", "key")
    assert first["privateKey"] != second["privateKey"]
    assert first["nodeId"] == public_id(private_key(bytes.fromhex(first["privateKey"])))
    assert "node id: " in program.ok("node", "key")
    assert not program.storage_dir.exists()


def test_a_notebook_has_a_node_within_a_block(lab: Lab, uri: str, place: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KACHERY_") and "TEST" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KACHERY_CHANNEL", "before")
    before, known = dict(os.environ), members(lab)
    with kf.ephemeral_node(lab.invite(), directory=place) as node:
        assert node.channels == ["demo"]
        assert node.node_id in members(lab)
        assert str(kf.load_file(uri)).startswith(str(node.storage_dir))
    node.close()
    assert dict(os.environ) == before
    assert not list(place.iterdir())
    assert members(lab) == known
    with pytest.raises(KacheryError):
        kf.ephemeral_node("nonsense", directory=place)
    assert dict(os.environ) == before
    assert not list(place.iterdir())


def test_a_program_that_forgets_its_node_leaves_none(lab: Lab, place: Path) -> None:
    code = f"import kachery_fast as kf; kf.ephemeral_node({lab.invite()!r}, directory={str(place)!r})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=lab.environ, capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(place.iterdir())
    assert not processes_of(place)
