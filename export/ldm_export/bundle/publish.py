"""The work folder of a build, and the atomic replacement of a bundle by the finished build."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ldm_runtime.errors import BuildError

__all__ = ["LOCK", "publish", "remove", "work_folder", "work_path"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
LOCK = "lock"
"""Name of the file in a work folder that a running build keeps locked."""
_log = logging.getLogger(__name__)


def work_path(target: Path) -> Path:
    """The hidden folder beside ``target`` in which a build writes."""
    return target.parent / f".{target.name}.part"


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Create a hidden folder for the finished stages of a build, in the parent folder of ``target``.

    It stays after a killed or interrupted build, and after a BuildError if a stage has finished, so that the next build
    can resume. After other errors it is removed: the checkpoint cannot be used, or the disk is full.

    Raises:
        BuildError: Another build of the same target is running, or the folder cannot be written.
    """
    work = work_path(target)
    try:
        _create(work)
        lock = _open_lock(work)
    except OSError as error:
        raise BuildError(f"{target.parent}: cannot be written ({error.strerror}); choose another -o") from None
    with lock:
        if not _is_locked(lock, work):
            raise BuildError(f"{target}: another build is writing it; wait for it or choose another -o")
        try:
            _remove_foreign(work)
            yield work
        except Exception as error:
            if isinstance(error, BuildError) and next(work.glob("*.stage"), None) is not None:
                raise BuildError(f"{error}; finished stages are kept, run the command again to continue") from error
            shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            what, where = error.strerror or error, error.filename or target
            raise BuildError(f"{where}: {what}; free some disk space or choose another -o") from error


def _create(work: Path) -> None:
    """Create the work folder, for this user alone. An existing one must be a folder of this user."""
    work.parent.mkdir(parents=True, exist_ok=True)
    try:
        work.mkdir(mode=0o700)
        return
    except FileExistsError:
        facts = work.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        raise BuildError(f"{work}: is not a folder of this user, as an unfinished build leaves it; remove it")
    work.chmod(0o700)


def _open_lock(work: Path) -> IO[bytes]:
    """Open the lock file without following a link and without changing it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(work / LOCK, flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        descriptor = -1
    if descriptor < 0 or not stat.S_ISREG(os.fstat(descriptor).st_mode):
        if descriptor >= 0:
            os.close(descriptor)
        raise BuildError(f"{work / LOCK}: is not a regular file, as an unfinished build leaves it; remove {work}")
    return os.fdopen(descriptor, "r+b")


def _is_locked(lock: IO[bytes], work: Path) -> bool:
    """Lock the file. Return False if another build has locked it, or has removed it when it ended.

    On a file system without locks, a warning is logged and the build goes on.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        _log.warning(
            "%s: the file system has no locks (%s); run no other build of the same -o meanwhile", work, error.strerror
        )
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (work / LOCK).lstat())
    except FileNotFoundError:
        return False


def _remove_foreign(work: Path) -> None:
    """Remove entries of a work folder that no build creates: links, special files, and entries of other users.

    Other users can no longer write to the folder, so the build may use the paths in it afterwards.
    """
    owner = work.lstat().st_uid
    folders = [work]
    while folders:
        for entry in list(os.scandir(folders.pop())):
            facts = entry.stat(follow_symlinks=False)
            if facts.st_uid != owner or not (stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)):
                remove(Path(entry.path))
            elif stat.S_ISDIR(facts.st_mode):
                folders.append(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content, if it exists.

    Raises:
        OSError: The file system does not allow it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(finished: Path, target: Path) -> None:
    """Rename ``finished`` to ``target``. An existing folder is exchanged with it and then removed.

    A reader sees either the complete old folder or the complete new one.

    Raises:
        OSError: The file system does not allow it.
    """
    if not target.exists():
        finished.rename(target)
    elif _exchange(finished, target):
        shutil.rmtree(finished)
    else:  # a file system without exchange: the target is missing for a moment
        old = finished.with_name(f"{finished.name}.old")
        remove(old)
        target.rename(old)
        finished.rename(target)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths with renameat2(RENAME_EXCHANGE), see rename(2); False if the system does not support it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0
