"""The registry's tables, version by version, for Alembic; ``registry.py`` runs what is missing at a hub's start.

A migration does not import ``tables.py``: it says what the tables were at its time.
"""
