"""The command that installs an extra of ldm-export from the source from which ldm-export was installed.

The package is not on an index. ``direct_url.json`` (PEP 610) in the metadata of the installed distribution says whether
pip installed it from a checkout, a wheel or a repository; an extra has to come from the same source.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from importlib.metadata import Distribution

__all__ = ["NAME", "install_command"]

NAME = "ldm-export"
"""Name of the distribution."""
_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")
_SPECIAL = re.compile(r"""(["$`\\])""")
"""Characters that have a special meaning for a shell inside double quotes."""


def install_command(extra: str) -> str:
    """Return a command that installs the packages of an extra for this copy of ldm-export.

    1. For a checkout or a wheel that still exists: ``pip install`` of its path, with ``-e`` if it is editable.
    2. For a repository or a wheel on a server: ``pip install "ldm-export[extra] @ URL"``.
    3. For a file that has been deleted, e.g. the wheel of a container image: ``pip install`` of the packages of the
       extra.
    4. Without a URL, because it was installed from an index: ``pip install "ldm-export[extra]"``.

    Args:
        extra: Name of an extra, e.g. "openvino".
    """
    from importlib.metadata import PackageNotFoundError, distribution  # imported here, because it is slow

    try:
        found = distribution(NAME)
    except PackageNotFoundError:  # the source folders are on the path, and nothing is installed
        return f"pip install -e {_quoted(f'{_shortened(Path(__file__).parents[2])}[{extra}]')}"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    url = str(origin.get("url", ""))
    if not url:
        return f"pip install {_quoted(f'{NAME}[{extra}]')}"
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    if urlsplit(url).scheme != "file":
        return f"pip install {_quoted(f'{NAME}[{extra}] @ {url}')}"
    source = Path(unquote(urlsplit(url).path))
    if not source.exists():
        return f"pip install {' '.join(map(_quoted, _requirements(found, extra)))}"
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"pip install {editable}{_quoted(f'{_shortened(source)}[{extra}]')}"


def _shortened(path: Path) -> Path:
    """A path relative to the current folder, if it lies inside."""
    try:
        here = Path.cwd()
    except OSError:  # it has been deleted
        return path
    return path.relative_to(here) if path.is_relative_to(here) else path


def _quoted(text: str) -> str:
    """Quote a word for a shell."""
    return '"' + _SPECIAL.sub(r"\\\1", text) + '"'


def _requirements(found: Distribution, extra: str) -> list[str]:
    """The requirements of an extra in the metadata of a distribution."""
    parts = [line.partition(";") for line in found.requires or ()]
    return [name.strip() for name, _, marker in parts if (match := _EXTRA.search(marker)) and match[1] == extra]
