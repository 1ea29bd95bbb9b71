"""The network's rules, pure: no I/O, clock, randomness, asyncio or logging. Time and ids arrive as arguments."""
