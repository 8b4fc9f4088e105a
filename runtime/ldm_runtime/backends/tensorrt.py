"""TensorRT and TensorRT for RTX: engines driven through cuda-python, and refused before they are opened."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed
from ldm_runtime.backends.cuda import Buffer, Cuda, empty
from ldm_runtime.bundle import Bundle
from ldm_runtime.engine_facts import Engine
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, check_feed

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
MAX_GRAPHS = 16
"""Captured CUDA graphs kept, one for each set of input shapes seen."""


class TensorRtBackend:
    """Runs one engine of a bundle: buffers kept on the device, one stream, one CUDA graph for each set of shapes.

    Args:
        bundle: an opened bundle.
        component: e.g. "unet".
        precision: of the engine.

    Raises:
        BackendError: no engine of that precision, the package is missing or of another version, no GPU or another than
            it was built for, or the engine does not load.
        ManifestError: the engine or its graph is not the file that was built.
    """

    def __init__(self, bundle: Bundle, component: str, precision: str):
        part = bundle.manifest.components[component]
        self._spec = part.spec
        engines = [engine for engine in part.engines if engine.precision == precision]
        check_graph(bundle, component, precision, engines)
        package = open_package(engines)
        self._cuda = Cuda()
        self._engine_facts = choose(component, engines, package.__version__, self._cuda.capability())
        file = bundle.file(self._engine_facts.file)
        self._stream = self._cuda.call("cudaStreamCreate")
        self._runtime = package.Runtime(package.Logger(package.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise BackendError(f"{file}: {package.__name__} cannot load it; {_rebuild(self._engine_facts)}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BackendError(f"{file}: no memory on the GPU to run it; free some")
        self._buffers = {t.name: Buffer(self._cuda) for t in (*self._spec.inputs, *self._spec.outputs)}
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._profile = 0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns."""
        return self._spec.outputs

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            SpecError: the feed does not fit the spec.
            BackendError: it fits no profile of the engine, or the GPU failed.
        """
        check_feed(self._spec, feed)
        given = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        shapes = {name: array.shape for name, array in given.items()}
        index = self._engine_facts.fitting(shapes)
        if index is None:
            raise BackendError(
                f"{self._spec.name}: the engine takes no inputs of shapes {shapes}; build it with wider --batch, "
                "--height or --width"
            )
        results = {t.name: empty(result_shape(self._spec, shapes, t), t.dtype) for t in self._spec.outputs}
        moved = self._hold({**given, **results})
        for name, array in given.items():
            self._cuda.upload(array, self._buffers[name].address, self._stream)
        self._launch(index, shapes, moved)
        for name, array in results.items():
            self._cuda.download(self._buffers[name].address, array, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return results

    def _hold(self, arrays: Feed) -> bool:
        """Room for each tensor; True where an address has changed."""
        before = [self._buffers[name].address for name in arrays]
        return before != [self._buffers[name].hold(array.nbytes) for name, array in arrays.items()]

    def _launch(self, index: int, shapes: dict[str, tuple[int, ...]], moved: bool) -> None:
        if moved:
            self._drop_graphs()
        key = (index, tuple(sorted(shapes.items())))
        if key not in self._graphs:
            self._prepare(index, shapes)
            self._enqueue()  # once outside a capture: the first call of a shape may allocate
            self._cuda.call("cudaStreamSynchronize", self._stream)
            if len(self._graphs) >= MAX_GRAPHS:
                self._drop_graphs()
            self._cuda.begin_capture(self._stream)
            self._enqueue()
            self._graphs[key] = self._cuda.end_capture(self._stream)
        self._cuda.call("cudaGraphLaunch", self._graphs[key], self._stream)

    def _prepare(self, index: int, shapes: dict[str, tuple[int, ...]]) -> None:
        if index != self._profile:
            self._context.set_optimization_profile_async(index, int(self._stream))
            self._profile = index
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.address)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError(f"{self._spec.name}: the engine failed; free GPU memory or check the driver")

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self._cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()

    def close(self) -> None:
        """Free the engine and its memory."""
        self._drop_graphs()
        for buffer in self._buffers.values():
            buffer.free()
        del self._context, self._engine, self._runtime
        self._cuda.call("cudaStreamDestroy", self._stream)


def check_graph(bundle: Bundle, component: str, precision: str, engines: Sequence[Engine]) -> None:
    """Refuse engines of another graph than the bundle's.

    Raises:
        BackendError: no engine of that precision, or none of the bundle's own graph.
    """
    part = bundle.manifest.components[component]
    if not engines:
        others = sorted({engine.precision for engine in part.engines})
        raise BackendError(
            f"{bundle.folder}: {component} has no {precision} engine, only {', '.join(others) or 'none'}; build it "
            f"with `ldm-export build --precision {precision} --target tensorrt-rtx --compute-capability …`"
        )
    digest = bundle.manifest.files[part.graphs[precision]].sha256 if precision in part.graphs else "none"
    for engine in engines:
        if engine.graph != digest:
            raise BackendError(
                f"{engine.file}: built from a graph of sha256 {engine.graph}, the bundle's is {digest}; "
                f"{_rebuild(engine)}"
            )


def open_package(engines: Sequence[Engine]) -> Any:
    """The module that runs the first of these engines.

    Raises:
        BackendError: unknown, or not installed.
    """
    name = engines[0].package
    if name not in MODULES:
        raise BackendError(f"{engines[0].file}: package {name!r:.40} is none of {', '.join(MODULES)}; rebuild it")
    try:
        return importlib.import_module(MODULES[name])
    except ImportError:
        raise BackendError(f'{MODULES[name]} is not installed; `pip install "ldm-export[{name}]"`') from None


def choose(component: str, engines: Sequence[Engine], version: str, capability: str) -> Engine:
    """The engine for this version and this GPU.

    Raises:
        BackendError: none; says what was found and what is needed.
    """
    for engine in engines:
        if engine.version == version and (not engine.compute_capabilities or capability in engine.compute_capabilities):
            return engine
    engine = engines[0]
    if engine.version != version:
        raise BackendError(
            f"{engine.file}: built by {engine.package} {engine.version}, here is {version}; install that version or "
            f"{_rebuild(engine)}"
        )
    raise BackendError(
        f"{component}: its engines are for compute capability {', '.join(engine.compute_capabilities)}, this GPU has "
        f"{capability}; {_rebuild(engine, capability)}"
    )


def result_shape(spec: ComponentSpec, shapes: dict[str, tuple[int, ...]], tensor: TensorSpec) -> tuple[int, ...]:
    """The shape of an output for inputs of these shapes, by the axes they share."""
    sizes = {
        dim.name: size // dim.scale
        for given in spec.inputs
        for dim, size in zip(given.shape, shapes[given.name], strict=True)
        if isinstance(dim, Axis)
    }
    shape = tuple(sizes[dim.name] * dim.scale if isinstance(dim, Axis) else dim for dim in tensor.shape)
    assert prod(shape) > 0
    return shape


def _rebuild(engine: Engine, capability: str | None = None) -> str:
    capabilities = capability or ",".join(engine.compute_capabilities)
    option = f" --compute-capability {capabilities}" if capabilities else ""
    return f"rebuild with `ldm-export build --precision {engine.precision} --target {engine.package}{option}`"
