"""The web page of the server: one HTML file that loads nothing from other hosts."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

__all__ = ["PAGE_HEADERS", "page_html"]

_FILE = Path(__file__).with_name("page.html")


@cache
def page_html() -> bytes:
    """The page as UTF-8."""
    return _FILE.read_bytes()


def _digests(tag: str) -> str:
    """Digests of the page's own scripts or styles, as sources of a Content-Security-Policy."""
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page_html().decode(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)


PAGE_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_digests('script')}; style-src {_digests('style')}; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Headers of the page. They allow it to run only its own script and to connect only to this server."""
