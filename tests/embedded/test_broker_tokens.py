"""Tokens: what is accepted, what is refused and with which code, and what happens as they end."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.embedded.broker_wire import PUBLISH, SUBSCRIBE, Action, Fault
from kachery_fast.embedded.tokens import Claims, TokenKey, allows, check_token, make_token
from tests.embedded.broker_server import ALL, BANDS, KEY, Clock, Server, raw_client, serving
from tests.network import LOOPS, run_on

BAND, OTHER = BANDS[0], BANDS[1]
NOW = 1_800_000_000.0


def encode(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forge(head: dict[str, Any] | None = None, claims: dict[str, Any] | None = None, secret: str = KEY.secret,
          algorithm: Any = hashlib.sha256) -> str:
    """A token made by hand: right in everything but what is given."""
    head = {"typ": "JWT", "alg": "HS256", "kid": KEY.name, **(head or {})}
    claims = {"iat": NOW, "exp": NOW + 900, "x-ably-capability": json.dumps({BAND: ["publish"]}),
              "x-ably-clientId": "node-1", **(claims or {})}
    body = f"{encode(head)}.{encode(claims)}"
    return f"{body}.{encode(hmac.new(secret.encode(), body.encode(), algorithm).digest())}"


def unsigned() -> str:
    return forge({"alg": "none"}).rpartition(".")[0] + "."


BAD = {
    "alg none": unsigned(),
    "alg none, signed": forge({"alg": "none"}),
    "alg HS512": forge({"alg": "HS512"}, algorithm=hashlib.sha512),
    "alg in other case": forge({"alg": "hs256"}),
    "wrong key": forge(secret="another secret"),
    "wrong kid": forge({"kid": "app.other"}),
    "no kid": forge({"kid": None}),
    "claims exchanged": ".".join((forge().split(".")[0], encode({"iat": NOW, "exp": NOW + 1}), forge().split(".")[2])),
    "no signature": forge().rpartition(".")[0],
    "signature cut": forge()[:-1],
    "four parts": forge() + ".x",
    "text": "not a token",
    "empty parts": "..",
    "not ascii": "é.é.é",
    "head not JSON": "AAAA.AAAA.AAAA",
    "too long": "a" * 20000 + ".b.c",
    "capability not a map": forge(claims={"x-ably-capability": "[]"}),
    "capability not text": forge(claims={"x-ably-capability": {BAND: ["publish"]}}),
    "capability of numbers": forge(claims={"x-ably-capability": json.dumps({BAND: [1]})}),
    "client id a number": forge(claims={"x-ably-clientId": 5}),
    "exp missing": forge(claims={"exp": None}),
    "exp text": forge(claims={"exp": "never"}),
    "exp before iat": forge(claims={"exp": NOW - 1}),
    "a life of a year": forge(claims={"exp": NOW + 365 * 86400}),
    "issued in the future": forge(claims={"iat": NOW + 3600, "exp": NOW + 3700}),
}


@pytest.mark.parametrize("token", BAD.values(), ids=BAD.keys())
def test_a_forged_or_senseless_token_is_refused_for_good(token: str) -> None:
    answer = check_token(KEY, token, NOW + 1)
    assert isinstance(answer, Fault)
    assert answer.code == 40101


def test_a_token_made_by_hand_by_the_rules_is_accepted() -> None:
    answer = check_token(KEY, forge(), NOW + 1)
    assert answer == Claims("node-1", {BAND: frozenset({"publish"})}, NOW, NOW + 900)


def test_an_expired_token_has_the_code_that_makes_clients_renew() -> None:
    assert isinstance(check_token(KEY, forge(), NOW + 899.9), Claims)
    answer = check_token(KEY, forge(), NOW + 900)
    assert isinstance(answer, Fault)
    assert answer.code == 40142


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40),
       st.dictionaries(st.text(max_size=20), st.lists(st.sampled_from(["publish", "subscribe", "*"]))),
       st.floats(1.0, 4e9), st.floats(0.01, 80000.0))
def test_what_is_made_is_what_is_read(client_id: str, capability: dict[str, list[str]], now: float,
                                      life_seconds: float) -> None:
    details = make_token(KEY, client_id, capability, now, life_seconds)
    claims = check_token(KEY, details["token"], now)
    assert isinstance(claims, Claims)
    assert claims.client_id == client_id
    assert claims.capability == {name: frozenset(operations) for name, operations in capability.items()}
    assert details["expires"] == int(claims.expires * 1000)
    assert abs(claims.expires - now - life_seconds) < 0.002
    assert check_token(TokenKey(KEY.name, KEY.secret + "x"), details["token"], now) != claims


def test_a_capability_is_by_exact_name_and_operation() -> None:
    capability = {"a": frozenset({"publish"}), "b*": frozenset({"*"})}
    assert allows(capability, "a", "publish")
    assert not allows(capability, "a", "subscribe")
    assert not allows(capability, "a2", "publish")
    assert not allows(capability, "*", "publish")
    assert allows(capability, "b*", "subscribe")
    assert not allows(capability, "bc", "subscribe")


# --- at the broker


@pytest.mark.parametrize("name", ["alg none", "wrong key", "wrong kid"])
def test_a_connection_with_a_forged_token_is_refused_for_good(name: str) -> None:
    async def scenario() -> None:
        async with (serving(clock=Clock(NOW)) as server,
                    raw_client(server, token=BAD[name], expect=Action.ERROR) as client):
            assert client.connected["error"]["code"] == 40101
            await client.ended()
            assert server.broker.stats()["connections"] == 0

    run_on("uvloop", scenario())


@pytest.mark.parametrize("parameter", ["accessToken", "access_token"])
def test_the_token_is_taken_from_either_parameter(parameter: str) -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server, token="", query={
                "v": "2", "heartbeats": "false", parameter: server.token()}) as client:
            assert (await client.attach(BAND))["channel"] == BAND
            assert "res" not in await client.publish(BAND, 0, {"data": "x"})

    run_on("uvloop", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_client_is_asked_to_renew_in_time_and_keeps_its_connection(loop_kind: str) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server, raw_client(server, token=server.token(life_seconds=900)) as client:
            await client.attach(BAND)
            clock.now += 869
            server.broker.tick()
            await client.send(action=Action.HEARTBEAT, id="quiet")
            assert (await client.read())["id"] == "quiet"
            clock.now += 1
            await client.read(Action.AUTH)
            server.broker.tick()
            await client.send(action=Action.AUTH, auth={"accessToken": server.token()})
            again = await client.read(Action.CONNECTED)
            assert again["connectionId"] == client.connected["connectionId"]
            clock.now += 100
            server.broker.tick()
            assert (await client.publish(BAND, 0, {"data": "x"}))["action"] == Action.ACK

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("by_tick", [True, False])
def test_a_connection_ends_with_its_token(by_tick: bool) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server, raw_client(server) as client:
            clock.now += 900
            if by_tick:
                server.broker.tick()
            else:
                await client.send(action=Action.MESSAGE, channel=BAND, msgSerial=0, messages=[{"data": "late"}])
            assert (await client.read(Action.DISCONNECTED))["error"]["code"] == 40142
            await client.ended()
            assert server.broker.stats().get("published", 0) == 0

    run_on("uvloop", scenario())


def test_a_renewed_token_that_grants_less_is_obeyed_at_once() -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as client, raw_client(server) as other:
            await client.attach(BAND)
            await client.attach(OTHER)
            less = server.token("node-1", {BAND: ["publish"]})
            await client.send(action=Action.AUTH, auth={"accessToken": less})
            refusal = await client.read(Action.ERROR)
            assert (refusal["channel"], refusal["error"]["code"]) == (OTHER, 40160)
            await client.read(Action.CONNECTED)
            for band in (BAND, OTHER):
                await other.publish(band, BANDS.index(band), {"data": "x"})
            assert server.broker.stats().get("delivered", 0) == 0
            assert (await client.attach(BAND))["flags"] == PUBLISH

    run_on("uvloop", scenario())


def test_a_renewed_token_that_grants_more_counts_from_the_next_attach() -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server, token=server.token("n", {BAND: ["publish"]})) as client:
            assert (await client.attach(BAND))["flags"] == PUBLISH
            await client.send(action=Action.AUTH, auth={"accessToken": server.token("n")})
            await client.read(Action.CONNECTED)
            assert (await client.attach(BAND))["flags"] == PUBLISH | SUBSCRIBE

    run_on("uvloop", scenario())


@pytest.mark.parametrize(("token", "action", "code"), [
    ("another", Action.ERROR, 40102), ("forged", Action.ERROR, 40101), ("old", Action.DISCONNECTED, 40142),
    ("", Action.ERROR, 40101),
])
def test_a_bad_token_in_mid_connection_ends_it(token: str, action: Action, code: int) -> None:
    clock = Clock(NOW)

    async def scenario() -> None:
        async with serving(clock=clock) as server, raw_client(server) as client:
            tokens = {"another": server.token("node-2"), "forged": BAD["wrong key"], "": "",
                      "old": server.token(life_seconds=1)}
            clock.now += 2
            await client.send(action=Action.AUTH, auth={"accessToken": tokens[token]})
            assert (await client.read(action))["error"]["code"] == code
            await client.ended()

    run_on("uvloop", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_revoking_cuts_the_client_and_refuses_its_tokens_from_before(loop_kind: str) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with (serving(clock=clock) as server, raw_client(server, token=server.token("node-2")) as other,
                    raw_client(server) as one, raw_client(server) as two):
            before, key = server.token(), one.connected["connectionKey"]
            assert await server.broker.revoke("node-1") == 2
            for client in (one, two):
                assert (await client.read(Action.DISCONNECTED))["error"]["code"] == 40141
                await client.ended()
            async with raw_client(server, token=before, expect=Action.ERROR) as refused:
                assert refused.connected["error"]["code"] == 40141
            async with raw_client(server, token=server.token(), query={"resume": key}) as again:
                assert again.connected["connectionId"] != one.connected["connectionId"]
            assert (await other.publish(BAND, 0, {"data": "x"}))["action"] == Action.ACK
            assert await server.broker.revoke("nobody") == 0

    run_on(loop_kind, scenario())


def test_a_token_from_before_the_brokers_start_must_be_renewed() -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server:
            before = server.token()
            await server.stop()
            clock.now += 5
            await server.start()
            async with raw_client(server, token=before, expect=Action.ERROR) as refused:
                assert refused.connected["error"]["code"] == 40142
            async with raw_client(server) as client:
                assert "error" not in client.connected

    run_on("uvloop", scenario())


# --- token requests


def signed_request(clock: Clock, **changes: Any) -> dict[str, Any]:
    request: dict[str, Any] = {"keyName": KEY.name, "ttl": 60_000, "capability": json.dumps({BAND: ["publish"]}),
                               "clientId": "js-1", "timestamp": int(clock.now * 1000), "nonce": "n" * 16, **changes}
    fields = ("keyName", "ttl", "capability", "clientId", "timestamp", "nonce")
    text = "".join(f"{'' if request.get(name) is None else request[name]}\n" for name in fields)
    mac = hmac.new(KEY.secret.encode(), text.encode(), hashlib.sha256).digest()
    return {"mac": base64.b64encode(mac).decode(), **request}


async def ask(server: Server, request: dict[str, Any], packed: bool = False, key_name: str = KEY.name
              ) -> tuple[int, Any]:
    kind = "application/x-msgpack" if packed else "application/json"
    body = msgspec.msgpack.encode(request) if packed else json.dumps(request).encode()
    async with aiohttp.ClientSession() as session, session.post(
            f"http://{server.endpoint}/keys/{key_name}/requestToken", data=body,
            headers={"Content-Type": kind}) as response:
        raw = await response.read()
        assert response.content_type == kind
        return response.status, msgspec.msgpack.decode(raw) if packed else json.loads(raw)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_signed_token_request_gets_a_token_that_works_once(loop_kind: str, packed: bool) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server:
            status, details = await ask(server, signed_request(clock), packed)
            assert status == 201
            assert details["expires"] - details["issued"] == 60_000
            assert (details["clientId"], details["keyName"]) == ("js-1", KEY.name)
            async with raw_client(server, token=details["token"]) as client:
                assert (await client.attach(BAND))["flags"] == PUBLISH
            status, answer = await ask(server, signed_request(clock), packed)
            assert (status, answer["error"]["code"]) == (401, 40101)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize(("changes", "status"), [
    ({"mac": "AAAA"}, 401), ({"timestamp": 1}, 401), ({"ttl": 10**10}, 400), ({"ttl": -1}, 400),
    ({"capability": "no"}, 400), ({"nonce": "short"}, 401), ({"timestamp": "now"}, 400),
])
def test_a_bad_token_request_is_refused(changes: dict[str, Any], status: int) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server:
            assert (await ask(server, signed_request(clock, **changes)))[0] == status
            assert (await ask(server, signed_request(clock), key_name="app.other"))[0] == 404
            assert (await ask(server, {"keyName": KEY.name}))[0] == 400
            assert (await ask(server, {"nonce": "x" * 100_000}))[0] == 413

    run_on("uvloop", scenario())


def test_revocations_and_nonces_are_forgotten_when_they_no_longer_matter() -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server:
            assert (await ask(server, signed_request(clock)))[0] == 201
            await server.broker.revoke("node-1")
            old = server.broker
            clock.now += 90_000
            old.tick()
            assert (await ask(server, signed_request(clock)))[0] == 201
            async with raw_client(server, token=server.token("node-1", ALL)) as client:
                assert "error" not in client.connected

    run_on("uvloop", scenario())
