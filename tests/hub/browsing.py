"""A browser without scripts: it keeps cookies, follows redirects, and sends forms as they are on the page."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import Any, NamedTuple

import aiohttp

from .support import World

__all__ = ["Browser", "Form", "Page", "browser", "sign_in"]


class Form(NamedTuple):
    """A form: where it goes, and its fields as they are sent untouched."""

    action: str
    fields: list[tuple[str, str]]


class Page(NamedTuple):
    """What came back, after redirects."""

    status: int
    path: str
    text: str
    headers: dict[str, str]
    forms: list[Form]

    def form(self, action: str, **fields: str) -> Form:
        """The only form of this action that has these fields."""
        found = [form for form in self.forms if form.action == action and set(fields.items()) <= set(form.fields)]
        assert len(found) == 1, (action, fields, self.forms, self.text)
        return found[0]

    def note(self) -> str:
        """What the page says of what was just done."""
        return self.text.partition('class="note')[2].partition(">")[2].partition("<")[0]


class Browser:
    """One person's browser, on one hub."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session

    async def get(self, path: str, **headers: str) -> Page:
        return await self._page("GET", path, headers=headers)

    async def post(self, path: str, fields: list[tuple[str, str]], **headers: str) -> Page:
        return await self._page("POST", path, data=fields, headers={"Origin": self.url, **headers})

    async def submit(self, form: Form, *more: tuple[str, str], **changed: str) -> Page:
        """Send a form with some fields changed, and some added (that of the button, say)."""
        fields = [(name, changed.get(name, value)) for name, value in form.fields]
        return await self.post(form.action, [*fields, *more])

    async def _page(self, method: str, path: str, headers: dict[str, str], **options: Any) -> Page:
        if path.startswith("http"):
            path = path.removeprefix(self.url)
        async with self.session.request(
                method, self.url + path, headers={"Accept": "text/html,*/*", **headers}, **options) as response:
            text = await response.text()
            parser = _Forms()
            parser.feed(text)
            return Page(response.status, response.url.path, text, dict(response.headers), parser.forms)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self._select = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fields = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(fields["action"], []))
        elif tag == "input" and self.forms and "name" in fields and (
                fields.get("type") != "checkbox" or "checked" in fields):
            self.forms[-1].fields.append((fields["name"], fields.get("value", "")))
        elif tag == "textarea" and self.forms:
            self.forms[-1].fields.append((fields["name"], ""))
        elif tag == "select":
            self._select = fields["name"]
        elif tag == "option" and self.forms and "selected" in fields:
            self.forms[-1].fields.append((self._select, fields["value"]))


@asynccontextmanager
async def browser(world: World) -> AsyncIterator[Browser]:
    """Yield a browser in which nobody is signed in."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:  # unsafe: by address
        yield Browser(world.url, session)


async def sign_in(world: World, into: Browser, owner: str | None = None) -> Page:
    """Sign somebody in by a link; return the page after it."""
    name = owner or (await world.owner.call("listChannels"))["owner"]
    page = await into.get((await world.owner.call("addAccount", owner=name))["link"])
    (form,) = page.forms[-1:]
    return await into.submit(form)
