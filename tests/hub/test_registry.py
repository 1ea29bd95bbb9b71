"""The registry's tables: those of an older version are brought up to date, those of a newer one left alone."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL

from kachery_fast import hub
from kachery_fast.errors import DiskError, HubError, InvalidSetting, RegistryUnreachable
from kachery_fast.hub.app import Hub
from kachery_fast.hub.registry import HEAD, Registry, _migrate, registry_url
from kachery_fast.hub.tables import metadata

from ..network import LOOPS, run_on
from ..postgresql import Cluster, the_cluster
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


def run_sql(path: Path, script: str, question: str = "SELECT version_num FROM alembic_version") -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        with connection:
            connection.executescript(script)
            return [row[0] for row in connection.execute(question)]
    finally:
        connection.close()


def old_registry(tmp_path: Path, more: str = "") -> Path:
    path = tmp_path / "hub" / "hub.db"
    path.parent.mkdir(mode=0o700)
    run_sql(path, VERSION_1 + more, "SELECT version FROM schema_version")
    return path


@pytest.mark.sqlite
@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_registry_of_version_1_goes_on_with_claims_and_accounts(tmp_path: Path, loop_kind: str) -> None:
    path = old_registry(tmp_path)
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
            found = await world.owner.call("showChannel", channel=CHANNEL)
            assert (found["private"], found["inviters"], found["sizeBytesMax"]) == (False, "owner", None)

    run_on(loop_kind, scenario())
    assert run_sql(path, "") == [HEAD]
    assert run_sql(path, "", "SELECT admin FROM owners") == [1]
    # A program from before there were migrations compares this with its own, 1 or 2, and leaves the tables alone.
    assert run_sql(path, "", "SELECT version FROM schema_version") == [3]


def test_the_migrations_make_the_tables_that_the_program_uses(tmp_path: Path) -> None:
    (old, migrated, fresh) = (URL.create("sqlite", database=str(path)) for path in (
        old_registry(tmp_path), tmp_path / "migrated.db", tmp_path / "fresh.db"))
    migrate_empty(migrated)
    assert_tables_are_those_of_the_program(old, migrated, fresh)
    assert columns_of(old) == columns_of(migrated) == columns_of(fresh)


def test_the_migrations_make_the_same_tables_in_postgresql(tmp_path: Path) -> None:
    cluster = the_cluster()
    migrated, fresh = (cluster.make_database(empty=True) for _ in range(2))
    urls = [registry_url(cluster.url(name), tmp_path) for name in (migrated, fresh)]
    migrate_empty(urls[0])
    assert_tables_are_those_of_the_program(*urls)
    assert columns_of(urls[0]) == columns_of(urls[1])
    for name in (migrated, fresh):
        cluster.drop_database(name)


def migrate_empty(url: URL) -> None:
    """Go through all migrations, where ``Registry`` would make the tables at once."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        _migrate(connection, "", "a test's")
    engine.dispose()


