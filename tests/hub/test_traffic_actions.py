"""What a channel's owner sees of its bands."""

from __future__ import annotations

from pathlib import Path

import pytest

from kachery_fast.errors import NotPermitted

from ..network import LOOPS, run_on
from .support import CHANNEL, Clock, Peer, node_id, running_world

BAND = f"{CHANNEL}-requestFiles"


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_messages_and_listeners_of_each_band_are_shown_to_the_owner_alone(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            client = await world.member("A")
            await world.owner.call("createChannel", name="another")
            peer = await Peer.connect(world, (await client.pubsub_token(CHANNEL)).token)
            assert await peer.attach(BAND)
            for number in range(3):
                assert await peer.publish(BAND, number)
            clock.now += 1
            assert await peer.publish(BAND, 3)
            clock.now += 1

            view = await world.owner.call("showTraffic", channel=CHANNEL)
            bands = {line["band"]: line for line in view["bands"]}
            assert len(bands) == 6
            assert bands["requestFiles"]["messages"] == [*[0] * 58, 3, 1]
            assert bands["requestFiles"]["sizeBytes"] >= 4 * len(BAND)
            assert bands["requestFiles"]["listeners"] == 1
            assert (sum(bands["provideFiles"]["messages"]), bands["provideFiles"]["listeners"]) == (0, 0)
            assert view["nodes"] == [{"node": node_id("A"), "label": "A"}]
            quiet = await world.owner.call("showTraffic", channel="another")
            assert (quiet["nodes"], {sum(line["messages"]) for line in quiet["bands"]}) == ([], {0})

            stranger = await world.person("stranger@lab.org")
            with pytest.raises(NotPermitted):
                await stranger.call("showTraffic", channel=CHANNEL)
            await peer.close()

    run_on(loop_kind, scenario())
