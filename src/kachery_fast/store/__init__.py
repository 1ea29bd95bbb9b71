"""The local store on disk; synchronous, to be called from a thread where that matters."""

from __future__ import annotations

from .files import Cleaned, FileStore, Located, Stored, StreamWriter, Totals, Verified

__all__ = ["Cleaned", "FileStore", "Located", "Stored", "StreamWriter", "Totals", "Verified"]
