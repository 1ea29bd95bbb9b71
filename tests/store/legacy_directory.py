"""A storage directory as the daemon of 2022 leaves it, made from the formats alone (WIRE-2022.md, part B)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kachery_fast.protocol.canonical import canonical_bytes, object_sha1
from kachery_fast.protocol.feeds import Tail, tail_after
from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.protocol.signing import private_key, public_id
from tests.protocol.chains import of_2022

__all__ = ["CHUNK_2022", "MAIN", "NODE", "OTHER_FEED", "OTHER_SEED", "OWN_FEED", "OWN_SEED", "Legacy", "append",
           "legacy_directory", "put", "set_mutable", "sha1_of", "snapshot"]

CHUNK_2022 = 20_000_000
NODE_SEED, OWN_SEED, OTHER_SEED = b"n" * 32, b"o" * 32, b"x" * 32
NODE, OWN_FEED, OTHER_FEED = (public_id(private_key(seed)) for seed in (NODE_SEED, OWN_SEED, OTHER_SEED))
MAIN = subfeed_hash("main")


@dataclass(frozen=True)
class Legacy:
    """What is in the directory: bytes by SHA-1, the link's target, the large file and its manifest."""

    root: Path
    small: bytes
    target: Path
    large: bytes
    manifest: bytes

    @property
    def databases(self) -> list[Path]:
        return [self.root / "mutables.db", self.root / "feeds.db"]


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def snapshot(*paths: Path) -> list[Any]:
    """Bytes, as SHA-256, and times; what must not change."""
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in paths]


def put(root: Path, data: bytes, name: str | None = None) -> Path:
    sha1 = name or sha1_of(data)
    path = root / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)
    return path


def append(root: Path, contents: Sequence[dict[str, Any]], seed: bytes = OWN_SEED, subfeed: str = MAIN) -> None:
    """Append signed messages, as the daemon does."""
    key = private_key(seed)
    feed_id = public_id(key)
    with closing(sqlite3.connect(root / "feeds.db")) as connection, connection:
        row = connection.execute("SELECT message FROM subfeedMessages WHERE feedId = ? AND subfeedHash = ?"
                                 " ORDER BY position DESC LIMIT 1", (feed_id, subfeed)).fetchone()
        tail = Tail(feed_id, subfeed) if row is None else tail_after(feed_id, subfeed, row[0].encode())
        connection.execute("INSERT OR IGNORE INTO feeds VALUES (?)", (feed_id,))
        connection.execute("INSERT OR IGNORE INTO subfeeds VALUES (?, ?)", (feed_id, subfeed))
        connection.executemany(
            "INSERT INTO subfeedMessages VALUES (?, ?, ?, ?)",
            [(feed_id, subfeed, number, message.decode())
             for number, message in enumerate(of_2022(contents, tail, key=key), tail.count)])


def set_mutable(root: Path, key: Any, value: Any) -> None:
    with closing(sqlite3.connect(root / "mutables.db")) as connection, connection:
        connection.execute("INSERT OR REPLACE INTO mutables VALUES (?, ?, ?)",
                           (object_sha1(key), _canonical(key), _canonical(value)))


def legacy_directory(root: Path, elsewhere: Path, *, large_size_bytes: int = 45_000_000) -> Legacy:
    """Make the directory; ``elsewhere`` is where the linked file lies."""
    root.mkdir(parents=True)
    _identity(root)
    small = b"a file of 2022"
    put(root, small)
    elsewhere.mkdir(parents=True, exist_ok=True)
    target = elsewhere / "linked.dat"
    target.write_bytes(b"linked" * 50)
    stat = target.stat()
    put(root, json.dumps({"path": str(target), "manifestSha1": None, "_writingProcess": "daemon",
                          "stat": {"size": stat.st_size, "mtime": stat.st_mtime}}, separators=(",", ":")).encode(),
        sha1_of(target.read_bytes()) + ".link")
    large = random.Random(2022).randbytes(large_size_bytes)
    chunks = [{"start": start, "end": min(start + CHUNK_2022, len(large)),
               "sha1": sha1_of(large[start:start + CHUNK_2022])} for start in range(0, len(large), CHUNK_2022)]
    manifest = json.dumps({"size": len(large), "sha1": sha1_of(large), "chunks": chunks},
                          separators=(",", ":")).encode()
    put(root, large)
    put(root, manifest)
    _databases(root)
    return Legacy(root, small, target, large, manifest)


def _identity(root: Path) -> None:
    der = {"private": bytes.fromhex("302e020100300506032b657004220420") + NODE_SEED,
           "public": bytes.fromhex("302a300506032b6570032100") + bytes.fromhex(NODE)}
    for name, data in der.items():
        kind = name.upper()
        path = root / f"{name}.pem"
        path.write_text(f"-----BEGIN {kind} KEY-----\n{base64.b64encode(data).decode()}\n-----END {kind} KEY-----\n")
        path.chmod(0o600)
    (root / "kachery-node-id").write_text(NODE)
    (root / "owner").write_text("someone@example.org")


def _databases(root: Path) -> None:
    with closing(sqlite3.connect(root / "mutables.db")) as connection, connection:
        connection.execute("CREATE TABLE mutables (sha1 TEXT PRIMARY KEY, key TEXT, value TEXT) WITHOUT ROWID")
    with closing(sqlite3.connect(root / "feeds.db")) as connection, connection:
        connection.execute("CREATE TABLE feeds (feedId TEXT PRIMARY KEY)")
        connection.execute("CREATE TABLE subfeeds (feedId TEXT, subfeedHash TEXT, PRIMARY KEY (feedId, subfeedHash))")
        connection.execute("CREATE TABLE subfeedMessages (feedId TEXT, subfeedHash TEXT, position INTEGER,"
                           " message TEXT, PRIMARY KEY (feedId, subfeedHash, position))")
    set_mutable(root, "greeting", "grüß dich 😀")
    set_mutable(root, {"b": [1, 2.5, None], "a": True}, {"x": 1})
    set_mutable(root, {"feedId": OWN_FEED, "type": "feedConfig"},
                {"feedId": OWN_FEED, "privateKey": OWN_SEED.hex()})
    set_mutable(root, {"feed_name": "diary", "type": "feed_id_for_name"}, OWN_FEED)
    append(root, [{"i": number} for number in range(700)])
    append(root, [{"day": 1}], subfeed=subfeed_hash({"day": 1}))
    append(root, [{"copy": number} for number in range(3)], OTHER_SEED)
    for path in (root / "mutables.db", root / "feeds.db"):
        path.chmod(0o600)
        os.utime(path, ns=(1_650_000_000_000_000_001, 1_650_000_000_000_000_001))


def _canonical(value: Any) -> str:
    return canonical_bytes(value).decode()
