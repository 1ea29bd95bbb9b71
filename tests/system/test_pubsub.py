"""Channels whose messages go by NATS, or by another's broker, in real processes: hub, nodes, and the service."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kachery_fast.cli import program
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import KacheryError, NotAvailable
from tests.ably_service import API_KEY, AblyService, running_ably
from tests.nats_server import NatsServer, running_nats
from tests.system.support import (
    CHUNK_SIZE_BYTES,
    QUICK,
    finish,
    load,
    make_recording,
    received,
    store,
    wait_until,
)

SIZE = 60 * CHUNK_SIZE_BYTES + 12345
RATE_BYTES = 16 * CHUNK_SIZE_BYTES  # a second: a transfer takes about four seconds, and can be met in the middle
MESSAGES_PER_SECOND_MAX = 4


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="module")
def ably() -> Iterator[AblyService]:
    with running_ably() as service:
        yield service


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, nats: NatsServer, ably: AblyService) -> Iterator[Lab]:
    """A hub whose tokens live for three seconds, and two nodes on two channels: ``demo``, and ``away`` on NATS."""
    directory = tmp_path_factory.mktemp("lab")
    environ = {**QUICK, "KACHERY_BUCKET_RATE_BYTES_MAX": str(RATE_BYTES), "KACHERY_TOKEN_LIFE_SECONDS": "3",
               "KACHERY_HUB_ENGINE_HOSTS": f"{nats.hosts} {ably.host}"}
    with Lab(directory, environ=environ) as lab:
        lab.start_hub()
        (directory / "seed").write_text(f"{nats.signer.seed}\n")
        (directory / "key").write_text(API_KEY)
        lab.owner("create", "away")
        found = lab.owner("pubsub", "away", "--nats", nats.url(), "--account", nats.account.public, "--seed",
                          str(directory / "seed"))
        assert (found["name"], found["test"]["ok"]) == ("nats", True), found
        for name in ("A", "B"):
            node = lab.add_node(name, start=False)
            node.join(lab.owner("invite", "away")["link"])
            node.start()
        yield lab


def begin_load(lab: Lab, uri: str, channel: str) -> subprocess.Popen[bytes]:
    """Begin a load at B and return when a part of it has arrived."""
    b = lab.nodes["B"]
    process = b.begin("load", uri, "--json", "--channel", channel)
    wait_until(lambda: received(b) > 8 * CHUNK_SIZE_BYTES or process.poll() is not None, "a part has arrived")
    assert process.poll() is None, finish(process)
    return process


def connected(lab: Lab, channel: str) -> bool:
    return all(line["connected"] for node in lab.nodes.values() for hub in node.connection.info()["hubs"]
               for line in hub["channels"] if line["name"] == channel)


def test_a_file_moves_on_each_channel_by_its_own_service(lab: Lab, tmp_path: Path) -> None:
    for number, channel in enumerate(("demo", "away")):
        recording = make_recording(tmp_path / channel, 3 * CHUNK_SIZE_BYTES, seed=10 + number)
        found = load(lab.nodes["B"], store(lab.nodes["A"], recording), "--channel", channel)
        assert Path(found["path"]).read_bytes() == recording.read_bytes()
    assert lab.owner("traffic", "away")["bands"] == []
    assert sum(sum(line["messages"]) for line in lab.owner("traffic", "demo")["bands"]) > 0


def command(lab: Lab, *arguments: str) -> Result:
    """Run ``kachery-fast channel ...`` on the hub's machine, within this process."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("KACHERY_")}
    return CliRunner().invoke(program, ["channel", *arguments], env={**clean, "KACHERY_HUB_DIR": str(lab.hub_dir)})


