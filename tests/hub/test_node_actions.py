"""What the owner of a node may do, what the owner of a channel may do, and what nobody else may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from kachery_fast.errors import (
    ActionRefused,
    InvalidArgument,
    InvalidName,
    KacheryError,
    NotOnHub,
    NotPermitted,
)
from kachery_fast.hub import node_owners, tables
from kachery_fast.hub.performing import ACTS
from kachery_fast.net.hub import HubClient, OwnerClient

from ..network import LOOPS, run_on
from .support import ALL, CHANNEL, World, node_id, running_world

ANNA, BORIS, ADMIN = "anna@lab.org", "boris@lab.org", "admin@lab.org"
FILES = ["provideFiles", "requestFiles"]

# Of a node of Anna's that is a member of the hub's owner's channel: who may do what. "own": on his own things only, so
# that of the node he learns nothing.
WHO_MAY: dict[str, dict[str, str]] = {
    # on nodes
    "findApproval": {"anna": "yes", "owner": "yes", "boris": "yes", "admin": "yes"},
    "approveNode": {"anna": "yes", "owner": "no", "boris": "no", "admin": "no"},
    "denyNode": {"anna": "yes", "owner": "yes", "boris": "yes", "admin": "yes"},
    "listNodes": {"anna": "yes", "owner": "own", "boris": "own", "admin": "own"},
    "showNode": {"anna": "yes", "owner": "no", "boris": "no", "admin": "no"},
    "requestPermissions": {"anna": "yes", "owner": "no", "boris": "no", "admin": "no"},
    "withdraw": {"anna": "yes", "owner": "no", "boris": "no", "admin": "no"},
    "forgetNode": {"anna": "yes", "owner": "no", "boris": "no", "admin": "no"},
    # on the channel
    "createChannel": {"anna": "no", "owner": "no", "boris": "no", "admin": "no"},  # the name is taken
    "listChannels": {"anna": "own", "owner": "yes", "boris": "own", "admin": "own"},
    "showChannel": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "changeChannel": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "grant": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "revoke": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "invite": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "closeInvitations": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "removeNode": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
    "deleteChannel": {"anna": "no", "owner": "yes", "boris": "no", "admin": "no"},
}
# In this order each can still be done.
ENDS = {"withdraw": "anna", "removeNode": "owner", "forgetNode": "anna", "deleteChannel": "owner"}


async def set_row(world: World, statement: Any) -> None:
    """Change the registry from beside."""
    registry = world.registry()

    def change(connection: Connection) -> None:
        connection.execute(statement)

    await registry.open()
    await registry.call(change)
    await registry.close()


async def let_in(world: World, name: str, person: OwnerClient, granted: list[str]) -> HubClient:
    """Return a node of ``person`` that asks for everything on the channel and was granted ``granted``."""
    client = await world.approved(name, person)
    await person.call("requestPermissions", node=node_id(name), channel=CHANNEL, permissions=["all"])
    await world.owner.call("grant", channel=CHANNEL, node=node_id(name), permissions=granted)
    return client


async def members(world: World) -> dict[str, dict[str, Any]]:
    shown = await world.owner.call("showChannel", channel=CHANNEL)
    return {member["label"]: member for member in shown["members"]}


def test_the_table_has_every_action_on_nodes_and_channels() -> None:
    known = {act.name for act in ACTS.values()}
    assert set(WHO_MAY) <= known
    assert {act.name for request, act in ACTS.items() if request.__module__.endswith(
        ("node_actions", "channel_actions"))} == set(WHO_MAY)


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_each_action_is_for_those_who_may_and_for_nobody_else(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            people = {"anna": await world.person(ANNA), "owner": world.owner, "boris": await world.person(BORIS),
                      "admin": await world.person(ADMIN, admin=True)}
            node = await let_in(world, "A", people["anna"], ["requestFiles"])
            fields: dict[str, dict[str, Any]] = {
                "showNode": {"node": node_id("A")}, "forgetNode": {"node": node_id("A")},
                "requestPermissions": {"node": node_id("A"), "channel": CHANNEL, "permissions": ["requestFiles"]},
                "withdraw": {"node": node_id("A"), "channel": CHANNEL},
                "createChannel": {"name": CHANNEL}, "listNodes": {}, "listChannels": {},
                "grant": {"channel": CHANNEL, "node": "A", "permissions": ["requestFiles"]},
                "revoke": {"channel": CHANNEL, "node": "A", "permissions": ["provideFiles"]},
                "removeNode": {"channel": CHANNEL, "node": "A"},
                **{kind: {"channel": CHANNEL} for kind in (
                    "showChannel", "changeChannel", "invite", "closeInvitations", "deleteChannel")}}
            async def tried(kind: str, who: str) -> str:
                world.clock.now += 60
                if kind in ("findApproval", "approveNode", "denyNode"):
                    fields[kind] = {"code": (await node.ask_approval("A")).code}
                try:
                    said = str(await people[who].call(kind, **fields[kind]))
                except KacheryError as error:
                    return "no" if error.http_status in (403, 404, 409) else error.message
                return "yes" if node_id("A") in said or f"'{CHANNEL}'" in said else "own"

            # What may not be done, then what may, and at last what ends the matter.
            for answers in (("no",), ("yes", "own")):
                for kind, table in WHO_MAY.items():
                    for who, answer in table.items():
                        if answer in answers and (answer == "no" or kind not in ENDS):
                            assert await tried(kind, who) == answer, (kind, who)
                assert (await members(world))["A"]["permissions"] == ["requestFiles"], "whatever was tried"
                assert (await node.node_config()).owner == ANNA
            for kind, who in ENDS.items():
                assert await tried(kind, who) == "yes"
                assert await tried("requestPermissions", "anna") == "no" or kind == "withdraw"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize(("kind", "fields", "error"), [
    ("showNode", {"node": "nope"}, NotOnHub),
    ("showNode", {"node": node_id("A")[:5]}, NotOnHub),
    ("showNode", {"node": "%"}, NotOnHub),
    ("showNode", {"node": "______"}, NotOnHub),
    ("showNode", {"node": ""}, NotOnHub),
    ("showNode", {"node": "twin"}, InvalidArgument),
    ("requestPermissions", {"node": "A", "channel": "nope", "permissions": ["all"]}, NotOnHub),
    ("requestPermissions", {"node": "A", "channel": CHANNEL, "permissions": []}, InvalidArgument),
    ("requestPermissions", {"node": "A", "channel": CHANNEL, "permissions": ["everything"]}, InvalidName),
    ("withdraw", {"node": "A", "channel": CHANNEL}, NotOnHub),
    ("withdraw", {"node": "A", "channel": "nope"}, NotOnHub),
    ("forgetNode", {"node": "nope"}, NotOnHub),
    ("findApproval", {"code": ""}, NotOnHub),
    ("approveNode", {"code": "'; drop table nodes; --"}, NotOnHub),
])
def test_what_cannot_be_done_is_refused_with_its_reason(
    tmp_path: Path, kind: str, fields: dict[str, Any], error: type[KacheryError]
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            await world.approved("A", anna)
            for name in ("B", "C"):
                await (await world.approved(name, anna)).node_config("twin")
            with pytest.raises(error):
                await anna.call(kind, **fields)

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_owner_sees_for_each_permission_why_it_is_not_in_force(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            await world.approved("A", anna)
            asked = await anna.call("requestPermissions", node="A", channel=CHANNEL,
                                    permissions=["requestFiles", "provideFiles"])
            assert (asked["state"], asked["requested"], asked["granted"], asked["permissions"]) == (
                "asked", FILES, [], [])
            assert asked["why"]["requestFiles"] == "the channel's owner has not granted requestFiles"
            assert asked["channelOwner"] == "", "that is for members, and channels with a public page"
            await world.owner.call("changeChannel", channel=CHANNEL, listed=True)
            await world.owner.call("grant", channel=CHANNEL, node="A", permissions=["requestFiles", "requestFeeds"])

            shown = await anna.call("showNode", node=node_id("A")[:6])
            assert (shown["node"], shown["owner"], shown["label"]) == (node_id("A"), ANNA, "A")
            (line,) = shown["memberships"]
            assert (line["channel"], line["state"], line["channelOwner"]) == (CHANNEL, "member", "owner@lab.org")
            assert (line["requested"], line["granted"]) == (FILES, ["requestFeeds", "requestFiles"])
            assert line["permissions"] == ["requestFiles"]
            assert line["why"] == {
                "provideFiles": "the channel's owner has not granted provideFiles",
                "requestFeeds": "the node's owner has not asked for requestFeeds",
                "provideFeeds": "provideFeeds is neither asked for nor granted",
                "requestTasks": "requestTasks is neither asked for nor granted",
                "provideTasks": "provideTasks is neither asked for nor granted"}
            (node,) = (await anna.call("listNodes"))["nodes"]
            assert node["channels"] == 1

            await world.owner.call("removeNode", channel=CHANNEL, node="A")
            (line,) = (await anna.call("showNode", node="A"))["memberships"]
            assert (line["state"], line["permissions"]) == ("removed", [])
            assert set(line["why"].values()) == {"the node is not a member of the channel"}

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_an_owner_no_longer_asks_for_is_gone_at_once(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            node = await let_in(world, "A", anna, ["all"])
            token = (await node.pubsub_token(CHANNEL)).token
            url = world.url.replace("http", "ws", 1) + f"/?access_token={token}&v=5"
            async with world.session.ws_connect(url) as connection:
                await connection.receive(timeout=20)
                changed = await anna.call(
                    "requestPermissions", node="A", channel=CHANNEL, permissions=["requestFiles"])
                assert changed["permissions"] == ["requestFiles"]
                with pytest.raises(NotPermitted, match="node's owner has not asked for provideFiles"):
                    await node.sign_uploads(CHANNEL, [("1" * 40, 1)])
                while (await connection.receive(timeout=20)).type is aiohttp.WSMsgType.TEXT:
                    pass  # until the broker has cut it
            more = await anna.call("requestPermissions", node="A", channel=CHANNEL, permissions=["all"])
            assert more["permissions"] == sorted(ALL), "what is granted still is"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_who_was_declined_comes_only_by_an_invitation(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            node = await world.approved("A", anna)
            wish: dict[str, Any] = {"node": "A", "channel": CHANNEL, "permissions": ["requestFiles"]}
            await anna.call("requestPermissions", **wish)
            old = await world.invite(uses=None)
            world.clock.now += 1
            await world.owner.call("removeNode", channel=CHANNEL, node="A")
            with pytest.raises(NotPermitted, match="removed or declined this node"):
                await anna.call("requestPermissions", **wish)
            asked = await node.ask_approval("A", "1", CHANNEL, ["all"])
            assert "removed or declined" in (await anna.call("approveNode", code=asked.code))["refused"]
            assert await members(world) == {}
            # Nor by forgetting it: it is the same node under whichever name.
            await anna.call("forgetNode", node="A")
            again = await world.approved("A", await world.person(BORIS))
            with pytest.raises(NotPermitted, match="removed this node"):
                await again.join(old)
            world.clock.now += 1
            assert (await again.join(await world.invite())).permissions == sorted(ALL)
            assert (await members(world))["A"]["owner"] == BORIS

    run_on(loop_kind, scenario())


def test_nobody_can_fill_a_channels_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(node_owners, "ASKING_PER_OWNER_MAX", 2)
        monkeypatch.setattr(node_owners, "ASKING_PER_CHANNEL_MAX", 3)
        async with running_world(tmp_path) as world:
            anna, boris = await world.person(ANNA), await world.person(BORIS)

            async def ask(person: OwnerClient, name: str) -> None:
                await person.call("requestPermissions", node=name, channel=CHANNEL, permissions=["all"])

            for name in ("A", "B", "C"):
                await world.approved(name, anna)
            await ask(anna, "A")
            await ask(anna, "B")
            with pytest.raises(NotPermitted, match="2 of your nodes wait there already"):
                await ask(anna, "C")
            await world.owner.call("removeNode", channel=CHANNEL, node="A")
            with pytest.raises(NotPermitted, match="or were declined"):
                await ask(anna, "C")
            await ask(anna, "B")  # it waits already
            await anna.call("withdraw", node="B", channel=CHANNEL)
            assert await members(world) == {}
            await ask(anna, "C")
            for name in ("D", "E", "F"):
                await world.approved(name, boris)
            await ask(boris, "D")
            await ask(boris, "E")
            for name in ("own", "own too"):
                await world.approved(name, world.owner)
            with pytest.raises(NotPermitted, match="3 nodes wait there already"):
                await ask(world.owner, "own")
            await world.owner.call("grant", channel=CHANNEL, node="D", permissions=["requestFiles"])
            await ask(world.owner, "own")

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_who_withdraws_is_off_the_channel_and_may_ask_again(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            node = await let_in(world, "A", anna, ["all"])
            await node.pubsub_token(CHANNEL)
            world.clock.now += 1
            await anna.call("withdraw", node="A", channel=CHANNEL)
            with pytest.raises(NotPermitted, match="not a member"):
                await node.pubsub_token(CHANNEL)
            assert (await anna.call("showNode", node="A"))["memberships"] == []
            asked = await anna.call("requestPermissions", node="A", channel=CHANNEL, permissions=["all"])
            assert (asked["state"], asked["granted"]) == ("asked", []), "its owner is to decide anew"
            with pytest.raises(NotPermitted, match="not a member"):
                await node.pubsub_token(CHANNEL)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_node_that_is_forgotten_is_a_strangers_node(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna, boris = await world.person(ANNA), await world.person(BORIS)
            node = await let_in(world, "A", anna, ["all"])
            token = (await node.pubsub_token(CHANNEL)).token
            url = world.url.replace("http", "ws", 1) + f"/?access_token={token}&v=5"
            async with world.session.ws_connect(url) as connection:
                await connection.receive(timeout=20)
                answer = await anna.call("forgetNode", node="A")
                assert answer == {"node": node_id("A"), "channels": [CHANNEL], "forgotten": True}
                while (await connection.receive(timeout=20)).type is aiohttp.WSMsgType.TEXT:
                    pass  # until the broker has cut it
            for request in (node.node_config(), node.pubsub_token(CHANNEL), node.sign_uploads(CHANNEL, [])):
                with pytest.raises(NotPermitted, match="not registered"):
                    await request
            assert await members(world) == {}
            assert (await world.owner.call("listChannels"))["channels"][0]["members"] == 0
            assert (await anna.call("listNodes"))["nodes"] == []
            assert {account["owner"]: account["nodes"] for account in (
                await world.owner.call("listAccounts"))["accounts"]}[ANNA] == 0
            with pytest.raises(NotOnHub):
                await anna.call("showNode", node=node_id("A"))
            assert (await node.find_approval()).state == "expired"
            # Under another owner it begins anew, without what the first one was granted.
            again = await world.approved("A", boris)
            assert (await again.node_config()).channels == []
            assert (await boris.call("showNode", node="A"))["memberships"] == []
            asked = await boris.call("requestPermissions", node="A", channel=CHANNEL, permissions=["all"])
            assert (asked["state"], asked["granted"]) == ("asked", [])

    run_on(loop_kind, scenario())


def test_a_token_for_one_channel_or_for_reading_approves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            await world.approved("A", anna)
            code = (await world.node("B").ask_approval("B")).code
            mine = tables.owner_tokens.update().where(tables.owner_tokens.c.owner == ANNA)
            await set_row(world, mine.values(scope="read"))
            assert (await anna.call("findApproval", code=code))["label"] == "B"
            for kind, fields in (("approveNode", {"code": code}), ("denyNode", {"code": code}),
                                 ("forgetNode", {"node": "A"}), ("withdraw", {"node": "A", "channel": CHANNEL})):
                with pytest.raises(ActionRefused, match="token is not for"):
                    await anna.call(kind, **fields)
            await set_row(world, mine.values(scope="all", channel=CHANNEL))
            for kind, fields in (("approveNode", {"code": code}), ("listNodes", {}), ("forgetNode", {"node": "A"})):
                with pytest.raises(ActionRefused, match="token is for the channel"):
                    await anna.call(kind, **fields)
            await anna.call("requestPermissions", node="A", channel=CHANNEL, permissions=["all"])

    run_on("asyncio-debug", scenario())


# --- invitations by members


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_member_invites_where_members_may_and_passes_on_only_what_is_his(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna, boris = await world.person(ANNA), await world.person(BORIS)
            await let_in(world, "A", anna, FILES)
            with pytest.raises(NotPermitted, match="another owner"):
                await anna.call("invite", channel=CHANNEL)
            await world.owner.call("changeChannel", channel=CHANNEL, inviters="members")
            with pytest.raises(NotPermitted, match="none of your nodes is on it"):
                await boris.call("invite", channel=CHANNEL)
            for permissions in (["requestTasks"], ["requestFiles", "provideFeeds"], ["all"]):
                with pytest.raises(NotPermitted, match=r"have not .* themselves"):
                    await anna.call("invite", channel=CHANNEL, permissions=permissions)
            # Granted is not enough, nor is asked for: it has to be in force.
            await world.owner.call("grant", channel=CHANNEL, node="A", permissions=["provideFeeds"])
            await anna.call("requestPermissions", node="A", channel=CHANNEL, permissions=["requestFiles"])
            with pytest.raises(NotPermitted, match="have not provideFiles themselves"):
                await anna.call("invite", channel=CHANNEL)
            invited = await anna.call("invite", channel=CHANNEL, permissions=["requestFiles"])
            assert (await world.node("guest").join(invited["code"], "guest")).permissions == ["requestFiles"]
            with pytest.raises(NotPermitted, match="another owner"):
                await anna.call("closeInvitations", channel=CHANNEL)
            await boris.call("approveNode", code=(await world.node("B").ask_approval("B")).code)
            await boris.call("requestPermissions", node="B", channel=CHANNEL, permissions=["all"])
            with pytest.raises(NotPermitted, match="none of your nodes is on it"):
                await boris.call("invite", channel=CHANNEL, permissions=["requestFiles"])  # it only asks

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_node_that_comes_by_an_invitation_belongs_to_its_owner_or_else_to_who_invited(
    tmp_path: Path, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna, boris = await world.person(ANNA), await world.person(BORIS)
            await let_in(world, "A", anna, FILES)
            await world.owner.call("changeChannel", channel=CHANNEL, inviters="members")
            code = (await anna.call("invite", channel=CHANNEL, uses=None))["code"]
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert [line["owner"] for line in shown["invitations"]] == [ANNA]
            await world.approved("B", boris)
            await boris.call("requestPermissions", node="B", channel=CHANNEL, permissions=["all"])
            # Who asks is let in by an invitation too, with what that gives.
            assert (await world.node("B").join(code, "B")).permissions == FILES
            await world.node("guest").join(code, "guest")
            await world.node("other").join(await world.invite(), "other")
            assert {label: member["owner"] for label, member in (await members(world)).items()} == {
                "A": ANNA, "B": BORIS, "guest": ANNA, "other": "owner@lab.org"}
            assert {node["label"] for node in (await anna.call("listNodes"))["nodes"]} == {"A", "guest"}
            # Whose it really is can have it, once she has let it go.
            asked = (await world.node("guest").ask_approval("guest")).code
            with pytest.raises(ActionRefused, match=f"belongs to {ANNA}"):
                await boris.call("approveNode", code=asked)
            await anna.call("forgetNode", node="guest")
            asked = (await world.node("guest").ask_approval("guest")).code
            await boris.call("approveNode", code=asked)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_members_invitation_holds_while_he_may_invite_so(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            await let_in(world, "A", anna, FILES)
            await world.owner.call("changeChannel", channel=CHANNEL, inviters="members")
            code = (await anna.call("invite", channel=CHANNEL, uses=None))["code"]
            await world.node("first").join(code, "first")
            # As "first" counts among her nodes, it is taken off too.
            await world.owner.call("revoke", channel=CHANNEL, node="first", permissions=["all"])
            await world.owner.call("revoke", channel=CHANNEL, node="A", permissions=["provideFiles"])
            with pytest.raises(NotPermitted, match="may not invite so any more"):
                await world.node("second").join(code)
            await world.owner.call("grant", channel=CHANNEL, node="A", permissions=["provideFiles"])
            await world.node("second").join(code, "second")
            await world.owner.call("changeChannel", channel=CHANNEL, inviters="owner")
            with pytest.raises(NotPermitted, match="may not invite so any more"):
                await world.node("third").join(code)
            await world.node("third").join(await world.invite(), "third")

    run_on(loop_kind, scenario())


def test_members_leave_room_for_the_owners_invitations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr("kachery_fast.hub.invitations.INVITATIONS_PER_MEMBER_MAX", 2)
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            await let_in(world, "A", anna, FILES)
            await world.owner.call("changeChannel", channel=CHANNEL, inviters="members")
            for _ in range(2):
                await anna.call("invite", channel=CHANNEL)
            with pytest.raises(InvalidArgument, match="has 2 invitations"):
                await anna.call("invite", channel=CHANNEL)
            for _ in range(3):
                await world.owner.call("invite", channel=CHANNEL)
            world.clock.now += 8 * 24 * 3600
            await anna.call("invite", channel=CHANNEL)

    run_on("asyncio-debug", scenario())


def test_the_registry_forgets_a_node_on_which_nobody_decided(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            await world.approved("A", anna)
            await anna.call("requestPermissions", node="A", channel=CHANNEL, permissions=["all"])
            await anna.call("forgetNode", node="A")
            await let_in(world, "B", anna, ["all"])
            await anna.call("forgetNode", node="B")
            registry = world.registry()

            def read(connection: Connection) -> list[Any]:
                return list(connection.execute(sa.select(tables.nodes)))

            await registry.open()
            (row,) = await registry.call(read)
            await registry.close()
            assert (row.id, row.label) == (node_id("B"), "")

    run_on("asyncio-debug", scenario())
