"""Images that responses refer to by URL: kept in memory for a limited time and in a limited size."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict

__all__ = ["ImageStore"]


class ImageStore:
    """Keeps encoded images under names that cannot be guessed. Thread-safe.

    Args:
        max_bytes: Maximum size of all images; the oldest are removed when it is exceeded.
        seconds: Seconds for which an image is kept.
    """

    def __init__(self, max_bytes: int = 256 * 2**20, seconds: float = 3600.0):
        self._max_bytes, self._seconds = max_bytes, seconds
        self._images: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, data: bytes, media_type: str) -> str:
        """Store an image and return its name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._images[name] = (time.monotonic(), data, media_type)
            self._bytes += len(data)
            while len(self._images) > 1 and (self._bytes > self._max_bytes or self._oldest_expired()):
                _, (_, removed, _) = self._images.popitem(last=False)
                self._bytes -= len(removed)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Return an image and its media type; None if there is no such image or it is no longer kept."""
        with self._lock:
            found = self._images.get(name)
        if found is None or time.monotonic() - found[0] > self._seconds:
            return None
        return found[1], found[2]

    def _oldest_expired(self) -> bool:
        return time.monotonic() - next(iter(self._images.values()))[0] > self._seconds
