"""The engines of this package. To add one, write its module and list its descriptor here."""

from __future__ import annotations

from collections.abc import Mapping

from ldm_runtime.backends.engine import Engine
from ldm_runtime.backends.onnxruntime import OnnxRuntimeEngine
from ldm_runtime.backends.openvino import OpenVinoEngine
from ldm_runtime.backends.tensorrt import TensorRtEngine

__all__ = ["AUTO", "BACKENDS", "BACKEND_NAMES"]

BACKENDS: Mapping[str, Engine] = {
    engine.name: engine for engine in (OnnxRuntimeEngine(), OpenVinoEngine(), TensorRtEngine())
}
"""Name of an engine -> its descriptor."""
AUTO = "auto"
"""Backend name that selects the fastest engine available on this machine."""
BACKEND_NAMES = (AUTO, *BACKENDS)
"""Valid values of ``backend``."""
