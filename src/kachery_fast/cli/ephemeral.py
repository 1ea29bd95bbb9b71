"""The program of an ephemeral node, which ``client/ephemeral.py`` starts.

An order comes as the first line of the standard input, which stays open as long as the node is wanted. What it has to
say goes to the standard output, in lines: ``{"ready": …}`` or ``{"failed": …}``, an error of the tree, and
``{"stillMember": …}`` where it could not leave its channel. The log goes to the standard error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import msgspec

from ..errors import KacheryError
from ..node.ephemeral import Order, run_ephemeral

__all__ = ["main"]

_INPUT = 0


def main() -> None:
    """Run the node that is ordered, and exit."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(_INPUT, 4096)
        if not data:
            sys.exit(0)  # who wanted it is gone
        line += data
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kachery_fast").setLevel(logging.INFO)
    try:
        run_ephemeral(msgspec.json.decode(line, type=Order), _INPUT, _say)
    except KacheryError as error:
        _say("failed", error.to_dict())
        sys.exit(error.exit_code)


def _say(kind: str, what: dict[str, Any]) -> None:
    print(json.dumps({kind: what}), flush=True)
