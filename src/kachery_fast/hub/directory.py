"""What a hub keeps in its directory beside registry and bucket: its key, its address, and the lock.

Every secret of the hub's own is derived from the one key. So hubs that share a registry share one file too, and a hub
that is moved takes one along.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from ..config import Settings
from ..errors import AlreadyExists, DiskError, InvalidSetting

__all__ = ["HubDirectory", "bucket_directory", "is_key", "running_hub"]

_LOCK = "lock"
_KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)


class HubDirectory:
    """A hub's directory, mode 0700 when it is made here.

    :param key_file: where the hub's key is; "" for ``hub-key`` in the directory, made when missing.
    """

    def __init__(self, path: Path, key_file: str = "") -> None:
        self.path = path
        self.key_path = Path(key_file).expanduser() if key_file else path / "hub-key"
        self._lock: int | None = None

    def acquire(self) -> None:
        """Make the directory when missing, and lock it for this process.

        :raises AlreadyExists: another hub runs on it. :raises DiskError: it is not usable.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(action="use", path=str(self.path), why=error.strerror) from None
        try:
            self._take(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            advice = "Stop it first with: kachery-fast hub stop"
            raise AlreadyExists(what=f"A hub on {self.path}", advice=advice) from None
        except OSError as error:  # a full or read-only disk, a file system without locks
            os.close(descriptor)
            raise DiskError(action="use", path=str(self.path), why=error.strerror) from None
        self._lock = descriptor

    def _take(self, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        (self.path / "address").unlink(missing_ok=True)  # of a hub that was killed
        # SQLite gives its journals the mode of the database.
        (self.path / "hub.db").touch(mode=0o600)

    def release(self) -> None:
        """Give the directory free for another hub."""
        if self._lock is not None:
            with suppress(OSError):  # the next hub looks for it again
                (self.path / "address").unlink()
            os.close(self._lock)
            self._lock = None

    def write_address(self, url: str) -> None:
        """Say where the hub is, for commands on this machine."""
        self._write("address", url, 0o644)

    def key(self) -> str:
        """Return the hub's key, 64 hex digits; made when there is none in the directory.

        :raises InvalidSetting: what the setting hub_key_file names is no key. :raises DiskError: it cannot be read.
        """
        given = self.key_path.parent != self.path
        if given:
            try:
                text = self.key_path.read_text("ascii", "replace").strip()
            except OSError as error:
                raise self._refused(error.strerror or "it cannot be read") from None
        else:
            text = self.read(self.key_path.name) or ""
            if not text:
                text = secrets.token_hex(32)
                self.write_secret(self.key_path.name, text)
        if not is_key(text):
            raise self._refused("64 hex digits are a key")
        return text

    def _refused(self, why: str) -> InvalidSetting:
        return InvalidSetting(name="hub_key_file", value=str(self.key_path), source="the settings",
                              why=f"{why}. Make one with: openssl rand -hex 32")

    def secret(self, name: str) -> str:
        """Return the secret of this name as 64 hex digits, derived from the hub's key. Raises as ``key`` does."""
        return hmac.new(bytes.fromhex(self.key()), f"kachery-fast:hub:{name}".encode(), "sha256").hexdigest()

    def write_secret(self, name: str, text: str) -> None:
        """Write a file of one line that nobody else can read. :raises DiskError: it cannot be written."""
        self._write(name, text, 0o600)

    def read(self, name: str) -> str | None:
        """Return a file's only line, None when there is no such file. A secret that others can read is closed to them.

        :raises DiskError: it cannot be read.
        """
        path = self.path / name
        try:
            text = path.read_text().strip()
            if name != "address" and path.stat().st_mode & 0o077:
                path.chmod(0o600)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DiskError(action="reading", path=str(path), why=error.strerror) from None
        return text

    def _write(self, name: str, text: str, mode: int) -> None:
        beside = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "w") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path / name)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise DiskError(action="writing", path=str(self.path / name), why=error.strerror) from None


def is_key(text: str) -> bool:
    """Whether this can be a hub's key."""
    return _KEY.fullmatch(text) is not None


def bucket_directory(settings: Settings) -> Path:
    """Where the embedded bucket's objects are."""
    shared = settings.hub_bucket_dir
    return Path(shared).expanduser().absolute() if shared else settings.hub_dir / "bucket"


def running_hub(path: Path) -> int | None:
    """Return the process id of the hub that runs on a directory, None when none does."""
    try:
        descriptor = os.open(path / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return int(os.pread(descriptor, 20, 0).strip() or b"0") or None
    finally:
        os.close(descriptor)
    return None
