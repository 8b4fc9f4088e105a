"""Folders that are expensive to make: built once per test run and shared by the worker processes of pytest-xdist."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

__all__ = ["SharedFolders"]


@dataclass(frozen=True)
class SharedFolders:
    """Folders below ``base``, a folder that all workers of one run have in common.

    The first worker that asks for a name makes it, while the others wait at a file lock. Tests must not change what
    lies in these folders; ``changed`` finds those that did.
    """

    base: Path

    @classmethod
    def of_run(cls, factory: pytest.TempPathFactory, worker: str) -> SharedFolders:
        """The shared folders of the current run; ``worker`` is the id of pytest-xdist's worker, "" without one."""
        own = factory.getbasetemp()
        base = (own.parent if worker else own) / "shared"
        base.mkdir(exist_ok=True)
        return cls(base)

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder called ``name``; call ``make`` with its path first if no worker has done so in this run."""
        folder, listing = self.base / name, self.base / f"{name}.files"
        with FileLock(self.base / f"{name}.lock"):
            if not listing.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                listing.write_text(_files(folder), encoding="utf-8")
        return folder

    def first_worker(self, module: Path, worker: str) -> str:
        """Return the worker that named this module of tests first: ``worker``, if none has done so in this run."""
        file = self.base / f"{hashlib.sha256(bytes(module)).hexdigest()}.worker"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                file.write_text(worker, encoding="utf-8")
            return file.read_text(encoding="utf-8")

    def changed(self) -> list[str]:
        """Names of the folders whose files are no longer those that were made."""
        listings = {listing.stem: listing.read_text(encoding="utf-8") for listing in self.base.glob("*.files")}
        return sorted(name for name, files in listings.items() if _files(self.base / name) != files)


def _files(folder: Path) -> str:
    """One line per file below a folder: its path, size in bytes and time of change."""
    facts = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return "".join(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in facts)
