"""What each page shows. A page is a function of a ``Look`` that returns a template and its fields."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web

from ...errors import NotOnHub
from .. import channels
from ..account_actions import ListAccounts, ShowAccount, ShowAudit
from ..actions import Actor, Answer, Request
from ..bucket_actions import ListObjects, ShowUsage, UsageView
from ..channel_actions import ChannelList, ListChannels, ShowChannel
from ..engine_actions import EngineList, ListEngines
from ..move_actions import ShowMove
from ..node_actions import FindApproval, ListNodes, ShowNode
from ..performing import ACTS, Performer
from ..pubsub_actions import ListPubsubs, PubsubList
from ..registry import Registry
from ..traffic_actions import ShowTraffic
from .visitors import Visitor

__all__ = ["PAGES", "Look"]


class Look(NamedTuple):
    """One look at a page."""

    request: web.Request
    visitor: Visitor
    performer: Performer
    registry: Registry
    hub_url: str
    now_ms: int

    async def ask(self, request: Request) -> Any:
        """What an action answers to who looks. :raises SignInRefused: nobody is signed in."""
        signed_in = self.visitor.must_be_signed_in()
        return await self.performer.perform(Actor(signed_in.owner, "web"), request)


_Page = tuple[str, dict[str, Any]]
_KINDS = {"sha1": "files", "feeds": "feeds", "task_results": "results of tasks"}


async def _home(look: Look) -> _Page:
    if look.visitor.signed_in is None:
        return "welcome.html", {"hub_url": look.hub_url}
    found: ChannelList = await look.ask(ListChannels())
    return "home.html", {"hub_url": look.hub_url, "channels": found.channels}


async def _channels(look: Look) -> _Page:
    found: ChannelList = await look.ask(ListChannels())
    return "channels.html", {"channels": found.channels}


async def _channel(look: Look) -> _Page:
    """A channel as its owner sees it, or, where it is listed, as everybody does."""
    name = look.request.match_info["name"]
    signed_in = look.visitor.signed_in
    try:
        settings = await look.registry.call(channels.find_settings, name)
    except NotOnHub:
        look.visitor.must_be_signed_in()
        raise
    if signed_in is not None and settings.owner == signed_in.owner:
        move = await _move(look, name)  # first: where it says that it is done, the channel has its new bucket
        view: Answer = await look.ask(ShowChannel(channel=name))
        usage: UsageView = await look.ask(ShowUsage(channel=name))
        mine: EngineList = await look.ask(ListEngines())
        services: PubsubList = await look.ask(ListPubsubs())
        return "channel.html", {"view": view, "usage": usage, "kinds": _KINDS, "hub_url": look.hub_url,
                                "traffic": await look.ask(ShowTraffic(channel=name)), "engines": mine.engines,
                                "pubsubs": services.engines, "move": move}
    if not settings.listed:
        # The same as of one that is not there: who may not see it does not learn that it is.
        look.visitor.must_be_signed_in()
        raise channels.unknown_channel(name)
    (line,) = [line for line in await look.registry.call(channels.list_channels, settings.owner) if line.name == name]
    return "public_channel.html", {"settings": settings, "members": line.members, "hub_url": look.hub_url}


async def _move(look: Look, channel: str) -> Answer | None:
    try:
        found: Answer = await look.ask(ShowMove(channel=channel))
        return found
    except NotOnHub:
        return None


async def _live(look: Look) -> _Page:
    """The part of a channel's page that its script asks for again and again."""
    return "live.html", {"traffic": await look.ask(ShowTraffic(channel=look.request.match_info["name"]))}


async def _objects(look: Look) -> _Page:
    kind = look.request.query.get("kind", "")
    asked = ListObjects(channel=look.request.match_info["name"], kind=kind if kind in _KINDS else "",  # type: ignore[arg-type]
                        after=look.request.query.get("after", "")[:1000])
    return "objects.html", {"found": await look.ask(asked), "asked": asked, "kinds": _KINDS}


async def _buckets(look: Look) -> _Page:
    found: EngineList = await look.ask(ListEngines())
    return "buckets.html", {"engines": found.engines}


async def _pubsubs(look: Look) -> _Page:
    found: PubsubList = await look.ask(ListPubsubs())
    return "pubsubs.html", {"engines": found.engines}


async def _nodes(look: Look) -> _Page:
    return "nodes.html", {"found": await look.ask(ListNodes()), "hub_url": look.hub_url}


async def _node(look: Look) -> _Page:
    return "node.html", {"view": await look.ask(ShowNode(node=look.request.match_info["node"]))}


async def _approve(look: Look) -> _Page:
    """Ask before anything is done: the link to here can be from anybody."""
    code = look.request.query.get("code", "").strip()[:20]
    look.visitor.must_be_signed_in()
    return "approve.html", {"code": code, "waiting": await look.ask(FindApproval(code=code)) if code else None}


async def _audit(look: Look) -> _Page:
    query = look.request.query
    before = query.get("before", "")
    asked = ShowAudit(
        channel=query.get("channel") or None, everything=query.get("everything") == "1",
        before=int(before) if before.isdecimal() and len(before) < 16 else None)
    found = await look.ask(asked)
    return "audit.html", {"entries": found.entries, "asked": asked}


async def _account(look: Look) -> _Page:
    found = await look.ask(ShowAccount())
    mine: ChannelList = await look.ask(ListChannels())
    return "account.html", {"account": found, "channels": mine.channels,
                            "session": look.visitor.must_be_signed_in().session}


async def _accounts(look: Look) -> _Page:
    found = await look.ask(ListAccounts())
    return "accounts.html", {"accounts": found.accounts}


async def _api(look: Look) -> _Page:
    return "api.html", {"acts": sorted(ACTS.values(), key=lambda act: (act.scope.value, act.name)),
                        "hub_url": look.hub_url}


PAGES: dict[str, Callable[[Look], Awaitable[_Page]]] = {
    "/": _home,
    "/channels": _channels,
    "/channels/{name}": _channel,
    "/channels/{name}/live": _live,
    "/channels/{name}/objects": _objects,
    "/buckets": _buckets,
    "/pubsubs": _pubsubs,
    "/nodes": _nodes,
    "/nodes/{node}": _node,
    "/approve": _approve,
    "/audit": _audit,
    "/account": _account,
    "/accounts": _accounts,
    "/api": _api,
}
