"""From signing in to a transfer that a click makes possible, and the next one impossible."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, ViewportSize, expect

from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.errors import NotPermitted
from tests.system.support import QUICK, load, make_recording, store, wait_until

Look = Callable[[Page, str], None]
PHONE = ViewportSize(width=390, height=844)
DESK = ViewportSize(width=1200, height=850)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        yield lab


def sign_in_link(lab: Lab) -> str:
    done = subprocess.run([sys.executable, "-m", "kachery_fast", "hub", "sign-in", "--dir", lab.hub_dir, "--json"],
                          env=lab.environ, capture_output=True, check=True, timeout=60)
    return str(json.loads(done.stdout)["link"])


def open_page(context: BrowserContext) -> Page:
    """A page on which a mistake of a script fails the test."""
    page = context.new_page()
    page.set_default_timeout(20_000)

    def fail(problem: object) -> None:
        raise AssertionError(problem)

    page.on("pageerror", fail)
    return page


def signed_in(chromium: Browser, lab: Lab, **options: object) -> Page:
    page = open_page(chromium.new_context(viewport=DESK, **options))  # type: ignore[arg-type]
    page.goto(sign_in_link(lab))
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Your channels")).to_be_visible()
    return page


def cell(page: Page, permission: str, label: str) -> Locator:
    return page.get_by_role("button", name=re.compile(rf"^{permission} for {label}:"))


def joined(lab: Lab, page: Page, name: str) -> LabNode:
    """A node that has joined by an invitation made on the page, with its link as it stands there."""
    page.goto(f"{lab.hub_url}/channels/ephys")
    page.get_by_role("button", name="Make an invitation").click()
    # Until the answer has come, the first command is one of the page before.
    expect(page.get_by_role("heading", name="An invitation to ephys")).to_be_visible()
    text = page.locator(".command code").first.inner_text()
    link = re.fullmatch(r"kachery-fast node join (\S+)", text.strip())
    assert link is not None, text
    node = lab.nodes[name] = LabNode(lab, name, KACHERY_CHANNEL="ephys")
    node.json("node", "join", link[1], "--label", name)  # as it stands on the page
    node.start()
    return node


def test_a_click_makes_a_transfer_possible_and_another_one_impossible(
    chromium: Browser, lab: Lab, look: Look, tmp_path: Path
) -> None:
    page = open_page(chromium.new_context(viewport=DESK))
    page.goto(lab.hub_url)
    look(page, "welcome")
    page.goto(sign_in_link(lab))
    look(page, "sign-in")
    page.get_by_role("button", name="Sign in").click()
    look(page, "home")

    page.get_by_label("A new channel").fill("ephys")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("status")).to_have_text("The channel ephys was made. Invite nodes to it next.")
    page.get_by_role("link", name="ephys").click()
    expect(page.get_by_role("heading", name="ephys", exact=True)).to_be_visible()
    page.get_by_role("button", name="Make an invitation").click()
    expect(page.get_by_role("heading", name="An invitation to ephys")).to_be_visible()
    look(page, "invitation")

    a, b = joined(lab, page, "A"), joined(lab, page, "B")
    page.goto(f"{lab.hub_url}/channels/ephys")
    look(page, "channel")
    live = page.locator("[data-live]")
    expect(live.get_by_text("A, B are connected now.")).to_be_visible()
    first = store(a, make_recording(tmp_path / "first.dat", 700_000, seed=11))
    assert load(b, first)["size"] == 700_000
    # What moved on the bands comes without a reload.
    expect(live.get_by_role("row", name=re.compile("^request files")).locator("rect").first).to_be_visible()

    cell(page, "requestFiles", "B").click()
    expect(page.get_by_role("status")).to_contain_text("Taken away from the node")
    expect(cell(page, "requestFiles", "B")).to_have_text("?")
    second = store(a, make_recording(tmp_path / "second.dat", 700_000, seed=12))
    with pytest.raises(NotPermitted, match=r"may not .*requestFiles"):
        load(b, second)

    # By the keyboard: the focus is where it was, so that it goes on from there.
    button = cell(page, "requestFiles", "B")
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Granted.")
    expect(button).to_be_focused()
    look(page, "granted")

    def comes() -> bool:
        try:
            return bool(load(b, second)["size"] == 700_000)
        except NotPermitted:
            return False  # the node asks the hub anew every few seconds

    wait_until(comes, "B loads what it may load again")


def test_a_node_is_approved_by_the_code_that_it_shows(chromium: Browser, lab: Lab, look: Look) -> None:
    page = signed_in(chromium, lab)
    node = lab.nodes["rig"] = LabNode(lab, "rig")
    command = [sys.executable, "-m", "kachery_fast", "node", "join", lab.hub_url, "--label", "rig", "--json"]
    with subprocess.Popen(command, env=node.environ, stdout=subprocess.PIPE, text=True) as joining:
        assert joining.stdout is not None
        waiting = json.loads(joining.stdout.readline())
        page.goto(waiting["link"])
        expect(page.get_by_role("heading", name="Is this node yours?")).to_be_visible()
        expect(page.get_by_text(waiting["code"])).to_be_visible()
        look(page, "approve")
        page.get_by_role("button", name="It is mine: approve").click()
        expect(page.get_by_role("status")).to_contain_text("The node rig is yours now.")
        joined = json.loads(joining.stdout.read())
        assert (joining.wait(60), joined["state"]) == (0, "approved")
    look(page, "nodes")
    page.get_by_role("link", name="rig").click()
    expect(page.get_by_role("heading", name="rig")).to_be_visible()
    expect(page.get_by_text(joined["nodeId"])).to_be_visible()
    look(page, "node")


@pytest.mark.parametrize(("scheme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light", "dark phone"])
def test_every_page_can_be_used_by_everybody(
    chromium: Browser, lab: Lab, look: Look, scheme: str, size: ViewportSize
) -> None:
    """What axe finds wrong: contrast, names of controls, structure; and nothing is wider than the window."""
    page = signed_in(chromium, lab, color_scheme=scheme)
    page.set_viewport_size(size)
    for path in ("/", "/channels", "/channels/demo", "/buckets", "/pubsubs", "/audit", "/account", "/accounts", "/api",
                 "/nowhere"):
        page.goto(lab.hub_url + path)
        name = path.strip("/").replace("/", "-") or "home"
        look(page, f"{name}-{scheme}-{size['width']}")


def test_everything_works_without_scripts(chromium: Browser, lab: Lab) -> None:
    page = signed_in(chromium, lab, java_script_enabled=False)
    page.get_by_label("A new channel").fill("plain")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("status")).to_contain_text("The channel plain was made")
    page.get_by_role("link", name="plain").click()
    page.get_by_label("Description").fill("without scripts")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("status")).to_contain_text("The settings of plain were changed")
    expect(page.get_by_label("Description")).to_have_value("without scripts")
    page.get_by_text("Delete this channel").click()
    page.get_by_role("button", name="Delete plain").click()
    expect(page.get_by_role("status")).to_contain_text("The channel plain was deleted")


def test_what_cannot_be_undone_is_asked_for_first(chromium: Browser, lab: Lab) -> None:
    page = signed_in(chromium, lab)
    page.goto(f"{lab.hub_url}/account")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Sign out everywhere").click()
    page.reload()
    expect(page.get_by_role("heading", name="Where you are signed in")).to_be_visible()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Sign out everywhere").click()
    expect(page.get_by_role("link", name="Sign in").first).to_be_visible()


def test_a_session_that_has_ended_leads_to_signing_in(chromium: Browser, lab: Lab) -> None:
    page = signed_in(chromium, lab)
    page.goto(f"{lab.hub_url}/channels")
    page.context.clear_cookies()
    page.get_by_label("Its name").fill("lost")
    page.get_by_role("button", name="Make it").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
