"""Who a node is: its Ed25519 key, and the code that its clients must know.

Files of 2022 in the storage directory (WIRE-2022.md §1 and part B): ``private.pem`` (PKCS#8) and ``public.pem``
(SubjectPublicKeyInfo), bodies on one line, mode 0600; ``kachery-node-id``; ``client-auth``, mode 0640, whose content
changes every few minutes. The private key never leaves the node. A node that has it from KACHERY_NODE_PRIVATE_KEY has
no ``private.pem``.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import grp
import hmac
import os
import re
import secrets
import stat
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import DiskError, InvalidSetting, NodeError
from ..protocol.signing import private_key, public_id
from ..store.naming import name_new

__all__ = ["ClientAuth", "DirectoryLock", "Identity", "load_identity", "note_owner", "write_whole"]

_PRIVATE_PREFIX = bytes.fromhex("302e020100300506032b657004220420")
_PUBLIC_PREFIX = bytes.fromhex("302a300506032b6570032100")
_PEM = re.compile(r"-----BEGIN (PRIVATE|PUBLIC) KEY-----\s*([A-Za-z0-9+/=\s]+?)\s*-----END \1 KEY-----\s*")
_PUBLIC_NAMES = ("kachery-node-id", "public.pem")
_CODE_LENGTH = 12
_GROUP_ID_MAX = 2**32 - 2  # the one beyond it says "as it is" (chown, POSIX)


class Identity(NamedTuple):
    """A node's key and id (the public half, 64 hex digits)."""

    key: Ed25519PrivateKey
    node_id: str


def load_identity(storage_dir: Path, seed_hex: str = "", *,
                  make_seed: Callable[[], bytes] = lambda: secrets.token_bytes(32)) -> Identity:
    """Read the node's key, or make one at first start.

    :param seed_hex: the seed of the key, 64 hex digits, of a node whose key is in no file; empty: it is in one.
    :raises NodeError: the key file is damaged, others than its owner may read it, it holds another key than
        ``seed_hex``, or the directory is that of a node whose key is not there. Nothing was written.
    :raises DiskError: the directory cannot be read or written.
    """
    path = storage_dir / "private.pem"
    try:
        storage_dir.mkdir(parents=True, exist_ok=True)
        key = _find_key(storage_dir, path, seed_hex, make_seed)
    except OSError as error:
        raise DiskError(action="the use", path=str(path), why=error.strerror or str(error)) from None
    if seed_hex and not hmac.compare_digest(key.private_bytes_raw(), bytes.fromhex(seed_hex)):
        raise NodeError(what=f"{path} is the key of another node ({public_id(key)[:16]}…) than the one that "
                             "KACHERY_NODE_PRIVATE_KEY holds. Take the variable away, or give the node of that key a "
                             "directory of its own by KACHERY_STORAGE_DIR.")
    identity = Identity(key, public_id(key))
    _note_public_parts(storage_dir, identity)
    return identity


def _find_key(storage_dir: Path, path: Path, seed_hex: str, make_seed: Callable[[], bytes]) -> Ed25519PrivateKey:
    noted = _noted_ids(storage_dir)  # before private.pem is looked for, which a first start writes before these
    if path.exists():
        return _key_of_file(path)
    if seed_hex:
        key = private_key(bytes.fromhex(seed_hex))
        if noted and public_id(key) not in noted:
            raise _other_node(storage_dir, noted, public_id(key))
        return key
    if noted:
        raise _other_node(storage_dir, noted, "")
    _create_key(storage_dir, private_key(make_seed()))
    return _key_of_file(path)


def _noted_ids(storage_dir: Path) -> list[str]:
    """Return what the public parts that are there say of whose directory this is, "" for what says nothing."""
    found: list[str] = []
    for name in _PUBLIC_NAMES:
        with contextlib.suppress(FileNotFoundError):
            text = (storage_dir / name).read_text(encoding="ascii", errors="replace").strip()
            if name == "public.pem":
                der = _der_of_pem("PUBLIC", text)
                text = der[len(_PUBLIC_PREFIX):].hex() if der.startswith(_PUBLIC_PREFIX) else ""
            found.append(text)
    return found


