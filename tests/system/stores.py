"""What the system tests of owners' buckets share: labs on a store, and what their users and owners do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner, Result

import kachery_fast as kf
from kachery_fast.cli import program
from kachery_fast.cli.lab import Lab

from ..store_server import StoreServer
from .support import QUICK

# What is refused is said soon.
IMPATIENT = {"KACHERY_RETRY_ATTEMPTS_MAX": "2", "KACHERY_CHANNEL_REFRESH_SECONDS": "0.2",
             "KACHERY_PATIENCE_SECONDS": "2"}


@contextmanager
def lab_on(store: StoreServer, directory: Path, **environ: str) -> Iterator[Lab]:
    """A lab with a hub, whose administrator trusts the store, and no node yet."""
    store.reset()
    with Lab(directory, environ={**QUICK, "KACHERY_HUB_ENGINE_HOSTS": store.host, **environ}) as lab:
        lab.start_hub()
        yield lab


def owner_command(lab: Lab, *arguments: str) -> Result:
    """Run ``kachery-fast channel ...`` on the hub's machine, within this process."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("KACHERY_")}
    return CliRunner().invoke(program, ["channel", *arguments], env={**clean, "KACHERY_HUB_DIR": str(lab.hub_dir)})


def stored(lab: Lab, path: Path) -> str:
    """Store a file at the node A, and return its URI."""
    with lab.nodes["A"].used():
        return kf.store_file(path)


def upload(lab: Lab, uri: str) -> None:
    """Have the node A put a file into the bucket."""
    with lab.nodes["A"].used():
        kf.upload_file(uri, channel="demo")
