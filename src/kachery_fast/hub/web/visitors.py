"""Who looks at the website: the cookie of a session, and what shows that a form was sent from one of our pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from aiohttp import web

from ...errors import SignInRefused
from ..registry import Registry
from ..sessions import SESSION_SECONDS, Seal, SignedIn, find_session

__all__ = ["Note", "Visitor", "Visitors"]

_SESSION = "kachery_session"
_NOTE = "kachery_note"
_NOTE_SECONDS = 60
_BEGUN = "kachery_sign_in"
BEGUN_SECONDS = 600
_NOTE_LENGTH_MAX = 1000


class Note(NamedTuple):
    """What the next page is to say. ``kind``: "done" or "error"."""

    kind: str
    text: str


class Visitor(NamedTuple):
    """Who looks. ``csrf``: what each form has to bring along, "" for who is not signed in."""

    signed_in: SignedIn | None
    csrf: str
    note: Note | None

    def must_be_signed_in(self) -> SignedIn:
        """:raises SignInRefused: nobody is signed in."""
        if self.signed_in is None:
            raise SignInRefused(why="your session has ended")
        return self.signed_in


class Visitors:
    """Knows visitors by their cookies. One for each hub, used on its event loop.

    :param public_url: returns the hub's address as browsers know it.
    """

    def __init__(self, registry: Registry, seal: Seal, clock: Callable[[], float],
                 public_url: Callable[[], str]) -> None:
        self._registry = registry
        self._seal = seal
        self._clock = clock
        self._public_url = public_url

    async def visitor(self, request: web.Request) -> Visitor:
        """Return who sent a request."""
        note = None
        kept = self._seal.open("note", request.cookies.get(self._name(_NOTE), ""))
        if kept is not None:
            note = Note(*json.loads(bytes.fromhex(kept)))
        token = self._seal.open("session", request.cookies.get(self._name(_SESSION), ""))
        if not token:
            return Visitor(None, "", note)
        found = await self._registry.call(find_session, token, int(self._clock() * 1000))
        return Visitor(found, self._seal.seal("csrf", found.session) if found else "", note)

    def begin(self, response: web.StreamResponse, token: str) -> None:
        """Have the browser keep a session."""
        # Lax: a link to the hub in a message finds its reader signed in; forms of other sites bring no cookie.
        self._keep(response, _SESSION, self._seal.seal("session", token), SESSION_SECONDS)

    def keep_begun(self, response: web.StreamResponse, kept: str, to: str) -> None:
        """Have the browser keep what it takes to finish a sign-in at a provider, and where it wanted to go."""
        self._keep(response, _BEGUN, self._seal.seal("begun", f"{kept}|{to.encode().hex()}"), BEGUN_SECONDS)

    def begun(self, request: web.Request) -> tuple[str, str]:
        """What was kept by ``keep_begun``; "" and "/" when there is nothing."""
        kept, _, to = (self._seal.open("begun", request.cookies.get(self._name(_BEGUN), "")) or "").rpartition("|")
        return kept, bytes.fromhex(to).decode() or "/"

    def forget_begun(self, response: web.StreamResponse) -> None:
        """It is over, in whichever way."""
        response.del_cookie(self._name(_BEGUN), path="/")

    def end(self, response: web.StreamResponse) -> None:
        """Have the browser forget the session."""
        response.del_cookie(self._name(_SESSION), path="/")

    def leave_note(self, response: web.StreamResponse, note: Note) -> None:
        """Have the next page say something."""
        text = json.dumps([note.kind, note.text[:_NOTE_LENGTH_MAX]])
        self._keep(response, _NOTE, self._seal.seal("note", text.encode().hex()), _NOTE_SECONDS)

    def forget_note(self, response: web.StreamResponse) -> None:
        """It has been said."""
        response.del_cookie(self._name(_NOTE), path="/")

    def check_form(self, request: web.Request, visitor: Visitor, csrf: str) -> None:
        """Make sure that a form was sent from a page of this hub that was made for this session.

        :raises SignInRefused: it was not.
        """
        self.check_origin(request)
        session = self._seal.open("csrf", csrf)
        if visitor.signed_in is None or session != visitor.signed_in.session:
            raise SignInRefused(why="the form is from another session. Open the page again, and send it once more")

    def check_origin(self, request: web.Request) -> None:
        """Refuse what another site had a browser send. :raises SignInRefused: another site did."""
        origin = request.headers.get("Origin")
        if origin is not None:
            foreign = origin != self._public_url() and urlsplit(origin).netloc != request.host
        else:  # browsers from before Origin was sent with forms send neither of the two
            foreign = request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none")
        if foreign:
            raise SignInRefused(why="the form was sent by another site")

    def _keep(self, response: web.StreamResponse, name: str, value: str, seconds: int) -> None:
        response.set_cookie(self._name(name), value, max_age=seconds, path="/", httponly=True, samesite="Lax",
                            secure=self._secure)

    @property
    def _secure(self) -> bool:
        return self._public_url().startswith("https://")

    def _name(self, name: str) -> str:
        # RFC 6265bis 4.1.3.2: no other host of the domain can have set it.
        return f"__Host-{name}" if self._secure else name
