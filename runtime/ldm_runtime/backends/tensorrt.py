"""TensorRT and TensorRT for RTX: engines driven through cuda-python, and refused before they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.cuda import Buffer, Cuda, empty
from ldm_runtime.backends.engine_match import check_graph, choose, open_package, rebuild_command
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import check_feed, sizes_of

MAX_GRAPHS = 16
"""Captured CUDA graphs kept, one for each set of input shapes and places seen."""
Shapes = Mapping[str, tuple[int, ...]]


class LoadedEngine:
    """One engine of a bundle, opened: launched on memory that the caller holds, as one CUDA graph a call.

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
        self.spec = part.spec
        engines = [engine for engine in part.engines if engine.precision == precision]
        check_graph(bundle, component, precision, engines)
        package = open_package(engines)
        self.cuda = Cuda()
        self._facts = choose(component, engines, package.__version__, self.cuda.capability())
        file = bundle.file(self._facts.file)
        self._runtime = package.Runtime(package.Logger(package.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise BackendError(f"{file}: {package.__name__} cannot load it; {rebuild_command(self._facts)}")
        self._context = _context(package, self._engine, file)
        self._graphs: dict[Any, Any] = {}
        self._profile = 0

    def launch(self, shapes: Shapes, addresses: Mapping[str, int], stream: Any) -> None:
        """Run on tensors that lie at these addresses, in the stream's order; it need not have ended on return.

        Args:
            shapes: of the inputs.
            addresses: of inputs and outputs.

        Raises:
            BackendError: the shapes fit no profile of the engine, or the GPU failed.
        """
        index = self._facts.fitting(dict(shapes))
        if index is None:
            raise BackendError(
                f"{self.spec.name}: the engine takes no inputs of shapes {dict(shapes)}; build it with wider --batch, "
                "--height or --width"
            )
        key = (index, tuple(sorted(shapes.items())), tuple(sorted(addresses.items())))
        if key not in self._graphs:
            self._prepare(index, shapes, addresses, stream)
            self._enqueue(stream)  # once outside a capture: the first call of a shape may allocate
            if not getattr(self._context, "is_stream_capturable", lambda stream: True)(int(stream)):
                return
            self.cuda.call("cudaStreamSynchronize", stream)
            if len(self._graphs) >= MAX_GRAPHS:
                self._drop_graphs()
            self.cuda.begin_capture(stream)
            self._enqueue(stream)
            self._graphs[key] = self.cuda.end_capture(stream)
            return
        self.cuda.call("cudaGraphLaunch", self._graphs[key], stream)

    def _prepare(self, index: int, shapes: Shapes, addresses: Mapping[str, int], stream: Any) -> None:
        if index != self._profile:
            self._context.set_optimization_profile_async(index, int(stream))
            self._profile = index
        for name, shape in shapes.items():
            self._context.set_input_shape(name, shape)
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)

    def _enqueue(self, stream: Any) -> None:
        if not self._context.execute_async_v3(int(stream)):
            raise BackendError(f"{self.spec.name}: the engine failed; free GPU memory or check the driver")

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self.cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()

    def close(self) -> None:
        """Free the engine; its last launch must have ended."""
        self._drop_graphs()
        del self._context, self._engine, self._runtime


class TensorRtBackend(SpecBackend):
    """Runs one engine of a bundle: buffers kept on the device, copies and work in the order of one stream.

    Arguments and errors are those of ``LoadedEngine``.
    """

    def __init__(self, bundle: Bundle, component: str, precision: str):
        self.engine = LoadedEngine(bundle, component, precision)
        self._spec, self._cuda = self.engine.spec, self.engine.cuda
        self._stream = self._cuda.call("cudaStreamCreate")
        self._buffers = {t.name: Buffer(self._cuda) for t in (*self._spec.inputs, *self._spec.outputs)}

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            SpecError: the feed does not fit the spec.
            BackendError: it fits no profile of the engine, or the GPU failed.
        """
        check_feed(self._spec, feed)
        given = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        shapes = {name: array.shape for name, array in given.items()}
        sizes = sizes_of(self._spec, shapes)
        results = {t.name: empty(t.shape_at(sizes), t.dtype) for t in self._spec.outputs}
        arrays = {**given, **results}
        addresses = {name: self._buffers[name].hold(array.nbytes) for name, array in arrays.items()}
        for name, array in given.items():
            self._cuda.upload(array, addresses[name], self._stream)
        self.engine.launch(shapes, addresses, self._stream)
        for name, array in results.items():
            self._cuda.download(addresses[name], array, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return results

    def close(self) -> None:
        """Free the engine and its memory."""
        self.engine.close()
        for buffer in self._buffers.values():
            buffer.free()
        self._cuda.call("cudaStreamDestroy", self._stream)


def _context(package: Any, engine: Any, file: Path) -> Any:
    """An execution context; TensorRT for RTX compiles each shape's kernels before its first call, not in its midst."""
    strategy = getattr(package, "DynamicShapesKernelSpecializationStrategy", None)
    if strategy is None:
        context = engine.create_execution_context()
    else:
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        context = engine.create_execution_context(config)
    if context is None:
        raise BackendError(f"{file}: no memory on the GPU to run it; free some")
    return context
