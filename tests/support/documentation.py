"""The pages of the documentation: their code blocks, links and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "anchors", "blocks", "links"]

ROOT = Path(__file__).parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
PAGES = sorted([*PAGES, "demo/README.md"])
"""Every page by its path in the repository."""
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A code block: its page, its language ("" for shell commands) and its text."""

    page: str
    language: str
    text: str


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The code blocks of a page."""
    found = _FENCE.findall((ROOT / page).read_text())
    return tuple(Block(page, language, text) for _, language, text in found)


def links(page: str) -> Iterator[str]:
    """The targets of links and images of a page, without those inside code."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", (ROOT / page).read_text()))
    for target, source in _LINK.findall(text):
        yield target or source


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of a page's headings, as GitHub and MkDocs name them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", (ROOT / page).read_text()), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain)
