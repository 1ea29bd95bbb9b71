"""What no true OpenID provider says: tokens and answers made by hand, by a small provider with a key of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from kachery_fast.errors import IdTokenRefused, InvalidSetting, ProviderUnusable, SignInRefused
from kachery_fast.hub.accounts import Person
from kachery_fast.hub.app import Hub
from kachery_fast.hub.oidc import OpenIdSignIn

from ..network import LOOPS, run_on
from .openid import CLIENT_ID, CLIENT_SECRET, REDIRECT_URI, sign_in
from .support import Clock, hub_settings

KEY = RSAKey.generate_key(2048, {"kid": "one", "use": "sig", "alg": "RS256"})
OTHER_KEY = RSAKey.generate_key(2048, {"kid": "one", "use": "sig", "alg": "RS256"})
HEADER = {"alg": "RS256", "kid": "one"}
SECRET_KEY = OctKey.import_key(CLIENT_SECRET + "-which-is-long-enough-for-hs256", {"kid": "secret"})
CURVE_KEY = ECKey.generate_key("P-256", {"kid": "two", "use": "sig", "alg": "ES256"})


class Maker:
    """A provider whose answers are made by hand. Each may be replaced; ``asked`` counts the requests by path."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.issuer = ""
        self.asked: dict[str, int] = {}
        self.form: dict[str, str] = {}
        self.metadata: dict[str, Any] = {}
        self.keys: dict[str, Any] = {"keys": [KEY.as_dict(private=False)]}
        self.claims: dict[str, Any] = {}
        self.userinfo: dict[str, Any] = {}
        self.token: Callable[[dict[str, Any]], str] = lambda claims: jwt.encode(HEADER, claims, KEY)
        self.answers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.path] = self.asked.get(request.path, 0) + 1
        if request.path in self.answers:
            return await self.answers[request.path](request)
        if request.path == "/.well-known/openid-configuration":
            return web.json_response({
                "issuer": self.issuer, "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token", "jwks_uri": f"{self.issuer}/keys",
                "userinfo_endpoint": f"{self.issuer}/userinfo", **self.metadata})
        if request.path == "/keys":
            return web.json_response(self.keys)
        if request.path == "/userinfo":
            return web.json_response({"sub": "1", **self.userinfo})
        self.form = dict(await request.post())  # type: ignore[arg-type]
        return web.json_response({
            "access_token": "access", "token_type": "Bearer", "id_token": self.token(self.good())})

    def good(self) -> dict[str, Any]:
        """The claims of a token that holds, changed as the test wants; None takes one away."""
        now = int(self.clock())
        claims = {"iss": self.issuer, "sub": "1", "aud": CLIENT_ID, "exp": now + 300, "iat": now,
                  "nonce": self.form["code"], "email": "anna@lab.org", "email_verified": True, "name": "Anna",
                  **self.claims}
        return {name: value for name, value in claims.items() if value is not None}

    async def finish(self, hub: OpenIdSignIn) -> Person:
        """Sign in. The code says which nonce the token is to have, as a true provider remembers it."""
        begun = await hub.begin(REDIRECT_URI)
        asked = dict(parse_qsl(urlsplit(begun.url).query))
        return await hub.finish(begun.kept, {"code": asked["nonce"], "state": asked["state"]}, REDIRECT_URI)


@asynccontextmanager
async def running_maker() -> AsyncIterator[Maker]:
    maker = Maker(Clock())
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", maker.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        maker.issuer = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield maker
    finally:
        await runner.cleanup()


def unsigned(claims: dict[str, Any], alg: str = "none") -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": alg, "kid": "one"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_token_that_holds_is_taken_and_nothing_is_asked_twice(loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            hub = sign_in(maker.issuer, maker.clock)
            for _ in range(3):
                assert await maker.finish(hub) == Person(maker.issuer, "1", "anna@lab.org", True, "Anna")
            assert maker.asked == {"/.well-known/openid-configuration": 1, "/keys": 1, "/token": 3}
            assert len(maker.form["code_verifier"]) == 43
            maker.clock.now += 3600
            await maker.finish(hub)
            assert maker.asked == {"/.well-known/openid-configuration": 2, "/keys": 2, "/token": 4}

    run_on(loop_kind, scenario())


