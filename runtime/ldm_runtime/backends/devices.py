"""From a choice to the device that the denoising loop stays on: TensorRT's, or ONNX Runtime's on CUDA."""

from __future__ import annotations

from collections.abc import Callable

from ldm_runtime.backends import Backend
from ldm_runtime.backends.onnxruntime_device import OnnxRuntimeDevice
from ldm_runtime.backends.selection import Choice, runs_on_cuda
from ldm_runtime.backends.tensorrt import LoadedEngine, TensorRtBackend
from ldm_runtime.backends.tensorrt_device import TensorRtDevice
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import GUIDED_STEP, STEP, Device, DeviceLoop
from ldm_runtime.errors import BackendError

STEPS = (STEP, GUIDED_STEP)


def device_loop(bundle: Bundle, choice: Choice, load_unet: Callable[[], Backend]) -> DeviceLoop | None:
    """The loop on the device that ``choice`` runs on; None on a CPU, and for a bundle without the graphs of its steps.

    Raises:
        ManifestError: a graph is not what was built.
    """
    components = bundle.manifest.components
    if any(name not in components for name in STEPS):
        return None
    if choice.backend == "tensorrt":
        if not all(components[name].engines for name in STEPS):
            return None
        return DeviceLoop(lambda: _tensorrt(bundle, load_unet()))
    if choice.backend == "onnxruntime" and runs_on_cuda(choice):
        precisions = {"unet": choice.graph, **dict.fromkeys(STEPS, "fp32")}
        graphs = {name: (bundle.graph(name, graph), components[name].spec) for name, graph in precisions.items()}
        return DeviceLoop(lambda: OnnxRuntimeDevice(graphs))
    return None


def _tensorrt(bundle: Bundle, unet: Backend) -> Device:
    if not isinstance(unet, TensorRtBackend):
        raise BackendError(f"unet: got {type(unet).__name__}, expected an engine of TensorRT")
    return TensorRtDevice(unet.engine, lambda name: LoadedEngine(bundle, name, "fp32"))
