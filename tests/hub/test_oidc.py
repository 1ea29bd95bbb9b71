"""Sign-in at a real OpenID provider: the whole flow over HTTP, and what a hub does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from kachery_fast.errors import IdentityRefused, IdTokenRefused, ProviderUnusable
from kachery_fast.hub.accounts import Person
from kachery_fast.hub.oidc import KEPT_SECONDS, Begun, OpenIdSignIn

from ..network import LOOPS, run_on
from .openid import CLIENT_ID, REDIRECT_URI, browser, running_provider, sign_in
from .support import Clock


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """A provider that runs for all tests of this file; each has browsers of its own."""
    with running_provider() as found:
        yield found


async def go(hub: OpenIdSignIn, login: str = "anna", **options: Any) -> tuple[Begun, dict[str, str]]:
    """Begin, and walk through the provider's pages in a new browser."""
    begun = await hub.begin(REDIRECT_URI)
    async with browser() as one:
        return begun, await one.go(begun.url, login, **options)


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("claims_in_id_token", [True, False])
def test_somebody_signs_in(loop_kind: str, claims_in_id_token: bool) -> None:
    async def scenario() -> None:
        with running_provider(claims_in_id_token=claims_in_id_token) as issuer:
            hub = sign_in(issuer)
            begun, query = await go(hub)
            asked = parse_qs(urlsplit(begun.url).query)
            assert asked["code_challenge_method"] == ["S256"]
            assert asked["client_id"] == [CLIENT_ID]
            assert asked["nonce"] != asked["state"]
            assert len(begun.kept) < 200
            assert await hub.finish(begun.kept, query, REDIRECT_URI) == Person(
                issuer, "anna", "Anna@lab.org", True, "Anna A.")
            begun, query = await go(hub, "claims-to-be-anna")
            assert await hub.finish(begun.kept, query, REDIRECT_URI) == Person(
                issuer, "claims-to-be-anna", "anna@lab.org", False, "")
            begun, query = await go(hub, "nobody")
            assert await hub.finish(begun.kept, query, REDIRECT_URI) == Person(issuer, "nobody", "", False, "")

    run_on(loop_kind, scenario())


def test_a_hub_without_a_secret_signs_in_by_pkce_alone() -> None:
    async def scenario() -> None:
        with running_provider(client_secret="") as issuer:
            hub = sign_in(issuer, client_secret="")
            begun, query = await go(hub)
            assert (await hub.finish(begun.kept, query, REDIRECT_URI)).subject == "anna"

    run_on("asyncio-debug", scenario())


def test_the_wrong_secret_is_the_admins_matter(issuer: str) -> None:
    async def scenario() -> None:
        hub = sign_in(issuer, client_secret="wrong")
        begun, query = await go(hub)
        with pytest.raises(ProviderUnusable, match=r"invalid_client.*KACHERY_HUB_OIDC_CLIENT_SECRET"):
            await hub.finish(begun.kept, query, REDIRECT_URI)

    run_on("asyncio-debug", scenario())


def _part(kept: str, index: int, text: str) -> str:
    parts = kept.split(".")
    parts[index] = text
    return ".".join(parts)


@pytest.mark.parametrize(("spoil", "kind", "why"), [
    (lambda kept, query: ("", query), IdentityRefused, "has not begun one"),
    (lambda kept, query: ("what.is.this", query), IdentityRefused, "has not begun one"),
    (lambda kept, query: (kept, {**query, "state": "x" * 43}), IdentityRefused, "another sign-in"),
    (lambda kept, query: (kept, {name: query[name] for name in ("code", "iss")}), IdentityRefused, "another sign-in"),
    (lambda kept, query: (kept, {**query, "iss": "https://other.example.org"}), IdentityRefused, "comes from https://oth"),
    (lambda kept, query: (kept, {name: query[name] for name in ("code", "state")}), IdentityRefused, "does not say"),
    (lambda kept, query: (kept, {**query, "code": ""}), IdentityRefused, "answered: nothing"),
    (lambda kept, query: (kept, {**query, "code": "x" * 43}), IdentityRefused, "did not take the code.*invalid_grant"),
    (lambda kept, query: (_part(kept, 2, "n" * 43), query), IdTokenRefused, "nonce"),
    (lambda kept, query: (_part(kept, 3, "v" * 43), query), IdentityRefused, "did not take the code.*invalid_grant"),
], ids=["no cookie", "a broken cookie", "wrong state", "no state", "of another issuer", "of no issuer", "no code",
        "wrong code", "wrong nonce", "wrong verifier"])
