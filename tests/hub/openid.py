"""A real OpenID provider, npm's oidc-provider, and a browser in front of it."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urljoin, urlsplit

import aiohttp
import pytest

from kachery_fast.hub.oidc import OpenIdSignIn
from kachery_fast.hub.web.site import REDIRECT_PATH

from ..programs import need_program
from .support import Clock

FOLDER = Path(__file__).parent / "oidc_provider"
CLIENT_ID = "the hub"
CLIENT_SECRET = "secret-of-the-hub"
# It starts within a second or two; of hundreds of starts one hung, before it listened.
START_SECONDS = 60.0
START_TRIES = 3
REDIRECT_URI = f"http://127.0.0.1:1{REDIRECT_PATH}"

ACCOUNTS: dict[str, dict[str, Any]] = {
    "anna": {"email": "Anna@lab.org", "email_verified": True, "name": "Anna A."},
    "anna-again": {"email": "anna@lab.org", "email_verified": True, "name": "Another Anna"},
    "ben": {"email": "ben@elsewhere.org", "email_verified": True, "name": "Ben"},
    "claims-to-be-anna": {"email": "anna@lab.org", "email_verified": False},
    "nobody": {},
}


def need_provider() -> str:
    """The path of node; skips the test where it, or the provider, is not installed."""
    node = need_program("node")
    if not (FOLDER / "node_modules" / "oidc-provider").is_dir():
        pytest.skip("the npm package oidc-provider is not installed; make test does it where there is npm")
    return node


@contextmanager
def running_provider(
    *, port: int = 0, redirect_uri: str = REDIRECT_URI, client_secret: str = CLIENT_SECRET,
    claims_in_id_token: bool = False,
) -> Iterator[str]:
    """Run the provider; yields its issuer."""
    wanted = json.dumps({
        "clientId": CLIENT_ID, "clientSecret": client_secret, "redirectUris": [redirect_uri], "accounts": ACCOUNTS,
        "port": port, "claimsInIdToken": claims_in_id_token})
    command = [need_provider(), str(FOLDER / "provider.mjs"), wanted]
    for tries_left in reversed(range(START_TRIES)):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                if select.select([process.stdout], [], [], START_SECONDS)[0]:
                    line = process.stdout.readline()
                    assert line, "the provider did not start"
                    yield json.loads(line)["issuer"]
                    return
                told = f"node said nothing for {START_SECONDS:g} s; its threads wait at {_waits_of(process.pid)}"
            finally:
                # It would end with its standard input too, as it does with this process; but node then waits, now and
                # then, for ever for a thread of its own.
                process.kill()
        assert tries_left, told
        sys.stderr.write(f"{told}; another one is started\n")


def _waits_of(process_id: int) -> list[str]:
    """Where in the kernel the threads of a process wait, as far as the system tells."""
    tasks = Path(f"/proc/{process_id}/task")
    return [f"{(task / 'comm').read_text().strip()}: {(task / 'wchan').read_text()}" for task in tasks.glob("*")]


def sign_in(issuer: str, clock: Clock | None = None, **options: Any) -> OpenIdSignIn:
    """A hub's part in it."""
    options = {"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, **options}
    return OpenIdSignIn(issuer, clock=clock or Clock(), **options)


class Browser:
    """Follows redirects, fills in forms, and keeps cookies, until it is sent back to the hub."""

    def __init__(self, session: aiohttp.ClientSession, redirect_uri: str) -> None:
        self._session = session
        self._redirect_uri = redirect_uri

    async def go(self, url: str, login: str, *, cancel: bool = False) -> dict[str, str]:
        """Sign in at ``url``; return the query that the browser is sent back with."""
        answer = await self._get(url)
        for _ in range(20):
            if isinstance(answer, dict):
                return answer
            forms = re.findall(r'<form[^>]* action="([^"]+)"', answer)
            prompt = re.search(r'name="prompt" value="(\w+)"', answer)
            assert prompt is not None, answer
            if cancel:
                abort = re.search(r'href="([^"]*/abort)"', answer)
                assert abort is not None, answer
                answer = await self._get(urljoin(url, abort[1]))
            else:
                fields = {"prompt": prompt[1], "login": login, "password": "any"}
                answer = await self._send("POST", urljoin(url, forms[0]), data=fields)
        raise AssertionError("the provider goes round in a circle")

    async def _get(self, url: str) -> str | dict[str, str]:
        return await self._send("GET", url)

    async def _send(self, method: str, url: str, **options: Any) -> str | dict[str, str]:
        while True:
            async with self._session.request(method, url, allow_redirects=False, **options) as response:
                text = await response.text()
                if response.status not in (302, 303):
                    assert response.status == 200, text
                    return text
                url = urljoin(url, response.headers["Location"])
            if url.startswith(self._redirect_uri):
                return dict(parse_qsl(urlsplit(url).query))
            method, options = "GET", {}


@asynccontextmanager
async def browser(redirect_uri: str = REDIRECT_URI) -> AsyncIterator[Browser]:
    """A browser in which nobody is signed in."""
    # Unsafe are cookies of an address. A connection for each request: the provider ends without a word to kept ones.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True),
                                     connector=aiohttp.TCPConnector(force_close=True)) as session:
        yield Browser(session, redirect_uri)
