"""The network, asyncio: byte ranges into memory, objects by URL, channels of pub/sub bands, signed calls to a hub."""
