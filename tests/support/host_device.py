"""The device of a denoising loop on the CPU: the code that runs on a GPU, with memory of the host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ldm_runtime.backends.memory import HostMemory
from ldm_runtime.backends.onnxruntime_launcher import OnnxRuntimeLauncher
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.specs import ComponentSpec

__all__ = ["host_device"]


def host_device(
    graphs: Mapping[str, tuple[Path, ComponentSpec]], derived: tuple[str, ...] = (), *, half: bool = False
) -> LoopDevice:
    """A device that runs graphs (component -> file and spec) with ONNX Runtime on the CPU."""
    memory = HostMemory()
    launchers = {name: OnnxRuntimeLauncher(*graph, memory, half=half) for name, graph in graphs.items()}

    def close() -> None:
        assert memory.used() == 0

    shallow = launchers.pop("shallow_unet", None)
    return LoopDevice(memory, launchers, frozenset(derived), close, None if shallow is None else lambda: shallow)