@pytest.mark.parametrize(("claims", "why"), [
    ({"iss": "https://accounts.example.org"}, "iss"), ({"iss": None}, "iss"),
    ({"aud": "another hub"}, "aud"), ({"aud": ["another hub"]}, "aud"), ({"aud": None}, "aud"),
    ({"aud": [CLIENT_ID, "another hub"]}, "azp"), ({"azp": "another hub"}, "azp"),
    ({"exp": 1}, "expired"), ({"exp": None}, "exp"), ({"exp": "9999999999"}, "exp"),
    ({"iat": 99_999_999_999}, "future|not valid yet"), ({"iat": None}, "iat"),
    ({"nbf": 99_999_999_999}, "not yet valid|not valid yet"),
    ({"nonce": "of another sign-in"}, "nonce"), ({"nonce": None}, "nonce"), ({"nonce": ""}, "nonce"),
    ({"sub": None}, "sub"), ({"sub": ""}, "sub"), ({"sub": 1}, "sub"), ({"sub": "1" * 256}, "sub"),
    ({"sub": "a\nb"}, "subject"), ({"at_hash": "AAAAAAAAAAAAAAAAAAAAAA"}, "at_hash"),
], ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "")
def test_a_token_whose_claims_do_not_hold_is_refused(claims: dict[str, Any], why: str) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.claims = claims
            with pytest.raises(IdTokenRefused, match=why):
                await maker.finish(sign_in(maker.issuer, maker.clock))

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("make", [
    unsigned,
    lambda claims: unsigned(claims, "None"),
    lambda claims: unsigned(claims, "RS256"),
    lambda claims: jwt.encode({"alg": "HS256", "kid": "secret"}, claims, SECRET_KEY),
    lambda claims: jwt.encode(HEADER, claims, OTHER_KEY),
    lambda claims: jwt.encode({"alg": "RS256", "kid": "two"}, claims, KEY),
    lambda claims: jwt.encode({"alg": "RS256", "kid": "one", "crit": ["b64"], "b64": False}, claims, KEY)[:-8],
    lambda claims: jwt.encode(HEADER, claims, KEY)[:-8] + "AAAAAAAA",
    lambda claims: ".".join([jwt.encode(HEADER, claims, KEY).rpartition(".")[0], "AAAA"]),
    lambda claims: "not a token", lambda claims: "", lambda claims: "a.b.c.d.e", lambda claims: "é.é.é",
], ids=["none", "None", "no signature", "HS256 by the client's secret", "another key", "an unknown key", "crit",
        "another signature", "a short signature", "no token", "empty", "encrypted", "not ASCII"])
@pytest.mark.parametrize("offered", [["RS256"], ["RS256", "HS256", "none"], ["HS256", "none"], []])
def test_a_token_that_is_not_signed_by_a_key_of_the_provider_is_refused(
    make: Callable[[dict[str, Any]], str], offered: list[str]
) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.token = make
            maker.metadata = {"id_token_signing_alg_values_supported": offered}
            # A key that is published, as a provider might by mistake: whoever reads it could sign with it.
            maker.keys = {"keys": [*maker.keys["keys"], SECRET_KEY.as_dict(private=True)]}
            with pytest.raises(IdTokenRefused, match="does not hold"):
                await maker.finish(sign_in(maker.issuer, maker.clock))

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("offered", [["RS256"], ["HS256"], []])
def test_a_token_of_an_algorithm_that_is_not_announced_is_refused(offered: list[str]) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.metadata = {"id_token_signing_alg_values_supported": offered}
            maker.keys = {"keys": [CURVE_KEY.as_dict(private=False)]}
            maker.token = lambda claims: jwt.encode({"alg": "ES256", "kid": "two"}, claims, CURVE_KEY)
            with pytest.raises(IdTokenRefused, match="unsupported_algorithm"):
                await maker.finish(sign_in(maker.issuer, maker.clock))

    run_on("asyncio-debug", scenario())


