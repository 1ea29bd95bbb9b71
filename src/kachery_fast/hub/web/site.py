"""The website's handlers: signing in and out, forms, and what is the same for all pages (``pages.py``)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from aiohttp import web

from ..._version import __version__
from ...errors import InvalidArgument, KacheryError, NodeError, NotOnHub, SignInRefused
from .. import sessions
from ..account_actions import SignInLink, TokenMade
from ..accounts import owner_of
from ..actions import Actor, Answer
from ..channel_actions import InvitationMade
from ..gcs_actions import BucketSetUp
from ..limits import RateLimiter, address_group
from ..performing import ACTS_BY_NAME, Performer
from ..registry import Registry
from ..trying import ChannelTried
from .forms import read_form
from .pages import PAGES, Look
from .render import STATIC, Pages
from .visitors import Note, Visitor, Visitors

if TYPE_CHECKING:
    from ..oidc import OpenIdSignIn

__all__ = ["Site"]

_log = logging.getLogger("kachery_fast.hub")

SIGN_INS_PER_MINUTE_MAX = 10
# Where a provider sends people back to; it was told of this address.
REDIRECT_PATH = "/sign-in/provider"
_Handler = Callable[[web.Request, Visitor], Awaitable[web.StreamResponse]]

# Answers that have a page of their own: with something that is shown once, or longer than a line.
_SHOWN: dict[type[Answer], str] = {
    InvitationMade: "shown_once.html", TokenMade: "shown_once.html", SignInLink: "shown_once.html",
    ChannelTried: "tried.html", BucketSetUp: "set_up.html"}


class Site:
    """The website. One for each hub, used on its event loop.

    :param public_url: returns the hub's address as browsers know it.
    :param provider: by whom people sign in, besides links of the hub; None for nobody.
    """

    def __init__(self, registry: Registry, performer: Performer, seal: sessions.Seal, clock: Callable[[], float],
                 public_url: Callable[[], str], provider: OpenIdSignIn | None = None) -> None:
        self._provider = provider
        self._registry = registry
        self._performer = performer
        self._clock = clock
        self._public_url = public_url
        self._visitors = Visitors(registry, seal, clock, public_url)
        self._pages = Pages(__version__)
        self._guesses = RateLimiter(SIGN_INS_PER_MINUTE_MAX / 60, 60.0)

    def routes(self) -> list[web.AbstractRouteDef]:
        """What the site answers, besides "/" (``home``)."""
        pages = [web.get(path, self._handler(self._page_of(render))) for path, render in PAGES.items() if path != "/"]
        return [
            *pages,
            web.get("/sign-in", self._handler(self._sign_in)),
            *([web.get("/sign-in/at-provider", self._handler(self._go_to_provider)),
               web.get(REDIRECT_PATH, self._handler(self._back_from_provider))] if self._provider else []),
            web.get("/sign-in/{code}", self._handler(self._confirm)),
            web.post("/sign-in/{code}", self._handler(self._use_link)),
            web.post("/sign-out", self._handler(self._sign_out)),
            web.post("/do/{action}", self._handler(self._do)),
            web.static("/static", STATIC),
        ]

    async def home(self, request: web.Request) -> web.StreamResponse:
        """The first page."""
        return await self._handler(self._page_of(PAGES["/"]))(request)

    async def join_page(self, request: web.Request) -> web.StreamResponse:
        """What to do with an invitation."""
        async def show(request: web.Request, visitor: Visitor) -> web.StreamResponse:
            return self._show(request, visitor, "join.html", link_command=f"kachery-fast node join "
                              f"{self._public_url()}/join/{_plain_code(request.match_info['code'])}")

        return await self._handler(show)(request)

    def error_page(self, error: KacheryError) -> web.Response:
        """A page that says what went wrong, for who is taken for not signed in."""
        return self._pages.page("error.html", status=error.http_status, error=error, signed_in=None, csrf="", note=None,
                                path="")

    # --- one request

    def _handler(self, handle: _Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def answer(request: web.Request) -> web.StreamResponse:
            visitor = Visitor(None, "", None)
            try:
                visitor = await self._visitors.visitor(request)
                response = await handle(request, visitor)
            except web.HTTPException:
                raise
            except KacheryError as error:
                _log.info("%s %s: %s", request.method, request.path, error.message)
                response = self._failed(request, visitor, error)
            except Exception:
                _log.exception("%s %s failed", request.method, request.path)
                response = self._failed(request, visitor, NodeError(
                    what="the hub met an error of its own; its log says more"))
            if visitor.note is not None and request.method == "GET":
                self._visitors.forget_note(response)
            return response

        return answer

    def _failed(self, request: web.Request, visitor: Visitor, error: KacheryError) -> web.StreamResponse:
        if isinstance(error, SignInRefused) and visitor.signed_in is None and request.method == "GET" and (
                not request.path.startswith("/sign-in")):
            return _see(f"/sign-in?next={quote(request.path_qs)}")
        return self._show(request, visitor, "error.html", status=error.http_status, error=error)

    def _show(self, request: web.Request, visitor: Visitor, template: str, status: int = 200,
              **fields: Any) -> web.Response:
        return self._pages.page(template, status, signed_in=visitor.signed_in, csrf=visitor.csrf, note=visitor.note,
                                path=request.path, **fields)

    def _page_of(self, render: Callable[[Look], Awaitable[tuple[str, dict[str, Any]]]]) -> _Handler:
        async def show(request: web.Request, visitor: Visitor) -> web.StreamResponse:
            look = Look(request, visitor, self._performer, self._registry, self._public_url(),
                        int(self._clock() * 1000))
            template, fields = await render(look)
            return self._show(request, visitor, template, **fields)

        return show

    # --- signing in and out

    async def _sign_in(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        return self._show(request, visitor, "sign_in.html", next=_local(request.query.get("next", "/")),
                          provider=self._provider.name if self._provider else "")

    async def _go_to_provider(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        assert self._provider is not None, "there is no such page without one"
        begun = await self._provider.begin(self._public_url() + REDIRECT_PATH)
        response = _see(begun.url)
        self._visitors.keep_begun(response, begun.kept, _local(request.query.get("next", "/")))
        return response

    async def _back_from_provider(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        assert self._provider is not None, "there is no such page without one"
        kept, to = self._visitors.begun(request)
        try:
            person = await self._provider.finish(kept, request.query, self._public_url() + REDIRECT_PATH)
            owner = await self._registry.call(
                owner_of, person, int(self._clock() * 1000), self._provider.allowed)
        except KacheryError as error:
            _log.info("%s: %s", request.path, error.message)
            response: web.StreamResponse = self._show(
                request, visitor, "error.html", status=error.http_status, error=error)
        else:
            response = await self._begin(request, owner, _local(to))
        self._visitors.forget_begun(response)
        return response

    async def _confirm(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        """Ask before the link is used: programs that look at links must not use it up."""
        code = request.match_info["code"]
        self._count(request)
        owner = await self._registry.call(sessions.find_link_owner, code, int(self._clock() * 1000))
        if owner is None:
            raise SignInRefused(why="the link was used already, or has expired")
        self._not_counted(request)
        return self._show(request, visitor, "sign_in_confirm.html", owner=owner, code=code)

    async def _use_link(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        self._visitors.check_origin(request)
        self._count(request)
        now_ms = int(self._clock() * 1000)
        owner = await self._registry.call(sessions.use_link, request.match_info["code"], now_ms)
        self._not_counted(request)
        return await self._begin(request, owner)

    async def _begin(self, request: web.Request, owner: str, to: str = "/") -> web.StreamResponse:
        token = await self._registry.call(
            sessions.begin_session, owner, request.headers.get("User-Agent", ""), int(self._clock() * 1000))
        _log.info("%s has signed in", owner)
        response = _see(to)
        self._visitors.begin(response, token)
        return response

    async def _sign_out(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        form = await request.post()
        self._visitors.check_form(request, visitor, str(form.get("csrf", "")))
        signed_in = visitor.must_be_signed_in()
        await self._registry.call(sessions.end_session, signed_in.owner, signed_in.session)
        response = _see("/")
        self._visitors.end(response)
        return response

    def _count(self, request: web.Request) -> None:
        """Count a guess beforehand, so that many at once are counted too."""
        address = address_group(request.remote)
        self._guesses.spend(address, 1, self._clock(), who=f"address {address}",
                            limit=f"{SIGN_INS_PER_MINUTE_MAX} links that do not hold are allowed in a minute")

    def _not_counted(self, request: web.Request) -> None:
        self._guesses.refund(address_group(request.remote), 1, self._clock())

    # --- forms

    async def _do(self, request: web.Request, visitor: Visitor) -> web.StreamResponse:
        """Perform the action that a form is for, and go back to where the form was."""
        form = await request.post()
        to = _local(str(form.get("next", "/")))
        if visitor.signed_in is None:
            return _see(f"/sign-in?next={quote(to)}")
        self._visitors.check_form(request, visitor, str(form.get("csrf", "")))
        act = ACTS_BY_NAME.get(request.match_info["action"])
        if act is None:
            raise NotOnHub(kind="action", name=request.match_info["action"], advice="See /api.")
        try:
            answer = await self._performer.perform(
                Actor(visitor.signed_in.owner, "web"), read_form(act.request, form))
        except KacheryError as error:
            _log.info("%s %s: %s", request.method, request.path, error.message)
            note = Note("error", error.message)
        else:
            if type(answer) in _SHOWN:
                return self._show(request, visitor, _SHOWN[type(answer)], answer=answer, kind=type(answer).__name__,
                                  to=to)
            note = Note("done", said(act.name, answer))
        response = _see(to)
        self._visitors.leave_note(response, note)
        return response


def said(action: str, answer: Answer) -> str:
    """What a page says after an action."""
    fields = {name: getattr(answer, name) for name in answer.__struct_fields__}
    if isinstance(fields.get("node"), str):
        fields["node"] = fields["node"][:8]
    return _SAID.get(action, "It is done.").format_map(fields)


_SAID = {
    "createChannel": "The channel {channel} was made. Invite nodes to it next.",
    "changeChannel": "The settings of {channel} were changed.",
    "grant": "Granted. The node {node} sees it within seconds.",
    "revoke": "Taken away from the node {node}, at once.",
    "removeNode": "The node {node} is no longer on {channel}.",
    "closeInvitations": "{closed} invitations were closed.",
    "deleteChannel": "The channel {channel} was deleted, and {objects_removed} objects with it. {left}",
    "addS3Bucket": "The hub knows the bucket {name} now. Choose it on the page of a channel.",
    "addGcsBucket": "The hub knows the bucket {name} now. Choose it on the page of a channel.",
    "addDirectoryBucket": "The hub knows the folder {name} now. Choose it on the page of a channel.",
    "migrateBucket": "The channel {channel} moves. Look again to see how far it has come.",
    "stopMove": "The channel {channel} stays where it is.",
    "changeCredentials": "The bucket {name} has other credentials now.",
    "removeEngine": "The hub has forgotten {name}. What is in a bucket stays.",
    "addAbly": "The hub knows {name} now. Choose it on the page of a channel.",
    "addNats": "The hub knows {name} now. Choose it on the page of a channel.",
    "changePubsubCredentials": "{name} has other credentials now.",
    "setPubsub": "The messages of {channel} go another way now. Test it next.",
    "setBucket": "The bucket of {channel} was changed. Test it next.",
    "approveNode": "The node {label} is yours now. {refused}",
    "denyNode": "The node {node} was not approved.",
    "requestPermissions": "Asked for on {channel}. What its owner grants of it is in force.",
    "withdraw": "The node {node} is not on {channel} any more.",
    "forgetNode": "The node {node} is nobody's now.",
    "removeObjects": "{removed} objects were removed.",
    "changeAccount": "Your name was changed.",
    "revokeToken": "{ended} token was revoked.",
    "endSession": "{ended} session was ended.",
    "endSessions": "You are signed out everywhere.",
    "closeAccount": "The account {owner} is closed.",
    "reopenAccount": "The account {owner} is open again.",
    "setAdmin": "Changed for {owner}.",
}


def _see(to: str) -> web.Response:
    return web.Response(status=303, headers={"Location": to, "Cache-Control": "no-store"})


def _local(path: str) -> str:
    """A path of this site, never another address: a browser takes "//host" and "/\\host" for one."""
    if not path.startswith("/") or path[1:2] in ("/", "\\") or not path.isprintable() or not path.isascii():
        return "/"
    return path


def _plain_code(code: str) -> str:
    """Only the characters that an invitation can have, so that nothing in a link ends up in a shell."""
    found = "".join(character for character in code if character.isascii() and (
        character.isalnum() or character in "-_"))[:64]
    if not found:
        raise InvalidArgument(what="The link has no invitation in it. Ask for it again.")
    return found
