"""The engine ONNX Runtime: on CUDA if its provider is installed and the driver has a GPU, otherwise on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.engine import Choice, Loader, Placement, Wish, step_graphs
from ldm_runtime.backends.host import first_line, is_installed
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.onnxruntime_cuda import check_cuda, has_cuda_build
from ldm_runtime.backends.onnxruntime_device import OnnxRuntimeDevice
from ldm_runtime.backends.onnxruntime_session import (
    EXTRA,
    load_onnxruntime,
    open_session,
    providers,
    session_options,
)
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import files_of_graph
from ldm_runtime.device_loop import DeviceLoop, slots_of
from ldm_runtime.errors import BackendError, UnsupportedError
from ldm_runtime.model import UNET
from ldm_runtime.specs import ComponentSpec, check_feed
from ldm_runtime.verified_file import GraphFile, VerifiedFile

__all__ = [
    "CPU_VARIANT",
    "OnnxRuntimeBackend",
    "OnnxRuntimeEngine",
    "OnnxRuntimeLoader",
    "open_session",
    "providers",
    "session_options",
]

CPU_VARIANT = "onnxruntime-cpu"
"""Variant of a graph with ONNX Runtime's own operators for the CPU, e.g. its fused attention."""
SMALL_UNET = 100 * 10**6
"""Bytes of an fp32 UNet below which ONNX Runtime generates a single image sooner than OpenVINO. OpenVINO samples
faster, but its compilation takes longer than that saves: 0.6 s against 1.4 s in total for a UNet of 22 MB. Larger
models were not measured."""
CUDA_RANK, SMALL_RANK, CPU_RANK = 20, 30, 50


class OnnxRuntimeBackend(SpecBackend):
    """Runs one ONNX graph with ONNX Runtime through IO binding.

    Args:
        graph: Path of the ``.onnx`` file. External weights lie beside it.
        spec: Inputs and outputs of the graph.
        device: "cpu", "cuda", or "auto" for CUDA if a GPU can be used and the CPU otherwise.
        threads: CPU threads of one operator. None means all cores that this process may use.

    Raises:
        BackendError: onnxruntime is not installed, the device is not available, or the graph does not load.
    """

    def __init__(self, graph: GraphFile, spec: ComponentSpec, device: str = "auto", threads: int | None = None):
        self._spec = spec
        self._session, self.device = open_session(graph, spec, device, threads)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Raises:
            SpecError: The feed does not fit the spec.
            BackendError: onnxruntime failed, e.g. because memory ran out.
        """
        check_feed(self._spec, feed)
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for tensor in self._spec.outputs:
            binding.bind_output(tensor.name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises exceptions of its C++ code, which have no common class
            raise BackendError(f"{self._spec.name}: onnxruntime failed: {first_line(error)}") from None
        names = [tensor.name for tensor in self._spec.outputs]
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def close(self) -> None:
        """Free the session."""
        del self._session


@dataclass(frozen=True)
class OnnxRuntimeLoader:
    """Loads a component whose graph has been checked."""

    graph: VerifiedFile
    spec: ComponentSpec
    placement: Placement

    def __call__(self) -> OnnxRuntimeBackend:
        """Load the component."""
        return OnnxRuntimeBackend(self.graph, self.spec, self.placement.device, self.placement.threads)


class OnnxRuntimeEngine:
    """Descriptor of ONNX Runtime, as ``backends.engine.Engine``."""

    name = "onnxruntime"
    extra = EXTRA

    def available(self) -> str | None:
        """None if onnxruntime is installed, otherwise why it cannot be used."""
        return None if is_installed("onnxruntime") else f'not installed; `pip install "ldm-export[{self.extra}]"`'

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        """Yield CUDA if it can be used, then the CPU, on the graphs of the precision asked for.

        For one image of a small model, fp32 on the CPU follows. The CPU has no kernels for bf16: there a bundle built
        for bf16 runs in fp32.

        Raises:
            UnsupportedError: The CPU is to compute in bf16.
            BackendError: onnxruntime is not installed, "cuda" is asked for and cannot be used; or, after the choices of
                the CPU, onnxruntime was built with CUDA but cannot use it on this machine.
        """
        if not is_installed("onnxruntime"):
            load_onnxruntime()
        graph = wish.precision or bundle.precision
        refused: BackendError | None = None
        if wish.device == "cuda" or (wish.device == "auto" and has_cuda_build()):
            try:
                check_cuda()
            except BackendError as error:
                refused = error
            else:
                yield Choice(self.name, "cuda", graph, graph, CUDA_RANK, "onnxruntime has a CUDA provider")
        if wish.device != "cuda":
            if wish.precision == "bf16":
                raise refused or UnsupportedError("onnxruntime does not compute in bf16 on a CPU; use precision fp32")
            graph = "fp32" if graph == "bf16" else graph
            reason = "OpenVINO, which is faster on a CPU, is not installed or cannot be used"
            yield Choice(self.name, "cpu", graph, graph, CPU_RANK, reason)
            if wish.once and graph != "int8" and wish.precision in (None, "fp32") and _is_small(bundle):
                reason = "the fastest start for one image of a small model"
                yield Choice(self.name, "cpu", "fp32", "fp32", SMALL_RANK, reason)
        if refused:
            raise refused

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        """Check a component's graph and return its loader. On the CPU the variant for ONNX Runtime is preferred.

        Raises:
            ManifestError: A file is not the one that was built, or there is no graph of that precision.
        """
        graph = bundle.verified_graph(component, choice.graph, CPU_VARIANT if placement.device == "cpu" else "")
        return OnnxRuntimeLoader(graph, bundle.manifest.components[component].spec, placement)

    def device_loop(self, bundle: Bundle, choice: Choice, placement: Placement, unet: LazyBackend) -> DeviceLoop | None:
        """Return the loop on CUDA; None on the CPU, and for a bundle without step graphs.

        Raises:
            ManifestError: A step graph is not the file that was built.
        """
        loader, steps = unet.loader, step_graphs(bundle.manifest.model)
        if placement.device != "cuda" or not steps or not isinstance(loader, OnnxRuntimeLoader):
            return None
        graphs = {name: (bundle.verified_graph(name, "fp32"), bundle.manifest.components[name].spec) for name in steps}
        graphs[UNET] = loader.graph, loader.spec
        return DeviceLoop(lambda: OnnxRuntimeDevice(graphs), slots_of(graphs[steps[0]][1]))


def _is_small(bundle: Bundle) -> bool:
    graph, files = bundle.manifest.components[UNET].graphs.get("fp32"), bundle.manifest.files
    return graph is not None and sum(files[name].size for name in files_of_graph(graph, files)) < SMALL_UNET
