"""A backend that is loaded when it first runs, and that can be freed and loaded again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.backends import Backend, Feed, SpecBackend
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, check_result

__all__ = ["LazyBackend"]

Loader = Callable[[], Backend]


class LazyBackend(SpecBackend):
    """Loads a component when it first runs. After ``close`` the next ``run`` loads it again.

    Threads may share it: they load, run and close it one at a time.

    Args:
        spec: Inputs and outputs of the component.
        loader: Loads the component.
        recover: Called with the loader and the error if the component cannot be loaded, or fails when it first runs. It
            calls ``replace`` with the loader of another engine, or raises the error. None raises it.

    Attributes:
        lock: Held while the component is loaded, runs or is closed; reentrant.
    """

    def __init__(
        self, spec: ComponentSpec, loader: Loader, recover: Callable[[Loader, BackendError], None] | None = None
    ):
        self._spec, self.loader, self._recover = spec, loader, recover
        self._loaded: tuple[Loader, Backend] | None = None
        self._ran: Loader | None = None
        self.lock = threading.RLock()

    @property
    def is_loaded(self) -> bool:
        """True if the component is loaded."""
        return self._loaded is not None

    def replace(self, loader: Loader) -> None:
        """Load the component with another loader from its next use on. A component in use is not interrupted."""
        self.loader = loader
        if self.lock.acquire(blocking=False):
            try:
                self._close_replaced()
            finally:
                self.lock.release()

    def load(self) -> Backend:
        """Return the backend, after loading it if necessary. Raises what the loader raises."""
        with self.lock:
            while True:
                self._close_replaced()
                if self._loaded is not None:
                    return self._loaded[1]
                loader = self.loader
                try:
                    self._loaded = loader, loader()
                except BackendError as error:
                    self._next_loader(loader, error)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the component once and check what it returns.

        Raises:
            BackendError: A dtype or shape is not what the spec says.
            LdmError: What the loader and the backend raise.
        """
        with self.lock:
            result = self._run(feed)
        check_result(self._spec, feed, result)
        return result

    def most_rows(self, feed: Feed) -> int | None:
        """Rows of one call, see ``SpecBackend.most_rows``. Loads the component."""
        with self.lock:
            loaded = self.load()
            return loaded.most_rows(feed) if isinstance(loaded, SpecBackend) else None

    def _run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        while True:
            backend = self.load()
            assert self._loaded is not None
            loader, _ = self._loaded
            try:
                result = backend.run(feed)
            except BackendError as error:
                if self._ran is loader:
                    raise
                self._next_loader(loader, error)
            else:
                self._ran = loader
                return result

    def _next_loader(self, loader: Loader, error: BackendError) -> None:
        if self._recover is None:
            raise error
        self._recover(loader, error)

    def _close_replaced(self) -> None:
        """Free a component that a replaced loader has loaded. An engine that failed may fail again here."""
        if self._loaded is not None and self._loaded[0] is not self.loader:
            with suppress(BackendError):
                self.close()

    def close(self) -> None:
        """Free the component if it was loaded."""
        with self.lock:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                loaded[1].close()
