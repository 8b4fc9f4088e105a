"""The engines TensorRT and TensorRT for RTX: engines of a bundle, run through cuda-python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.cuda import Buffer, Cuda, empty
from ldm_runtime.backends.driver import installed_gpu, no_gpu
from ldm_runtime.backends.engine import Choice, Loader, Placement, Wish, pipeline_components, step_graphs
from ldm_runtime.backends.engine_match import RUNTIMES, MatchedEngine, engines_of, find_engine, match_engine
from ldm_runtime.backends.host import is_installed
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.memory import cuda_memory
from ldm_runtime.backends.tensorrt_device import TensorRtLauncher
from ldm_runtime.backends.tensorrt_engine import LoadedEngine
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import DeviceLoop, slots_of
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.errors import BackendError, UnsupportedError
from ldm_runtime.installation import install_command
from ldm_runtime.model import SHALLOW_UNET, UNET
from ldm_runtime.specs import check_feed, sizes_of

__all__ = ["TensorRtBackend", "TensorRtEngine", "TensorRtLoader"]

RANK = 10


class TensorRtBackend(SpecBackend):
    """Runs one engine of a bundle. Buffers stay on the device; copies and work run in the order of one stream.

    Args:
        matched: An engine that runs on this machine.

    Raises:
        BackendError: There is no GPU, or the engine does not load.
    """

    def __init__(self, matched: MatchedEngine):
        self.engine = LoadedEngine(matched)
        self._spec, self._cuda = self.engine.spec, self.engine.cuda
        self._stream = self._cuda.call("cudaStreamCreate")
        self._buffers = {t.name: Buffer(self._cuda) for t in (*self._spec.inputs, *self._spec.outputs)}

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the engine once.

        Raises:
            SpecError: The feed does not fit the spec.
            BackendError: Its shapes fit no profile of the engine, or the GPU failed.
        """
        check_feed(self._spec, feed)
        inputs = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        shapes = {name: array.shape for name, array in inputs.items()}
        sizes = sizes_of(self._spec, shapes)
        results = {t.name: empty(t.shape_at(sizes), t.dtype) for t in self._spec.outputs}
        arrays = {**inputs, **results}
        self._cuda.call("cudaDeviceSynchronize")  # a device loop may have launched this engine on its own stream
        addresses = {name: self._buffers[name].hold(array.nbytes) for name, array in arrays.items()}
        for name, array in inputs.items():
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


@dataclass(frozen=True)
class TensorRtLoader:
    """Loads a component from an engine that has been matched and checked."""

    matched: MatchedEngine

    def __call__(self) -> TensorRtBackend:
        """Load the engine."""
        return TensorRtBackend(self.matched)


class TensorRtEngine:
    """Descriptor of TensorRT and TensorRT for RTX, as ``backends.engine.Engine``."""

    name = "tensorrt"
    extra = "tensorrt-rtx"

    def available(self) -> str | None:
        """None if one of the packages is installed, otherwise how to install one."""
        if any(map(is_installed, RUNTIMES.values())):
            return None
        return f"not installed; `{install_command(self.extra)}`"

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        """Yield the bundle's engines of the precision asked for.

        Raises:
            UnsupportedError: The CPU is asked for, or a component has no engine.
            BackendError: There is no GPU or no driver that can be used, or no engine of a component runs here: see
                ``engine_match.find_engine``.
        """
        if wish.device == "cpu":
            raise UnsupportedError("tensorrt runs on a GPU; leave device out, or use backend onnxruntime")
        precision, names = wish.precision or bundle.precision, pipeline_components(bundle.manifest.model)
        for name in names:
            engines_of(bundle, name, precision)
        gpu = installed_gpu()
        if isinstance(gpu, str):
            raise no_gpu(gpu)
        for name in names:
            find_engine(bundle, name, precision, gpu)
        Cuda()
        yield Choice(self.name, "cuda", precision, precision, RANK, "the bundle has engines and there is a GPU")

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        """Find the engine for this machine, check its file and return its loader.

        Raises:
            BackendError: No engine is for this package version and GPU, or there is no GPU.
            ManifestError: The engine is not the file that was built.
        """
        return TensorRtLoader(match_engine(bundle, component, choice.graph))

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        """Return the loop on the GPU, which shares the UNet's engine with the pipeline.

        None if the bundle has no engines for its step graphs.

        Raises:
            BackendError, ManifestError: As ``open``.
        """
        steps = step_graphs(bundle.manifest.model)
        if not steps or not all(bundle.manifest.components[name].engines for name in steps):
            return None
        matched = {name: match_engine(bundle, name, "fp32") for name in steps}

        def launcher(name: str) -> TensorRtLauncher:
            backend = backends[name].load()
            if not isinstance(backend, TensorRtBackend):
                raise BackendError(f"{name}: got {type(backend).__name__}, expected a TensorRT engine")
            return TensorRtLauncher(backend.engine, cuda_memory(self.extra))

        def open_device() -> LoopDevice:
            unet, memory = launcher(UNET), cuda_memory(self.extra)
            engines = {name: LoadedEngine(engine) for name, engine in matched.items()}
            launchers = {name: TensorRtLauncher(engine, memory) for name, engine in engines.items()}

            def close() -> None:
                for engine in engines.values():
                    engine.close()

            return LoopDevice(
                memory, {**launchers, UNET: unet}, close=close, load_shallow=lambda: launcher(SHALLOW_UNET)
            )

        slots, shallow = slots_of(matched[steps[0]].spec), SHALLOW_UNET in backends
        return DeviceLoop(open_device, slots, backends[UNET].lock, shallow=shallow)
