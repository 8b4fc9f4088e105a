"""Polygraphy's runners as engines for ``verify --backends``, in addition to those of ``ldm_runtime.backends``.

If a backend differs from the reference and Polygraphy's runner of the same graph or engine does not, the fault is in
the backend; if both differ, it is in the graph or the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.engine import Choice, Engine, Loader, Placement, Wish
from ldm_runtime.backends.engine_match import MatchedEngine, match_engine
from ldm_runtime.backends.host import first_line, import_engine, is_installed
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.tensorrt import TensorRtEngine
from ldm_runtime.backends.tensorrt_log import error_log, one_line
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError
from ldm_runtime.installation import install_command
from ldm_runtime.specs import ComponentSpec, check_feed

__all__ = ["POLYGRAPHY", "PolygraphyBackend", "PolygraphyOnnxRuntime", "PolygraphyTensorRt"]

EXTRA = "polygraphy"


class PolygraphyBackend(SpecBackend):
    """Runs one component with a runner of Polygraphy.

    Args:
        spec: Inputs and outputs of the component.
        open_runner: Returns the runner, which is activated here.
        before: Called with the runner and the shapes of the inputs before each call.

    Raises:
        BackendError: The runner cannot load the component.
    """

    def __init__(
        self,
        spec: ComponentSpec,
        open_runner: Callable[[], Any],
        before: Callable[[Any, Mapping[str, tuple[int, ...]]], None] = lambda runner, shapes: None,
    ):
        self._spec, self._before = spec, before
        self._runner: Any = self._quietly("load", open_runner)
        self._quietly("load", self._runner.activate)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the component once.

        Raises:
            SpecError: The feed does not fit the spec.
            BackendError: The runner failed.
        """
        check_feed(self._spec, feed)
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}

        def infer() -> dict[str, NDArray[Any]]:
            self._before(self._runner, {name: array.shape for name, array in arrays.items()})
            results = self._runner.infer(arrays)
            return {tensor.name: np.array(results[tensor.name]) for tensor in self._spec.outputs}

        result: dict[str, NDArray[Any]] = self._quietly("run", infer)
        return result

    def close(self) -> None:
        """Free the resources of the runner."""
        with suppress(BackendError):
            self._quietly("close", self._runner.deactivate)

    def _quietly(self, what: str, work: Callable[[], Any]) -> Any:
        logger = import_engine("polygraphy.logger", EXTRA).G_LOGGER
        try:
            with logger.verbosity(logger.CRITICAL + 1):  # it would also print errors that it raises
                return work()
        except BackendError:
            raise
        except Exception as error:  # Polygraphy's own class, and those of the packages that it calls
            raise BackendError(f"{self._spec.name}: polygraphy cannot {what} it: {first_line(error)}") from None


class PolygraphyOnnxRuntime:
    """ONNX Runtime through ``OnnxrtRunner``: the portable graph with ONNX Runtime's default settings."""

    name, extra = "polygraphy", EXTRA

    def available(self) -> str | None:
        """None if polygraphy is installed, otherwise how to install it."""
        return _available(self.extra)

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        """Yield the graphs of the precision asked for, on the CPU unless "cuda" is asked for."""
        device, graph = ("cuda" if wish.device == "cuda" else "cpu"), wish.precision or bundle.precision
        yield Choice(self.name, device, graph, graph, 0, "as asked")

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        """Check a component's graph and return its loader.

        Raises:
            ManifestError: A file is not the one that was built, or there is no graph of that precision.
        """
        graph, spec = bundle.verified_graph(component, choice.graph), bundle.manifest.components[component].spec

        def runner() -> Any:
            onnxrt = import_engine("polygraphy.backend.onnxrt", EXTRA)
            session = onnxrt.SessionFromOnnx(str(graph.path), providers=[placement.device])()
            graph.check()
            return onnxrt.OnnxrtRunner(session)

        return lambda: PolygraphyBackend(spec, runner)

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        """None: the NumPy loop runs."""
        return None


class PolygraphyTensorRt(TensorRtEngine):
    """TensorRT and TensorRT for RTX through ``TrtRunner``: the bundle's engines without CUDA graphs."""

    name, extra = "polygraphy-tensorrt", EXTRA

    def available(self) -> str | None:
        """None if polygraphy and one of TensorRT's packages are installed, otherwise how to install them."""
        return _available(self.extra) or super().available()

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        """Find the engine for this machine, check its file and return its loader; errors as ``TensorRtEngine.open``."""
        return PolygraphyTensorRtLoader(match_engine(bundle, component, choice.graph))

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        """None: the NumPy loop runs."""
        return None


@dataclass(frozen=True)
class PolygraphyTensorRtLoader:
    """Loads a component from an engine that has been matched and checked."""

    matched: MatchedEngine

    def __call__(self) -> PolygraphyBackend:
        """Load the engine."""
        return PolygraphyBackend(self.matched.spec, self._runner, self._set_profile)

    def _runner(self) -> Any:
        package, file = self.matched.package, self.matched.file
        trt, log = _polygraphy_trt(package), error_log(package)
        content = file.path.read_bytes()
        file.check()
        try:
            engine = trt.EngineFromBytes(content, runtime=package.Runtime(log))()
        except Exception:  # Polygraphy's own class; TensorRT's log has the reason
            reason = one_line(log.first())
            raise BackendError(f"{self.matched.spec.name}: polygraphy cannot load {file.path}: {reason}") from None
        return trt.TrtRunner(engine)

    def _set_profile(self, runner: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        index = self.matched.facts.fitting(shapes)
        if index is None:
            raise BackendError(f"{self.matched.spec.name}: the engine takes no inputs of shapes {dict(shapes)}")
        runner.set_profile(index)


def _polygraphy_trt(package: ModuleType) -> ModuleType:
    """Import Polygraphy's TensorRT backend for one of the packages; a process can use it for one of them only.

    Raises:
        BackendError: It was imported for the other package, or is not installed.
    """
    config: Any = import_engine("polygraphy.config", EXTRA)
    rtx = package.__name__ == "tensorrt_rtx"
    if rtx != config.USE_TENSORRT_RTX:
        if "polygraphy.backend.trt" in sys.modules:
            raise BackendError(f"polygraphy: this process uses it for another package than {package.__name__}")
        config.USE_TENSORRT_RTX = rtx
    return import_engine("polygraphy.backend.trt", EXTRA)


def _available(extra: str) -> str | None:
    return None if is_installed("polygraphy") else f"not installed; `{install_command(extra)}`"


POLYGRAPHY: Mapping[str, Engine] = {engine.name: engine for engine in (PolygraphyOnnxRuntime(), PolygraphyTensorRt())}
"""Name in ``verify --backends`` -> engine."""
