"""A NATS server for each file of tests that needs one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nats_server import NatsServer, running_nats


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def nats_server(running_server: NatsServer) -> NatsServer:
    """It runs, also where the test before has ended it."""
    if running_server._process is None:
        running_server.start()
    return running_server
