"""The website without scripts: signing in and out, forms and whom they are from, and what a page shows to whom."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from kachery_fast.hub import sessions
from kachery_fast.hub.sessions import LINK_SECONDS, SESSION_SECONDS, SESSIONS_PER_OWNER_MAX
from kachery_fast.hub.web.site import SIGN_INS_PER_MINUTE_MAX

from ..network import LOOPS, run_on
from .browsing import Browser, browser, sign_in
from .support import ALL, CHANNEL, OWNER, Clock, node_id, running_world

parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
OTHER = "second@lab.org"


# --- signing in and out


@parametrized
def test_a_link_signs_in_once_and_only_when_it_is_confirmed(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine, browser(world) as other:
            link = (await world.owner.call("addAccount", owner=OWNER))["link"]
            for _ in range(3):  # programs that look at links in messages
                assert f"Sign in as {OWNER}" in (await other.get(link)).text
            page = await mine.get(link)
            page = await mine.submit(page.forms[-1])
            assert (page.status, page.path) == (200, "/")
            assert CHANNEL in page.text
            assert (await other.get(link)).status == 403
            assert (await other.post(link.removeprefix(world.url), [])).status == 403
            assert (await mine.get("/channels")).status == 200
            assert (await other.get("/channels")).path == "/sign-in"

    run_on(loop_kind, scenario())


@parametrized
def test_links_and_sessions_end(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world, browser(world) as mine, browser(world) as other:
            link = (await world.owner.call("addAccount", owner=OWNER))["link"]
            clock.now += LINK_SECONDS + 1
            assert (await mine.get(link)).status == 403
            await sign_in(world, mine)
            clock.now += SESSION_SECONDS - 60
            assert (await mine.get("/account")).path == "/account"  # and goes on from here
            clock.now += SESSION_SECONDS - 60
            assert (await mine.get("/account")).path == "/account"
            clock.now += SESSION_SECONDS + 1
            assert (await mine.get("/account")).path == "/sign-in"
            await sign_in(world, mine)
            await sign_in(world, other)
            page = await mine.submit((await mine.get("/account")).form("/sign-out"))
            assert (page.path, (await mine.get("/account")).path) == ("/", "/sign-in")
            await sign_in(world, mine)
            page = await other.get("/account")
            assert page.text.count("Signed in as") == 1
            assert page.text.count('action="/do/endSession"') == 2
            await other.submit(page.form("/do/endSessions"))
            for one in (mine, other):
                assert (await one.get("/account")).path == "/sign-in"

    run_on(loop_kind, scenario())


def test_old_sessions_make_room_for_new_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world, browser(world) as first, browser(world) as mine:
            await sign_in(world, first)
            for number in range(1, SESSIONS_PER_OWNER_MAX):
                await world.hub._registry.call(
                    sessions.begin_session, OWNER, "another", int(clock.now * 1000) + number)
            assert (await first.get("/account")).path == "/account"
            clock.now += 1
            await sign_in(world, mine)
            assert len((await world.owner.call("showAccount"))["sessions"]) == SESSIONS_PER_OWNER_MAX
            assert (await first.get("/account")).path == "/sign-in"
            assert (await mine.get("/account")).path == "/account"

    run_on("uvloop", scenario())


@parametrized
def test_guesses_of_links_are_slowed_down(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world, browser(world) as mine:
            link = (await world.owner.call("addAccount", owner=OWNER))["link"]
            for number in range(SIGN_INS_PER_MINUTE_MAX):
                assert (await mine.get(f"/sign-in/guess{number}")).status == 403
            assert (await mine.get(link)).status == 429
            assert (await mine.post(link.removeprefix(world.url), [])).status == 429
            clock.now += 60
            assert (await mine.get(link)).status == 200

    run_on(loop_kind, scenario())


@parametrized
def test_the_cookie_of_a_session_is_for_the_hub_alone_and_cannot_be_made_up(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine, browser(world) as other:
            link = (await world.owner.call("addAccount", owner=OWNER))["link"]
            async with mine.session.post(link, headers={"Origin": world.url}, allow_redirects=False) as answer:
                assert answer.status == 303
                cookie = answer.cookies["kachery_session"]
            assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Lax", "/")
            for made_up in ("x", "x.y", cookie.value[:-1], cookie.value + "A", f"é{cookie.value}", "." * 50,
                            cookie.value.partition(".")[2]):
                page = await other.get("/channels", Cookie=f"kachery_session={made_up}")
                assert page.path == "/sign-in", made_up
            assert (await other.get("/channels", Cookie=f"kachery_session={cookie.value}")).path == "/channels"

    run_on(loop_kind, scenario())


def test_behind_a_proxy_with_tls_the_cookie_goes_nowhere_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, public_url="https://hub.lab.org") as world, browser(world) as mine:
            link = (await world.owner.call("addAccount", owner=OWNER))["link"]
            assert link.startswith("https://hub.lab.org/sign-in/")
            async with mine.session.post(
                    world.url + link.removeprefix("https://hub.lab.org"), headers={"Origin": "https://hub.lab.org"},
                    allow_redirects=False) as answer:
                assert answer.status == 303
                assert answer.cookies["__Host-kachery_session"]["secure"] is True

    run_on("uvloop", scenario())


# --- forms


@parametrized
def test_a_form_of_another_site_or_session_does_nothing(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine, browser(world) as other:
            await sign_in(world, mine)
            await sign_in(world, other, OTHER)
            good = (await mine.get("/channels")).form("/do/createChannel")
            theirs = (await other.get("/channels")).form("/do/createChannel")
            fields = [(name, "evil" if name == "name" else value) for name, value in good.fields]
            without = [(name, value) for name, value in fields if name != "csrf"]
            stolen = [*without, ("csrf", dict(theirs.fields)["csrf"])]
            for sent, headers in (
                    (fields, {"Origin": "http://evil.example"}), (fields, {"Origin": "null"}),
                    (fields, {"Origin": world.url.replace("127.0.0.1", "127.0.0.1.evil.example")}),
                    (without, {}), (stolen, {}), ([*without, ("csrf", "x")], {})):
                page = await mine.post("/do/createChannel", sent, **headers)
                assert page.status == 403, headers
            async with mine.session.post(world.url + "/do/createChannel", data=fields,
                                         headers={"Sec-Fetch-Site": "cross-site"}) as answer:
                assert answer.status == 403
            assert [item["name"] for item in (await world.owner.call("listChannels"))["channels"]] == [CHANNEL]
            assert (await mine.submit(good, name="mine")).note().startswith("The channel mine was made")

    run_on(loop_kind, scenario())


@parametrized
def test_a_form_without_a_session_leads_to_signing_in(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as stranger:
            page = await stranger.post("/do/createChannel", [("name", "mine"), ("next", "/channels")])
            assert page.path == "/sign-in"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("to", ["//evil.example/", "/\\evil.example", "http://evil.example/", "javascript:alert(1)",
                                "/a\r\nSet-Cookie: x=y", "/ä", ""])
def test_no_form_leads_to_another_site_or_breaks_a_header(tmp_path: Path, to: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            form = (await mine.get("/channels")).form("/do/createChannel")
            fields = [(name, {"next": to, "name": "mine"}.get(name, value)) for name, value in form.fields]
            async with mine.session.post(world.url + form.action, data=fields, headers={"Origin": world.url},
                                         allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (303, "/")
                assert "x" not in answer.cookies

    run_on("uvloop", scenario())


@parametrized
def test_what_cannot_be_done_is_said_on_the_page_of_the_form(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            form = (await mine.get("/channels")).form("/do/createChannel")
            page = await mine.submit(form, name=CHANNEL.upper())
            assert page.path == "/channels"
            assert page.note() == "The channel &#39;lab&#39; exists already. Choose another name."
            assert (await mine.get("/channels")).note() == ""  # it is said once
            assert "name" in (await mine.submit(form, name="a b")).note()
            settings = (await mine.get("/channels/lab")).form("/do/changeChannel")
            assert "positive" in (await mine.submit(settings, sizeBytesMax="-5")).note()
            assert "int" in (await mine.submit(settings, sizeBytesMax="many")).note()
            assert (await mine.post("/do/nothing", [*form.fields])).status == 404

    run_on(loop_kind, scenario())


# --- what pages do and show


@parametrized
def test_the_matrix_grants_and_takes_away(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            node = await world.member("A", granted=["requestFiles"])
            await sign_in(world, mine)
            page = await mine.get("/channels/lab")
            assert page.text.count('class="cell on"') == 1
            assert page.text.count('class="cell half"') == len(ALL) - 1
            # As many buttons as permissions, each in a form of its own.
            grant = [form for form in page.forms if form.action == "/do/grant"]
            page = await mine.submit(grant[0], ("permissions", "provideFiles"))
            assert page.note() == f"Granted. The node {node_id('A')[:8]} sees it within seconds."
            (info,) = (await node.node_config()).channels
            assert info.permissions == ["provideFiles", "requestFiles"]
            revoke = [form for form in page.forms if form.action == "/do/revoke"]
            page = await mine.submit(revoke[0], ("permissions", "requestFiles"))
            (info,) = (await node.node_config()).channels
            assert info.permissions == ["provideFiles"]
            page = await mine.submit(page.form("/do/removeNode"))
            assert (await node.node_config()).channels == []
            log = await mine.get("/audit?channel=lab")
            for action in ("grant", "revoke", "removeNode"):
                assert f"<td>{action}</td>" in log.text
            assert "<td>web</td>" in log.text

    run_on(loop_kind, scenario())


@parametrized
def test_settings_are_kept_as_the_form_says(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            form = (await mine.get("/channels/lab")).form("/do/changeChannel")
            await mine.submit(form, ("listed", "true"), description="Spikes & <waves>", sizeBytesMax="1000000",
                              inviters="members")
            found = await world.owner.call("showChannel", channel=CHANNEL)
            assert (found["description"], found["listed"], found["private"]) == ("Spikes & <waves>", True, False)
            assert (found["sizeBytesMax"], found["unreadDaysMax"], found["inviters"]) == (1_000_000, None, "members")
            page = await mine.get("/channels/lab")
            assert "Spikes &amp; &lt;waves&gt;" in page.text
            await mine.submit(page.form("/do/changeChannel"), description="", sizeBytesMax="")
            found = await world.owner.call("showChannel", channel=CHANNEL)
            assert (found["description"], found["sizeBytesMax"], found["listed"]) == ("", None, True)

    run_on(loop_kind, scenario())


@parametrized
def test_an_invitation_made_on_a_page_lets_a_node_in(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            page = await mine.submit((await mine.get("/channels/lab")).form("/do/invite"),
                                     ("permissions", "requestFeeds"))
            link = page.text.partition("kachery-fast node join ")[2].partition("<")[0]
            assert link.startswith(f"{world.url}/join/")
            info = await world.node("A").join(link.rpartition("/")[2], "A", ALL)
            assert info.permissions == ["provideFiles", "requestFeeds", "requestFiles"]
            assert link.rpartition("/")[2] not in (await mine.get("/channels/lab")).text

    run_on(loop_kind, scenario())


@parametrized
def test_a_channel_is_shown_to_its_owner_and_to_others_only_where_it_is_listed(
    tmp_path: Path, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine, browser(world) as other, (
                browser(world)) as stranger:
            await world.member("A")
            await sign_in(world, mine)
            await sign_in(world, other, OTHER)
            absent = await other.get("/channels/absent")
            hidden = await other.get("/channels/lab")
            assert absent.status == hidden.status == 404
            assert hidden.text.replace("&#39;lab&#39;", "&#39;absent&#39;") == absent.text
            for name in ("lab", "absent"):
                assert (await stranger.get(f"/channels/{name}")).path == "/sign-in"
            await world.owner.call("changeChannel", channel=CHANNEL, listed=True, description="Our recordings")
            for one in (other, stranger):
                page = await one.get("/channels/lab")
                assert "Our recordings" in page.text
                assert "1 node" in page.text
                assert node_id("A")[:8] not in page.text
                assert "/do/grant" not in page.text

    run_on(loop_kind, scenario())


@parametrized
def test_what_others_named_is_shown_as_text(tmp_path: Path, loop_kind: str) -> None:
    evil = "<script>alert('x')</script>\"'{{7*7}}"

    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            node = world.node("A")
            await node.join(await world.invite(), evil, ALL)
            await world.owner.call("changeChannel", channel=CHANNEL, listed=True, description=evil)
            await world.owner.call("changeAccount", name=evil)
            await world.owner.call("makeToken", name=evil, scopes=["read"])
            await sign_in(world, mine)
            for path in ("/", "/channels/lab", "/audit", "/account", "/accounts", "/channels", "/api",
                         f"/audit?channel={evil}", f"/sign-in?next={evil}", f"/join/{evil}", f"/channels/{evil}"):
                page = await mine.get(path)
                assert "<script>alert" not in page.text, path
                if path in ("/channels/lab", "/audit", "/account", "/accounts"):
                    assert "{{7*7}}" in page.text, path

    run_on(loop_kind, scenario())


@parametrized
def test_pages_keep_to_themselves(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            for path in ("/", "/channels/lab", "/account", "/nowhere", "/sign-in"):
                headers = (await mine.get(path)).headers
                assert "default-src 'none'" in headers["Content-Security-Policy"], path
                assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert headers["Cache-Control"] == "no-store"
            page = await mine.get("/nowhere")
            assert (page.status, "page &#39;/nowhere&#39;" in page.text) == (404, True)

    run_on(loop_kind, scenario())


@parametrized
def test_a_node_is_approved_by_who_is_signed_in_and_asks_for_permissions(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine, browser(world) as other, (
                browser(world)) as stranger:
            await sign_in(world, mine)
            await sign_in(world, other, OTHER)
            node = world.node("A")
            asked = await node.ask_approval("rig <1>", "0.2", channel=CHANNEL, permissions=["requestFiles"])
            path = f"/approve?code={asked.code}"
            assert asked.link == world.url + path
            assert (await stranger.get(path)).path == "/sign-in"
            page = await other.get(path)  # to look is not to approve
            assert "rig &lt;1&gt;" in page.text
            assert node_id("A") in page.text
            assert (await node.find_approval()).state == "waiting"
            page = await other.submit(page.form("/do/approveNode"))
            assert (page.path, "is yours now" in page.note()) == ("/nodes", True)
            assert (await node.find_approval()).state == "approved"
            page = await other.get(f"/nodes/{node_id('A')}")
            assert "waits for its owner" in page.text
            assert (await mine.get(f"/nodes/{node_id('A')}")).status == 404
            page = await mine.get("/channels/lab")
            assert "asks to join" in page.text
            grants = [form for form in page.forms if form.action == "/do/grant"]
            await mine.submit(grants[0], ("permissions", "requestFiles"))
            (info,) = (await node.node_config()).channels
            assert info.permissions == ["requestFiles"]
            page = await other.get(f"/nodes/{node_id('A')}")
            assert "<td>no: " in page.text
            page = await other.submit(page.form("/do/withdraw"))
            assert page.note() == f"The node {node_id('A')[:8]} is not on lab any more."
            page = await other.submit(page.form("/do/forgetNode"))
            assert (page.path, "is nobody&#39;s now" in page.note()) == ("/nodes", True)

    run_on(loop_kind, scenario())


@parametrized
def test_what_is_in_the_bucket_is_listed_and_removed_on_a_page(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            node = await world.member("A")
            for number in range(3):
                assert await world.upload(node, bytes([number]) * 1000) == 200
            await sign_in(world, mine)
            page = await mine.get("/channels/lab/objects")
            assert page.text.count('name="names"') == 3
            name = page.text.partition('name="names" value="')[2].partition('"')[0]
            page = await mine.submit(page.form("/do/removeObjects"), ("names", name))
            assert page.note() == "1 objects were removed."
            assert name not in page.text
            assert "2 objects of files" in page.text
            assert "2 objects of files" in (await mine.get("/channels/lab")).text
            assert (await mine.get("/channels/lab/objects?kind=feeds&after=x")).text.count('name="names"') == 0

    run_on(loop_kind, scenario())


# --- people


@parametrized
def test_an_admin_closes_an_account_and_everything_of_it_stops(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine, browser(world) as other:
            await sign_in(world, mine)
            await sign_in(world, other, OTHER)
            assert (await other.get("/accounts")).status == 403
            token = await _token_of(other)
            status, _ = await world.post("/api/v1/listChannels", b"{}", Authorization=f"Bearer {token}")
            assert status == 200
            page = await mine.get("/accounts")
            page = await mine.submit(page.form("/do/closeAccount", owner=OTHER))
            assert page.note() == f"The account {OTHER} is closed."
            assert (await other.get("/account")).path == "/sign-in"
            status, answer = await world.post("/api/v1/listChannels", b"{}", Authorization=f"Bearer {token}")
            assert (status, answer["error"]) == (403, "ActionRefused")
            page = await mine.submit(page.form("/do/addAccount", owner=OTHER))
            assert f"the account {OTHER} is closed" in page.note()
            page = await mine.submit((await mine.get("/accounts")).form("/do/reopenAccount", owner=OTHER))
            status, _ = await world.post("/api/v1/listChannels", b"{}", Authorization=f"Bearer {token}")
            assert status == 200

    run_on(loop_kind, scenario())


async def _token_of(one: Browser) -> str:
    form = (await one.get("/account")).form("/do/makeToken")
    page = await one.submit(form, name="a script")
    return page.text.partition("<code>")[2].partition("<")[0]


@parametrized
def test_a_browser_that_goes_away_in_the_middle_harms_nobody(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            for _ in range(20):
                with pytest.raises((aiohttp.ClientError, TimeoutError)):
                    async with mine.session.get(world.url + "/channels/lab",
                                                timeout=aiohttp.ClientTimeout(total=0.0001)):
                        raise aiohttp.ClientError
            assert (await mine.get("/channels/lab")).status == 200

    run_on(loop_kind, scenario())
