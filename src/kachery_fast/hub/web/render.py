"""Making a page: templates, how times and sizes are shown, and the headers that keep a page to itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from aiohttp import web
from markupsafe import Markup

from ...protocol.access import Permission

__all__ = ["STATIC", "Pages"]

_FOLDER = Path(__file__).parent
STATIC = _FOLDER / "static"

# Everything comes from the hub itself, and no other site can show a page in a frame or have a form sent elsewhere.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with "no-referrer" a browser sends "Origin: null" with our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_PLOT_HEIGHT = 100


class Pages:
    """Renders templates. Everything that is put into one is escaped.

    :param version: of the hub, shown at the foot of each page.
    """

    def __init__(self, version: str) -> None:
        self._templates = _environment(version)

    def page(self, template: str, status: int = 200, **fields: Any) -> web.Response:
        """Return a page."""
        text = self._templates.get_template(template).render(**fields)
        return web.Response(text=text, status=status, content_type="text/html", charset="utf-8", headers=HEADERS)


@cache  # its templates are compiled once in a process
def _environment(version: str) -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    templates.filters.update(moment=_moment, size=_size, count=_count, short=_short, detail=_detail, words=_words,
                             called=_called)
    templates.globals.update(
        version=version, permissions=[permission.value for permission in Permission], bars=_bars)
    return templates


def _moment(time_ms: int | None) -> Markup:
    """A time in UTC, which the script turns into the reader's own."""
    if time_ms is None:
        return Markup("never")
    try:
        when = datetime.fromtimestamp(time_ms / 1000, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return Markup("at no time")
    return Markup('<time datetime="{}">{}</time>').format(
        when.strftime("%Y-%m-%dT%H:%M:%SZ"), when.strftime("%Y-%m-%d %H:%M UTC"))


def _size(size_bytes: int) -> str:
    """A size as people read it, in powers of 1024."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes all")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _short(node_id: str) -> str:
    return node_id[:8]


def _called(node: Any) -> str:
    """What a node is called: its label, or the beginning of its id."""
    return node.label or _short(node.node)


def _words(permission: str) -> str:
    """A permission as two words: "request files"."""
    return re.sub(r"(?=[A-Z])", " ", permission).lower()


def _detail(text: str) -> str:
    """What an entry of the audit log says besides, in words."""
    try:
        fields = json.loads(text)
    except ValueError:
        return text
    return ", ".join(
        f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in fields.items()) if isinstance(fields, dict) else text


def _bars(values: Sequence[float]) -> list[float]:
    """The heights of a bar chart, in parts of a hundred of the longest; a bar of what is not nothing can be seen."""
    longest = max(values, default=0)
    return [max(1.0, _PLOT_HEIGHT * value / longest) if value else 0.0 for value in values]
