"""The commands ``hub`` and ``channel`` against a hub in a process of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
from click.testing import CliRunner, Result

from kachery_fast.cli import program
from kachery_fast.cli.owner import _find_hub
from kachery_fast.config import load_settings
from kachery_fast.errors import DiskError
from kachery_fast.hub.channel_actions import ChangeChannel
from kachery_fast.net.hub import HubClient, split_invitation
from kachery_fast.protocol.signing import private_key, public_id

KEY = private_key(b"n" * 32)
NODE_ID = public_id(KEY)


@pytest.fixture(scope="module")
def hub_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a hub that runs in the background, started and stopped by its commands."""
    path = tmp_path_factory.mktemp("cli") / "hub"
    started = run(path, "hub", "--port", "0", "--dir", str(path), "--owner", "me@lab.org", "--detach", "--json")
    assert started.exit_code == 0, started.output
    try:
        yield path
    finally:
        stopped = run(path, "hub", "stop", "--dir", str(path))
        assert stopped.exit_code == 0, stopped.output


def run(hub_dir: Path, *arguments: str, **environ: str) -> Result:
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("KACHERY_")}
    return CliRunner().invoke(
        program, list(arguments), env={**clean, "KACHERY_HUB_DIR": str(hub_dir), **environ}, catch_exceptions=False)