def test_a_key_that_is_published_later_or_of_another_kind_is_found() -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            hub = sign_in(maker.issuer, maker.clock)
            await maker.finish(hub)
            maker.metadata = {"id_token_signing_alg_values_supported": ["RS256", "ES256"]}
            maker.clock.now += 3600
            await maker.finish(hub)
            maker.keys["keys"] += [CURVE_KEY.as_dict(private=False), {"kty": "of another age", "kid": "three"}]
            maker.token = lambda claims: jwt.encode({"alg": "ES256", "kid": "two"}, claims, CURVE_KEY)
            assert (await maker.finish(hub)).subject == "1"
            # Under the name of the old one, as after a move of the provider to another machine.
            maker.keys = {"keys": [OTHER_KEY.as_dict(private=False)]}
            maker.token = lambda claims: jwt.encode(HEADER, claims, OTHER_KEY)
            assert (await maker.finish(hub)).subject == "1"
            assert maker.asked["/keys"] == 4

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("claims", "userinfo", "told"), [
    ({"email": None, "name": None}, {"email": "anna@lab.org", "email_verified": True, "name": "A"},
     ("anna@lab.org", True, "A")),
    ({"name": None}, {"email": "other@lab.org", "email_verified": True, "name": "A"}, ("anna@lab.org", True, "A")),
    ({"name": None, "email_verified": None}, {"email": "other@lab.org", "email_verified": True},
     ("anna@lab.org", False, "")),
    ({"email_verified": "true"}, {}, ("anna@lab.org", True, "Anna")),
    ({"email_verified": "false"}, {}, ("anna@lab.org", False, "Anna")),
    ({"email_verified": 1.5}, {}, ("anna@lab.org", False, "Anna")),
    ({"email": "", "email_verified": True}, {}, ("", False, "Anna")),
    ({"email": ["anna@lab.org"]}, {}, ("", False, "Anna")),
    ({"email": "a\r\nb@lab.org"}, {}, ("", False, "Anna")),
    ({"email": "a" * 250 + "@lab.org"}, {}, ("", False, "Anna")),
    ({"name": "An\x1b[31mna"}, {}, ("anna@lab.org", True, "An[31mna")),
    ({"name": "n" * 300}, {}, ("anna@lab.org", True, "n" * 200)),
    ({"name": {"first": "A"}}, {}, ("anna@lab.org", True, "")),
], ids=str)
def test_what_a_provider_tells_of_somebody_is_read_with_care(
    claims: dict[str, Any], userinfo: dict[str, Any], told: tuple[str, bool, str]
) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.claims, maker.userinfo = claims, userinfo
            assert await maker.finish(sign_in(maker.issuer, maker.clock)) == Person(maker.issuer, "1", *told)

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("subject", ["2", "", None, 1])
def test_what_is_told_of_somebody_else_is_refused(subject: Any) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.claims, maker.userinfo = {"email": None}, {"sub": subject, "email": "ben@lab.org"}
            with pytest.raises(IdTokenRefused, match="about somebody else"):
                await maker.finish(sign_in(maker.issuer, maker.clock))

    run_on("asyncio-debug", scenario())


# --- a provider that cannot be used


@pytest.mark.parametrize(("metadata", "why"), [
    ({"issuer": "https://accounts.example.org"}, r"calls itself https://accounts\.example\.org"),
    ({"issuer": None}, "not usable"), ({"token_endpoint": None}, "not usable"), ({"jwks_uri": 5}, "not usable"),
    ({"token_endpoint": "http://accounts.example.org/token"}, "token_endpoint .*must begin with https"),
    ({"jwks_uri": "http://10.0.0.1/keys"}, "jwks_uri .*must begin with https"),
    ({"userinfo_endpoint": "file:///etc/passwd"}, "userinfo_endpoint .*must be an address"),
    ({"authorization_endpoint": "javascript:alert(1)"}, "authorization_endpoint .*must be an address"),
    ({"authorization_endpoint": "https://accounts.example.org@evil.org/"}, "neither a user's name"),
    ({"token_endpoint": "https://[::1/token"}, "token_endpoint"),
], ids=str)
def test_a_provider_that_says_what_cannot_be_is_not_asked_further(metadata: dict[str, Any], why: str) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.metadata = metadata
            with pytest.raises(ProviderUnusable, match=why):
                await sign_in(maker.issuer, maker.clock).begin(REDIRECT_URI)

    run_on("asyncio-debug", scenario())


