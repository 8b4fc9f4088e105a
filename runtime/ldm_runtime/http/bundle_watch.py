"""Watches the bundles of a server on disk, and loads new versions of those that are loaded."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import LdmError
from ldm_runtime.http.served_bundle import ServedBundle
from ldm_runtime.http.served_model import ServedModel, version_of
from ldm_runtime.http.served_models import ServedModels

__all__ = ["BundleWatch"]

RETRY_SECONDS = 60.0
"""Seconds until a version that could not be loaded is tried again; its files may still be being copied."""
_log = logging.getLogger(__name__)


@dataclass
class _Seen:
    """State of the watch for one bundle.

    Attributes:
        stamp: Inode, size in bytes and modification time of the manifest at the last check.
        version: Digest of that manifest.
        tried: ``time.monotonic()`` when this version was last tried, if it could not be loaded.
    """

    stamp: tuple[int, int, int] | None = None
    version: str = ""
    tried: float | None = None


class BundleWatch:
    """Checks the manifests periodically, in its own thread, while a block runs.

    A manifest that is missing or cannot be read is ignored, because its bundle may be in the middle of being replaced.

    Args:
        models: The bundles.
        seconds: Seconds between two checks, above 0.
        note: Called with a line of text for each new version that takes the requests.
    """

    def __init__(self, models: ServedModels, seconds: float, note: Callable[[str], None] = lambda line: None):
        self._models, self._seconds, self._note = models, seconds, note
        self._seen = {name: _Seen() for name in models.names}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ldm-watch", daemon=True)

    def __enter__(self) -> BundleWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            for bundle in self._models.bundles.values():
                try:
                    if self._is_new(bundle):
                        self._exchange(bundle)
                except (LdmError, OSError):
                    continue

    def _is_new(self, bundle: ServedBundle) -> bool:
        """True if a loaded bundle has another version on disk that should be loaded now."""
        current, seen = bundle.current, self._seen[bundle.name]
        if bundle.path is None or current is None or bundle.loading is not None:
            return False
        facts = (bundle.path / MANIFEST).stat()
        stamp = facts.st_ino, facts.st_size, facts.st_mtime_ns
        if stamp != seen.stamp:
            version = version_of(bundle.path)
            seen.tried = seen.tried if version == seen.version else None
            seen.stamp, seen.version = stamp, version
        waits = seen.tried is not None and time.monotonic() - seen.tried < RETRY_SECONDS
        return seen.version != current.version and not waits

    def _exchange(self, bundle: ServedBundle) -> None:
        self._seen[bundle.name].tried = time.monotonic()
        self._models.load(bundle).add_done_callback(lambda loaded: self._report(bundle, loaded))

    def _report(self, bundle: ServedBundle, loaded: Future[ServedModel]) -> None:
        if loaded.cancelled():
            return
        if (error := loaded.exception()) is None:
            self._note(f"{bundle.name}: version {loaded.result().version[:12]} takes the requests from now on")
        else:
            text = str(error) if isinstance(error, LdmError) else f"{type(error).__name__}: {error}"
            _log.error("%s: the new version is not loaded, the old one serves: %s", bundle.name, " ".join(text.split()))