def run_json(hub_dir: Path, *arguments: str) -> Any:
    result = run(hub_dir, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def join(link: str) -> list[str]:
    """Join as a node would; return the permissions in force."""
    async def scenario() -> list[str]:
        url, code = split_invitation(link)
        async with HubClient(url, KEY, load_settings({})) as client:
            return (await client.join(code, "workstation")).permissions

    return asyncio.run(scenario())


def test_a_channel_lives_from_its_making_to_its_end(hub_dir: Path) -> None:
    assert run_json(hub_dir, "channel", "create", "life") == {"channel": "life", "owner": "me@lab.org"}
    assert "life" in [item["name"] for item in run_json(hub_dir, "channel", "list")["channels"]]
    invitation = run_json(hub_dir, "channel", "invite", "life", "--permissions", "request-files", "--days", "2")
    assert join(invitation["link"]) == ["requestFiles"]
    granted = run_json(hub_dir, "channel", "grant", "life", "workstation", "provideFiles", "provide-feeds")
    assert granted["permissions"] == ["provideFeeds", "provideFiles", "requestFiles"]
    revoked = run_json(hub_dir, "channel", "revoke", "life", NODE_ID[:8], "requestFiles")
    assert revoked["permissions"] == ["provideFeeds", "provideFiles"]
    shown = run(hub_dir, "channel", "show", "life").stdout
    assert re.search(rf"{NODE_ID[:16]}  workstation  provideFeeds provideFiles  seen \d{{4}}-\d\d-\d\d", shown)
    assert "not granted: provideTasks requestFeeds requestFiles requestTasks" in shown
    assert run_json(hub_dir, "channel", "revoke", "life", "workstation", "all")["permissions"] == []
    assert run_json(hub_dir, "channel", "remove-node", "life", "workstation")["removed"] is True
    assert run_json(hub_dir, "channel", "show", "life")["members"] == []
    assert run_json(hub_dir, "channel", "delete", "life", "--yes")["deleted"] is True
    assert run(hub_dir, "channel", "show", "life").exit_code == 3


def test_each_command_says_in_words_what_it_did(hub_dir: Path) -> None:
    assert "channel invite words" in run(hub_dir, "channel", "create", "words").stdout
    assert "words  0 nodes" in run(hub_dir, "channel", "list").stdout
    text = run(hub_dir, "channel", "invite", "words", "--uses", "any").stdout
    assert "any number of nodes" in text
    link = re.search(r"kachery-fast node join (\S+)", text)
    assert link is not None
    join(link[1])
    assert "open invitation for any number of nodes" in run(hub_dir, "channel", "show", "words").stdout
    assert run(hub_dir, "channel", "uninvite", "words").stdout == "1 invitation closed.\n"
    assert "provideFeeds" in run(hub_dir, "channel", "grant", "words", "workstation", "all").stdout
    assert "nothing permitted" in run(hub_dir, "channel", "revoke", "words", "workstation", "all").stdout
    assert "no longer on" in run(hub_dir, "channel", "remove-node", "words", "workstation").stdout
    assert run(hub_dir, "channel", "delete", "words").exit_code == 1, "nobody confirmed it"
    assert "0 objects" in run(hub_dir, "channel", "delete", "words", "--yes").stdout


def test_every_setting_of_a_channel_is_changed_by_itself_and_shown(hub_dir: Path) -> None:
    run_json(hub_dir, "channel", "create", "set")
    assert "  public, unlisted, its owner invites\n" in run(hub_dir, "channel", "show", "set").stdout
    before = run_json(hub_dir, "channel", "show", "set")
    changes: list[tuple[tuple[str, ...], str, Any]] = [
        (("--private",), "private", True), (("--listed",), "listed", True), (("--description", "of rigs"),
                                                                             "description", "of rigs"),
        (("--inviters", "members"), "inviters", "members"), (("--size-max", "2TB"), "sizeBytesMax", 2 * 10**12),
        (("--unread-days-max", "30"), "unreadDaysMax", 30), (("--node-day-max", "1.5GiB"), "nodeDayBytesMax", 3 << 29)]
    for options, field, value in changes:
        before[field] = value
        answer = run_json(hub_dir, "channel", "set", "set", *options)
        assert answer == {name: before[name] for name in answer}
        assert answer[field] == value
    assert {field for _, field, _ in changes} == {
        field.encode_name for field in msgspec.structs.fields(ChangeChannel)} - {"channel"}
    shown = run(hub_dir, "channel", "show", "set").stdout
    assert ("  private, listed, its members invite, up to 2.0 TB, objects go unread for 30 days, a node uploads up to "
            "1.6 GB a day\n  of rigs\n") in shown
    text = run(hub_dir, "channel", "set", "set", "--public", "--unlisted", "--description", "", "--inviters", "owner",
               "--size-max", "none", "--unread-days-max", "none", "--node-day-max", "none").stdout
    assert text == "set: public, unlisted, its owner invites\n"


@pytest.mark.parametrize(("arguments", "exit_code"), [
    (["create", "two words"], 2),
    (["set", "nope"], 2),
    (["set", "nope", "--private"], 3),
    (["set", "nope", "--size-max", "much"], 2),
    (["set", "nope", "--unread-days-max", "-1"], 2),
    (["show", "nope"], 3),
    (["grant", "nope", "A", "all"], 3),
    (["invite", "nope", "--uses", "many"], 2),
    (["invite", "nope"], 3),
    (["list", "--hub", "nonsense"], 2),
    (["list", "--hub", "http://127.0.0.1:9", "--token", "x"], 5),
    (["list", "--token", "wrong"], 4),
])
def test_an_error_is_one_line_and_an_exit_code(hub_dir: Path, arguments: list[str], exit_code: int) -> None:
    result = run(hub_dir, "channel", *arguments)
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_the_token_of_this_machines_hub_is_sent_to_no_other(hub_dir: Path) -> None:
    result = run(hub_dir, "channel", "list", "--hub", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "KACHERY_HUB_TOKEN" in result.stderr
    address = (hub_dir / "address").read_text().strip()
    assert run(hub_dir, "channel", "list", "--hub", address + "/").exit_code == 0


def test_from_another_machine_hub_and_token_are_named(hub_dir: Path, tmp_path: Path) -> None:
    address = (hub_dir / "address").read_text().strip()
    token = (hub_dir / "owner-token").read_text().strip()
    assert run(tmp_path, "channel", "list").exit_code == 2
    assert run(tmp_path, "channel", "list", "--hub", address, "--token", token).exit_code == 0
    assert run(tmp_path, "channel", "list", "--hub", address, KACHERY_HUB_TOKEN=token).exit_code == 0


def test_a_second_hub_on_the_directory_is_a_conflict(hub_dir: Path) -> None:
    for extra in ([], ["--detach"]):
        result = run(hub_dir, "hub", "--port", "0", *extra)
        assert result.exit_code == 9
        assert "hub stop" in result.stderr
    assert run(hub_dir, "channel", "list").exit_code == 0


@pytest.mark.parametrize("arguments", [
    ["--channel", "two words"], ["--owner", "a b"], ["--host", "no.such.host.invalid"]])
def test_a_hub_that_cannot_start_says_why_and_leaves_nothing_running(tmp_path: Path, arguments: list[str]) -> None:
    result = run(tmp_path / "hub", "hub", "--port", "0", *arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert run(tmp_path / "hub", "hub", "stop").exit_code == 3


def test_a_port_that_cannot_be_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path / "hub", "hub", KACHERY_HUB_PORT="70000")
    assert result.exit_code == 2
    assert "65535" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_the_foreground_it_prints_what_to_do_and_ends_on_a_signal(tmp_path: Path, number: int) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KACHERY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "kachery_fast", "hub", "--port", "0", "--dir", str(tmp_path / "hub"),
         "--channel", "lab"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    assert process.stdout is not None
    lines: list[str] = []
    while not (lines and lines[-1].startswith("The invitation")):
        line = process.stdout.readline()
        assert line, "the hub ended early"
        lines.append(line)
    link = re.search(r"kachery-fast node join (\S+)", "".join(lines))
    assert link is not None
    assert join(link[1]) == ["provideFiles", "requestFiles"]
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "", "")


def test_a_killed_hub_starts_again_on_its_directory_and_knows_everything(tmp_path: Path) -> None:
    hub_dir = tmp_path / "hub"
    start = ["hub", "--port", "0", "--detach"]
    first = run_json(hub_dir, *start, "--channel", "lab")
    assert join(first["link"]) == ["provideFiles", "requestFiles"]
    process = psutil.Process(int((hub_dir / "lock").read_text()))
    process.kill()
    process.wait(20)
    again = run(hub_dir, *start)
    try:
        assert again.exit_code == 0, again.output
        (member,) = run_json(hub_dir, "channel", "show", "lab")["members"]
        assert member["node"] == NODE_ID
        url = (hub_dir / "address").read_text().strip()
        assert join(f"{url}/join/{first['invitation']}") == ["provideFiles", "requestFiles"]
    finally:
        assert run(hub_dir, "hub", "stop").exit_code == 0


# --- what is in the bucket


def upload(hub_dir: Path, channel: str, data: bytes) -> str:
    """Upload as a node would; return the object's name."""
    link = run_json(hub_dir, "channel", "invite", channel, "--permissions", "all")["link"]

    async def scenario() -> str:
        url, code = split_invitation(link)
        async with HubClient(url, KEY, load_settings({})) as client, aiohttp.ClientSession() as session:
            await client.join(code, "workstation")
            (leave,) = await client.sign_uploads(channel, [(hashlib.sha1(data).hexdigest(), len(data))])
            async with session.put(leave.url, data=data, headers=leave.headers) as response:
                assert response.status == 200
            return leave.object

    return asyncio.run(scenario())


def test_a_bucket_is_listed_measured_and_cleared(hub_dir: Path) -> None:
    run_json(hub_dir, "channel", "create", "care")
    assert "Nothing was uploaded or downloaded in 14 days." in run(hub_dir, "channel", "usage", "care").stdout
    name = upload(hub_dir, "care", b"x" * 2500)
    shown = run(hub_dir, "channel", "usage", "care").stdout
    assert re.search(r"\d{4}-\d\d-\d\d  1 upload \(2.5 kB\), 0 downloads \(0 bytes\)", shown)
    assert f"{NODE_ID[:16]} workstation  1 upload (2.5 kB)" in shown
    assert "1 object of files (2.5 kB)" in shown
    assert run_json(hub_dir, "channel", "usage", "care", "--days", "3")["days"][-1]["uploadBytes"] == 2500
    listed = run(hub_dir, "channel", "objects", "care").stdout
    assert re.search(rf"{name}  2.5 kB  came \d{{4}}-\d\d-\d\d \d\d:\d\d  used \d{{4}}", listed)
    assert run_json(hub_dir, "channel", "objects", "care", "--kind", "feeds")["objects"] == []
    other = upload(hub_dir, "care", b"y")
    first, second = sorted([name, other])
    assert f"More with: --after {first}" in run(hub_dir, "channel", "objects", "care", "--limit", "1").stdout
    (line,) = run_json(hub_dir, "channel", "objects", "care", "--after", first)["objects"]
    assert line["name"] == second
    absent = name[:-1] + ("0" if name[-1] != "0" else "1")
    removed = run(hub_dir, "channel", "objects", "care", "--remove", name, "--remove", absent)
    assert removed.stdout == f"1 object removed (2.5 kB).\nNot there: {absent}\n"
    assert [line["name"] for line in run_json(hub_dir, "channel", "objects", "care")["objects"]] == [other]


def test_traffic_is_shown_by_band(hub_dir: Path) -> None:
    run_json(hub_dir, "channel", "create", "quiet")
    shown = run(hub_dir, "channel", "traffic", "quiet").stdout
    assert re.search(r"^requestFiles +0 messages +0 bytes  0 nodes listening$", shown, re.MULTILINE)
    assert len(run_json(hub_dir, "channel", "traffic", "quiet")["bands"]) == 6


@pytest.mark.parametrize("option", [
    ("--size-max", "much"), ("--size-max", "5XB"), ("--size-max", "-5"), ("--size-max", "0"),
    ("--unread-days-max", "1.5"), ("--node-day-max", "")])
def test_a_limit_that_is_none_is_refused(hub_dir: Path, option: tuple[str, str]) -> None:
    run(hub_dir, "channel", "create", "strict")
    assert run(hub_dir, "channel", "set", "strict", *option).exit_code == 2
    assert run_json(hub_dir, "channel", "show", "strict")["sizeBytesMax"] is None


def test_a_token_that_is_given_needs_no_file(tmp_path: Path) -> None:
    """On the hub's machine too: the hub's own token may be another user's to read."""
    (tmp_path / "address").write_text("http://127.0.0.1:20440\n")
    (tmp_path / "owner-token").mkdir()  # not to be read, for root neither
    assert _find_hub(load_settings(hub_dir=tmp_path, hub_token="mine"), None) == ("http://127.0.0.1:20440", "mine")
    with pytest.raises(DiskError):
        _find_hub(load_settings(hub_dir=tmp_path), None)
