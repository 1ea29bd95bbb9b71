"""Draws the pictures of the documentation: ``python docs/make_pictures.py`` writes ``docs/transfer.svg``.

Plain SVG without fonts or scripts of its own; ``prefers-color-scheme`` makes it readable on light and on dark pages. A
test compares the file with what this draws.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

__all__ = ["transfer_picture"]

WIDTH, HEIGHT = 910, 470

STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 15px; }
  .small { font-size: 12.5px; fill: #57606a; }
  .box { fill: #f6f8fa; stroke: #57606a; stroke-width: 1.2; }
  .data { stroke: #0969da; stroke-width: 3; fill: none; marker-end: url(#data-head); }
  .talk { stroke: #8250df; stroke-width: 1.6; stroke-dasharray: 6 4; fill: none; marker-end: url(#talk-head); }
  .data-head { fill: #0969da; } .talk-head { fill: #8250df; }
  .data-text { fill: #0550ae; } .talk-text { fill: #6639ba; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #9da7b3; }
    .box { fill: #161b22; stroke: #8b949e; }
    .data { stroke: #58a6ff; } .talk { stroke: #bc8cff; }
    .data-head { fill: #58a6ff; } .talk-head { fill: #bc8cff; }
    .data-text { fill: #79c0ff; } .talk-text { fill: #d2a8ff; }
  }
"""


def _box(x: int, y: int, width: int, height: int, title: str, *lines: str) -> list[str]:
    parts = [f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>',
             f'<text class="title" x="{x + width // 2}" y="{y + 24}" text-anchor="middle">{escape(title)}</text>']
    parts += [f'<text class="small" x="{x + width // 2}" y="{y + 46 + 18 * number}" text-anchor="middle">'
              f'{escape(line)}</text>' for number, line in enumerate(lines)]
    return parts


def _arrow(kind: str, path: str) -> str:
    return f'<path class="{kind}" d="{path}"/>'


def _label(kind: str, x: int, y: int, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}-text" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def transfer_picture() -> str:
    """Return the picture of how a file travels from node A to node B, as SVG."""
    parts = [
        *_box(20, 180, 200, 116, "Node A has the file", "stored: read once;", "nothing leaves A",
              "before it is asked for"),
        *_box(690, 180, 200, 116, "Node B wants the file", "verifies each chunk,", "then the whole,",
              "then keeps it in its store"),
        *_box(345, 20, 220, 92, "Hub", "says who may do what;", "signs URLs, gives tokens"),
        *_box(345, 192, 220, 92, "Bands", "pub/sub of the channel;", "each message is signed"),
        *_box(345, 362, 220, 92, "Bucket", "chunks under their SHA-1,", "each created once"),
        _arrow("talk", "M 690 222 L 571 222"), _arrow("talk", "M 345 222 L 226 222"),
        _label("talk", 630, 213, "1 want, 3 assign"), _label("talk", 285, 213, "1 want, 3 assign"),
        _arrow("talk", "M 220 252 L 339 252"), _arrow("talk", "M 565 252 L 684 252"),
        _label("talk", 283, 272, "2 offer, 6 ready"), _label("talk", 627, 272, "2 offer, 6 ready"),
        _arrow("talk", "M 120 180 C 130 100 210 66 339 66"),
        _label("talk", 128, 76, "4 sign uploads"),
        _arrow("talk", "M 790 180 C 780 100 700 66 571 66"),
        _label("talk", 792, 76, "members, tokens"),
        _arrow("data", "M 120 296 C 130 376 210 408 337 408"),
        _label("data", 125, 430, "5 PUT what is missing"),
        _arrow("data", "M 565 408 C 690 408 780 376 790 302"),
        _label("data", 790, 430, "7 GET each once ready"),
    ]
    heads = "".join(
        f'<marker id="{kind}-head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="{size}" markerHeight="{size}" '
        f'orient="auto-start-reverse"><path class="{kind}-head" d="M 0 0 L 10 5 L 0 10 z"/></marker>'
        for kind, size in (("data", 5), ("talk", 7)))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title description">',
        '<title id="title">How a file travels</title>',
        '<desc id="description">Node B asks on the bands of the channel; node A offers the file, has the hub sign '
        "uploads, puts the missing chunks into the bucket and says so; B gets each chunk from the bucket as soon as it "
        "is there, and verifies it.</desc>",
        f"<style>{STYLE}</style>", f"<defs>{heads}</defs>", *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("transfer.svg").write_text(transfer_picture(), encoding="utf-8")