def test_the_commands_say_by_what_messages_go_and_what_is_wrong_with_what_was_said(
    lab: Lab, nats: NatsServer, tmp_path: Path
) -> None:
    assert command(lab, "pubsub", "demo").stdout == "demo: messages go by the hub's own broker\n"
    assert command(lab, "pubsub", "away").stdout == "away: messages go by 'nats'\n"
    assert "  messages go by 'nats'\n" in command(lab, "show", "away").stdout
    assert command(lab, "engines").stdout == f"nats  {nats.url()}  used by away\n"
    seed, key, wrong = str(lab.directory / "seed"), str(lab.directory / "key"), tmp_path / "wrong"
    wrong.write_text("two\nlines")
    for arguments in (("--ably",), ("--ably", "--key", str(wrong)), ("--ably", "--key", seed), ("--key", key),
                      ("--nats", nats.url(), "--seed", seed), ("--nats", nats.url(), "--account", "A", "--seed", seed),
                      ("--own", "--use", "nats"), ("--own", "--as", "x"), ("--seed", seed), ("--endpoint", "x")):
        refused = command(lab, "pubsub", "demo", *arguments)
        assert refused.exit_code == 2, (arguments, refused.output)
        assert nats.signer.seed not in refused.output
    assert command(lab, "pubsub", "demo", "--ably", "--key", str(tmp_path / "none")).exit_code != 0
    assert command(lab, "engines", "--renew", "nats", "--credentials", key).exit_code == 2
    assert "'nats' has other credentials now." in command(
        lab, "engines", "--renew", "nats", "--credentials", seed).stdout
    removed = command(lab, "engines", "--remove", "nats")
    assert (removed.exit_code, "kachery-fast channel pubsub away --own" in removed.stderr) == (2, True)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_nats_server_that_is_restarted_in_mid_transfer_ends_no_transfer(
    lab: Lab, nats: NatsServer, tmp_path: Path, how: str
) -> None:
    """Tokens end meanwhile, too: a transfer takes longer than they live."""
    recording = make_recording(tmp_path / "recording", SIZE, seed=len(how))
    process = begin_load(lab, store(lab.nodes["A"], recording), "away")
    (nats.kill if how == "killed" else nats.stop)()
    wait_until(lambda: not connected(lab, "away"), "the nodes have noticed")
    nats.start()
    assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()
    wait_until(lambda: connected(lab, "away"), "the nodes are back")


def test_tokens_end_in_mid_transfer_and_are_renewed(lab: Lab, tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "recording", SIZE, seed=3)
    begun = time.monotonic()
    process = begin_load(lab, store(lab.nodes["A"], recording), "away")
    assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()
    assert time.monotonic() - begun > 3.0, "tokens live for three seconds"
    assert connected(lab, "away")


def test_a_permission_withdrawn_in_mid_transfer_is_the_cause_that_is_named(lab: Lab, tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "recording", SIZE, seed=4)
    process = begin_load(lab, store(lab.nodes["A"], recording), "away")
    lab.owner("revoke", "away", "A", "provideFiles")
    try:
        with pytest.raises(KacheryError) as failed:
            finish(process)
        assert "provide" in failed.value.message.lower() or "permi" in failed.value.message.lower()
    finally:
        lab.owner("grant", "away", "A", "provideFiles")
    uri = store(lab.nodes["A"], recording)

    def loaded() -> bool:
        try:
            return Path(load(lab.nodes["B"], uri, "--channel", "away")["path"]).read_bytes() == recording.read_bytes()
        except NotAvailable:  # A hears the band again with its next token
            return False

    wait_until(loaded, "it provides again")


def test_nodes_move_to_another_service_and_back_in_mid_transfer_without_a_restart(
    lab: Lab, ably: AblyService, tmp_path: Path
) -> None:
    recording = make_recording(tmp_path / "recording", SIZE, seed=5)
    process = begin_load(lab, store(lab.nodes["A"], recording), "demo")
    lab.owner("pubsub", "demo", "--use", "nats")
    assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()
    assert lab.owner("traffic", "demo")["bands"] == []
    wait_until(lambda: connected(lab, "demo"), "the nodes are there")
    other = make_recording(tmp_path / "other", CHUNK_SIZE_BYTES, seed=6)
    assert load(lab.nodes["B"], store(lab.nodes["A"], other), "--channel", "demo")
    lab.owner("pubsub", "demo", "--own")
    wait_until(lambda: lab.owner("traffic", "demo")["nodes"] != [], "the nodes are back", 60)


def test_a_node_publishes_at_most_four_messages_a_second_where_ably_counts(
    lab: Lab, ably: AblyService, tmp_path: Path
) -> None:
    found = lab.owner("pubsub", "demo", "--ably", "--key", str(lab.directory / "key"), "--endpoint",
                      f"http://{ably.host}", "--test")
    assert found["test"]["ok"], found
    try:
        wait_until(lambda: ably.listeners("demo-requestFiles") == 2 == ably.listeners("demo-provideFiles"),
                   "both nodes are there")
        recording = make_recording(tmp_path / "recording", 4 * SIZE, seed=7)
        process = begin_load(lab, store(lab.nodes["A"], recording), "demo")
        ably.kill()
        ably.start()
        assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()
        published = ably.published()
        assert len(published) == 2, "both nodes have published since the restart"
        assert sum(map(len, published.values())) > 10
        for times in published.values():
            for at, first in enumerate(times):
                # They come as they were sent, but for some tens of milliseconds.
                assert len([moment for moment in times[at:] if moment < first + 0.9]) <= MESSAGES_PER_SECOND_MAX
    finally:
        lab.owner("pubsub", "demo", "--own")
