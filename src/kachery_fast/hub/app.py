"""The hub as a program: one directory, one port, and what answers there.

In ``<hub_dir>``: ``hub.db`` (the registry), ``bucket/`` (the embedded bucket), ``hub-key`` and ``owner-token`` (mode
0600), ``address`` (the hub's URL while it runs) and ``lock`` (held, with the process id in it, while it runs).

Several hubs may share a registry on PostgreSQL: each has a directory of its own, all have the same key.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from .._version import __version__
from ..config import Settings
from ..embedded.broker import Broker, TokenKey, is_websocket
from ..embedded.bucket import BucketServer, UploadSigner
from ..embedded.bucket_reads import DownloadSigner, ReadGate
from ..errors import InvalidArgument, InvalidSetting, KacheryError, NodeError, NotOnHub, TooLarge, TooSlow
from ..net.port import Port, serve_port
from ..net.visitors import Patience, Visitors, connections_max
from . import identity
from .actions import Outside
from .addresses import local_url, public_url
from .bucket_moves import Mover
from .buckets import Buckets
from .care import Care
from .directory import HubDirectory, bucket_directory
from .engines.embedded import EmbeddedBucket, EmbeddedPubsub
from .limits import address_group
from .node_api import NodeApi
from .open_channels import OpenChannels
from .openapi import describe_api
from .owner_api import OwnerApi
from .performing import ACTS_BY_NAME, Performer
from .pubsubs import Pubsubs
from .registry import Registry, registry_url
from .relay import Relay
from .sessions import Seal
from .telling import Teller
from .trying import Trier
from .vault import Vault
from .vouching import Voucher
from .web.site import Site

if TYPE_CHECKING:
    from .oidc import OpenIdSignIn

__all__ = ["EXPIRY_SECONDS", "Hub", "run_hub"]

_log = logging.getLogger("kachery_fast.hub")

# How long requests that are being answered may take when the hub stops.
STOP_SECONDS = 2.0
# How long what is left of a refused request is read, so that its sender reads the refusal.
LINGERING_SECONDS = 2.0
PATIENCE = Patience()
# Where several hubs share a registry, and perhaps a bucket's directory, each counts anew so often what the others did.
RECOUNT_SECONDS = 600.0
EXPIRY_SECONDS = 3600.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Hub:
    """One hub. ``start``, then ``stop``; after a restart on the same directory everything is as it was.

    :param clock: seconds since the epoch.
    :param public_url: the address that other machines use, when it is not ``http://<hub_host>:<hub_port>``.
    :param expiry_seconds: how often to look for objects that nobody reads.
    """

    def __init__(
        self, settings: Settings, *, clock: Callable[[], float] = time.time, public_url: str | None = None,
        expiry_seconds: float = EXPIRY_SECONDS,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._given_url = public_url.rstrip("/") if public_url else None
        self._expiry_seconds = expiry_seconds
        self._directory = HubDirectory(settings.hub_dir, settings.hub_key_file)
        # What was opened, to be closed in reverse.
        self._parts = AsyncExitStack()
        self._port: Port | None = None
        self._description: bytes | None = None

    @property
    def port(self) -> int:
        """The port that the hub listens on, known after ``start``."""
        assert self._port is not None, "the hub is not started"
        return self._port.port

    @property
    def local_url(self) -> str:
        """The hub's address for programs on this machine."""
        return local_url(self._settings.hub_host, self.port)

    @property
    def public_url(self) -> str:
        """The hub's address for other machines, as well as it can be known here."""
        return self._given_url or public_url(self._settings.hub_host, self.port)

    async def start(self, *, prepare: Callable[[Hub], Awaitable[None]] | None = None) -> None:
        """Open or create the directory, and listen. Nothing is left open when it fails.

        :param prepare: awaited before the address is written: who sees the address may count on what it did.
        :raises AlreadyExists: another hub runs on the directory. :raises DiskError: the directory is not usable.
        :raises InvalidArgument: the address cannot be listened on.
        """
        if self._settings.hub_port > 65535:  # the system would take it modulo 2^16
            raise InvalidSetting(name="hub_port", value=self._settings.hub_port, source="the settings",
                                 why="ports end at 65535")
        self._directory.acquire()
        try:
            await self._open()
            if prepare is not None:
                await prepare(self)
            self._directory.write_address(self.local_url)
        except BaseException:
            await self.stop()
            raise
        _log.info("the hub listens at %s", self.local_url)

    async def _open(self) -> None:
        settings, directory, parts = self._settings, self._directory, self._parts
        sign_in: OpenIdSignIn | None = None
        if settings.hub_oidc_issuer:
            from .oidc import sign_in_of  # takes a quarter of a second

            sign_in = sign_in_of(settings, self._clock)
        registry = Registry(registry_url(settings.hub_database, directory.path))
        parts.push_async_callback(registry.close)
        await registry.open()
        care = Care(registry, settings.url_life_seconds, self._expiry_seconds, self._clock)
        secret = bytes.fromhex(directory.secret("upload-secret"))
        signer, reads = UploadSigner(secret, clock=self._clock), DownloadSigner(secret, clock=self._clock)
        gate = ReadGate(reads)
        open_channels = OpenChannels(registry, gate.open)
        parts.push_async_callback(open_channels.close)
        await open_channels.start()
        server = BucketServer(bucket_directory(settings), signer, settings, gate=gate, clock=self._clock, observer=care,
                              shared=bool(settings.hub_bucket_dir),
                              rate_limit_bytes_per_second=settings.bucket_rate_bytes_max or None,
                              recount_seconds=RECOUNT_SECONDS if registry.shared else None)
        bucket = EmbeddedBucket(server, signer, reads)
        vault = Vault(bytes.fromhex(directory.secret("engine-key")))
        buckets = Buckets(bucket, vault, settings, self._clock)
        care.start(buckets)
        parts.push_async_callback(care.stop)
        parts.push_async_callback(asyncio.to_thread, server.close)
        relay = Relay(registry.url, directory.key(), self._clock) if registry.shared else None
        key, voucher = TokenKey("kachery.hub", directory.secret("broker-key")), Voucher(registry)
        parts.push_async_callback(voucher.close)
        broker = Broker(keys=key, clock=self._clock, relay=relay, vouch=voucher.vouch)
        if relay is not None:
            parts.push_async_callback(relay.close)
            await relay.start(broker.receive, broker.forget_tokens)
        pubsubs = Pubsubs(EmbeddedPubsub(broker), vault, buckets.outbound, self._clock)
        parts.push_async_callback(asyncio.to_thread, buckets.close)
        node_api = NodeApi(registry, buckets, pubsubs, care.quotas, settings, self._clock, lambda: self.public_url)
        parts.push_async_callback(asyncio.to_thread, node_api.close)
        await node_api.start()
        self._registry, self._broker, self._node_api = registry, broker, node_api
        trier = Trier(buckets, pubsubs, lambda: self.local_url, settings, self._clock)
        teller = Teller(registry, pubsubs, lambda: self.local_url, settings)
        parts.push_async_callback(teller.stop)
        mover = Mover(registry, buckets, settings, teller.tell, self._clock)
        parts.push_async_callback(mover.stop)
        parts.callback(buckets.outbound.close)  # first: nothing waits for an owner's store that is slow
        outside = Outside(buckets, pubsubs, care.usage, trier.run, mover.wake, teller.tell)
        performer = Performer(registry, outside, self._clock, lambda: self.public_url, open_channels.refresh)
        self._owner_api = OwnerApi(registry, performer, self._clock)
        seal = Seal(bytes.fromhex(directory.secret("session-key")))
        self._site = Site(registry, performer, seal, self._clock, lambda: self.public_url, sign_in)
        self._visitors = Visitors(connections_max(settings.hub_connections_max), PATIENCE, group=address_group)
        runner = web.AppRunner(
            self._application(), access_log=None, shutdown_timeout=STOP_SECONDS, lingering_time=LINGERING_SECONDS)
        parts.push_async_callback(runner.cleanup)
        await runner.setup()
        # Before the runner's turn to stop: its websockets would make it wait.
        parts.push_async_callback(broker.close)
        assert runner.server is not None, "a runner that is set up has a server"
        self._port = await serve_port(settings.hub_host, settings.hub_port, runner.server, server,
                                      visitors=self._visitors)
        parts.push_async_callback(self._port.close)
        mover.start()

    async def stop(self) -> None:
        """Stop listening, end every connection, and leave the directory to the next start. May be called twice."""
        await self._parts.aclose()
        self._directory.release()

    # --- the owner at the hub's own machine

    async def ensure_owner(self, owner: str) -> str:
        """Return the owner of this hub, making ``owner`` that at the first start; its token is in ``owner-token``.

        A hub that joins others on their registry has their owner, and gets a token of its own.

        :raises InvalidName: it cannot name an owner.
        """
        token = self._directory.read("owner-token")
        now_ms = int(self._clock() * 1000)
        found = await self._registry.call(identity.find_token, token, now_ms) if token else None
        if found is not None:
            return found.owner
        if self._registry.shared:
            first: str | None = await self._registry.call(identity.find_first_admin)
            owner = first or owner
        await self._registry.call(identity.ensure_owner, owner, now_ms, admin=True)
        token = await self._registry.call(identity.issue_owner_token, owner, now_ms)
        self._directory.write_secret("owner-token", token)
        return owner

    # --- HTTP

    def _application(self) -> web.Application:
        app = web.Application(
            client_max_size=self._settings.api_body_size_bytes_max,
            middlewares=[self._translate_errors, self._attend])
        app.router.add_get("/", self._root)
        app.router.add_get("/api/health", self._health)
        app.router.add_get("/join/{code}", self._join_page)
        app.router.add_post("/api/node", self._node)
        app.router.add_post("/api/owner", self._owner)
        app.router.add_get("/api/openapi.json", self._openapi)
        app.router.add_post("/api/v1/{action}", self._action)
        app.router.add_routes(self._site.routes())
        app.router.add_post("/api/getChannelBucketBaseUrl", self._bucket_url)
        app.router.add_route("*", "/bucket/{name:.*}", self._other_connection)
        app.router.add_routes([route for route in self._broker.routes() if route.path != "/"])
        return app

    @web.middleware
    async def _translate_errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except KacheryError as error:
            _log.info("%s %s: %s", request.method, request.path, error.message)
            refusal = self._refusal(request, error)
            if isinstance(error, TooSlow):
                refusal.force_close()
            return refusal
        except web.HTTPRequestEntityTooLarge:
            limit = self._settings.api_body_size_bytes_max
            return _failure(TooLarge(what="The request", size=request.content_length or f"more than {limit}",
                                     limit=limit, setting="api_body_size_bytes_max"))
        except web.HTTPNotFound:
            return self._refusal(request, NotOnHub(kind="page", name=request.path,
                                                   advice="This is a kachery-fast hub."))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            response = _json(
                InvalidArgument(what=f"{request.path} takes {allowed}, not {request.method}.").to_dict(), 405)
            response.headers["Allow"] = allowed
            return response
        except web.HTTPException:
            raise
        except ConnectionError:  # who asked has gone; nobody reads this
            return web.Response(status=400)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _failure(NodeError(what="the hub met an error of its own; its log says more"))

    @web.middleware
    async def _attend(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Answer a request whose body has come, in time; a websocket's has none, and its broker watches over it."""
        with self._visitors.answering(request.transport):
            if request.can_read_body and not is_websocket(request):
                limit_seconds = self._visitors.patience.body_seconds
                try:
                    await asyncio.wait_for(request.read(), limit_seconds)
                except asyncio.TimeoutError:
                    raise TooSlow(what="The request", limit_seconds=limit_seconds) from None
            return await handler(request)

    def _refusal(self, request: web.Request, error: KacheryError) -> web.Response:
        return self._site.error_page(error) if _is_for_people(request) else _failure(error)

    async def _root(self, request: web.Request) -> web.StreamResponse:
        if is_websocket(request):
            return await self._broker.serve(request)
        if _is_for_people(request):
            return await self._site.home(request)
        return web.Response(text=(
            f"This is a kachery-fast hub, version {__version__}.\n"
            "It introduces nodes to one another; recordings move between them by content URI.\n"
            "To join a channel, ask its owner for an invitation link and run: kachery-fast node join LINK\n"))

    async def _health(self, _request: web.Request) -> web.Response:
        return _json({"ok": True, "version": __version__, "time": int(self._clock() * 1000)})

    async def _other_connection(self, _request: web.Request) -> web.Response:
        """A connection belongs to what it first asked for (``net/port.py``): objects want one of their own."""
        response = web.Response(status=421, text="Ask for objects on a connection of their own.\n")
        response.force_close()
        return response

    async def _join_page(self, request: web.Request) -> web.StreamResponse:
        if _is_for_people(request):
            return await self._site.join_page(request)
        # Only characters that an invitation can have are shown, so nothing in the link ends up in a shell.
        code = "".join(c for c in request.match_info["code"] if c.isascii() and (c.isalnum() or c in "-_"))[:64]
        return web.Response(text=(
            "This link invites a node to a channel of this hub. On the machine that is to join, run:\n\n"
            f"    kachery-fast node join {self.public_url}/join/{code}\n"))

    async def _node(self, request: web.Request) -> web.Response:
        return _json(await self._node_api.answer(await request.read(), address_group(request.remote)))

    async def _bucket_url(self, request: web.Request) -> web.Response:
        base, private = await self._node_api.bucket_of(await request.read(), address_group(request.remote))
        url = base.rstrip("/")
        if url.startswith("/"):  # by the name that the client knows the hub by
            host = request.headers.get("Host", "")
            url = (f"http://{host}" if host and self._given_url is None else self.public_url) + url
        return _json({"url": url, "private": private})

    async def _owner(self, request: web.Request) -> web.Response:
        authorization = request.headers.get("Authorization", "")
        return _json(await self._owner_api.answer(await request.read(), authorization, address_group(request.remote)))

    async def _openapi(self, _request: web.Request) -> web.Response:
        if self._description is None:  # made once: it takes a while, and strangers may ask for it
            self._description = msgspec.json.encode(describe_api(ACTS_BY_NAME, self.public_url))
        return web.Response(body=self._description, content_type="application/json")

    async def _action(self, request: web.Request) -> web.Response:
        authorization = request.headers.get("Authorization", "")
        return _json(await self._owner_api.answer(
            await request.read(), authorization, address_group(request.remote), request.match_info["action"]))


async def run_hub(
    settings: Settings, *, public_url: str | None = None, prepare: Callable[[Hub], Awaitable[None]] | None = None,
    ready: Callable[[Hub], Awaitable[None]] | None = None,
) -> None:
    """Run a hub until SIGINT or SIGTERM.

    :param prepare: as of ``Hub.start``.
    :param ready: awaited once the hub listens, before anything else.
    :raises KacheryError: it could not be started.
    """
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    hub = Hub(settings, public_url=public_url)
    try:
        await hub.start(prepare=prepare)
        if ready is not None:
            await ready(hub)
        await told.wait()
    finally:
        await hub.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _is_for_people(request: web.Request) -> bool:
    """Whether a browser asks for a page."""
    return "text/html" in request.headers.get("Accept", "") and not request.path.startswith("/api/")


def _json(answer: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")


def _failure(error: KacheryError) -> web.Response:
    return _json(error.to_dict(), error.http_status)
