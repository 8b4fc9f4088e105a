"""Files whose digest has been checked, with their identity, so that a later replacement of the file is detected.

A digest is computed before an engine opens the file. Code therefore calls ``unchanged`` right after an engine has
opened or read a file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ldm_runtime.errors import ManifestError
from ldm_runtime.regular_files import OPEN_FLAGS

__all__ = ["FileIdentity", "GraphFile", "VerifiedFile", "path_of", "unchanged", "unwritten", "verify"]

CHUNK = 4 * 2**20
MAX_READS = 10
"""Maximum number of times a file is read again because its status changed meanwhile."""


@dataclass(frozen=True)
class FileIdentity:
    """Attributes that change if a file is replaced or written: device, inode, size, and two times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, facts: os.stat_result) -> FileIdentity:
        """Return the identity from the result of ``os.stat`` or ``os.fstat``."""
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)

    def is_same_content(self, other: FileIdentity) -> bool:
        """True if all is equal except the time of the last status change, which a new hard link also changes."""
        return (self.device, self.inode, self.size, self.modified) == (
            other.device,
            other.inode,
            other.size,
            other.modified,
        )


@dataclass(frozen=True)
class VerifiedFile:
    """A file whose digest was computed from an open descriptor.

    Attributes:
        path: Path of the file.
        sha256: Its digest (hex).
        identity: Its identity when the digest was computed.
        beside: Files that belong to it, e.g. the external weights of a graph.
    """

    path: Path
    sha256: str
    identity: FileIdentity
    beside: tuple[VerifiedFile, ...] = ()

    def __fspath__(self) -> str:
        return str(self.path)

    def check(self) -> None:
        """Check that the path still names the file that was verified.

        If only the time of the last status change differs, e.g. because a build has linked the file, the digest is
        computed again.

        Raises:
            ManifestError: The file or one beside it was replaced, changed or removed.
        """
        self._check()
        for other in self.beside:
            other.check()

    def _check(self) -> None:
        try:
            identity = FileIdentity.of(self.path.stat())
        except OSError:
            raise self._replaced() from None
        if identity != self.identity:
            if not identity.is_same_content(self.identity):
                raise self._replaced()
            verify(self.path, self.sha256, self.identity.size)

    def check_not_written(self) -> None:
        """Check that the file was not written since, for an engine that still has it open or mapped.

        The path may name another file by now, or none.

        Raises:
            ManifestError: The file itself or one beside it was written.
        """
        with suppress(OSError):
            facts = self.path.stat()
            if (facts.st_dev, facts.st_ino) == (self.identity.device, self.identity.inode):
                self._check()
        for other in self.beside:
            other.check_not_written()

    def _replaced(self) -> ManifestError:
        return ManifestError(f"{self.path}: the bundle was replaced after it was opened; open it again")


GraphFile = Path | VerifiedFile
"""A file for an engine: a verified file of a bundle, or the path of any file, which is not checked."""


def path_of(file: GraphFile) -> Path:
    """The path of a file."""
    return file.path if isinstance(file, VerifiedFile) else file


def unchanged(file: GraphFile) -> None:
    """Check that a verified file is still the one that was verified; call it after the file has been opened or read.

    Raises:
        ManifestError: As ``VerifiedFile.check``.
    """
    if isinstance(file, VerifiedFile):
        file.check()


def unwritten(file: GraphFile) -> None:
    """Check that a verified file that is still open was not written.

    Raises:
        ManifestError: As ``VerifiedFile.check_not_written``.
    """
    if isinstance(file, VerifiedFile):
        file.check_not_written()


def verify(path: Path, sha256: str, size: int) -> VerifiedFile:
    """Check the size in bytes and the digest of a regular file.

    Raises:
        ManifestError: The size or digest differs, the file is not regular, or it changed while it was read.
        OSError: It cannot be read.
    """
    descriptor = os.open(path, OPEN_FLAGS)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ManifestError(f"{path}: missing, but the manifest lists it; copy the whole bundle or rebuild it")
        if facts.st_size != size:
            raise ManifestError(f"{path}: got {facts.st_size} bytes, expected {size}; copy the file again or rebuild")
        verified = VerifiedFile(path, *_unchanged_digest(file, path))
    if verified.sha256 != sha256:
        raise ManifestError(f"{path}: got sha256 {verified.sha256}, expected {sha256}; copy the file again or rebuild")
    return verified


def _unchanged_digest(file: BinaryIO, path: Path) -> tuple[str, FileIdentity]:
    """SHA-256 (hex) and identity of an open file. It is read again if only its status changed, e.g. by a hard link."""
    after = FileIdentity.of(os.fstat(file.fileno()))
    for _ in range(MAX_READS):
        before = after
        file.seek(0)
        digest, bytes_left = hashlib.sha256(), before.size
        while bytes_left and (part := file.read(min(bytes_left, CHUNK))):
            digest.update(part)
            bytes_left -= len(part)
        after = FileIdentity.of(os.fstat(file.fileno()))
        if after == before:
            return digest.hexdigest(), after
        if not after.is_same_content(before):
            break
    raise ManifestError(f"{path}: changed while its digest was computed; wait for its writer and try again")
