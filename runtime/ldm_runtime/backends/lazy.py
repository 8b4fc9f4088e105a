"""A backend that is loaded when it first runs, and that can be freed and loaded again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.backends import Backend, Feed, SpecBackend
from ldm_runtime.specs import ComponentSpec, check_result

__all__ = ["LazyBackend"]


class LazyBackend(SpecBackend):
    """Loads a component when it first runs. After ``close`` the next ``run`` loads it again.

    Threads may share it: they load, run and close one after the other.

    Args:
        spec: Inputs and outputs of the component.
        loader: Loads the component.

    Attributes:
        lock: Held while the component is loaded, runs or is closed; reentrant.
    """

    def __init__(self, spec: ComponentSpec, loader: Callable[[], Backend]):
        self._spec, self.loader = spec, loader
        self._loaded: Backend | None = None
        self.lock = threading.RLock()

    @property
    def is_loaded(self) -> bool:
        """True if the component is loaded."""
        return self._loaded is not None

    def load(self) -> Backend:
        """Return the backend, which is loaded if it was not. Raises what the loader raises."""
        with self.lock:
            if self._loaded is None:
                self._loaded = self.loader()
            return self._loaded

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the component once and check what it returns.

        Raises:
            BackendError: A dtype or shape is not what the spec says.
            LdmError: What the loader and the backend raise.
        """
        with self.lock:
            result = self.load().run(feed)
        check_result(self._spec, feed, result)
        return result

    def most_rows(self, feed: Feed) -> int | None:
        """Rows of one call, as ``SpecBackend.most_rows`` of the component, which is loaded."""
        with self.lock:
            loaded = self.load()
            return loaded.most_rows(feed) if isinstance(loaded, SpecBackend) else None

    def close(self) -> None:
        """Free the component if it was loaded."""
        with self.lock:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                loaded.close()
