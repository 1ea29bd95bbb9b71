"""What nodes ask of the hub: the gates every request passes, and each answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import KacheryError, NotPermitted, RateLimited, StaleMessage, TooLarge
from kachery_fast.hub import node_api
from kachery_fast.hub.damage import CHECKS_PER_NODE_MAX
from kachery_fast.hub.node_api import BUCKET_QUESTIONS_PER_SECOND_MAX, JOIN_FAILURES_PER_MINUTE_MAX
from kachery_fast.protocol.hub_bodies import GetNodeConfig, GetPubsubToken, JoinChannel, SignUploads
from kachery_fast.protocol.messages import decode_hub_request, encode_hub_request

from ..network import LOOPS, run_on
from .support import ALL, CHANNEL, OWNER, Clock, World, node_id, node_key, running_world

CONTENT = b"a chunk of a recording" * 1000
SHA1 = hashlib.sha1(CONTENT).hexdigest()


def stored_object(world: World, sha1: str) -> Path:
    (path,) = [path for path in (world.settings.hub_dir / "bucket").rglob(sha1) if path.is_file()]
    return path


async def refused(world: World, data: bytes) -> dict[str, Any]:
    """POST a node request that must be refused; return the error."""
    status, answer = await world.post("/api/node", data)
    assert status != 200
    assert set(answer) == {"error", "message", "details"}
    assert KacheryError.from_dict(answer).http_status == status
    return dict(answer)


# --- signature, freshness, registration


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_request_counts_once(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            body = GetPubsubToken(channel=CHANNEL, time=int(world.clock() * 1000), id="1" * 32)
            data = encode_hub_request(body, node_key("A"))
            status, _ = await world.post("/api/node", data)
            assert status == 200
            error = await refused(world, data)
            assert error["error"] == "StaleMessage"
            assert "before" in error["message"]

    run_on(loop_kind, scenario())


def test_a_join_that_was_overheard_cannot_bring_a_node_back_that_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            code = await world.invite(uses=None)
            body = JoinChannel(time=int(world.clock() * 1000), id="1" * 32, invitation=code)
            data = encode_hub_request(body, node_key("A"))
            assert (await world.post("/api/node", data))[0] == 200
            await world.node("A").leave(CHANNEL)
            assert (await refused(world, data))["error"] == "StaleMessage"
            assert (await world.node("A").node_config()).channels == []

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("shift_seconds", [-121.0, 121.0])
def test_a_request_from_another_time_is_refused_with_the_hubs_time(tmp_path: Path, shift_seconds: float) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            world.clock.now += 1000
            body = GetPubsubToken(channel=CHANNEL, time=int((world.clock() + shift_seconds) * 1000), id="1" * 32)
            error = await refused(world, encode_hub_request(body, node_key("A")))
            assert error["error"] == "StaleMessage"
            assert error["details"]["now"] == int(world.clock() * 1000)

    run_on("asyncio-debug", scenario())


def test_a_request_that_an_earlier_run_of_the_hub_may_have_seen_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            await world.member("A")
            body = GetPubsubToken(channel=CHANNEL, time=int(clock() * 1000), id="1" * 32)
            data = encode_hub_request(body, node_key("A"))
            assert (await world.post("/api/node", data))[0] == 200
        clock.now += 1
        async with running_world(tmp_path, clock, channel=False) as world:
            error = await refused(world, data)
            assert error["error"] == "StaleMessage"
            # A node that does not know corrects its clock, which was right, and asks anew.
            assert (await world.node("A").pubsub_token(CHANNEL)).client_id == node_id("A")

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_forged_request_is_refused_before_anything_else_is_looked_at(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            time_ms = int(world.clock() * 1000)
            honest = json.loads(encode_hub_request(
                GetPubsubToken(channel=CHANNEL, time=time_ms, id="1" * 32), node_key("stranger")))
            in_the_name_of_a = {**honest, "nodeId": node_id("A")}
            changed = {**honest, "body": {**honest["body"], "channel": "other"}}
            for forged in (in_the_name_of_a, changed, {**honest, "signature": "00" * 64}):
                error = await refused(world, json.dumps(forged).encode())
                assert error["error"] == "SignatureInvalid"

    run_on(loop_kind, scenario())


def test_an_unregistered_node_is_told_to_join_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            with pytest.raises(NotPermitted, match="not registered"):
                await world.node("stranger").node_config()

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("data", [
    b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"body":{},"nodeId":"x"}', b'{"body":1,"nodeId":"","signature":""}',
    b'{"body":{"type":"noSuchThing"},"nodeId":"","signature":""}',
    b'{"body":{"type":["x"]},"nodeId":"","signature":""}',
    b'{"body":{},"nodeId":"","signature":"","more":1}',
    b"[" * 100_000,
], ids=lambda data: repr(data[:40]))
def test_what_is_no_request_is_refused_as_malformed(tmp_path: Path, loop_kind: str, data: bytes) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            error = await refused(world, data)
            assert error["error"] in ("BadMessage", "SignatureInvalid")
            assert (await world.session.get(world.url + "/api/health")).status == 200

    run_on(loop_kind, scenario())


def test_a_signed_request_with_wrong_fields_is_refused_as_malformed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            time_ms = int(world.clock() * 1000)
            short_id = GetNodeConfig(time=time_ms, id="1")
            assert (await refused(world, encode_hub_request(short_id, node_key("A"))))["error"] == "InvalidArgument"
            for objects in ([("x", 1)], [("A" * 40, 1)], [(SHA1, -1)], [("../../../etc/passwd", 1)]):
                with pytest.raises(KacheryError) as caught:
                    await client.sign_uploads(CHANNEL, objects)
                assert caught.value.http_status == 400
            for channel in ("", "..", "lab/../other", "x" * 300):
                with pytest.raises(NotPermitted):
                    await client.sign_uploads(channel, [(SHA1, 1)])

    run_on("asyncio-debug", scenario())


def test_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, api_body_size_bytes_max=10_000) as world:
            for path in ("/api/node", "/api/owner"):
                status, answer = await world.post(path, b"x" * 10_001)
                assert status == 413
                assert answer["error"] == "TooLarge"
                assert "api_body_size_bytes_max" in answer["message"]

    run_on("asyncio-debug", scenario())


def test_a_stranger_cannot_keep_the_hub_busy_with_one_long_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that canonical JSON writes in another way are what takes longest to check."""
    threads: list[str] = []

    def decode(data: bytes) -> Any:
        threads.append(threading.current_thread().name.split("_")[0])
        return decode_hub_request(data)

    def request(size: int) -> bytes:
        numbers = ",".join(["1.5e300"] * (size // 8))
        return (f'{{"body":{{"type":"keepTasks","time":1,"id":"{"1" * 32}","tasks":[],"more":[{numbers}]}},'
                f'"nodeId":"{node_id("stranger")}","signature":"{"0" * 128}"}}').encode()

    async def scenario() -> None:
        monkeypatch.setattr(node_api, "decode_hub_request", decode)
        async with running_world(tmp_path) as world:
            assert (await refused(world, request(900_000)))["error"] == "TooLarge"
            assert (await refused(world, request(100_000)))["error"] == "SignatureInvalid"
            assert (await refused(world, request(1000)))["error"] == "SignatureInvalid"
            assert threads == ["hub-reader", "MainThread"]

    run_on("asyncio-debug", scenario())


# --- the answers


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_node_learns_its_channels_and_fellow_members(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            first = await world.member("first", granted=["requestFiles"])
            await world.member("second", granted=["provideFiles"])
            world.clock.now += 60
            config = await first.node_config("renamed\x1b[31m", "9.9")
            (info,) = config.channels
            assert (config.owner, info.owner, info.name) == (OWNER, OWNER, CHANNEL)
            assert config.time == int(world.clock() * 1000)
            assert info.bucket_url == f"{world.url}/bucket/"
            assert (info.pubsub.kind, info.pubsub.endpoint) == ("ably", "")
            assert [(member.label, member.permissions) for member in info.members] == [
                ("renamed[31m", ["requestFiles"]), ("second", ["provideFiles"])]
            assert info.members[0].last_seen - info.members[1].last_seen == 60_000

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_uploads_are_signed_in_order_and_within_limits(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, sign_batch_max=3, sign_rate_per_node_max=1) as world:
            client, other = await world.member("A"), await world.member("B")
            objects = [(hashlib.sha1(bytes([n])).hexdigest(), n) for n in range(3)]
            assert [item.sha1 for item in await client.sign_uploads(CHANNEL, objects)] == [o[0] for o in objects]
            with pytest.raises(TooLarge, match="sign_batch_max"):
                await client.sign_uploads(CHANNEL, [*objects, (SHA1, 1)])
            with pytest.raises(TooLarge, match=str(64 * 1024 * 1024)):
                await client.sign_uploads(CHANNEL, [(SHA1, 64 * 1024 * 1024 + 1)])
            for _ in range(2):
                await client.sign_uploads(CHANNEL, objects)
            with pytest.raises(RateLimited) as caught:  # ten seconds' worth are ten; nine are spent
                await client.sign_uploads(CHANNEL, objects)
            assert caught.value.details["retry_seconds"] == 2.0
            await other.sign_uploads(CHANNEL, objects)
            world.clock.now += 2
            await client.sign_uploads(CHANNEL, objects)

    run_on(loop_kind, scenario())


def test_a_signed_url_ends_with_its_life(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, url_life_seconds=60) as world:
            client = await world.member("A")
            (signed,) = await client.sign_uploads(CHANNEL, [(SHA1, len(CONTENT))])
            world.clock.now += 61
            async with world.session.put(signed.url, data=CONTENT, headers=signed.headers) as response:
                assert response.status == 403
            assert await world.upload(client, CONTENT) == 200

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_many_requests_at_once_are_all_answered(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            clients = [await world.member(f"node {number}") for number in range(4)]
            objects = [(hashlib.sha1(b"%d" % n).hexdigest(), n) for n in range(100)]
            answers = await asyncio.gather(*(
                clients[n % 4].sign_uploads(CHANNEL, [item]) for n, item in enumerate(objects)))
            assert [answer[0].sha1 for answer in answers] == [sha1 for sha1, _ in objects]

    run_on(loop_kind, scenario())


# --- damage


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_damaged_object_is_removed_and_a_sound_one_is_not(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            assert await world.upload(client, CONTENT) == 200
            assert not await client.report_corrupt(CHANNEL, SHA1, "0" * 40), "a false report removes nothing"
            assert await world.download(SHA1) == CONTENT

            path = stored_object(world, SHA1)
            path.chmod(0o600)
            path.write_bytes(b"damaged")
            assert await client.report_corrupt(CHANNEL, SHA1, hashlib.sha1(b"damaged").hexdigest())
            assert await world.download(SHA1) is None
            assert not await client.report_corrupt(CHANNEL, SHA1, "0" * 40), "nothing is left to remove"
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert [(item["sha1"], item["actual"], item["reportedBy"]) for item in shown["damage"]] == [
                (SHA1, hashlib.sha1(b"damaged").hexdigest(), node_id("A"))]
            assert await world.upload(client, CONTENT) == 200, "it can be uploaded again"

    run_on(loop_kind, scenario())


def test_reports_of_damage_are_checked_a_few_at_a_time_for_each_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client, other = await world.member("A"), await world.member("B")
            content = b"x" * (16 * 1024 * 1024)
            sha1 = hashlib.sha1(content).hexdigest()
            assert await world.upload(client, content) == 200
            count = 5 * CHECKS_PER_NODE_MAX
            answers = await asyncio.gather(
                *(client.report_corrupt(CHANNEL, sha1, "0" * 40) for _ in range(count)), return_exceptions=True)
            assert any(isinstance(answer, RateLimited) for answer in answers)
            assert all(answer is False or isinstance(answer, RateLimited) for answer in answers)
            assert not await other.report_corrupt(CHANNEL, sha1, "0" * 40)
            assert not await client.report_corrupt(CHANNEL, sha1, "0" * 40), "the count went down again"

    run_on("asyncio-debug", scenario())


# --- invitations


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_invitation_has_its_number_of_uses(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            code = await world.invite(uses=2)
            answers = await asyncio.gather(
                *(world.node(f"node {n}").join(code) for n in range(5)), return_exceptions=True)
            refusals = [answer for answer in answers if isinstance(answer, BaseException)]
            assert len(refusals) == 3
            assert all(isinstance(refusal, NotPermitted) and "used up" in str(refusal) for refusal in refusals)
            winner = next(n for n, answer in enumerate(answers) if not isinstance(answer, BaseException))
            # The answer may have been lost on its way: asking again is free.
            again = await world.node(f"node {winner}").join(code, permissions=["requestFiles"])
            assert again.permissions == ["requestFiles"]
            free = await world.invite(uses=None)
            for n in range(5):
                await world.node(f"guest {n}").join(free)
            await world.owner.call("closeInvitations", channel=CHANNEL)
            with pytest.raises(NotPermitted, match="no such invitation"):
                await world.node("late").join(free)

    run_on(loop_kind, scenario())


def test_an_invitation_expires_and_a_guessed_one_never_was(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            code = await world.invite(days=1)
            world.clock.now += 24 * 3600 + 1
            with pytest.raises(NotPermitted, match="expired"):
                await world.node("A").join(code)
            for guess in ("", "x" * 22, code[:-1], code.upper() + "a", "'; drop table nodes; --", "\ud800"):
                with pytest.raises(KacheryError):
                    await world.node("A").join(guess)

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_guesses_of_invitations_are_slowed_down(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            good = await world.invite()
            guesses = await asyncio.gather(
                *(world.node(f"guesser {n}").join(f"guess{n}") for n in range(30)), return_exceptions=True)
            wrong = [guess for guess in guesses if isinstance(guess, NotPermitted)]
            assert len(wrong) == JOIN_FAILURES_PER_MINUTE_MAX
            assert all(isinstance(guess, (NotPermitted, RateLimited)) for guess in guesses)
            with pytest.raises(RateLimited):
                await world.node("A").join("another guess")
            with pytest.raises(RateLimited):
                await world.node("A").join(good)
            world.clock.now += 6.1
            await world.node("A").join(good)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_invitation_does_not_overrule_a_later_decision_on_a_node(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            code = await world.invite(uses=None)
            client = world.node("A")
            assert (await client.join(code)).permissions == sorted(ALL)
            world.clock.now += 1
            await world.owner.call("revoke", channel=CHANNEL, node=node_id("A"), permissions=["provideFiles"])
            left = sorted(set(ALL) - {"provideFiles"})
            assert (await client.join(code)).permissions == left
            await client.leave(CHANNEL)
            assert (await client.join(code)).permissions == left
            await world.owner.call("removeNode", channel=CHANNEL, node=node_id("A"))
            with pytest.raises(NotPermitted, match="removed this node"):
                await client.join(code)
            world.clock.now += 1
            assert (await client.join(await world.invite())).permissions == sorted(ALL)

    run_on(loop_kind, scenario())


def test_a_permission_asked_for_at_joining_takes_effect_when_it_is_granted_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = world.node("A")
            await client.join(await world.invite(["requestFiles"]), "A")
            with pytest.raises(NotPermitted, match="has not granted provideFiles"):
                await client.sign_uploads(CHANNEL, [(SHA1, 1)])
            await world.owner.call("grant", channel=CHANNEL, node="A", permissions=["provide-files"])
            await client.sign_uploads(CHANNEL, [(SHA1, 1)])

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_restart_keeps_everything(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            client = await world.member("A", granted=["provideFiles", "requestFiles"])
            open_code = await world.invite()
            assert await world.upload(client, CONTENT) == 200
            (signed,) = await client.sign_uploads(CHANNEL, [(hashlib.sha1(b"late").hexdigest(), 4)])
            token = world.token
        clock.now += 1
        async with running_world(tmp_path, clock, channel=False) as world:
            assert world.token == token
            client = world.node("A")
            (info,) = (await client.node_config()).channels
            assert info.permissions == ["provideFiles", "requestFiles"]
            assert await world.download(SHA1) == CONTENT
            late = world.url + "/bucket/" + signed.url.partition("/bucket/")[2]
            async with world.session.put(late, data=b"late", headers=signed.headers) as response:
                assert response.status == 200, "URLs signed before the restart hold"
            await world.node("B").join(open_code)
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert {member["node"] for member in shown["members"]} == {node_id("A"), node_id("B")}

    run_on(loop_kind, scenario())


def test_a_signature_is_checked_before_freshness_and_freshness_before_registration(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            old = SignUploads(channel=CHANNEL, time=1, id="1" * 32, objects=[])
            envelope = json.loads(encode_hub_request(old, node_key("stranger")))
            assert (await refused(world, json.dumps(envelope).encode()))["error"] == "StaleMessage"
            envelope["signature"] = "00" * 64
            assert (await refused(world, json.dumps(envelope).encode()))["error"] == "SignatureInvalid"
            with pytest.raises(StaleMessage):
                raise KacheryError.from_dict(await refused(world, encode_hub_request(old, node_key("other"))))

    run_on("asyncio-debug", scenario())


def test_who_asks_for_buckets_without_end_is_slowed_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            question = json.dumps({"channelName": CHANNEL}).encode()

            async def ask() -> int:
                return int((await world.post("/api/getChannelBucketBaseUrl", question))[0])

            burst = 10 * BUCKET_QUESTIONS_PER_SECOND_MAX
            assert [await ask() for _ in range(burst + 3)] == [200] * burst + [429] * 3
            world.clock.now += 1.0
            assert [await ask() for _ in range(3)] == [200] * 3

    run_on("uvloop", scenario())