def test_an_answer_that_does_not_fit_signs_nobody_in(
    issuer: str, spoil: Callable[[str, dict[str, str]], tuple[str, dict[str, str]]], kind: type[IdentityRefused],
    why: str,
) -> None:
    async def scenario() -> None:
        hub = sign_in(issuer)
        begun, query = await go(hub)
        with pytest.raises(IdentityRefused, match=why) as caught:
            await hub.finish(*spoil(begun.kept, query), REDIRECT_URI)
        assert type(caught.value) is kind

    run_on("asyncio-debug", scenario())


def test_a_code_of_another_browser_does_not_sign_in(issuer: str) -> None:
    async def scenario() -> None:
        hub = sign_in(issuer)
        mine, query = await go(hub, "ben")
        _, stolen = await go(hub, "anna")
        with pytest.raises(IdentityRefused, match="did not take the code"):
            await hub.finish(mine.kept, {**query, "code": stolen["code"]}, REDIRECT_URI)

    run_on("asyncio-debug", scenario())


def test_an_answer_counts_once(issuer: str) -> None:
    async def scenario() -> None:
        hub = sign_in(issuer)
        begun, query = await go(hub)
        await hub.finish(begun.kept, query, REDIRECT_URI)
        with pytest.raises(IdentityRefused, match="was used before"):
            await hub.finish(begun.kept, query, REDIRECT_URI)
        with pytest.raises(IdentityRefused, match="did not take the code"):  # by another hub, or after a restart
            await sign_in(issuer).finish(begun.kept, query, REDIRECT_URI)

    run_on("asyncio-debug", scenario())


def test_an_answer_that_comes_too_late_or_from_the_future_does_not_count(issuer: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        hub = sign_in(issuer, clock)
        begun, query = await go(hub)
        start = clock.now
        for moment in (start + KEPT_SECONDS + 1, start - 120):
            clock.now = moment
            with pytest.raises(IdentityRefused, match="took longer than 10 minutes"):
                await hub.finish(begun.kept, query, REDIRECT_URI)
        clock.now = start
        await hub.finish(begun.kept, query, REDIRECT_URI)

    run_on("asyncio-debug", scenario())


def test_who_turns_back_at_the_provider_is_told_so(issuer: str) -> None:
    async def scenario() -> None:
        hub = sign_in(issuer)
        begun, query = await go(hub, cancel=True)
        with pytest.raises(IdentityRefused, match=f"{issuer} answered: access_denied"):
            await hub.finish(begun.kept, query, REDIRECT_URI)

    run_on("asyncio-debug", scenario())


def test_an_address_that_the_provider_was_not_told_of_is_no_way_back(issuer: str) -> None:
    async def scenario() -> None:
        hub = sign_in(issuer)
        begun, query = await go(hub)
        with pytest.raises(IdentityRefused, match="did not take the code"):
            await hub.finish(begun.kept, query, "http://127.0.0.1:1/elsewhere")

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_new_keys_of_the_provider_are_fetched_when_they_are_met(loop_kind: str) -> None:
    async def scenario() -> None:
        with running_provider() as issuer:
            hub = sign_in(issuer)
            begun, query = await go(hub)
            await hub.finish(begun.kept, query, REDIRECT_URI)
        with running_provider(port=urlsplit(issuer).port or 0) as again:
            assert again == issuer
            begun, query = await go(hub)
            assert (await hub.finish(begun.kept, query, REDIRECT_URI)).subject == "anna"

    run_on(loop_kind, scenario())
