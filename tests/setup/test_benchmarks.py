"""The benchmarks of the engines, run small: each measures, and finds both sides' bytes to be right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from benchmarks import engines
from benchmarks.measure import Figure
from benchmarks.stores import Boto3, Store, s3_bucket

from tests.s3_server import S3Server

MIB = 1 << 20


@contextmanager
def moto(place: Path) -> Iterator[Store]:
    """In the place of rclone's server, which is not among what tests need."""
    with S3Server.running() as server:
        yield Store(s3_bucket(server.url), Boto3(server.url), "S3")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no file system in memory at /dev/shm")
@pytest.mark.parametrize("measure", [
    pytest.param(partial(engines.FIGURES["folder-load"], size_bytes=2 * MIB), id="folder-load"),
    pytest.param(partial(engines.upload_versus, moto, size_bytes=21 * MIB), id="s3-upload"),
    pytest.param(partial(engines.load_versus, moto, size_bytes=21 * MIB), id="s3-load"),
    pytest.param(partial(engines.FIGURES["gcs-upload"], size_bytes=21 * MIB), id="gcs-upload"),
    pytest.param(partial(engines.FIGURES["gcs-load"], size_bytes=21 * MIB), id="gcs-load"),
    *(pytest.param(partial(engines.FIGURES[name], urls=2), id=name)
      for name in ("sign-s3", "sign-gcs", "sign-gcs-hmac")),
    pytest.param(engines.FIGURES["crc32c"], id="crc32c"),
])
def test_a_figure_is_measured(measure: Callable[..., Figure], tmp_path: Path) -> None:
    found = measure(tmp_path, count=1)
    assert found.low <= found.ratio <= found.high
    assert min(found.ours, found.rival) > 0
    assert list(tmp_path.iterdir()) == []


def test_every_figure_of_the_engines_is_explained() -> None:
    page = (Path(engines.__file__).parent / "README.md").read_text("utf-8")
    for name in engines.FIGURES:
        assert re.search(rf"^\| (`[a-z0-9-]+`, )?`{name}`[,` ]", page, re.MULTILINE), name
