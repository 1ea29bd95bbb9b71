"""``node join HUB_URL`` and ``nodes``: a hub, nodes and their owners' commands, in processes of their own."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.engine import Connection

from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.hub import identity
from kachery_fast.hub.registry import Registry, registry_url
from tests.cli.commands import PROGRAM

ANNA = "anna@lab.org"
PATIENCE_SECONDS = 60


class Person:
    """Somebody with an account at the lab's hub, at his own machine."""

    def __init__(self, lab: Lab, token: str) -> None:
        self.environ = {**lab.environ, "KACHERY_HUB_TOKEN": token}
        self.hub_url = lab.hub_url

    def run(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*PROGRAM, *arguments, "--hub", self.hub_url], env=self.environ, input=typed, text=True,
                              capture_output=True, timeout=PATIENCE_SECONDS, check=False)

    def ok(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("nodes"), environ={"KACHERY_CHANNEL_REFRESH_SECONDS": "0.5"}) as made:
        made.start_hub()
        yield made


@pytest.fixture(scope="module")
def owner(lab: Lab) -> Person:
    """The channel's owner."""
    return Person(lab, lab.owner_token)


@pytest.fixture(scope="module")
def anna(lab: Lab) -> Person:
    """The owner of nodes, and of nothing else."""
    def add(connection: Connection) -> str:
        identity.ensure_owner(connection, ANNA, 1)
        return identity.issue_owner_token(connection, ANNA, 1)

    async def scenario() -> str:
        registry = Registry(registry_url("", lab.hub_dir))
        await registry.open()
        try:
            return await registry.call(add)
        finally:
            await registry.close()

    return Person(lab, asyncio.run(scenario()))


