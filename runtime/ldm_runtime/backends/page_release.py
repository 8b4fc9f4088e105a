"""Gives memory back to the system: pages of mapped weights while an engine repacks them, and freed memory."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["mapped_ranges", "release_freed_memory", "release_mapped_files", "release_mapped_pages"]

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4
INTERVAL = 0.05
"""Seconds between two releases."""
Range = tuple[int, int]


@contextmanager
def release_mapped_pages(arrays: Sequence[NDArray[Any]]) -> Iterator[None]:
    """Release the pages of arrays in read-only file mappings repeatedly until the block ends, and once more then.

    The pages stay in the system's page cache, and reading them maps them again. The arrays stay referenced until the
    block ends, so no other data can use their addresses. On systems other than Linux this does nothing.
    """
    ranges, done = mapped_ranges(arrays), threading.Event()
    worker = threading.Thread(target=_rounds, args=(ranges, done), daemon=True)
    worker.start()
    try:
        yield
    finally:
        done.set()
        worker.join()


def release_mapped_files(folder: Path) -> None:
    """Release the pages of all read-only mappings of files below a folder once."""
    _drop([place for path, place in _read_only_files() if path.is_relative_to(folder.resolve())])


def release_freed_memory() -> None:
    """Return memory to the system that was freed, which the C library otherwise keeps for later. glibc only."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def mapped_ranges(arrays: Sequence[NDArray[Any]]) -> list[Range]:
    """Return the first and last address of the whole pages of each array in a read-only file mapping."""
    mappings = [place for _, place in _read_only_files()]
    starts = np.array([start for start, _ in mappings], np.uint64)
    ranges = []
    for array in arrays:
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        index = int(np.searchsorted(starts, start, "right")) - 1
        if index >= 0 and end <= mappings[index][1]:
            ranges.append((-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE))
    return [(start, end) for start, end in ranges if start < end]


def _read_only_files() -> list[tuple[Path, Range]]:
    """Return the read-only file mappings of this process, sorted by address."""
    if not MAPS.exists():
        return []
    lines = (line.split(maxsplit=5) for line in MAPS.read_text().splitlines())
    places = [(place, path) for place, mode, _, _, inode, *path in lines if mode[:2] == "r-" and inode != "0"]
    return [(Path(*path), (int(place.split("-")[0], 16), int(place.split("-")[1], 16))) for place, path in places]


def _rounds(ranges: Sequence[Range], done: threading.Event) -> None:
    while ranges:
        last = done.wait(INTERVAL)
        _drop(ranges)
        if last:
            return


def _drop(ranges: Sequence[Range]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in ranges:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
