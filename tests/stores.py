"""The fixture of running stores, for the folders whose tests use them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest

from .gcs_server import GcsServer
from .s3_server import S3Server
from .store_server import StoreServer


@pytest.fixture(scope="session")
def stores(looked_at: Callable[[int], None]) -> Iterator[Callable[[str], StoreServer]]:
    """The running ``s3`` or ``gcs``, started when it is asked for first. Whoever uses it resets it before."""
    with contextlib.ExitStack() as stack:
        @functools.cache
        def running(kind: str) -> StoreServer:
            store = stack.enter_context((S3Server if kind == "s3" else GcsServer).running())
            looked_at(store.process_id)
            return store

        yield running
