"""The function that the demo's task backend offers; a lab's own functions look the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kachery_fast as kf

__all__ = ["CROSSINGS", "count_crossings"]

CROSSINGS = "demo.count-crossings.1"
_SPAN_SAMPLES = 4 * 1024 * 1024


@kf.taskfunction(CROSSINGS, type="pure-calculation", timeout_seconds=600)
def count_crossings(uri: str, threshold: int) -> dict[str, Any]:
    """Count how often the sixteen-bit samples of a recording rise through a threshold; runs where the recording is."""
    import numpy as np

    path = kf.load_file(uri)
    count = Path(path).stat().st_size // 2
    crossings = 0
    if not count:  # nothing to map
        return {"samples": 0, "crossings": 0}
    samples = np.memmap(path, dtype=np.int16, mode="r", shape=(count,))
    for start in range(0, count, _SPAN_SAMPLES):
        above = samples[start:start + _SPAN_SAMPLES + 1] > threshold
        crossings += int(np.count_nonzero(above[1:] & ~above[:-1]))
        kf.report_progress(min(1.0, (start + _SPAN_SAMPLES) / count))
    return {"samples": count, "crossings": crossings}
