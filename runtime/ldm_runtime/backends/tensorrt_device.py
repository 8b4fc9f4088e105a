"""TensorRT as a ``device.Launcher``: engines that run on given memory, in the order of its stream."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_runtime.backends.memory import CudaMemory
from ldm_runtime.backends.tensorrt_engine import LoadedEngine
from ldm_runtime.device import Region
from ldm_runtime.specs import ComponentSpec

__all__ = ["TensorRtLauncher"]


class _BoundEngine:
    """An engine with inputs and outputs at fixed addresses."""

    def __init__(self, engine: LoadedEngine, tensors: Mapping[str, Region], memory: CudaMemory):
        self._engine, self._memory = engine, memory
        self._shapes = {tensor.name: tensors[tensor.name].shape for tensor in engine.spec.inputs}
        self._addresses = {name: region.address for name, region in tensors.items()}

    def run(self) -> None:
        """Run the engine in the order of the stream."""
        self._engine.launch(self._shapes, self._addresses, self._memory.stream)

    def close(self) -> None:
        """Nothing to free: ``LoadedEngine.close`` frees the captured graphs."""


class TensorRtLauncher:
    """Runs a loaded engine on memory of the GPU.

    Args:
        engine: The engine, which this class does not close.
        memory: The GPU's memory.
    """

    def __init__(self, engine: LoadedEngine, memory: CudaMemory):
        self._engine, self._memory = engine, memory

    @property
    def spec(self) -> ComponentSpec:
        """Inputs and outputs of the engine."""
        return self._engine.spec

    def prepare(self, tensors: Mapping[str, Region], *, repeated: bool) -> _BoundEngine:
        """Bind inputs and outputs; as ``device.Launcher.prepare``."""
        call = _BoundEngine(self._engine, tensors, self._memory)
        if repeated:
            call.run()
        return call