def columns_of(url: URL) -> dict[str, Any]:
    """All tables as the database has them: columns, keys, indexes, and the version."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        look = sa.inspect(connection)
        tables = {table: (
            {column["name"]: (str(column["type"]), column["nullable"], column["default"])
             for column in look.get_columns(table)},
            sorted(look.get_pk_constraint(table)["constrained_columns"]),
            sorted(str((key["constrained_columns"], key["referred_table"])) for key in look.get_foreign_keys(table)),
            sorted(str((index["column_names"], index["unique"])) for index in look.get_indexes(table)),
            sorted(str(unique["column_names"]) for unique in look.get_unique_constraints(table)),
        ) for table in look.get_table_names()}
        versions = [connection.execute(sa.text(f"SELECT * FROM {table}")).scalar()
                    for table in ("alembic_version", "schema_version")]
    engine.dispose()
    return {**tables, "versions": versions}


def assert_tables_are_those_of_the_program(*urls: URL) -> None:
    async def scenario() -> None:
        for url in urls:
            registry = Registry(url)
            await registry.open()
            difference = await registry.call(
                lambda connection: compare_metadata(MigrationContext.configure(connection), metadata))
            await registry.close()
            assert [entry for entry in difference if "schema_version" not in str(entry)] == []

    run_on("asyncio-debug", scenario())


def test_the_newest_migration_is_the_one_that_needs_no_look(tmp_path: Path) -> None:
    folder = str(Path(hub.__file__).parent / "migrations")
    assert ScriptDirectory(folder, version_locations=[folder]).get_current_head() == HEAD


def test_a_move_to_the_next_version_that_breaks_off_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old_registry(tmp_path)
    tables = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
    before = run_sql(path, "", tables)

    async def scenario() -> None:
        made = Operations.create_table

        def fail_at_last(self: Operations, name: str, *columns: Any, **options: Any) -> Any:
            if name == "seen_requests":
                raise sa.exc.OperationalError("CREATE TABLE", None, Exception("disk I/O error"))
            return made(self, name, *columns, **options)

        registry = Registry(URL.create("sqlite", database=str(path)))
        with monkeypatch.context() as patch:
            patch.setattr(Operations, "create_table", fail_at_last)
            with pytest.raises(DiskError, match="disk I/O error"):
                await registry.open()
        assert run_sql(path, "", tables) == before
        await registry.open()
        await registry.close()

    run_on("asyncio-debug", scenario())
    assert run_sql(path, "") == [HEAD]


def test_a_registry_of_a_newer_version_is_refused_and_not_touched(tmp_path: Path) -> None:
    newer = "CREATE TABLE alembic_version (version_num VARCHAR(32)); INSERT INTO alembic_version VALUES ('9999');"
    path = old_registry(tmp_path, f"{newer} DROP TABLE memberships;")

    async def scenario() -> None:
        with pytest.raises(HubError, match="newer kachery-fast"):
            await Hub(hub_settings(tmp_path)).start()

    run_on("asyncio-debug", scenario())
    names = run_sql(path, "", "SELECT name FROM sqlite_master WHERE type = 'table'")
    assert not set(names) & {"memberships", "task_claims", "sessions"}


@pytest.mark.parametrize(("text", "why"), [
    ("mysql://lab:secret-word@host/kachery", "must begin with postgresql://"),
    ("mysql://lab@host/kachery?password=secret-word", "must begin with postgresql://"),
    ("no address, secret-word", "(what cannot be read)"),
    ("postgresql://lab:secret-word", "must be like postgresql://USER"),
    ("postgresql://lab:what@secret-word@host/kachery", "is written %40"),
])
def test_a_database_that_cannot_be_is_refused_without_showing_the_password(
    tmp_path: Path, text: str, why: str
) -> None:
    with pytest.raises(InvalidSetting) as caught:
        registry_url(text, tmp_path)
    assert why in str(caught.value)
    assert "secret-word" not in str(caught.value)


def test_a_password_is_in_no_error_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cluster = the_cluster()
    wrong = cluster.url("postgres", "secret-word")
    given_as_option = f"{cluster.url('postgres', '')}&password=secret-word".replace(":@", "@")

    async def scenario() -> None:
        for text in (wrong, given_as_option):
            with caplog.at_level(logging.DEBUG), pytest.raises(RegistryUnreachable) as caught:
                await Hub(hub_settings(tmp_path, hub_database=text)).start()
            assert "password authentication failed" in str(caught.value)
            shown = f"{caught.value} {caught.value.to_dict()} {caplog.text}"
            assert "secret-word" not in shown

    run_on("asyncio-debug", scenario())


def test_a_hub_whose_postgresql_restarts_says_so_and_goes_on(tmp_path: Path) -> None:
    cluster = Cluster()
    settings = hub_settings(tmp_path, hub_database=cluster.url(cluster.make_database()))

    async def scenario() -> None:
        async with running_world(tmp_path, hub_database=settings.hub_database) as world:
            client = await world.member("A")
            await asyncio.to_thread(cluster.stop)
            for ask in (client.node_config, lambda: world.owner.call("listChannels")):
                with pytest.raises(RegistryUnreachable, match="goes on by itself"):
                    await ask()
            async with world.session.get(world.url + "/api/health") as response:
                assert response.status == 200, "who watches the hub would restart it for nothing"
            await asyncio.to_thread(cluster.start)
            # Nobody has noticed this one: the connections in the pool are dead.
            assert (await client.node_config()).channels[0].name == CHANNEL
            await asyncio.to_thread(cluster.stop)
            await asyncio.to_thread(cluster.start)
            assert (await client.claim_task(CHANNEL, TASK, "action", "f")).granted
            assert (await client.find_task(CHANNEL, TASK)).state == "claimed"

    try:
        run_on("asyncio-debug", scenario())
    finally:
        cluster.close()


def test_closing_waits_for_what_was_begun_and_leaves_no_connection(tmp_path: Path) -> None:
    cluster = the_cluster()
    name = cluster.make_database()

    async def scenario() -> None:
        registry = Registry(registry_url(cluster.url(name), tmp_path))
        await registry.open()
        others = sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND "
                         "pid <> pg_backend_pid() AND query LIKE '%pg_sleep%'")
        slow = [asyncio.ensure_future(registry.call(lambda connection: connection.execute(
            sa.text("SELECT 7, pg_sleep(0.5)")).scalar())) for _ in range(3)]
        while await registry.call(lambda connection: connection.execute(others).scalar()) != 3:
            await asyncio.sleep(0)
        await registry.close()
        assert [await answer for answer in slow] == [7, 7, 7]
        gc.collect()  # a connection that was forgotten warns, and a warning fails the test
        watch = Registry(registry_url(cluster.url(name), tmp_path))
        await watch.open()
        assert await watch.call(lambda connection: connection.execute(others).scalar()) == 0
        await watch.close()

    run_on("asyncio-debug", scenario())
    cluster.drop_database(name)


@pytest.mark.postgresql
def test_what_postgresql_does_not_take_is_the_askers_fault(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            for asked in ({"type": "showChannel", "channel": "la\0b"},
                          {"type": "changeChannel", "channel": CHANNEL, "description": "a\0b"}):
                status, answer = await world.ask(json.dumps(asked).encode())
                assert (status, answer["error"]) == (400, "InvalidArgument")
            assert (await world.owner.call("showChannel", channel=CHANNEL))["description"] == ""

    run_on("asyncio-debug", scenario())
