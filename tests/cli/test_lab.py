"""What the lab is made of; how it works is seen in all the tests of the system."""

from __future__ import annotations

import socket

from kachery_fast.cli.lab import free_port


def test_a_free_port_is_given_to_nobody_else_before_its_server_starts() -> None:
    port = free_port()
    given = set()
    for _ in range(40_000):  # more than there are
        with socket.socket() as anyone:
            anyone.bind(("127.0.0.1", 0))
            given.add(anyone.getsockname()[1])
    assert len(given) > 1000
    assert port not in given
    with socket.create_server(("127.0.0.1", port)) as server, socket.create_connection(server.getsockname()):
        pass
