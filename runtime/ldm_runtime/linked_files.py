"""Links in folders of models: which of them may be followed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["stays_inside"]

_REPOSITORIES = ("models--", "datasets--", "spaces--")


def stays_inside(path: Path, folder: Path) -> bool:
    """True if a file, with all links resolved, is in a folder or among the blobs of a Hugging Face cache.

    Such a cache keeps a repository as ``models--OWNER--NAME/snapshots/REVISION/FILE``, links to
    ``models--OWNER--NAME/blobs/DIGEST``. A folder outside the cache may consist of links to blobs as well. The content
    of a blob is not trusted here: callers compare digests, or read formats that cannot execute code.

    Raises:
        OSError, RuntimeError, ValueError: The path is too long, a link to itself, or contains a zero byte.
    """
    target, place = path.resolve(), folder.resolve()
    if target.is_relative_to(place):
        return True
    repositories = [parent.parent for parent in place.parents if parent.name == "snapshots"]
    if any(target.is_relative_to(repository / "blobs") for repository in repositories):
        return True
    return target.parent.name == "blobs" and target.parent.parent.name.startswith(_REPOSITORIES)
