"""Which database the hubs of a test keep their registry in, and the stores of their owners' buckets.

Tests on both event loops take SQLite on one and PostgreSQL on the other. Those marked ``databases`` run on both, those
marked with the name of one on that, the others on SQLite. The fixture says it by KACHERY_HUB_DATABASE, which
``support.hub_settings`` and programs read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ..gcs_server import KEYS, GcsServer
from ..postgresql import the_cluster
from ..store_server import StoreServer
from ..stores import stores

__all__ = ["stores"]

DATABASES = ("sqlite", "postgresql")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = {mark.name for mark in metafunc.definition.iter_markers()}
    if "databases" in marked and "sqlite" not in marked and "loop_kind" not in metafunc.fixturenames:
        metafunc.parametrize("database", DATABASES, indirect=True)


@pytest.fixture(autouse=True)
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the test's own database; "" for the file in the hub's directory."""
    if request.node.get_closest_marker("sqlite") is not None or _kind_of(request) == "sqlite":
        yield ""
        return
    cluster = the_cluster()
    name = cluster.make_database()
    monkeypatch.setenv("KACHERY_HUB_DATABASE", cluster.url(name))
    yield cluster.url(name)
    cluster.drop_database(name)


def _kind_of(request: pytest.FixtureRequest) -> str:
    if request.node.get_closest_marker("postgresql") is not None:
        return "postgresql"
    callspec = getattr(request.node, "callspec", None)
    loop_kind = None if callspec is None else callspec.params.get("loop_kind")
    return str(getattr(request, "param", "postgresql" if loop_kind == "uvloop" else "sqlite"))


def _store_of(stores: Callable[[str], StoreServer], name: str) -> StoreServer:
    found = stores("s3") if name == "s3" else GcsServer(stores("gcs").port, name)
    found.reset()
    return found


@pytest.fixture
def s3(stores: Callable[[str], StoreServer]) -> StoreServer:
    return _store_of(stores, "s3")


@pytest.fixture
def gcs(request: pytest.FixtureRequest, stores: Callable[[str], StoreServer]) -> StoreServer:
    """Google's; a test may name the KEYS."""
    return _store_of(stores, getattr(request, "param", "account"))


@pytest.fixture(params=["s3", *KEYS])
def store(request: pytest.FixtureRequest, stores: Callable[[str], StoreServer]) -> StoreServer:
    """Each of both stores, Google's with all KEYS that the hub may have of it."""
    return _store_of(stores, request.param)
