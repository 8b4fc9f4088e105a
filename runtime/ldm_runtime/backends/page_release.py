"""Mapped weights given back to the system while an engine repacks them, so that they are not resident twice."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAPS = Path("/proc/self/maps")
MADV_DONTNEED = 4
EVERY = 0.05
"""Seconds between two rounds."""
Range = tuple[int, int]


@contextmanager
def release_mapped_pages(arrays: Sequence[NDArray[Any]]) -> Iterator[None]:
    """Until the block ends, and once more then, drop the pages of those arrays that are read-only maps of a file.

    They stay in the system's page cache, and come back where they are read again. The arrays are held meanwhile, so
    nothing else can take their place in memory. Nothing is done but on Linux.
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
    """Drop the pages of all files below a folder that are mapped to be read only; as ``release_mapped_pages``, once."""
    _drop([place for path, place in _read_only_files() if path.is_relative_to(folder.resolve())])


def mapped_ranges(arrays: Sequence[NDArray[Any]]) -> list[Range]:
    """First and last address of the whole pages of arrays that lie in files' mappings which cannot be written."""
    held = [place for _, place in _read_only_files()]
    starts = np.array([start for start, _ in held], np.uint64)
    found = []
    for array in arrays:
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        index = int(np.searchsorted(starts, start, "right")) - 1
        if index >= 0 and end <= held[index][1]:
            found.append((-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE))
    return [(start, end) for start, end in found if start < end]


def _read_only_files() -> list[tuple[Path, Range]]:
    """The process's mappings of files that it can read and not write, by address."""
    if not MAPS.exists():
        return []
    lines = (line.split(maxsplit=5) for line in MAPS.read_text().splitlines())
    places = [(place, path) for place, mode, _, _, inode, *path in lines if mode[:2] == "r-" and inode != "0"]
    return [(Path(*path), (int(place.split("-")[0], 16), int(place.split("-")[1], 16))) for place, path in places]


def _rounds(ranges: Sequence[Range], done: threading.Event) -> None:
    while ranges:
        last = done.wait(EVERY)
        _drop(ranges)
        if last:
            return


def _drop(ranges: Sequence[Range]) -> None:
    libc = ctypes.CDLL(None)
    for start, end in ranges:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
