"""Self-contained HTML documents: inline styles and images, no scripts, nothing is loaded from a network.

The content comes from untrusted bundles. Everything except ``Markup`` is escaped, and the content security policy of
the document forbids running scripts and loading anything.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from PIL import Image, ImageChops

from ldm_export.screen import printable
from ldm_runtime.images import to_png

__all__ = [
    "Figure",
    "Markup",
    "decibel",
    "difference",
    "document",
    "element",
    "inline_image",
    "number",
    "table",
    "text",
]

SMALL, LARGE = 160, 192
"""Minimum width in pixels to which a small image is magnified, and maximum width of a large one."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222;
  background: #fff; }
h1 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; border-bottom: 2px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td { overflow-wrap: anywhere; } th { white-space: nowrap; color: #555; font-size: .9em; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { image-rendering: pixelated; border: 1px solid #ccc; display: block; }
svg { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
code { font-size: .9em; overflow-wrap: anywhere; } figure { margin: 0; } .note { color: #555; font-size: .9em; }
.good { color: #176a2c; } .bad { color: #a3161b; }
"""


class Markup(str):
    """HTML that is inserted unchanged; all other text is escaped."""


class Figure(str):
    """A formatted number: text that tables align to the right."""


def document(title: str, body: Iterable[str]) -> str:
    """Return an HTML document with a title, which is escaped, and a body of parts that are markup."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{text(title)}</h1>
{"".join(f"{part}{chr(10)}" for part in body)}</body></html>
"""


def text(value: object) -> Markup:
    """Escape any value, with control characters written as escape sequences; ``Markup`` is returned unchanged."""
    return value if isinstance(value, Markup) else Markup(escape(printable(str(value))))


def element(name: str, *children: object, **attributes: str) -> Markup:
    """``<name attribute="…">children</name>``; ``class_`` gives class, ``text_anchor`` text-anchor."""
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{listed}>{''.join(map(text, children))}</{name}>")


def table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """HTML table; numbers and the headers of their columns are aligned to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    flush = [any(number for _, number in column) for column in zip(*cells, strict=True)] or [False] * len(columns)
    head = element("tr", *(element("th", name, **_n(n)) for name, n in zip(columns, flush, strict=True)))
    lines = [element("tr", *(element("td", content, **_n(n)) for content, n in row)) for row in cells]
    return element("div", element("table", head, *lines), class_="wide")


def number(value: float) -> str:
    """Format a number with four significant digits; very large and very small ones with an exponent."""
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value) or 1)))}f}"


def decibel(value: float | None) -> Figure:
    """Format a PSNR in dB with one decimal; None becomes "equal"."""
    return Figure("equal" if value is None else f"{value:.1f}")


def inline_image(image: Image.Image, alt: str = "") -> Markup:
    """Embed an image as PNG; a small one is magnified by a whole factor, a large one is displayed smaller."""
    width = image.width * math.ceil(SMALL / image.width) if image.width <= SMALL else min(image.width, LARGE)
    source = f"data:image/png;base64,{base64.b64encode(to_png(image)).decode()}"
    return Markup(f'<img alt="{text(alt)}" width="{width}" src="{source}">')


def difference(one: Image.Image, other: Image.Image, times: int) -> Image.Image:
    """Return the difference of two images, amplified by ``times``. Differences in opacity are grey."""
    difference_image = ImageChops.difference(one, other).point(lambda value: min(255, value * times))
    if difference_image.mode != "RGBA":
        return difference_image
    red, green, blue, alpha = difference_image.split()
    return Image.merge("RGB", [ImageChops.lighter(channel, alpha) for channel in (red, green, blue)])


def _cell(value: Any) -> tuple[Markup, bool]:
    if value is None:
        return Markup("–"), True
    if isinstance(value, bool):
        return Markup("yes" if value else "no"), False
    if isinstance(value, int | float):
        return text(number(value)), True
    return text(value), isinstance(value, Figure)


def _n(number: bool) -> dict[str, str]:
    return {"class_": "n"} if number else {}
