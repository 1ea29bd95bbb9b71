"""The stores that the channel's objects are in, and labs on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ..store_server import StoreServer
from ..stores import stores

__all__ = ["stores"]


@pytest.fixture(scope="module")
def s3(stores: Callable[[str], StoreServer]) -> StoreServer:
    return stores("s3")


@pytest.fixture(scope="module")
def gcs(stores: Callable[[str], StoreServer]) -> StoreServer:
    return stores("gcs")


@pytest.fixture(scope="module", params=["s3", "gcs"])
def store(request: pytest.FixtureRequest, stores: Callable[[str], StoreServer]) -> StoreServer:
    """Each of both."""
    return stores(request.param)
