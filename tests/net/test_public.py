"""A hub's word on where a bucket is: used as it stands, or the hub is blamed for it, never the user."""

from __future__ import annotations

from typing import Any

import pytest
from aiohttp import web

from kachery_fast.config import load_settings
from kachery_fast.errors import HubError
from kachery_fast.net.public import find_bucket_url
from tests.network import run_on


def asked(answer: Any) -> tuple[str, str]:
    """Return the address of a hub that answers so, and what was made of it."""

    async def reply(_: web.Request) -> web.Response:
        return web.json_response(answer)

    async def run() -> tuple[str, str]:
        app = web.Application()
        app.router.add_post("/api/getChannelBucketBaseUrl", reply)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            hub_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                return hub_url, await find_bucket_url(hub_url, "lab", load_settings({}))
            except HubError as error:
                return hub_url, error.message
        finally:
            await runner.cleanup()

    return run_on("asyncio", run(), 60)


@pytest.mark.parametrize("url", ["", "ftp://host/bucket", "http://[", "http://host:99999", "http://host:port", "host/x",
                                 "http://", "http://a host/", "http://host/\n", "http://user@host/", "http://h/?x=1"])
def test_an_address_that_is_none_is_the_hubs_fault(url: str) -> None:
    hub_url, told = asked({"url": url})
    assert told.startswith(f"The hub {hub_url} failed: it says that the bucket of the channel 'lab' is at {url!r}")


@pytest.mark.parametrize("answer", [{}, [], {"url": 1}])
def test_no_address_is_the_hubs_fault(answer: Any) -> None:
    hub_url, told = asked(answer)
    assert told.startswith(f"The hub {hub_url} failed: it does not say where")


@pytest.mark.parametrize(("url", "whole"), [("/bucket/", "{hub}/bucket"), ("https://storage.googleapis.com/b", None),
                                            ("http://[::1]:9000/b", None)])
def test_a_bucket_may_be_at_the_hub_or_elsewhere(url: str, whole: str | None) -> None:
    hub_url, found = asked({"url": url})
    assert found == (whole or url).format(hub=hub_url)
