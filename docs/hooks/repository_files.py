"""Hook of MkDocs: links to files of the repository outside docs/ work on the site too.

Some files become pages (``PAGES``); every other file that a page links is copied to the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "demo/README.md": "demo.md",
}
"""File of the repository -> page of the site. The first has a page of its own in docs/."""
COPIES = "repository"
"""Folder of the site for copied files."""
LINK = re.compile(r'(\]\(|src=")([^)"#\s]+)(#[^)"\s]*)?')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and the files that pages link to."""
    for source, page in list(PAGES.items())[1:]:
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for file in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(file.content_string):
            path = _repository_path(file.src_uri, target)
            if path is None or path in PAGES or path.startswith("docs/"):
                continue
            uri = f"{COPIES}/{path}"
            if not (ROOT / path).is_file():
                raise PluginError(f"{file.src_uri}: links to {path}, which is no file of the repository")
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files outside docs/ by links within the site."""
    here = page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        path = _repository_path(here, match[2])
        if path is None:
            return match[0]
        inside = path.removeprefix("docs/") if path.startswith("docs/") else PAGES.get(path, f"{COPIES}/{path}")
        return f"{match[1]}{posixpath.relpath(inside, posixpath.dirname(here) or '.')}{match[3] or ''}"

    return LINK.sub(replaced, markdown)


def _repository_path(page: str, target: str) -> str | None:
    """Path in the repository that a link names; None for addresses, anchors, and links inside docs/."""
    if ":" in target or not target:
        return None
    source = next((source for source, uri in PAGES.items() if uri == page and source != "README.md"), None)
    if source is not None:
        return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path
