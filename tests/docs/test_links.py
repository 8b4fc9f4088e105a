"""Links of the documentation: files and anchors exist, and every page is on the site."""

from __future__ import annotations

import os.path
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.documentation import PAGES, ROOT, anchors, links

GENERATED = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
"""Pages of the site that a hook makes from files outside docs/."""


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(page):
        if ":" in target:  # another host
            continue
        path, _, anchor = target.partition("#")
        found = os.path.normpath(Path(page).parent / path) if path else page
        assert (ROOT / found).exists(), f"{page}: {target}: no such file"
        if anchor:
            assert anchor in anchors(found), f"{page}: {target}: no such heading"


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = list(leaves(site["nav"]))
    assert len(pages) == len(set(pages))
    outside = {*GENERATED, "demo.md"}
    assert set(pages) - outside == {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert outside < set(pages) and all((ROOT / file).exists() for file in GENERATED.values())


def leaves(nav: Any) -> Iterator[str]:
    """The pages of a navigation, in their order."""
    if isinstance(nav, str):
        yield nav
    for value in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from leaves(value)