def _other_node(storage_dir: Path, noted: list[str], given: str) -> NodeError:
    """Return the error of a directory without ``private.pem`` that is a node's.

    :param given: the id of the key in KACHERY_NODE_PRIVATE_KEY; empty without one.
    """
    whose = f"{storage_dir} is the directory of " + next((f"the node {text[:16]}…" for text in noted if text), "a node")
    anew = ("To make it another node, which has to join its channels anew, delete "
            f"{' and '.join(_PUBLIC_NAMES)} in it.")
    if given:
        return NodeError(what=f"{whose}, and KACHERY_NODE_PRIVATE_KEY holds the key of another one ({given[:16]}…). "
                              "Set the variable to the key of that node, or give the node of this key a directory of "
                              f"its own by KACHERY_STORAGE_DIR. {anew}")
    return NodeError(what=f"{whose}, and its key is not there. If the node was started with KACHERY_NODE_PRIVATE_KEY, "
                          "set the variable as it was then. If it had the file private.pem, restore that from a "
                          f"backup. {anew}")


def _key_of_file(path: Path) -> Ed25519PrivateKey:
    mode = path.stat().st_mode
    text = path.read_text(encoding="ascii", errors="replace")
    if stat.S_IMODE(mode) & 0o077:
        raise NodeError(what=f"{path} can be read by others than its owner, so this node's identity may have been "
                             f"copied. Make it private with: chmod 600 {path}")
    return private_key(_decode_pem(text, path))


def _create_key(storage_dir: Path, key: Ed25519PrivateKey) -> None:
    seed = key.private_bytes_raw()
    temporary = storage_dir / f".private.{secrets.token_hex(6)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(_encode_pem("PRIVATE", _PRIVATE_PREFIX + seed))
            file.flush()
            os.fsync(file.fileno())
        # Of two first starts at once the one that was quicker wins.
        name_new(temporary, storage_dir / "private.pem", durable=True)
    finally:
        temporary.unlink(missing_ok=True)


def _note_public_parts(storage_dir: Path, identity: Identity) -> None:
    public = _encode_pem("PUBLIC", _PUBLIC_PREFIX + bytes.fromhex(identity.node_id))
    for name, text, mode in (("public.pem", public, 0o600), ("kachery-node-id", identity.node_id, 0o644)):
        path = storage_dir / name
        try:
            if not path.exists() or path.read_text(encoding="ascii", errors="replace").strip() != text.strip():
                write_whole(path, text, mode)
        except OSError as error:
            raise DiskError(action="the writing", path=str(path), why=error.strerror or str(error)) from None


def note_owner(storage_dir: Path, owner: str) -> None:
    """Write who owns this node into the file ``owner``, which clients of 2022 show; one that is there is kept."""
    path = storage_dir / "owner"
    with contextlib.suppress(OSError):
        if not path.exists():
            write_whole(path, owner, 0o644)


def _encode_pem(kind: str, der: bytes) -> str:
    return f"-----BEGIN {kind} KEY-----\n{base64.b64encode(der).decode()}\n-----END {kind} KEY-----\n"


def _der_of_pem(kind: str, text: str) -> bytes:
    """Return what is in a PEM of this kind, nothing when it is none."""
    match = _PEM.fullmatch(text)
    if match is not None and match[1] == kind:
        with contextlib.suppress(ValueError):
            return base64.b64decode("".join(match[2].split()), validate=True)
    return b""


def _decode_pem(text: str, path: Path) -> bytes:
    der = _der_of_pem("PRIVATE", text)
    if len(der) != len(_PRIVATE_PREFIX) + 32 or not der.startswith(_PRIVATE_PREFIX):
        raise NodeError(what=f"{path} is not an Ed25519 private key in PEM form. Restore it from a backup; deleting "
                             f"it, {' and '.join(_PUBLIC_NAMES)} makes this a new node that has to join its channels "
                             "again.")
    return der[len(_PRIVATE_PREFIX):]


