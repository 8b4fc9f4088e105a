"""Decides which symbolic links in model folders may be followed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["stays_inside"]

_REPOSITORIES = ("models--", "datasets--", "spaces--")


def stays_inside(path: Path, folder: Path) -> bool:
    """True if a file, after all links are resolved, is in the folder or is a blob of a Hugging Face cache.

    Such a cache stores a repository as ``models--OWNER--NAME/snapshots/REVISION/FILE``, which are links to
    ``models--OWNER--NAME/blobs/DIGEST``. A folder outside the cache may also consist of links to blobs. The content of
    a blob is not trusted: callers compare digests, or read formats that cannot execute code.

    Raises:
        OSError, RuntimeError, ValueError: The path is too long, is a link to itself, or contains a zero byte.
    """
    target, place = path.resolve(), folder.resolve()
    if target.is_relative_to(place):
        return True
    repositories = [parent.parent for parent in place.parents if parent.name == "snapshots"]
    if any(target.is_relative_to(repository / "blobs") for repository in repositories):
        return True
    return target.parent.name == "blobs" and target.parent.parent.name.startswith(_REPOSITORIES)
