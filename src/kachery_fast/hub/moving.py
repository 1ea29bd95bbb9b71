"""``hub export`` and ``hub import``: a whole hub as one file, from one database or machine to another.

The members of the archive (``archive.py``, docs/formats.md) are ``hub.json``, ``hub-key``, perhaps ``owner-token``,
``registry/<table>/<number>`` (rows as JSON lines), ``objects/<name>``, and the end.
"""

from __future__ import annotations

import base64
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection

from ..config import Settings
from ..embedded.bucket_files import ObjectFiles
from ..embedded.bucket_names import is_object_name
from ..errors import AlreadyExists, DiskError, InvalidSetting, NotOnHub, ObjectExists, ObjectMissing
from . import seen
from .archive import COPY_BYTES, ArchiveReader, ArchiveWriter, broken
from .directory import HubDirectory, bucket_directory, is_key
from .registry import HEAD, Registry, reading, registry_url
from .tables import metadata, relayed, seen_requests, sessions, sign_in_links

__all__ = ["Moved", "export_hub", "import_hub"]

FORMAT = 1
# What ends with the hub that is left: who is signed in, and what its processes tell one another.
LEFT_BEHIND = frozenset({relayed, seen_requests, sessions, sign_in_links})
TABLES = [table for table in metadata.sorted_tables if table not in LEFT_BEHIND]

_ROWS_AT_ONCE = 500
_PART_SIZE_BYTES = 4 * 1024 * 1024
_STAGING = ".import"  # no channel can be called so


class Moved(NamedTuple):
    """What an archive holds."""

    rows: int
    objects: int


class _Head(msgspec.Struct):
    format: int
    tables: str


def export_hub(settings: Settings, path: Path, *, objects: bool = True) -> Moved:
    """Write a hub into a new file that only its owner can read. The hub may run meanwhile.

    The registry is written as at one moment, the objects afterwards, each as it is when its turn comes.

    :param objects: whether those of the embedded bucket come along.
    :raises AlreadyExists: the file is there. :raises NotOnHub: there is no hub.
    :raises DiskError: :raises RegistryUnreachable: :raises HubError: the registry is of another version.
    """
    if path.exists():
        raise _exists(path)
    directory = HubDirectory(settings.hub_dir, settings.hub_key_file)
    url = registry_url(settings.hub_database, directory.path)
    if not settings.hub_database and not _has_content(Path(str(url.database))):
        raise NotOnHub(kind="hub in the directory", name=str(directory.path), advice="Name another one by --dir.")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            archive = ArchiveWriter(file)
            archive.add("hub.json", msgspec.json.encode(_Head(FORMAT, HEAD)))
            archive.add("hub-key", directory.key().encode())
            token = directory.read("owner-token")
            if token:
                archive.add("owner-token", token.encode())
            with reading(url) as connection:
                rows = _write_rows(connection, archive)
            count = _write_objects(bucket_directory(settings), archive) if objects else 0
            archive.end()
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, path)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise DiskError(action="writing", path=str(path), why=error.strerror) from None
    finally:
        with suppress(OSError):
            beside.unlink()
    return Moved(rows, count)


async def import_hub(settings: Settings, path: Path, now_ms: int) -> Moved:
    """Make a hub of what ``export_hub`` wrote. When it fails, nothing of it is left.

    :param now_ms: the time; requests of nodes that were signed before are not accepted.
    :raises AlreadyExists: there is a hub already. :raises InvalidArgument: it is no such archive, or damaged.
    :raises InvalidSetting: the key file that is named has another key. :raises DiskError: :raises RegistryUnreachable:
    """
    directory = HubDirectory(settings.hub_dir, settings.hub_key_file)
    new = not directory.path.exists()
    directory.acquire()
    staging = directory.path / _STAGING
    try:
        _require_empty(directory)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        url = registry_url(settings.hub_database, directory.path)
        if not settings.hub_database:
            url = URL.create("sqlite", database=str(staging / "hub.db"))
        registry = Registry(url)
        placing = _Placing(directory, bucket_directory(settings))
        try:
            try:
                await registry.open()
                moved = await registry.call(_import, path, placing, now_ms)
            finally:
                await registry.close()
            if not settings.hub_database:
                (staging / "hub.db").chmod(0o600)
                (staging / "hub.db").replace(directory.path / "hub.db")
        except BaseException:
            placing.undo()
            raise
        new = False
        return moved
    except OSError as error:
        raise DiskError(action="importing into", path=str(directory.path), why=error.strerror) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not _has_content(directory.path / "hub.db"):
            (directory.path / "hub.db").unlink(missing_ok=True)
        directory.release()
        if new:
            shutil.rmtree(directory.path, ignore_errors=True)


