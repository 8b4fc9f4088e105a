"""What lies in a folder, to compare before and after."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, object]:
    """Every path below, hidden ones too: a file's bytes, a link's target, None for a folder."""
    result: dict[str, object] = {}
    for path in folder.rglob("*"):
        file = path.read_bytes() if path.is_file() else None
        result[str(path.relative_to(folder))] = path.readlink() if path.is_symlink() else file
    return result
