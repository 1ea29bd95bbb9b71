"""Every bound of the embedded broker."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BrokerLimits"]


@dataclass(frozen=True)
class BrokerLimits:
    """Every bound of the broker."""

    message_size_bytes_max: int = 65536
    """All messages of one publish together."""
    messages_per_publish_max: int = 1000
    frame_size_bytes_max: int = 524288
    inbound_rate_max: float = 2000.0
    """Protocol messages per second from one connection, averaged; faster clients are read more slowly."""
    inbound_burst_max: float = 4000.0
    connections_max: int = 4096
    connections_per_client_max: int = 256  # a node has one for each of its channels
    channels_max: int = 8192
    attachments_max: int = 256
    send_queue_bytes_max: int = 8 * 1024 * 1024
    """Unsent bytes of one connection; it is cut beyond."""
    send_total_bytes_max: int = 128 * 1024 * 1024
    """Unsent bytes of all connections, looked at each tick; those that hold the most are cut beyond."""
    ring_messages_max: int = 1024
    ring_size_bytes_max: int = 1024 * 1024
    ring_total_size_bytes_max: int = 64 * 1024 * 1024
    connection_state_seconds: float = 120.0
    """How long a broken connection can be resumed, and how long a message is kept for replay."""
    idle_seconds: float = 6.0
    """A client that has heard nothing for this long may take the broker for gone; a heartbeat goes out before."""
    tick_seconds: float = 0.5
    close_seconds: float = 2.0