class _Placing:
    """Where the parts of a hub that are no rows go: first aside, then all at once to their places, or away again."""

    def __init__(self, directory: HubDirectory, bucket: Path) -> None:
        self._directory = directory
        self._bucket = bucket
        self._staging = bucket / _STAGING
        self._placed: list[Path] = []
        self._files: ObjectFiles | None = None
        self.secrets: dict[str, str] = {}

    def begin(self) -> None:
        """Forget what an earlier attempt has brought."""
        shutil.rmtree(self._staging, ignore_errors=True)
        self._files = None
        self.secrets = {}

    def files(self) -> ObjectFiles:
        """Where objects go. :raises AlreadyExists: the bucket has some."""
        if self._files is None:
            if self._bucket.is_dir() and any(ObjectFiles(self._bucket, shared=True).objects()):
                raise AlreadyExists(what=f"A bucket with objects in {self._bucket}",
                                    advice="Import into an empty one, or export with --no-objects.")
            self._files = ObjectFiles(self._staging)
        return self._files

    def place(self) -> None:
        """Put everything where the hub looks for it. :raises InvalidSetting: there is another key."""
        key = self._directory.key_path
        if key.exists() and key.read_text().strip() != self.secrets.get("hub-key"):
            raise InvalidSetting(name="hub_key_file", value=str(key), source="the settings",
                                 why="it is not the key of the hub that is imported; remove the file, or name another")
        for name, path in (("hub-key", key), ("owner-token", self._directory.path / "owner-token")):
            if name in self.secrets and not path.exists():
                self._placed.append(path)
                HubDirectory(path.parent).write_secret(path.name, self.secrets[name])
        if self._files is not None:
            for channel in sorted(self._staging.iterdir()):
                if not channel.name.startswith("."):
                    self._placed.append(self._bucket / channel.name)
                    channel.rename(self._bucket / channel.name)
            shutil.rmtree(self._staging)

    def undo(self) -> None:
        """Take everything away again."""
        shutil.rmtree(self._staging, ignore_errors=True)
        for path in self._placed:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _import(connection: Connection, path: Path, placing: _Placing, now_ms: int) -> Moved:
    placing.begin()
    for table in TABLES:
        if connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() is not None:
            raise AlreadyExists(what="A hub in this registry", advice="Import into an empty database.")
    rows = objects = 0
    with path.open("rb") as file:
        archive = ArchiveReader(file)
        member = archive.next()
        if member is None or member[0] != "hub.json":
            raise broken("it is no archive of a hub")
        _check_head(archive.content())
        while (member := archive.next()) is not None:
            name, size_bytes = member
            if name in ("hub-key", "owner-token"):
                placing.secrets[name] = archive.content().decode("ascii", "replace")
            elif name.startswith("registry/"):
                rows += _read_rows(connection, name, archive.content())
            elif name.startswith("objects/"):
                _read_object(placing.files(), name.removeprefix("objects/"), size_bytes, archive.pieces())
                objects += 1
            else:
                raise broken(f"{name!r} is no part of a hub")
    if not is_key(placing.secrets.get("hub-key", "")):
        raise broken("the hub's key is missing")
    seen.start_anew(connection, now_ms)
    _renumber(connection)
    placing.place()
    return Moved(rows, objects)


def _check_head(content: bytes) -> None:
    try:
        head = msgspec.json.decode(content, type=_Head)
    except msgspec.MsgspecError:
        raise broken("it is no archive of a hub") from None
    if (head.format, head.tables) != (FORMAT, HEAD):
        raise broken(f"it has version {head.tables} of the tables, this program {HEAD}; import it with the version "
                     "that wrote it, and go on from there")


