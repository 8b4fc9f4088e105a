"""The bundles of the server by name: loads them at start or on first use, replaces them by new versions, unloads them.

A single thread loads one version at a time. Requests hold the version they run on, which is closed after its last
request.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, LdmError, SpecError
from ldm_runtime.http.api_error import ApiError
from ldm_runtime.http.served_bundle import BundleState, ServedBundle
from ldm_runtime.http.served_model import ModelOptions, ServedModel
from ldm_runtime.required_memory import bundle_bytes

__all__ = ["ServedModels"]

POLL = 0.05
"""Seconds between two checks for a bundle that has become idle."""


class ServedModels:
    """Bundles by name. Thread-safe.

    Args:
        bundles: At least one; the first is the default. A bundle that is not loaded must have a path.
        options: How versions are loaded.
        memory: Maximum of the estimated bytes of all loaded versions; None for no limit.
        patience: Timeout in seconds for loading a bundle on first use, including waiting for memory that requests use.
    """

    def __init__(
        self,
        bundles: Sequence[ServedBundle],
        options: ModelOptions | None = None,
        memory: int | None = None,
        patience: float = 300.0,
    ):
        self.bundles: Mapping[str, ServedBundle] = {bundle.name: bundle for bundle in bundles}
        self.memory = memory
        self._options, self._patience = options or ModelOptions(), patience
        self._lock = threading.Lock()
        self._loader = ThreadPoolExecutor(1, "ldm-loader")
        self._closing = False

    @classmethod
    def of(cls, models: Mapping[str, ServedModel]) -> ServedModels:
        """Serve models that are already loaded; they are never replaced."""
        return cls([ServedBundle(name, current=model) for name, model in models.items()])

    @classmethod
    def open(
        cls, paths: Sequence[Path], options: ModelOptions, memory: int | None = None, patience: float = 300.0
    ) -> ServedModels:
        """Serve bundles, each under the name of its folder. Without a memory limit, all are loaded now.

        Raises:
            SpecError: Two folders have one name, or a bundle needs more than ``memory``.
            LdmError: A bundle is damaged, or it does not run here.
        """
        names = [path.resolve().name for path in paths]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SpecError(f"bundles: got two folders named {twice[0]!r:.60}, expected different names; rename one")
        models = cls([ServedBundle(*pair) for pair in zip(names, paths, strict=True)], options, memory, patience)
        try:
            for bundle in models.bundles.values():
                if memory is None:
                    models._load(bundle)
                else:
                    models._check_size(bundle)
        except BaseException:
            models.close()
            raise
        return models

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all bundles, the default first."""
        return tuple(self.bundles)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ServedModel]:
        """Hold the current version of a bundle while the block runs, after loading it if necessary.

        Raises:
            ApiError: It cannot be loaded, or loading times out.
        """
        model = await self._held(self.bundles[name])
        try:
            yield model
        finally:
            model.release()

    async def _held(self, bundle: ServedBundle) -> ServedModel:
        until = time.monotonic() + self._patience
        while (model := self._hold(bundle)) is None:
            try:
                loading = asyncio.shield(asyncio.wrap_future(self.load(bundle)))
                await asyncio.wait_for(loading, max(0.0, until - time.monotonic()))
            except TimeoutError:
                message = f"model: {bundle.name} is not loaded after {self._patience:g} s; try again"
                raise ApiError(503, message, kind="server_error", code="not_ready") from None
            except LdmError as error:
                message = f"model: {bundle.name} cannot be loaded ({error})"
                raise ApiError(503, message, kind="server_error", code="not_ready") from None
        return model

    def _hold(self, bundle: ServedBundle) -> ServedModel | None:
        with self._lock:
            if bundle.current is not None:
                bundle.used = time.monotonic()
                bundle.current.hold()
            return bundle.current

    def load(self, bundle: ServedBundle) -> Future[ServedModel]:
        """Load the current files of a bundle in the background; the new version takes requests as soon as it is loaded.

        The previous version is closed when its requests have ended. If the new version cannot be loaded, the future has
        the error and nothing changes.
        """
        with self._lock:
            if self._closing:
                raise ApiError(503, "server: stops", kind="server_error", code="not_ready")
            if bundle.loading is None:
                bundle.loading = self._loader.submit(self._load, bundle)
            return bundle.loading

    def _load(self, bundle: ServedBundle) -> ServedModel:
        assert bundle.path is not None
        try:
            self._make_room(bundle, self._check_size(bundle))
            model = ServedModel.open(bundle.path, bundle.name, self._options)
        except BaseException:
            with self._lock:
                bundle.loading, bundle.loads["failed"] = None, bundle.loads["failed"] + 1
            raise
        with self._lock:
            former, bundle.current, bundle.loading = bundle.current, model, None
            bundle.loads["done"] += 1
            if former is not None:
                bundle.retired.append(former)
        if former is not None:
            closing = threading.Thread(target=self._close, args=(bundle, former), name="ldm-closing")
            former.when_idle(closing.start)
        return model

    def _check_size(self, bundle: ServedBundle) -> int:
        """Read the manifest of a bundle and return the estimated bytes of this version."""
        assert bundle.path is not None
        opened = Bundle.open(bundle.path)
        bundle.model = opened.manifest.model
        needed = bundle_bytes(opened, self._options.bundle.get("precision"))
        if self.memory is not None and needed > self.memory:
            raise SpecError(
                f"memory: got {self.memory / 1e9:.3g} GB, but {bundle.name} alone needs about {needed / 1e9:.3g} GB; "
                "give more, or leave --memory out"
            )
        return needed

    def _make_room(self, bundle: ServedBundle, needed: int) -> None:
        """Unload idle bundles, the least recently used first, until there is enough memory for this one.

        A new version of a loaded bundle does not wait until other bundles are idle, because the old version still
        serves.

        Raises:
            BackendError: The other bundles do not become idle in time.
        """
        until = time.monotonic() + (self._patience if bundle.current is None else 0)
        while self.memory is not None and (used := self.used()) + needed > self.memory:
            if (unloaded := self._unload(bundle)) is not None:
                self._close(*unloaded)
            elif time.monotonic() > until or self._closing:
                raise BackendError(
                    f"memory: needs about {needed / 1e9:.3g} GB beside {used / 1e9:.3g} GB in use, and --memory is "
                    f"{self.memory / 1e9:.3g} GB; try again later, or give more"
                )
            else:
                time.sleep(POLL)

    def _unload(self, kept: ServedBundle) -> tuple[ServedBundle, ServedModel] | None:
        with self._lock:
            others = sorted((one for one in self.bundles.values() if one is not kept), key=lambda one: one.used)
            for bundle in others:
                if (model := bundle.current) is not None and model.idle:
                    bundle.current = None
                    bundle.retired.append(model)
                    return bundle, model
        return None

    def _close(self, bundle: ServedBundle, model: ServedModel) -> None:
        model.close()
        with self._lock:
            if model in bundle.retired:
                bundle.end(model)

    def used(self) -> int:
        """Estimated bytes of all loaded versions."""
        with self._lock:
            return sum(bundle.memory for bundle in self.bundles.values())

    def states(self) -> list[BundleState]:
        """State of each bundle, all at the same moment."""
        with self._lock:
            return [bundle.state() for bundle in self.bundles.values()]

    def not_ready(self) -> list[str]:
        """Names of loaded bundles that cannot generate images."""
        return [
            bundle.name
            for bundle in self.bundles.values()
            if (model := bundle.current) is not None and not model.scheduler.ready
        ]

    def close(self) -> None:
        """Cancel running requests and free all versions."""
        with self._lock:
            self._closing = True
        self._loader.shutdown(cancel_futures=True)
        with self._lock:
            loaded = [model for bundle in self.bundles.values() for model in bundle.versions]
        for model in loaded:
            model.close()
