"""The engine ONNX Runtime: on CUDA if its provider is installed and the driver has a GPU, otherwise on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend, Feed, SpecBackend
from ldm_runtime.backends.device_backend import DeviceBackend
from ldm_runtime.backends.engine import Choice, Placement, WeightChange, Wish, step_graphs
from ldm_runtime.backends.host import first_line, is_installed
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.memory import memory_of
from ldm_runtime.backends.onnxruntime_cuda import GPU_EXTRA, check_cuda, has_cuda_build
from ldm_runtime.backends.onnxruntime_launcher import Mode, OnnxRuntimeLauncher
from ldm_runtime.backends.onnxruntime_session import (
    EXTRA,
    Opening,
    load_onnxruntime,
    open_session,
    providers,
    session_options,
)
from ldm_runtime.backends.page_release import release_freed_memory
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CPU_VARIANT, CUDA_VARIANT, files_of_graph
from ldm_runtime.device_loop import DeviceLoop, slots_of
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.errors import BackendError, UnsupportedError
from ldm_runtime.installation import install_command
from ldm_runtime.loras.changes import ChangedWeight
from ldm_runtime.model import DENOISERS, SHALLOW_UNET, UNET
from ldm_runtime.specs import ComponentSpec, check_feed
from ldm_runtime.verified_file import GraphFile, VerifiedFile

__all__ = [
    "OnnxRuntimeBackend",
    "OnnxRuntimeEngine",
    "OnnxRuntimeLoader",
    "open_session",
    "providers",
    "session_options",
]

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
        changes: Weights that get other values than those of the graph.

    Raises:
        BackendError: onnxruntime is not installed, the device is not available, or the graph does not load.
    """

    def __init__(
        self,
        graph: GraphFile,
        spec: ComponentSpec,
        device: str = "auto",
        threads: int | None = None,
        changes: Sequence[ChangedWeight] = (),
    ):
        self._spec = spec
        self._session, _, self.device = open_session(graph, spec, Opening(device, threads, changes=changes))

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
        release_freed_memory()


@dataclass(frozen=True)
class OnnxRuntimeLoader:
    """Loads a component whose graph has been checked.

    Attributes:
        graph: The graph.
        spec: Inputs and outputs, as callers see them.
        placement: Where it runs.
        half: True if the graph may have float16 where the spec says float32.
        changes: Weights that get other values than those of the graph.
    """

    graph: VerifiedFile
    spec: ComponentSpec
    placement: Placement
    half: bool = False
    changes: Sequence[ChangedWeight] = ()

    def __call__(self) -> Backend:
        """Load the component. On CUDA its calls are captured, so that they cost one launch each."""
        if self.placement.device != "cuda":
            placement = self.placement
            return OnnxRuntimeBackend(self.graph, self.spec, placement.device, placement.threads, self.changes)
        launcher = self.launcher()
        return DeviceBackend(launcher, self.spec, memory_of("cuda", GPU_EXTRA))

    def launcher(self) -> OnnxRuntimeLauncher:
        """Load the component to run on device memory. Only denoisers get a session for each set of shapes."""
        memory = memory_of(self.placement.device, GPU_EXTRA)
        modes = tuple(Mode) if self.spec.name in DENOISERS else (Mode.FREE, Mode.PLAIN)
        return OnnxRuntimeLauncher(
            self.graph,
            self.spec,
            memory,
            half=self.half,
            modes=modes,
            threads=self.placement.threads,
            changes=self.changes,
        )


class OnnxRuntimeEngine:
    """Descriptor of ONNX Runtime, as ``backends.engine.Engine``."""

    name = "onnxruntime"
    extra = EXTRA

    def available(self) -> str | None:
        """None if onnxruntime is installed, otherwise why it cannot be used."""
        return None if is_installed("onnxruntime") else f"not installed; `{install_command(self.extra)}`"

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        """Yield CUDA if it can be used, then the CPU, on the graphs of the precision asked for.

        For one image of a small model, fp32 on the CPU follows. The CPU has no kernels for bf16: there a bundle built
        for bf16 runs in fp32.

        Raises:
            UnsupportedError: bf16 is requested on the CPU.
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

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> OnnxRuntimeLoader:
        """Check a component's graph and return its loader. The variant of the graph for the device is preferred.

        Raises:
            ManifestError: A file is not the one that was built, or there is no graph of that precision.
        """
        variant = CPU_VARIANT if placement.device == "cpu" else CUDA_VARIANT
        part = bundle.manifest.components[component]
        graph = bundle.verified_graph(component, choice.graph, variant)
        half = variant == CUDA_VARIANT and choice.graph in part.variants.get(variant, {})
        return OnnxRuntimeLoader(graph, part.spec, placement, half)

    def open_changed(
        self, bundle: Bundle, component: str, choice: Choice, placement: Placement, change: WeightChange
    ) -> OnnxRuntimeLoader | None:
        """As ``backends.engine.WeightChanger``."""
        loader = self.open(bundle, component, choice, placement)
        changes = change(loader.graph)
        return replace(loader, changes=changes) if changes else None

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        """Return the loop on CUDA. It shares the sessions of the UNet and of the components that derive its inputs.

        None on the CPU, and for a bundle without step graphs.

        Raises:
            ManifestError: A step graph is not the file that was built.
        """
        model, precise = bundle.manifest.model, replace(choice, graph="fp32")
        steps = step_graphs(model)
        if placement.device != "cuda" or not steps:
            return None
        loaders = {name: self.open(bundle, name, precise, placement) for name in steps}
        derived = frozenset(spec.name for runs in ("request", "schedule") for spec in model.once_per(runs))
        slots = slots_of(loaders[steps[0]].spec)
        lock, shallow = backends[UNET].lock, SHALLOW_UNET in backends
        return DeviceLoop(lambda: _loop_device(backends, loaders, derived), slots, lock, shallow=shallow)


def _loop_device(
    backends: Mapping[str, LazyBackend], loaders: Mapping[str, OnnxRuntimeLoader], derived: frozenset[str]
) -> LoopDevice:
    """Return the device of a loop. The step graphs are loaded by ``loaders``, other components by their backends."""
    steps = {name: loader.launcher() for name, loader in loaders.items()}
    launchers = dict(steps)
    for name in (UNET, *derived):
        launchers[name] = _launcher(backends, name)

    def close() -> None:
        for one in steps.values():
            one.close()

    return LoopDevice(
        memory_of("cuda", GPU_EXTRA), launchers, derived, close, lambda: _launcher(backends, SHALLOW_UNET)
    )


def _launcher(backends: Mapping[str, LazyBackend], name: str) -> OnnxRuntimeLauncher:
    backend = backends[name].load()
    if not isinstance(backend, DeviceBackend):
        raise BackendError(f"{name}: got {type(backend).__name__}, expected a component on a device")
    return backend.launcher


def _is_small(bundle: Bundle) -> bool:
    graph, files = bundle.manifest.components[UNET].graphs.get("fp32"), bundle.manifest.files
    return graph is not None and sum(files[name].size for name in files_of_graph(graph, files)) < SMALL_UNET