class Joining:
    """``node join`` at the lab's hub, which has shown its code and waits."""

    def __init__(self, lab: Lab, node: LabNode, *arguments: str) -> None:
        self.process = subprocess.Popen([*PROGRAM, "node", "join", lab.hub_url, *arguments], env=node.environ,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said = ""
        while not self.said.endswith(("}\n", "Ctrl-C ends that.\n")):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()
            self.said += line
        (self.code,) = set(re.findall(r"[A-Z]{5}-[A-Z]{5}", self.said))

    def end(self) -> tuple[int, str, str]:
        """Wait until it has ended; return its exit code, and what it said since, on the one output and the other."""
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, out, err


def channels_of(node: LabNode) -> dict[str, Any]:
    return {channel["name"]: channel for hub in node.json("node", "info")["hubs"] for channel in hub["channels"]}


def test_a_node_is_approved_asks_for_a_channel_and_is_let_in(lab: Lab, owner: Person, anna: Person) -> None:
    node = lab.nodes["rig-1"] = LabNode(lab, "rig-1")
    node.start(connected=False)
    joining = Joining(lab, node, "--label", "rig-1", "--channel", "demo", "--permissions", "requestFiles,provideFiles")
    assert f"Open {lab.hub_url}/approve?code={joining.code} in a browser" in joining.said
    assert f"kachery-fast nodes approve {joining.code} --hub {lab.hub_url}" in joining.said

    # Who says no to what is shown has decided nothing.
    looked = anna.run("nodes", "approve", joining.code, typed="n\n")
    assert looked.returncode == 130
    assert "calls itself rig-1" in looked.stderr
    assert "wants to be on the channel demo: provideFiles requestFiles" in looked.stderr
    approved = anna.run("nodes", "approve", joining.code, typed="y\n")
    assert (approved.returncode, approved.stdout) == (0, (
        f"The node rig-1 is yours now ({ANNA}).\n"
        "  demo: waits for the channel's owner to grant provideFiles requestFiles\n"))
    code, out, err = joining.end()
    assert (code, err) == (0, "")
    node_id = node.json("node", "info")["nodeId"]
    assert out.startswith(f"This node belongs to {ANNA} at {lab.hub_url}. It asks to be let in to the channel demo")
    assert f"kachery-fast channel grant demo {node_id[:16]}" in out
    assert channels_of(node) == {}

    assert f"rig-1  of {ANNA}, asks to be let in: provideFiles requestFiles" in owner.ok("channel", "show", "demo")
    owner.ok("channel", "grant", "demo", node_id[:16], "requestFiles", "requestTasks")
    end = time.monotonic() + PATIENCE_SECONDS
    while not channels_of(node).get("demo", {}).get("connected"):  # the running node takes it up by itself
        assert time.monotonic() < end
    shown = anna.ok("nodes", "show", "rig-1")
    assert "  demo: requestFiles\n" in shown
    assert "    not provideFiles: the channel's owner has not granted provideFiles\n" in shown
    assert "    not requestTasks: the node's owner has not asked for requestTasks\n" in shown
    assert "requestFeeds" not in shown
    assert anna.ok("nodes", "request", "rig-1", "demo", "all").startswith("demo: requestFiles requestTasks\n")
    listed = anna.ok("nodes", "list")
    assert re.search(rf"{node_id[:16]}  rig-1  1 channel  version \S+  seen \d{{4}}-\d\d-\d\d", listed)
    assert anna.json("nodes", "show", "rig-1")["memberships"][0]["channelOwner"] == "lab@localhost"

    # Once more, with nothing left to approve.
    assert "It is on the channel demo, and may requestFiles, requestTasks." in node.run(
        "node", "join", lab.hub_url, "--channel", "demo").stdout.decode()
    assert "not on 'demo' any more" in anna.ok("nodes", "withdraw", "rig-1", "demo")
    assert "it was on 0 channels" in anna.ok("nodes", "forget", "rig-1")
    assert anna.ok("nodes", "list") == f"{ANNA} has no nodes yet. On a machine: kachery-fast node join {lab.hub_url}\n"


def test_a_join_that_was_broken_off_goes_on_when_it_is_run_again(lab: Lab, anna: Person) -> None:
    node = LabNode(lab, "rig-2")
    joining = Joining(lab, node, "--json")
    first = json.loads(joining.said)
    assert first["link"] == f"{lab.hub_url}/approve?code={first['code']}"
    assert first["state"] == "waiting"
    joining.process.send_signal(signal.SIGINT)
    code, out, err = joining.end()
    assert (code, out) == (130, "")
    assert "run the same command again" in err
    assert "Traceback" not in err
    again = Joining(lab, node, "--json")
    again.process.send_signal(signal.SIGINT)
    assert again.end()[0] == 130
    void = anna.run("nodes", "approve", joining.code, "--yes")
    assert (void.returncode, void.stdout) == (3, "")
    assert anna.json("nodes", "approve", again.code, "--yes")["owner"] == ANNA
    done = node.run("node", "join", lab.hub_url, "--json")
    (line,) = done.stdout.decode().splitlines()
    result = json.loads(line)
    assert (result["state"], result["owner"], result["channels"], result["running"]) == ("approved", ANNA, {}, False)
    assert "node join" in node.run("node", "join", lab.hub_url).stdout.decode(), "how to ask for a channel"


def test_whoever_has_the_code_can_deny_the_node(lab: Lab, anna: Person) -> None:
    node = LabNode(lab, "rig-3")
    joining = Joining(lab, node)
    assert "was not approved" in anna.ok("nodes", "deny", joining.code.lower())
    code, out, err = joining.end()
    assert (code, out) == (4, "")
    assert "whoever entered the code denied it" in err
    assert not (node.storage_dir / "kachery-fast.json").exists(), "the hub is not remembered"


def test_a_hub_that_is_away_for_a_while_is_waited_for(lab: Lab, anna: Person) -> None:
    node = LabNode(lab, "rig-4", KACHERY_RETRY_ATTEMPTS_MAX="1")
    joining = Joining(lab, node)
    lab.hub.stop()
    lab.start_hub()
    anna.ok("nodes", "approve", joining.code, "--yes")
    assert joining.end()[0] == 0


def test_a_node_that_came_by_an_invitation_needs_no_approval_until_it_asks_for_more(
    lab: Lab, owner: Person, anna: Person
) -> None:
    node = LabNode(lab, "rig-5")
    node.join(lab.invite())
    assert "It is on: demo" in node.run("node", "join", lab.hub_url).stdout.decode()
    owner.ok("channel", "create", "second")
    joining = Joining(lab, node, "--channel", "second", "--json")
    refused = anna.run("nodes", "approve", joining.code, "--yes")
    assert refused.returncode == 4
    assert "belongs to lab@localhost, who would have to forget it first" in refused.stderr
    assert "belongs to lab@localhost" in owner.run("nodes", "approve", joining.code, typed="n\n").stderr
    owner.ok("nodes", "approve", joining.code, "--yes")
    code, out, _ = joining.end()
    result = json.loads(out)
    assert (code, result["standing"], list(result["channels"])) == (0, "asked", ["demo"])


@pytest.mark.parametrize(("arguments", "exit_code", "said"), [
    (["nonsense"], 2, "neither an invitation"), (["hub.example.org:20440"], 2, "neither an invitation"),
    (["http://127.0.0.1:9/join/x", "--channel", "demo"], 2, "names its channel"),
    (["http://127.0.0.1:9", "--permissions", "all"], 2, "Name it with --channel"),
    (["http://127.0.0.1:9"], 5, "cannot be reached"), (["ftp://hub"], 2, "not a hub's address"),
    (["HUB", "--channel", "nope"], 3, "no channel 'nope'"),
    (["HUB", "--channel", "demo", "--permissions", "x"], 2, "permission"),
])
def test_a_join_that_cannot_be_says_why(lab: Lab, arguments: list[str], exit_code: int, said: str) -> None:
    node = LabNode(lab, "nowhere", KACHERY_RETRY_ATTEMPTS_MAX="1")
    done = node.run("node", "join", *(lab.hub_url if word == "HUB" else word for word in arguments))
    assert (done.returncode, done.stdout) == (exit_code, b"")
    assert said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
