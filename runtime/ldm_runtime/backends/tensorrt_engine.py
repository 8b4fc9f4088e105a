"""One loaded TensorRT engine, launched on device memory as a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.engine_advice import rebuild_command
from ldm_runtime.backends.engine_match import MatchedEngine
from ldm_runtime.backends.tensorrt_log import error_log, one_line
from ldm_runtime.errors import BackendError

__all__ = ["LoadedEngine"]

MAX_GRAPHS = 16
"""Maximum number of cached CUDA graphs, one for each set of input shapes and addresses."""
Shapes = Mapping[str, tuple[int, ...]]


class LoadedEngine:
    """A loaded engine that runs on memory of the caller. Each set of shapes is captured as one CUDA graph.

    Args:
        matched: An engine that runs on this machine.

    Raises:
        BackendError: There is no GPU, or the engine does not load.
        ManifestError: The bundle was replaced after the engine had been verified.
    """

    def __init__(self, matched: MatchedEngine):
        self.spec, self._facts, file, package = matched.spec, matched.facts, matched.file.path, matched.package
        self.cuda = Cuda()
        self._log = error_log(package)
        self._runtime = package.Runtime(self._log)
        content = file.read_bytes()
        matched.file.check()
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise BackendError(
                f"{file}: {package.__name__} cannot load it: {one_line(self._log.first())}; free GPU memory, or "
                f"{rebuild_command(self._facts)}"
            )
        self._context = _context(package, self._engine)
        if self._context is None:
            raise BackendError(f"{file}: cannot be prepared to run: {one_line(self._log.first())}; free GPU memory")
        self._graphs: dict[Any, Any] = {}
        self._profile = 0

    def launch(self, shapes: Shapes, addresses: Mapping[str, int], stream: Any) -> None:
        """Run the engine in stream order. It may still be running when this returns.

        Args:
            shapes: Input name -> shape.
            addresses: Name of each input and output -> its address on the device.
            stream: CUDA stream.

        Raises:
            BackendError: The shapes fit no profile of the engine, or the GPU failed.
        """
        index = self._facts.fitting(dict(shapes))
        if index is None:
            raise BackendError(
                f"{self.spec.name}: the engine takes no inputs of shapes {dict(shapes)}; build it with wider --batch, "
                "--height, --width or --chunks"
            )
        key = (index, tuple(sorted(shapes.items())), tuple(sorted(addresses.items())))
        if key not in self._graphs:
            self._prepare(index, shapes, addresses, stream)
            self._enqueue(stream)  # outside a capture, because the first call of a shape may allocate memory
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
            reason = one_line(self._log.first())
            raise BackendError(f"{self.spec.name}: the engine failed: {reason}; free GPU memory or check the driver")

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self.cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()

    def close(self) -> None:
        """Free the engine. Its last launch must have finished."""
        self._drop_graphs()
        del self._context, self._engine, self._runtime


def _context(package: Any, engine: Any) -> Any:
    """Return an execution context, or None if there is no memory for it.

    TensorRT for RTX compiles the kernels of a shape before its first call.
    """
    strategy = getattr(package, "DynamicShapesKernelSpecializationStrategy", None)
    if strategy is None:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
    return engine.create_execution_context(config)
