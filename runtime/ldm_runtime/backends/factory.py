"""From a choice to the backend of each component."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ldm_runtime.backends import Backend
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.onnxruntime_keyed import KEYED, KEYS, KeyedUNetBackend
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.backends.selection import Choice, runs_on_cuda
from ldm_runtime.backends.tensorrt import TensorRtBackend
from ldm_runtime.bundle import Bundle


def backend_factory(
    bundle: Bundle, component: str, choice: Choice, threads: int | None = None, cache: Path | None = None
) -> Callable[[], Backend]:
    """What loads a component as chosen. Its files are checked now, not when it is loaded.

    Args:
        threads: CPU threads; None takes the cores this process may use.
        cache: OpenVINO's; below it each graph gets a folder of its own, named after its digest.

    Raises:
        ManifestError: a file is not what was built.
    """
    spec = bundle.manifest.components[component].spec
    if choice.backend == "tensorrt":
        return lambda: TensorRtBackend(bundle, component, choice.graph)
    graph = bundle.graph(component, choice.graph)
    if choice.backend == "onnxruntime" and component == "unet" and _is_keyed(bundle, choice):
        keys, keyed = ((bundle.graph(name, "fp32"), bundle.manifest.components[name].spec) for name in (KEYS, KEYED))
        return lambda: KeyedUNetBackend(spec, keys, keyed, threads)
    if choice.backend == "onnxruntime":
        return lambda: OnnxRuntimeBackend(graph, spec, choice.device, threads)
    folder = None if cache is None else cache / _digest(bundle, component, choice.graph)
    constant = "context" if component == "unet" else None
    return lambda: OpenVinoBackend(graph, spec, choice.arithmetic, threads, folder, constant)


def _is_keyed(bundle: Bundle, choice: Choice) -> bool:
    held = KEYS in bundle.manifest.components and KEYED in bundle.manifest.components
    return held and choice.graph == "fp32" and not runs_on_cuda(choice)


def _digest(bundle: Bundle, component: str, precision: str) -> str:
    """A name for a graph and its weights."""
    name, files = bundle.manifest.components[component].graphs[precision], bundle.manifest.files
    return "-".join(files[part].sha256[:16] for part in (name, f"{name}.data") if part in files)
