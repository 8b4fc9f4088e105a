"""Reads a page strictly: every element is closed where it should be, and what it holds is there to be compared."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "img", "br")


class Page(HTMLParser):
    """Elements as (name, attributes), all text, and the text of the cells of each table, row by row."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, head: str) -> list[list[str]]:
        """The rows of the table that has a column of this name."""
        (result,) = [rows for rows in self.tables if head in rows[0]]
        return result


def assert_self_contained(page: Page) -> None:
    """Nothing is run and nothing is fetched: known elements only, no handler, images inline."""
    known = "html head meta title style body h1 h2 h3 p div span ul li table tr th td br img code figure"
    drawing = "svg g rect line text polyline circle"
    assert {name for name, _ in page.elements} <= {*known.split(), *drawing.split()}
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "background")], name
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = [a["content"] for n, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
