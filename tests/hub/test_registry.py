"""The registry's tables: those of an older version are brought up to date, those of a newer one left alone."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from kachery_fast.errors import HubError
from kachery_fast.hub.app import Hub
from kachery_fast.hub.registry import SCHEMA_VERSION, Registry, sqlite_url

from ..network import LOOPS, run_on
from .support import ALL, CHANNEL, OWNER, Clock, hub_settings, node_id, running_world

TASK = "7a" * 16
TOKEN = "the owner's token"

# As version 1 of the tables was created, and filled: an owner, its token, a node, a channel, a membership.
VERSION_1 = f"""
CREATE TABLE damage_reports (id INTEGER NOT NULL, channel VARCHAR(64) NOT NULL, node VARCHAR(64) NOT NULL,
    sha1 VARCHAR(40) NOT NULL, found VARCHAR(40) NOT NULL, actual VARCHAR(40), time BIGINT NOT NULL, PRIMARY KEY (id));
CREATE INDEX ix_damage_reports_channel ON damage_reports (channel);
CREATE TABLE owners (id VARCHAR(254) NOT NULL, created BIGINT NOT NULL, PRIMARY KEY (id));
CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE channels (name VARCHAR(64) NOT NULL, folded VARCHAR(64) NOT NULL, owner VARCHAR(254) NOT NULL,
    created BIGINT NOT NULL, PRIMARY KEY (name), UNIQUE (folded), FOREIGN KEY(owner) REFERENCES owners (id));
CREATE TABLE nodes (id VARCHAR(64) NOT NULL, owner VARCHAR(254) NOT NULL, label VARCHAR(100) NOT NULL,
    version VARCHAR(100) NOT NULL, created BIGINT NOT NULL, last_seen BIGINT NOT NULL, PRIMARY KEY (id),
    FOREIGN KEY(owner) REFERENCES owners (id));
CREATE TABLE owner_tokens (hash VARCHAR(64) NOT NULL, owner VARCHAR(254) NOT NULL, created BIGINT NOT NULL,
    PRIMARY KEY (hash), FOREIGN KEY(owner) REFERENCES owners (id));
CREATE TABLE invitations (hash VARCHAR(64) NOT NULL, channel VARCHAR(64) NOT NULL, node_owner VARCHAR(254) NOT NULL,
    permissions VARCHAR(200) NOT NULL, uses_left INTEGER, expires BIGINT NOT NULL, created BIGINT NOT NULL,
    PRIMARY KEY (hash), FOREIGN KEY(channel) REFERENCES channels (name),
    FOREIGN KEY(node_owner) REFERENCES owners (id));
CREATE INDEX ix_invitations_channel ON invitations (channel);
CREATE TABLE memberships (channel VARCHAR(64) NOT NULL, node VARCHAR(64) NOT NULL, owner VARCHAR(254) NOT NULL,
    requested VARCHAR(200) NOT NULL, granted VARCHAR(200) NOT NULL, state VARCHAR(10) NOT NULL,
    invitation VARCHAR(64) NOT NULL, created BIGINT NOT NULL, decided BIGINT NOT NULL,
    PRIMARY KEY (channel, node, owner), FOREIGN KEY(channel) REFERENCES channels (name),
    FOREIGN KEY(node) REFERENCES nodes (id), FOREIGN KEY(owner) REFERENCES owners (id));
CREATE INDEX memberships_by_node ON memberships (node);
INSERT INTO schema_version VALUES (1);
INSERT INTO owners VALUES ('{OWNER}', 1);
INSERT INTO owner_tokens VALUES ('{hashlib.sha256(TOKEN.encode()).hexdigest()}', '{OWNER}', 1);
INSERT INTO channels VALUES ('{CHANNEL}', '{CHANNEL}', '{OWNER}', 1);
INSERT INTO nodes VALUES ('{node_id("A")}', '{OWNER}', 'A', '0.1', 1, 1);
INSERT INTO memberships VALUES ('{CHANNEL}', '{node_id("A")}', '{OWNER}', '{" ".join(ALL)}', '{" ".join(ALL)}',
    'member', '', 1, 0);
"""


def run_sql(path: Path, script: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        with connection:
            connection.executescript(script)
            return connection.execute("SELECT version FROM schema_version").fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_registry_of_version_1_goes_on_with_claims(tmp_path: Path, loop_kind: str) -> None:
    path = tmp_path / "hub" / "hub.db"
    path.parent.mkdir(mode=0o700)
    run_sql(path, VERSION_1)
    (path.parent / "owner-token").write_text(TOKEN)

    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock, channel=False) as world:
            assert world.token == TOKEN
            client = world.node("A")
            (info,) = (await client.node_config()).channels
            assert (info.name, info.permissions) == (CHANNEL, sorted(ALL))
            assert (await client.claim_task(CHANNEL, TASK, "action", "f")).granted
        clock.now += 1
        async with running_world(tmp_path, clock, channel=False) as world:
            assert (await world.node("A").find_task(CHANNEL, TASK)).state == "claimed"

    run_on(loop_kind, scenario())
    assert run_sql(path, "") == [(SCHEMA_VERSION,)]


def test_a_move_to_the_next_version_that_broke_off_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "hub.db"
    run_sql(path, VERSION_1)

    async def scenario() -> None:
        for _ in range(2):
            registry = Registry(sqlite_url(path))
            await registry.open()
            await registry.close()
            run_sql(path, "UPDATE schema_version SET version = 1;")  # the tables are there, the version is not

    run_on("asyncio-debug", scenario())


def test_a_registry_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "hub" / "hub.db"
    path.parent.mkdir(mode=0o700)
    run_sql(path, f"{VERSION_1} UPDATE schema_version SET version = {SCHEMA_VERSION + 1}; DROP TABLE memberships;")

    async def scenario() -> None:
        with pytest.raises(HubError, match="newer kachery-fast"):
            await Hub(hub_settings(tmp_path)).start()

    run_on("asyncio-debug", scenario())
    connection = sqlite3.connect(path)
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    connection.close()
    assert not names & {"memberships", "task_claims"}
