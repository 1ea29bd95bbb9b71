"""Commands that measure: bench cpu."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from typing import Any

import click

from ..errors import NodeError
from .output import command_errors, emit, json_option

__all__ = ["bench"]

_CHUNK_SIZE_BYTES = 20 * 1024 * 1024


@click.group(short_help="Measure what this machine can do.")
def bench() -> None:
    """Measure what this machine can do."""


@bench.command(short_help="Measure each SHA-1 kernel of this CPU.")
@click.option("--size", "size_mib", type=click.IntRange(min=1, max=4096), default=64, show_default=True, metavar="MIB",
              help="How much to hash in each run, in MiB.")
@click.option("--runs", type=click.IntRange(min=1, max=1000), default=5, show_default=True,
              help="How often; the best counts.")
@json_option
@command_errors
def cpu(size_mib: int, runs: int, as_json: bool) -> None:
    """Measure each SHA-1 kernel that this CPU has, on one core, and check that all give the same digests.

    "one" is the digest of the whole, "both" that of the whole and of each 20 MiB chunk in one pass; hashlib gives
    one. The figures are bytes of input per second.
    """
    from .. import _core

    data = _test_bytes(size_mib * 1024 * 1024)
    expected = hashlib.sha1(data).hexdigest()
    chunks = tuple(hashlib.sha1(data[start : start + _CHUNK_SIZE_BYTES]).hexdigest()
                   for start in range(0, len(data), _CHUNK_SIZE_BYTES))
    rows = [{"kernel": "hashlib", "one": _rate(len(data), runs, lambda: hashlib.sha1(data)), "both": None}]
    for kernel in _core.KERNELS:
        one = _core.Sha1(data, kernel=kernel).hexdigest()
        both = _core.digest_buffer(data, _CHUNK_SIZE_BYTES, kernel=kernel)
        if one != expected or both.sha1 != expected or both.chunk_sha1s != chunks:
            raise NodeError(what=f"the kernel {kernel} computed a wrong digest on this CPU ({platform.processor()}); "
                                 "choose another with KACHERY_SHA1_KERNEL and report this.")
        rows.append({"kernel": kernel, "one": _rate(len(data), runs, _hasher(_core.Sha1, data, kernel)),
                     "both": _rate(len(data), runs, _fused(_core.digest_buffer, data, kernel))})
    result = {"machine": platform.machine(), "chosen": _core.kernel(), "size": len(data), "kernels": rows,
              "equal": True}
    emit(result, lambda: _text(result), as_json)


def _hasher(kind: Any, data: bytes, kernel: str) -> Callable[[], Any]:
    return lambda: kind(data, kernel=kernel).digest()


def _fused(digest: Any, data: bytes, kernel: str) -> Callable[[], Any]:
    return lambda: digest(data, _CHUNK_SIZE_BYTES, kernel=kernel)


def _test_bytes(size_bytes: int) -> bytes:
    """Return bytes that do not repeat: SHAKE-128 of a fixed seed."""
    return hashlib.shake_128(b"kachery-fast bench").digest(size_bytes)


def _rate(size_bytes: int, runs: int, act: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(runs):
        begun = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - begun)
    return round(size_bytes / best)


def _text(result: dict[str, Any]) -> str:
    lines = [f"SHA-1 on one core of this {result['machine']} machine, GB/s of input:",
             f"  {'':<10}{'one':>8}{'both':>8}"]
    for row in result["kernels"]:
        both = "" if row["both"] is None else f"{row['both'] / 1e9:.2f}"
        chosen = "  (used)" if row["kernel"] == result["chosen"] else ""
        lines.append(f"  {row['kernel']:<10}{row['one'] / 1e9:>8.2f}{both:>8}{chosen}")
    lines.append("All digests are equal.")
    return "\n".join(lines)
