"""Signing in on the website by a real OpenID provider."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlencode

import pytest

from kachery_fast.cli.lab import free_port
from kachery_fast.hub.web.site import REDIRECT_PATH

from ..network import LOOPS, run_on
from . import openid
from .browsing import Browser, browser
from .support import OWNER, running_world


async def begin(one: Browser, to: str = "/account") -> str:
    """Press the button; return where the browser is sent."""
    page = await one.get(f"/sign-in?next={to}")
    assert "Sign in with the lab" in page.text
    assert f'href="/sign-in/at-provider?next={to}"' in page.text
    async with one.session.get(f"{one.url}/sign-in/at-provider?next={to}", allow_redirects=False) as answer:
        assert answer.status == 303
        return answer.headers["Location"]


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_people_sign_in_by_the_provider_and_only_in_the_browser_that_began(tmp_path: Path, loop_kind: str) -> None:
    port = free_port()
    redirect_uri = f"http://127.0.0.1:{port}{REDIRECT_PATH}"

    async def scenario(issuer: str) -> None:
        async with running_world(
                tmp_path, hub_port=port, hub_oidc_issuer=issuer, hub_oidc_client_id=openid.CLIENT_ID,
                hub_oidc_client_secret=openid.CLIENT_SECRET, hub_oidc_name="the lab",
                hub_oidc_allowed="@lab.org") as world, browser(world) as mine, browser(world) as other:
            async with openid.browser(redirect_uri) as at_provider:
                query = await at_provider.go(await begin(mine), "anna")
            back = f"{REDIRECT_PATH}?{urlencode(query)}"
            assert (await other.get(back)).status == 403  # it did not begin this
            page = await mine.get(back)
            assert (page.status, page.path) == (200, "/account")
            assert "<h1>anna@lab.org</h1>" in page.text
            assert (await mine.get(back)).status == 403  # once
            assert (await mine.get("/account")).status == 200
            async with openid.browser(redirect_uri) as at_provider:
                query = await at_provider.go(await begin(other), "ben")
            page = await other.get(f"{REDIRECT_PATH}?{urlencode(query)}")
            assert (page.status, "ben@elsewhere.org may not have an account here" in page.text) == (403, True)
            assert (await other.get("/account")).path == "/sign-in"
            accounts = (await world.owner.call("listAccounts"))["accounts"]
            assert {account["owner"]: account["admin"] for account in accounts} == {
                OWNER: True, "anna@lab.org": False}

    with openid.running_provider(redirect_uri=redirect_uri) as issuer:
        run_on(loop_kind, scenario(issuer))


def test_without_a_provider_there_is_no_button(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            assert "at-provider" not in (await mine.get("/sign-in")).text

    run_on("uvloop", scenario())
