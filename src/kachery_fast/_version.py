"""The version, read by the build (pyproject.toml holds the same) and shown by ``kachery-fast --version``."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