async def _redirect(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/elsewhere")


async def _fail(request: web.Request) -> web.StreamResponse:
    return web.Response(status=503)


async def _text(request: web.Request) -> web.StreamResponse:
    return web.Response(text="<html>")


async def _list(request: web.Request) -> web.StreamResponse:
    return web.json_response([])


async def _nested(request: web.Request) -> web.StreamResponse:
    return web.Response(text="[" * 200_000)


async def _endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65536)


async def _zeros(request: web.Request) -> web.StreamResponse:
    response = web.Response(body=b" " * (4 * 1024 * 1024))
    response.enable_compression(web.ContentCoding.gzip)
    return response


async def _silent(request: web.Request) -> web.StreamResponse:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/keys", "/token", "/userinfo"])
@pytest.mark.parametrize(("answer", "why"), [
    (_redirect, "status 302"), (_fail, "status 503"), (_text, "JSON"), (_list, "JSON"), (_nested, "JSON"),
    (_endless, "more than 1048576 bytes"), (_zeros, "more than 1048576 bytes"),
])
def test_an_answer_that_is_none_ends_the_sign_in_with_a_word(
    path: str, answer: Callable[[web.Request], Awaitable[web.StreamResponse]], why: str
) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.claims = {"email": None}
            maker.answers[path] = answer
            with pytest.raises(ProviderUnusable, match=f"{path}.*{why}"):
                await maker.finish(sign_in(maker.issuer, maker.clock))
            assert "/elsewhere" not in maker.asked

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_provider_that_is_silent_is_not_waited_for(loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.answers["/.well-known/openid-configuration"] = _silent
            with pytest.raises(ProviderUnusable, match=r"did not answer within 0\.2 s"):
                await sign_in(maker.issuer, maker.clock, timeout_seconds=0.2).begin(REDIRECT_URI)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("keys", [
    {}, {"keys": []}, {"keys": 5}, {"keys": [{"kty": "RSA"}]}, {"keys": ["RSA"]},
    {"keys": [{"kty": "oct", "k": "AAAA"}]}], ids=str)
def test_keys_that_are_none_are_refused(keys: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            maker.keys = keys
            with pytest.raises(ProviderUnusable, match=r"its keys .* are not usable"):
                await maker.finish(sign_in(maker.issuer, maker.clock))

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("status", "answer", "kind", "why"), [
    (200, {}, ProviderUnusable, "no ID token"), (200, {"id_token": 5}, ProviderUnusable, "no ID token"),
    (400, {"error": "invalid_grant", "error_description": "x" * 999}, SignInRefused, "invalid_grant x{200}$"),
    (400, {"error": "unauthorized_client"}, ProviderUnusable, "unauthorized_client"),
    (401, {"error": "invalid_client"}, ProviderUnusable, "KACHERY_HUB_OIDC_CLIENT_SECRET"),
    (400, {}, ProviderUnusable, "refuses this hub: 400"),
])
def test_what_the_token_endpoint_says_decides_whose_matter_it_is(
    status: int, answer: dict[str, Any], kind: type[Exception], why: str
) -> None:
    async def tokens(request: web.Request) -> web.StreamResponse:
        return web.json_response(answer, status=status)

    async def scenario() -> None:
        async with running_maker() as maker:
            maker.answers["/token"] = tokens
            with pytest.raises(kind) as caught:
                await maker.finish(sign_in(maker.issuer, maker.clock))
            assert why.rstrip("$").replace("x{200}", "x" * 200) in str(caught.value)
            assert "x" * 201 not in str(caught.value)

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("methods", "where"), [
    (["client_secret_basic", "client_secret_post"], "header"), (["client_secret_post"], "form"), (None, "header")])