def _require_empty(directory: HubDirectory) -> None:
    for name in ("hub.db", "owner-token"):
        if _has_content(directory.path / name):
            raise AlreadyExists(what=f"A hub in {directory.path}", advice="Import into an empty directory.")


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _exists(path: Path) -> AlreadyExists:
    return AlreadyExists(what=str(path), advice="Name a new file.")


# --- rows


def _write_rows(connection: Connection, archive: ArchiveWriter) -> int:
    """Add all rows of all tables that move along; return how many. ``connection`` sees them as at one moment."""
    count = 0
    for table in TABLES:
        part, number, lines = bytearray(), 0, 0
        rows = connection.execution_options(stream_results=True, yield_per=_ROWS_AT_ONCE).execute(sa.select(table))
        for row in rows.mappings():
            part += msgspec.json.encode({name: _plain(value) for name, value in row.items()}) + b"\n"
            lines += 1
            if len(part) >= _PART_SIZE_BYTES:
                archive.add(f"registry/{table.name}/{number}", bytes(part))
                part, number = bytearray(), number + 1
        if part:
            archive.add(f"registry/{table.name}/{number}", bytes(part))
        count += lines
    return count


def _read_rows(connection: Connection, name: str, content: bytes) -> int:
    """Insert the rows of a member ``registry/...``; return how many.

    :raises InvalidArgument: they are no rows of a table that moves along.
    """
    table = next((table for table in TABLES if name.split("/")[1] == table.name), None)
    if table is None:
        raise broken(f"there is no table for {name!r}")
    rows = []
    binary = {column.name for column in table.columns if isinstance(column.type, sa.LargeBinary)}
    try:
        for line in content.splitlines():
            row = msgspec.json.decode(line, type=dict[str, Any])
            if set(row) != set(table.columns.keys()):
                raise broken(f"rows of {table.name} have other columns")
            rows.append({key: base64.b64decode(value) if key in binary and value is not None else value
                         for key, value in row.items()})
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            connection.execute(table.insert(), rows[start:start + _ROWS_AT_ONCE])
    except (msgspec.MsgspecError, ValueError, TypeError, sa.exc.IntegrityError, sa.exc.DataError,
            sa.exc.StatementError) as error:
        if isinstance(error, sa.exc.OperationalError):
            raise
        raise broken(f"a row of {table.name} is not right") from error
    return len(rows)


def _renumber(connection: Connection) -> None:
    """Let PostgreSQL count on from the numbers that were imported."""
    if connection.dialect.name != "postgresql":
        return
    for table in TABLES:
        column = table.autoincrement_column
        if column is not None:
            top = sa.select(sa.func.coalesce(sa.func.max(column), 0) + 1).scalar_subquery()
            connection.execute(sa.select(sa.func.setval(
                sa.func.pg_get_serial_sequence(table.name, column.name), top, False)))


def _plain(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, (bytes, memoryview)) else value


# --- objects


def _write_objects(bucket: Path, archive: ArchiveWriter) -> int:
    """Add all objects of a bucket, each as it is when its turn comes; return how many."""
    if not bucket.is_dir():
        return 0
    count, files = 0, ObjectFiles(bucket, shared=True)
    for name in (stored.name for stored in files.objects()):
        try:
            found = files.open(name)
        except ObjectMissing:  # removed meanwhile
            continue
        with os.fdopen(found.fd, "rb") as file:
            archive.begin(f"objects/{name}", found.size_bytes)
            left = found.size_bytes
            while left:
                piece = file.read(min(left, COPY_BYTES))
                if not piece:
                    raise DiskError(action="reading", path=name, why="it became shorter meanwhile")
                archive.put(piece)
                left -= len(piece)
            archive.pad(found.size_bytes)
        count += 1
    return count


def _read_object(files: ObjectFiles, name: str, size_bytes: int, pieces: Iterator[bytes]) -> None:
    """Create an object from a member ``objects/...``. :raises InvalidArgument: its name is none of an object."""
    if not is_object_name(name):
        raise broken(f"{name!r} is no object's name")
    incoming = files.create(name, size_bytes)
    try:
        offset = 0
        for piece in pieces:
            offset += os.pwrite(incoming.fd, piece, offset)
        incoming.commit()
    except ObjectExists:
        raise broken(f"the object {name} is in it twice") from None
    except OSError as error:
        raise incoming.translated(error, "writing") from error
    finally:
        incoming.close()
