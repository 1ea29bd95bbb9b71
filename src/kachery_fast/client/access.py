"""What lets a client use a node: the code that it sends along, and that it is not told to work offline.

The node wants the code that stands in ``client-auth`` of its storage directory, so whoever can read that file may use
the node. That code changes every few minutes and the one before stays valid. A client that does not have the directory
names the file by KACHERY_CLIENT_AUTH_FILE, or has a lasting code in KACHERY_CLIENT_AUTH_CODE that the node's owner has
admitted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import Settings
from ..errors import ClientAuthRefused, ClientOffline, KacheryError

__all__ = ["ClientCode", "check_online"]


class ClientCode:
    """The code of one client for one node.

    :param probe: asks the node what any client may know, to explain why there is no code.
    """

    def __init__(self, settings: Settings, probe: Callable[[], dict[str, Any]]) -> None:
        self._storage_dir = settings.storage_dir
        self._given = settings.client_auth_code
        self._path = Path(settings.client_auth_file or settings.storage_dir / "client-auth").expanduser().absolute()
        self._is_named = bool(settings.client_auth_file)
        self._probe = probe

    def read(self) -> str:
        """Return the code of now.

        :raises ClientAuthRefused: it cannot be read, or is not one.
        """
        if self._given:
            if not (self._given.isascii() and self._given.isprintable()):
                raise ClientAuthRefused(why="KACHERY_CLIENT_AUTH_CODE is not a code", path=self._path)
            return self._given
        try:
            code = self._path.read_text("ascii").strip()
        except FileNotFoundError:
            raise ClientAuthRefused(why=self._missing_reason(), path=self._path) from None
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "its content is not a code"
            raise ClientAuthRefused(why=f"its code could not be read ({why})", path=self._path) from error
        if not code.isalnum():
            raise ClientAuthRefused(why="there is no code in the file", path=self._path)
        return code

    def _missing_reason(self) -> str:
        try:
            storage_dir = self._probe().get("kacheryStorageDir")
        except KacheryError:
            storage_dir = None
        if self._is_named or storage_dir in (None, str(self._storage_dir)):
            return "there is no file with its code"
        return (f"there is no file with its code here; its storage directory is {storage_dir}, "
                "set KACHERY_STORAGE_DIR to that, or where it is mounted here, or KACHERY_CLIENT_AUTH_CODE to a code "
                "that the node's owner has admitted")


def check_online(settings: Settings, what: str) -> None:
    """Before ``what`` goes to the network: :raises ClientOffline: KACHERY_OFFLINE_STORAGE_DIR is set."""
    if settings.offline_storage_dir:
        raise ClientOffline(what=what, path=settings.offline_storage_dir)