def write_whole(path: Path, text: str, mode: int, *, group_id: int = -1) -> None:
    """Write a small file as a whole: readers see the old content or the new, also after a crash.

    :param group_id: the group that it is handed to; -1: that which the system gives it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            os.fchown(file.fileno(), -1, group_id)
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class DirectoryLock:
    """Held by the one node of a storage directory; the system drops it when the process ends, however that comes."""

    def __init__(self, storage_dir: Path) -> None:
        self._path = storage_dir / ".node.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        """:raises NodeError: another node has the directory. :raises DiskError: the lock cannot be written."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise
        except BlockingIOError:
            raise NodeError(what=f"another node works on {self._path.parent}. Stop it with: kachery-fast node stop, or "
                                 "give this one a directory of its own by KACHERY_STORAGE_DIR.") from None
        except OSError as error:
            raise DiskError(action="the locking", path=str(self._path), why=error.strerror or str(error)) from None
        self._fd = fd

    def release(self) -> None:
        """Let the directory go; may be repeated."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _group_id(name: str) -> int:
    """Return the number of a group, -1 for the empty name.

    :raises InvalidSetting: it is no number that a group can have. :raises NodeError: there is none of that name.
    """
    if not name:
        return -1
    if name.isascii() and name.isdecimal():
        if len(name) > len(str(_GROUP_ID_MAX)) or int(name) > _GROUP_ID_MAX:
            raise InvalidSetting(name="client_auth_group", value=name[:40], source="the settings",
                                 why=f"the numbers of groups end at {_GROUP_ID_MAX}")
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise NodeError(what=f"there is no group {name!r}, which KACHERY_CLIENT_AUTH_GROUP names. Make it with "
                             "groupadd, or name another.") from None


class ClientAuth:
    """The code in the file ``client-auth``: who can read the file may use the node. The last code stays valid.

    :param group: the group, by name or number, that the file is handed to; empty: as the system does.
    """

    def __init__(self, storage_dir: Path, *, group: str = "",
                 choose: Callable[[str], str] = secrets.choice) -> None:
        self._path = storage_dir / "client-auth"
        self._group = group
        self._choose = choose
        self._codes: list[str] = []

    @property
    def path(self) -> Path:
        """The file that clients read."""
        return self._path

    def rotate(self) -> None:
        """Make a new code and write it, mode 0640; the one before the last is no longer accepted.

        :raises DiskError: it cannot be written; the last code stays valid.
        :raises NodeError: there is no such group, or it may not be given the file. :raises InvalidSetting: nor can be.
        """
        group_id = _group_id(self._group)
        code = "".join(self._choose(string.ascii_letters) for _ in range(_CODE_LENGTH))
        former = self._codes[-1:]
        self._codes = [*former, code]  # before any client can read it
        try:
            write_whole(self._path, code, 0o640, group_id=group_id)
        except OSError as error:
            self._codes = former
            if group_id != -1 and isinstance(error, PermissionError):
                raise NodeError(what=f"it may not hand {self._path} to the group {self._group!r} of "
                                     "KACHERY_CLIENT_AUTH_GROUP. The node's user must be a member of that group, and "
                                     "own the storage directory.") from None
            raise DiskError(action="the writing", path=str(self._path), why=error.strerror or str(error)) from None

    def accepts(self, code: str) -> bool:
        """Whether a client knows the code, compared in constant time."""
        data = code.encode("utf-8", "surrogateescape")
        return sum(hmac.compare_digest(data, known.encode()) for known in self._codes) > 0

    def admits(self, code: str, admitted: object) -> bool:
        """Whether ``code`` is among those that the node's owner lists, a list of texts; other values admit nobody."""
        data = code.encode("utf-8", "surrogateescape")
        known = [text for text in admitted if isinstance(text, str)] if isinstance(admitted, list) else []
        return sum(hmac.compare_digest(data, text.encode("utf-8", "surrogatepass")) for text in known if text) > 0

    def remove(self) -> None:
        """The node stops: no code is valid any more. A file that another node of this store has written stays."""
        codes, self._codes = self._codes, []
        with contextlib.suppress(OSError):
            if self._path.read_text(encoding="ascii", errors="replace") in codes:
                self._path.unlink()
