"""How a request's cost grows with the channel: simulated nodes, real state machines, virtual time.

A channel of 2 to 10,000 nodes, some of which have the file; one node asks for it. What is counted is exact; what is
timed in wall-clock seconds is the work of this machine for all nodes together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.protocol.simulation import Net, World, make_file

__all__ = ["NODE_COUNTS", "NetworkGrowth", "measure_network_growth", "table"]

NODE_COUNTS = (2, 5, 10, 30, 100, 300, 1_000, 3_000, 10_000)
_CHUNK_COUNT = 50
_RATE_BYTES_PER_SECOND = 100e6


@dataclass(frozen=True)
class NetworkGrowth:
    """One request on a channel of ``nodes``.

    ``seconds`` is virtual: from the wish to the verified file of 50 chunks of 20 MiB, the bucket giving and each
    provider sending 100 MB/s. ``messages`` were published; ``bystander_messages`` is what one node without the file
    had to look at (its signature checked, its store searched); ``requester_events`` what the asking node handled.
    ``work_seconds`` is the wall-clock time of all state machines together, the simulation included.
    """

    nodes: int
    providers: int
    seconds: float
    messages: int
    bystander_messages: int
    requester_events: int
    work_seconds: float


def measure_network_growth(node_counts: Sequence[int] = NODE_COUNTS, *, provider_share: float = 0.0,
                           seed: int = 0) -> list[NetworkGrowth]:
    """Load one file on channels of different length.

    :param node_counts: nodes on the channel, the asking one included; at least 2.
    :param provider_share: the part of the other nodes that has the file; at least one does.
    """
    return [_measure(count, max(1, round(provider_share * (count - 1))), seed) for count in node_counts]


def _measure(node_count: int, provider_count: int, seed: int) -> NetworkGrowth:
    world = World(seed, Net(download_bytes_per_second=_RATE_BYTES_PER_SECOND))
    file = make_file("recording", _CHUNK_COUNT)
    for number in range(provider_count):
        world.provider(f"has-it-{number}", file, rate=_RATE_BYTES_PER_SECOND)
    bystanders = [world.provider(f"bystander-{number}") for number in range(node_count - 1 - provider_count)]
    start = time.perf_counter()
    outcome = world.request(file)
    world.run(until=3600.0)
    work_seconds = time.perf_counter() - start
    if not outcome.succeeded:
        raise AssertionError(f"the simulated request failed: {outcome.error}")
    return NetworkGrowth(
        nodes=node_count, providers=provider_count, seconds=outcome.seconds, messages=sum(world.said.values()),
        bystander_messages=max((node.received for node in bystanders), default=0),
        requester_events=world.requests[0].cost_events, work_seconds=work_seconds)


def table(rows: Sequence[NetworkGrowth]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| nodes | with the file | virtual seconds | messages | a bystander's | asking node's events | work, s |",
             "|--:|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {row.nodes} | {row.providers} | {row.seconds:.2f} | {row.messages} | {row.bystander_messages} "
              f"| {row.requester_events} | {row.work_seconds:.3f} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure_network_growth()))
    print()
    print(table(measure_network_growth(provider_share=0.5)))
