"""Opens the components of a bundle on an engine: all that a pipeline runs, or a single one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock

from ldm_runtime.backends.engine import (
    FLOAT_GRAPHS,
    Choice,
    Engine,
    Loader,
    Placement,
    WeightChange,
    WeightChanger,
    Wish,
    pipeline_components,
)
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.registry import AUTO
from ldm_runtime.backends.selection import Failure, select_backend
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError, UnsupportedError
from ldm_runtime.number_checks import threads as checked_threads

__all__ = ["OpenModel", "open_component", "open_model"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Options:
    """Options of the caller; see ``open_model``."""

    backend: str | Engine
    wish: Wish
    threads: int | None
    cache: Path | None


class OpenModel:
    """The components of a bundle, ready to be loaded.

    With the backend "auto", an engine whose components do not load or do not run is replaced by the next one that can
    run the bundle. Each replacement is logged as a warning and is part of the reason of the new choice.

    Attributes:
        backends: Component -> backend that is loaded on first use. The objects stay the same if the engine is replaced.
        choice: The engine that runs them.
        loop: The denoising loop on the device, if there is one.
        on_change: Called after the engine was replaced, in the thread in which it failed.

    Raises:
        ManifestError: A file is not the one that was built.
        BackendError: No engine can run the bundle on this machine, or the one that the caller names cannot.
    """

    choice: Choice
    loop: DeviceLoop | None
    _engine: Engine

    def __init__(self, bundle: Bundle, names: Sequence[str], options: _Options, *, with_loop: bool):
        self._bundle, self._names, self._options, self._with_loop = bundle, names, options, with_loop
        self._failures: list[Failure] = []
        self._reported: set[str] = set()
        self._lock = RLock()
        self.on_change: Callable[[], None] = lambda: None
        self.backends: dict[str, LazyBackend] = {}
        self._open()

    @property
    def refuses_changes(self) -> str | None:
        """Why the present engine cannot change weights; None if it can."""
        if not isinstance(self._engine, WeightChanger):
            return f"engine {self._engine.name} cannot change weights"
        if self.choice.graph not in FLOAT_GRAPHS:
            return f"the weights of {self.choice.graph} graphs cannot be changed"
        return None

    def changed(self, name: str, change: WeightChange) -> LazyBackend | None:
        """A component with changed weights beside the one without, loaded on first use; None if nothing changes.

        Raises:
            UnsupportedError: As ``refuses_changes`` says.
            ManifestError: A file is not the one that was built, or a change does not fit the graph.
        """
        engine = self._engine
        if self.refuses_changes or not isinstance(engine, WeightChanger):
            raise UnsupportedError(f"{name}: {self.refuses_changes}")
        loader = engine.open_changed(self._bundle, name, self.choice, self._placement(self.choice), change)
        return None if loader is None else LazyBackend(self._bundle.manifest.components[name].spec, loader)

    def loop_failed(self, loop: DeviceLoop, error: BackendError) -> None:
        """Replace the engine whose denoising loop could not start.

        Raises:
            BackendError: ``error``, if the caller has named the engine or no other one is left.
        """
        with self._lock:
            if self.loop is loop:  # otherwise another thread has replaced the engine
                self._next_engine(error)

    def _component_failed(self, name: str, loader: Loader, error: BackendError) -> None:
        with self._lock:
            if self.backends[name].loader is loader:
                self._next_engine(error)

    def _next_engine(self, error: BackendError) -> None:
        if self._options.backend != AUTO:
            raise error
        self._failures.append(Failure(self.choice, str(error)))
        try:
            self._open()
        except BackendError:
            self._failures.pop()
            raise error from None
        self.on_change()

    def _open(self) -> None:
        """Open the components on the first engine that can run them, and report why earlier engines cannot."""
        while True:
            selected = select_backend(self._bundle, self._options.backend, self._options.wish, self._failures)
            try:
                loop = self._open_on(selected.engine, selected.choice)
            except BackendError as error:
                if self._options.backend != AUTO:
                    raise
                self._failures.append(Failure(selected.choice, str(error)))
                continue
            self._engine, self.choice, self.loop = selected.engine, selected.choice, loop
            for refusal in selected.refusals:
                if refusal not in self._reported:
                    self._reported.add(refusal)
                    log.warning("%s; %s runs the model instead", refusal, selected.choice.backend)
            return

    def _placement(self, choice: Choice) -> Placement:
        return Placement(choice.device, self._options.threads, self._options.cache)

    def _open_on(self, engine: Engine, choice: Choice) -> DeviceLoop | None:
        placement = self._placement(choice)
        loaders = {name: engine.open(self._bundle, name, choice, placement) for name in self._names}
        for name, loader in loaders.items():
            if name in self.backends:
                self.backends[name].replace(loader)
            else:
                spec = self._bundle.manifest.components[name].spec
                self.backends[name] = LazyBackend(spec, loader, partial(self._component_failed, name))
        if not self._with_loop:
            return None
        return engine.device_loop(self._bundle, choice, placement, self.backends)


def open_model(
    bundle: Bundle,
    backend: str | Engine = AUTO,
    *,
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
    once: bool = False,
) -> OpenModel:
    """Select an engine and check the files of every component that the pipeline runs; each file is read once.

    Args:
        bundle: The bundle.
        backend, precision, device: As ``select_backend`` and ``Wish`` take them.
        threads: CPU threads of one operator. None means all cores that this process may use.
        cache: Folder where an engine may keep compiled graphs.
        once: True if the model generates one image and is then freed.

    Raises:
        SpecError: ``threads`` is not a number from 1 to 1024.
        ManifestError: A file is not the one that was built.
        BackendError: The engine cannot run the bundle on this machine.
    """
    options = _Options(backend, Wish(precision, device, once), checked_threads(threads), cache)
    return OpenModel(bundle, pipeline_components(bundle.manifest.model), options, with_loop=True)


def open_component(
    bundle: Bundle,
    component: str,
    backend: str | Engine = AUTO,
    *,
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
) -> LazyBackend:
    """Load one component. Only its own files are read and checked.

    Arguments and errors are those of ``open_model``; the component must be one of the bundle's.
    """
    if component not in bundle.manifest.components:
        known = ", ".join(bundle.manifest.components)
        raise BackendError(f"{bundle.folder}: got component {component!r:.60}, expected one of {known}")
    options = _Options(backend, Wish(precision, device), checked_threads(threads), cache)
    opened = OpenModel(bundle, (component,), options, with_loop=False).backends[component]
    opened.load()
    return opened
