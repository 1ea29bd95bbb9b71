"""Who may use the node's local API, and how a refusal or an error is told to them.

A request from a web page is refused: its ``Origin`` is foreign, or its ``Host`` is not an address of this node (which
also stops a rebound name). All others need a code that the node accepts. A lasting code, for clients elsewhere, opens
all but what ends the node, and what makes it read a file of its user by a path: whoever has one would read every file.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping

from aiohttp import web

from ..errors import ClientAuthRefused, KacheryError
from .admissions import Admissions
from .identity import ClientAuth
from .legacy_parts import MISSING_CODE, WRONG_CODE, tell_in_text

__all__ = ["Border"]

_AUTH_HEADER = "KACHERY-CLIENT-AUTH-CODE"
_NO_CODE, _WRONG_CODE = "no client code was sent", "the client code is not the node's"
_OF_2022 = {_NO_CODE: MISSING_CODE, _WRONG_CODE: WRONG_CODE}
# By a lasting code these are refused, as they were in 2022 (browserAccess of kachery-daemon 1.2.1); a file is sent in
# by /store or /api/store. What takes a path of this machine belongs here.
_OWN_CLIENTS_ONLY = frozenset({"/storeFile", "/linkFile", "/halt", "/api/stop"})
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?", re.ASCII)
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Border:
    """The border of one node.

    :param node_host: the address that the node listens on. :param names: further names of it, with spaces or commas.
    :param is_open: whether a path is served without a code. :param speaks_2022: whether its errors are plain text.
    """

    def __init__(self, node_host: str, names: str, client_auth: ClientAuth, admissions: Admissions,
                 is_open: Callable[[str], bool], speaks_2022: Callable[[str], bool]) -> None:
        self._node_host = node_host.lower()  # names of hosts have no case (RFC 9110, 4.2.3)
        self._names = _LOCAL_NAMES | {self._node_host, *names.lower().replace(",", " ").split()}
        self._client_auth = client_auth
        self._admissions = admissions
        self._is_open = is_open
        self._speaks_2022 = speaks_2022

    async def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Let a request pass.

        :param headers: without regard to the case of their names.
        :raises ClientAuthRefused: it may not.
        """
        # Not as aiohttp tells it: without the header that is this machine's name, from a look-up that may block.
        host = _HOST.fullmatch(headers.get("Host", "").lower())
        if "Origin" in headers or host is None:
            raise self._refusal("web pages may not use a node")
        if not self._is_own_host(host[1] or host[2]):
            # So a web page under a name that was bound to this address (DNS rebinding) gets nothing either.
            raise self._refusal(f"web pages may not use a node, and it is not known to be called {host[0]!r}: use its "
                                "address, or name it in the node's setting KACHERY_NODE_NAMES")
        if (method, path) == ("GET", "/probe") or self._is_open(path):
            return
        code = headers.get(_AUTH_HEADER)
        if code is None:
            raise self._refusal(_NO_CODE)
        if self._client_auth.accepts(code):
            return
        if not await self._admissions.admit(code):
            raise self._refusal(_WRONG_CODE)
        if path in _OWN_CLIENTS_ONLY:
            raise self._refusal(f"a lasting code does not open {path}. That is for clients that read the node's own "
                                "file client-auth, on its machine or where it is mounted, by its user or its group")

    def tell(self, path: str, error: KacheryError, status: int) -> web.Response:
        """Return the answer that tells an error: JSON, or at a path of 2022 plain text."""
        if self._speaks_2022(path):
            return tell_in_text(_OF_2022.get(str(error.details.get("why")), error.message), status)
        return web.json_response(error.to_dict(), status=status)

    def _refusal(self, why: str) -> ClientAuthRefused:
        return ClientAuthRefused(why=why, path=str(self._client_auth.path))

    def _is_own_host(self, host: str) -> bool:
        if host in self._names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        # Listening on all addresses was asked for; a rebound name is still no address.
        return self._node_host in _EVERY_ADDRESS and not address.is_unspecified
