"""The whole program, in real processes, as its users run it."""