def test_the_secret_goes_where_the_provider_takes_it(methods: list[str] | None, where: str) -> None:
    seen: dict[str, Any] = {}

    async def scenario() -> None:
        async with running_maker() as maker:
            async def tokens(request: web.Request) -> web.StreamResponse:
                seen["header"] = CLIENT_SECRET in _basic(request)
                seen["form"] = "client_secret" in await request.post()
                del maker.answers["/token"]
                return await maker.answer(request)

            maker.answers["/token"] = tokens
            if methods:
                maker.metadata = {"token_endpoint_auth_methods_supported": methods}
            await maker.finish(sign_in(maker.issuer, maker.clock))

    run_on("asyncio-debug", scenario())
    assert seen == {"header": where == "header", "form": where == "form"}


def _basic(request: web.Request) -> str:
    return base64.b64decode(request.headers.get("Authorization", "").removeprefix("Basic ")).decode()


# --- addresses


@pytest.mark.parametrize("issuer", [
    "http://accounts.example.org", "http://10.0.0.1", "http://127.0.0.1.example.org", "accounts.example.org",
    "https://",
    "https://accounts.example.org?a=b", "https://accounts.example.org#a", "https://me@accounts.example.org",
    "https://accounts.example.org:port", "https://[::1", "ftp://127.0.0.1", "https://" + "a" * 400,
])
def test_an_issuer_that_is_not_https_or_no_address_is_refused_at_the_start_of_the_hub(
    tmp_path: Path, issuer: str
) -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidSetting, match="hub_oidc_issuer"):
            await Hub(hub_settings(tmp_path, hub_oidc_issuer=issuer, hub_oidc_client_id="hub")).start()
        with pytest.raises(InvalidSetting, match=r"hub_oidc_client_id.*the provider gives one"):
            await Hub(hub_settings(tmp_path, hub_oidc_issuer="https://accounts.example.org")).start()
        with pytest.raises(InvalidSetting, match="hub_oidc_allowed"):
            await Hub(hub_settings(tmp_path, hub_oidc_issuer="https://accounts.example.org", hub_oidc_client_id="hub",
                                   hub_oidc_allowed="lab.org")).start()

    run_on("asyncio-debug", scenario())


def test_a_provider_of_this_machine_may_be_without_tls_and_is_called_as_the_settings_say() -> None:
    assert [sign_in(issuer).name for issuer in ("http://127.0.0.1:80", "http://[::1]/a", "http://localhost")] \
        == ["127.0.0.1", "::1", "localhost"]
    assert sign_in("https://accounts.example.org", name="The institute").name == "The institute"


def test_a_provider_whose_certificate_nobody_vouches_for_is_not_asked(tmp_path: Path) -> None:
    context = _self_signed(tmp_path)
    outcomes: list[bytes | OSError] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                outcomes.append(context.wrap_socket(connection, server_side=True).recv(1000))
            except OSError as error:  # the client does not go on
                outcomes.append(error)

    async def scenario(issuer: str) -> None:
        with pytest.raises(ProviderUnusable, match="certificate"):
            await sign_in(issuer).begin(REDIRECT_URI)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        run_on("asyncio-debug", scenario(f"https://127.0.0.1:{listener.getsockname()[1]}"))
        thread.join()
    assert not any(isinstance(outcome, bytes) and outcome for outcome in outcomes)


def _self_signed(directory: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
                   .not_valid_after(now + timedelta(days=1)).sign(key, SHA256()))
    path = directory / "provider.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM)
                     + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def test_a_provider_that_is_away_is_said_to_be_so() -> None:
    async def scenario() -> None:
        async with running_maker() as maker:
            issuer = maker.issuer
        with pytest.raises(ProviderUnusable, match=f"{issuer} cannot be used.*cannot be asked"):
            await sign_in(issuer).begin(REDIRECT_URI)

    run_on("asyncio-debug", scenario())
