"""A backend that is loaded when it first runs, and can be freed and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.backends import Backend, Feed, Preparing, SpecBackend
from ldm_runtime.specs import ComponentSpec


class LazyBackend(SpecBackend):
    """Stands for a component that ``load`` loads; after ``close`` the next ``run`` loads it anew."""

    def __init__(self, spec: ComponentSpec, load: Callable[[], Backend]):
        self._spec, self._load = spec, load
        self._loaded: Backend | None = None

    def load(self) -> Backend:
        """The backend itself, loaded if it was not. Raises what its constructor raises."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def prepare(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """As the backend does, or what it is given where the backend has nothing to prepare."""
        loaded = self.load()
        return loaded.prepare(feed) if isinstance(loaded, Preparing) else dict(feed)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once. Raises what loading and the backend raise."""
        return self.load().run(feed)

    def close(self) -> None:
        """Free it, if it was loaded."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()
