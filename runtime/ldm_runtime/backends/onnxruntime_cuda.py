"""Checks whether ONNX Runtime can use the GPU of this machine: CUDA provider, driver, and their CUDA versions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ldm_runtime.backends.driver import check_driver, installed_gpu
from ldm_runtime.backends.host import import_engine
from ldm_runtime.backends.onnxruntime_session import load_onnxruntime, providers
from ldm_runtime.errors import BackendError

__all__ = ["GPU_EXTRA", "check_cuda", "has_cuda_build"]

GPU_EXTRA = "gpu"
"""Extra of ldm-export that installs ONNX Runtime with CUDA, and cuda-python."""


def has_cuda_build() -> bool:
    """True if the installed onnxruntime was built with CUDA. It is not imported."""
    spec = importlib.util.find_spec("onnxruntime")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return any((Path(folder) / "capi/libonnxruntime_providers_cuda.so").exists() for folder in folders)


def check_cuda() -> None:
    """Check that ONNX Runtime can use the GPU. Memory and CUDA's libraries are checked when a graph is loaded.

    Raises:
        BackendError: There is no GPU, onnxruntime or cuda-python cannot be loaded, onnxruntime has no CUDA provider, or
            the driver is too old.
    """
    if not has_cuda_build():  # its advice is the useful one, whatever the driver says
        providers("cuda", load_onnxruntime().get_available_providers())
    gpu = installed_gpu()
    if isinstance(gpu, str):
        raise BackendError(f"{gpu}; install the driver of the GPU, or use device cpu")
    import_engine("cuda.bindings.runtime", GPU_EXTRA)
    onnxruntime = load_onnxruntime()
    providers("cuda", onnxruntime.get_available_providers())
    check_driver(gpu, "onnxruntime", getattr(onnxruntime, "cuda_version", ""))
