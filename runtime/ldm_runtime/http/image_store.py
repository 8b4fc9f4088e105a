"""Images that answers refer to by URL: kept in memory for a while, within a limit."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict

__all__ = ["ImageStore"]


class ImageStore:
    """Keeps encoded images under names that nobody can guess. Any thread may use it.

    Args:
        max_bytes: Size of all images; the oldest make room for new ones.
        seconds: Time for which an image is kept.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, seconds: float = 3600.0):
        self._max_bytes, self._seconds = max_bytes, seconds
        self._images: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, data: bytes, media_type: str) -> str:
        """Keep an image and return its name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._images[name] = (time.monotonic(), data, media_type)
            self._bytes += len(data)
            while len(self._images) > 1 and (self._bytes > self._max_bytes or self._oldest_expired()):
                _, (_, removed, _) = self._images.popitem(last=False)
                self._bytes -= len(removed)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The image of a name and its media type, or None if there is none (any more)."""
        with self._lock:
            found = self._images.get(name)
        if found is None or time.monotonic() - found[0] > self._seconds:
            return None
        return found[1], found[2]

    def _oldest_expired(self) -> bool:
        return time.monotonic() - next(iter(self._images.values()))[0] > self._seconds
