"""Writes ``docs/errors.md`` from the tree in ``src/kachery_fast/errors/``: ``python docs/make_errors.py``.

A test compares the page with what this writes.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from kachery_fast import errors

__all__ = ["errors_page"]

HEAD = """# Errors

Made by `python docs/make_errors.py` from the tree in `src/kachery_fast/errors/`; a test compares the two.

Every error of the package is a `kachery_fast.KacheryError`; the classes are in `kachery_fast.errors`. An error has a
`message`, in which the words in braces below are filled in from its `details`. The command line prints the message to
the standard error and ends with the exit code; the node's and the hub's HTTP API answer with the status and
`{"error": class, "message": text, "details": {...}}`.

| exit code | kind |
|---:|---|
"""

KINDS = {
    0: "done", 1: "internal", 2: "the call itself is wrong", 3: "not found", 4: "not permitted", 5: "unreachable",
    6: "damaged or changed data", 7: "disk", 8: "timed out, or broken off", 9: "conflict", 130: "interrupted",
}


def errors_page() -> str:
    """Return ``docs/errors.md``."""
    found = [getattr(errors, name) for name in errors.__all__]
    rows = [f"| `{kind.__name__}` | {_parent(kind)} | {kind.exit_code} | {kind.http_status} | {_message(kind)} |"
            for kind in sorted(found, key=lambda kind: (kind.exit_code, kind.__name__))]
    kinds = [f"| {code} | {text} |" for code, text in KINDS.items()]
    unknown = {kind.exit_code for kind in found} - set(KINDS)
    if unknown:
        raise SystemExit(f"exit codes without a meaning: {sorted(unknown)}")
    head = ["", "| class | is a | exit code | HTTP status | message |", "|---|---|---:|---:|---|"]
    return HEAD + "\n".join([*kinds, *head, *rows]) + "\n"


def _parent(kind: type[errors.KacheryError]) -> str:
    parent = kind.__bases__[0].__name__
    return f"`{parent}`" if parent != "Exception" else ""


def _message(kind: type[errors.KacheryError]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    Path(__file__).with_name("errors.md").write_text(errors_page(), encoding="utf-8")
