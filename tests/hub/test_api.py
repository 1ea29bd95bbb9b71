"""The API for scripts: what its description says is what the hub does, whatever is sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.cli.lab import Lab
from kachery_fast.errors import NotOnHub
from kachery_fast.hub import identity
from kachery_fast.hub.openapi import describe_api
from kachery_fast.hub.performing import ACTS_BY_NAME

from ..network import LOOPS, run_on
from .support import CHANNEL, OWNER, Clock, node_id, running_world

ACTIONS = ACTS_BY_NAME
parametrized = pytest.mark.parametrize("loop_kind", LOOPS)


def test_whatever_is_sent_is_answered_as_described(tmp_path: Path) -> None:
    """Of every action: no error of the hub's own, answers and refusals of the shapes that are described, malformed
    requests refused, and nothing without a token. Of a real hub, by its own description."""
    with Lab(tmp_path) as lab:
        lab.start_hub()
        done = subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), "run", f"{lab.hub_url}/api/openapi.json", "--no-color",
             "--header", f"Authorization: Bearer {lab.owner_token}", "--phases", "examples,coverage,fuzzing",
             "--max-examples", "5", "--no-shrink",
             # What can be said in a schema is said there; that a name is taken, or a day too far, cannot.
             "--exclude-checks", "positive_data_acceptance"],
            cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^  Tested: {len(ACTIONS)}$", done.stdout, re.MULTILINE), done.stdout


def test_every_action_is_described_for_people() -> None:
    described = describe_api(ACTIONS, "http://127.0.0.1")
    for name, act in ACTIONS.items():
        operation = described["paths"][f"/api/v1/{name}"]["post"]
        assert operation["summary"], name
        assert f"scope `{act.scope.value}`" in operation["description"]
    assert len(json.dumps(described)) > 5000


@parametrized
def test_the_description_is_served_and_needs_no_token(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, world.session.get(world.url + "/api/openapi.json") as answer:
            assert answer.status == 200
            found = await answer.json()
            assert found["openapi"] == "3.1.0"
            assert found["servers"] == [{"url": world.url}]
            assert "/api/v1/grant" in found["paths"]

    run_on(loop_kind, scenario())


@parametrized
def test_a_token_opens_what_it_is_for_until_it_expires_or_is_revoked(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            async def call(token: str, action: str, **fields: Any) -> tuple[int, Any]:
                data = json.dumps(fields).encode()
                return await world.post(f"/api/v1/{action}", data, Authorization=f"Bearer {token}")

            await world.member("A")
            await world.owner.call("createChannel", name="second")
            reads = await world.owner.call("makeToken", name="reads", scopes=["read"], days=2)
            one = await world.owner.call("makeToken", name="one", scopes=["read", "grant"], channel=CHANNEL)
            assert (await call(reads["token"], "showChannel", channel=CHANNEL))[0] == 200
            status, answer = await call(reads["token"], "grant", channel=CHANNEL, node="A", permissions=["all"])
            assert (status, answer["error"]) == (403, "ActionRefused")
            assert "'grant'" in answer["message"]
            assert (await call(one["token"], "revoke", channel=CHANNEL, node="A", permissions=["all"]))[0] == 200
            for action, fields in (("showChannel", {"channel": "second"}), ("listChannels", {}),
                                   ("makeToken", {"name": "more", "scopes": ["read"], "channel": CHANNEL})):
                status, answer = await call(one["token"], action, **fields)
                assert (status, answer["error"]) == (403, "ActionRefused"), action
            tokens = (await world.owner.call("showAccount"))["tokens"]
            assert {token["name"]: token["scopes"] for token in tokens} == {
                "": ["all"], "reads": ["read"], "one": ["grant", "read"]}
            assert reads["token"] not in json.dumps(tokens)
            clock.now += 3 * 24 * 3600
            assert (await call(reads["token"], "listChannels"))[0] == 401
            assert (await world.owner.call("revokeToken", token=one["id"]))["ended"] == 1
            assert (await call(one["token"], "showChannel", channel=CHANNEL))[0] == 401

    run_on(loop_kind, scenario())


def test_a_token_makes_none_that_opens_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            made = await world.owner.call("makeToken", name="narrow", scopes=["account", "read"])
            for scopes in (["all"], ["grant"], ["account", "manage"], []):
                status, _ = await world.post(
                    "/api/v1/makeToken", json.dumps({"name": "x", "scopes": scopes}).encode(),
                    Authorization=f"Bearer {made['token']}")
                assert status in (400, 403), scopes
            status, _ = await world.post("/api/v1/makeToken", b'{"name": "x", "scopes": ["read"]}',
                                         Authorization=f"Bearer {made['token']}")
            assert status == 200

    run_on("uvloop", scenario())


def test_admins_alone_see_to_other_accounts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            other = "second@lab.org"
            await world.owner.call("addAccount", owner=other)
            registry = world.registry()
            await registry.open()
            token = await registry.call(identity.issue_owner_token, other, 1)
            await registry.close()
            more: dict[str, dict[str, Any]] = {
                "setAdmin": {"admin": False}, "connectIdentity": {"issuer": "https://a.example.org", "subject": "1"}}
            for action, act in ACTIONS.items():
                fields = {} if action == "listAccounts" else {"owner": OWNER, **more.get(action, {})}
                if act.admin:
                    status, answer = await world.post(
                        f"/api/v1/{action}", json.dumps(fields).encode(), Authorization=f"Bearer {token}")
                    assert (status, answer["error"]) == (403, "ActionRefused"), action
            await world.owner.call("setAdmin", owner=other, admin=True)
            status, answer = await world.post("/api/v1/closeAccount", json.dumps({"owner": OWNER}).encode(),
                                              Authorization=f"Bearer {token}")
            assert (status, answer["owner"]) == (200, OWNER)
            status, answer = await world.post("/api/v1/closeAccount", json.dumps({"owner": other}).encode(),
                                              Authorization=f"Bearer {token}")
            assert (status, "another admin" in answer["message"]) == (400, True)

    run_on("uvloop", scenario())


@parametrized
def test_the_audit_log_says_who_changed_what(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A", granted=["requestFiles"])
            await world.owner.call("grant", channel=CHANNEL, node="A", permissions=["provideFeeds"])
            with pytest.raises(NotOnHub):
                await world.owner.call("grant", channel=CHANNEL, node="nobody", permissions=["all"])
            entries = (await world.owner.call("showAudit", channel=CHANNEL))["entries"]
            assert [entry["action"] for entry in entries] == ["grant", "invite"]
            assert (entries[0]["owner"], entries[0]["node"]) == (OWNER, "A")
            assert json.loads(entries[0]["detail"]) == {"permissions": ["provideFeeds"]}
            assert entries[0]["via"].startswith("token ")
            assert entries[0]["time"] == int(world.clock() * 1000)
            older = (await world.owner.call("showAudit", before=entries[1]["id"]))["entries"]
            assert [entry["action"] for entry in older] == ["createChannel"]
            assert node_id("A") not in json.dumps(entries)
            assert world.token not in json.dumps(entries)

    run_on(loop_kind, scenario())
