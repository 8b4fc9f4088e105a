"""An engine in NumPy for the small bundle, as a caller can pass it; it fails at a place that a test names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ldm_runtime import Bundle
from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.engine import Choice, Loader, Placement, Wish
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec

__all__ = ["PLACEMENT", "NumpyEngine"]

PLACEMENT = Placement("cpu", threads=1)
"""The only placement that the engine takes."""


class NumpyBackend(SpecBackend):
    """Computes a component of the small bundle's shapes in NumPy: the mean over channels, repeated as needed."""

    def __init__(self, spec: ComponentSpec, engine: NumpyEngine):
        self._spec, self._engine, self._calls = spec, engine, engine.calls

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        self._calls.append(self._spec.name)
        self._engine.fail(f"run {self._spec.name}")
        if self._spec.name == "time_embedding":
            return {"time_embedding": np.ones((len(feed["timestep"]), 8), np.float32)}
        if self._spec.name == "unet":
            return {"noise_pred": np.zeros_like(feed["sample"])}
        mean = feed["latents"].mean(1, keepdims=True).repeat(3, 1).repeat(2, 2).repeat(2, 3)
        return {"image": np.clip(mean, 0, 1)}

    def close(self) -> None:
        self._calls.append(f"close {self._spec.name}")


class NumpyEngine:
    """An engine that no module of the package knows.

    Args:
        fails: "load <component>" or "run <component>" for a failure there, "open" for one before anything is loaded, or
            "loop" for a loop that cannot start.
    """

    name, extra = "numpy", ""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, list[str]()

    def available(self) -> str | None:
        return None

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        if wish.precision not in (None, "fp32"):
            raise BackendError(f"numpy: got precision {wish.precision}, expected fp32")
        yield Choice(self.name, "cpu", "fp32", "fp32", 0, "the only one")

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        bundle.graph(component, choice.graph)
        assert placement == PLACEMENT
        self.fail("open")

        def load() -> NumpyBackend:
            self.fail(f"load {component}")
            return NumpyBackend(bundle.manifest.components[component].spec, self)

        return load

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        if self.fails != "loop":
            return None

        def no_device() -> LoopDevice:
            self.fail("loop")
            raise AssertionError

        return DeviceLoop(no_device)

    def fail(self, place: str) -> None:
        if place == self.fails:
            raise BackendError(f"{place}: no memory")
