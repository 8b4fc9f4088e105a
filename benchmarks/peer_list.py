"""Lists the runtimes that ``peers.py`` measures, and the conversions that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

REFERENCE = "diffusers fp32"
CONVERSIONS = {
    "unet.onnx": ("convert.py", "onnx"),
    "unet.xml": ("convert.py", "openvino"),
    "unet-int8.xml": ("convert.py", "int8"),
    "pipeline-onnxruntime": ("convert_pipeline.py", "onnxruntime"),
    "pipeline-openvino": ("convert_pipeline.py", "openvino"),
}
"""File or folder -> script of ``peer_workers`` that writes it, and its argument; in the order of their creation."""


@dataclass(frozen=True)
class Peer:
    """A runtime to time.

    Attributes:
        script: Worker script.
        environment: Environment of the worker; "" is this one.
        settings: Settings of the worker.
        share: Bytes of memory per byte of the UNet's weights.
        needs: Keys of ``CONVERSIONS``.
    """

    script: str
    environment: str
    settings: dict[str, Any]
    share: float
    needs: tuple[str, ...] = ()

    @property
    def changes_image(self) -> bool:
        """True if steps are saved, so that a single step says nothing about an image."""
        return any(self.settings.get(name, 1) > 1 for name in ("every", "cache_every"))


def torch_peer(dtype: str, compiled: bool = False) -> Peer:
    settings = {"dtype": dtype, "compile": compiled}
    return Peer("torch_worker.py", "torch", settings, (0.6 if dtype == "bfloat16" else 1.1) + 0.3 * compiled)


def openvino_peer(unet: str, share: float, *needs: str) -> Peer:
    return Peer("openvino_worker.py", "optimum", {"unet": unet, "precision": "bf16"}, share, (*needs, unet))


def optimum_pipeline(engine: str, share: float) -> Peer:
    """A pipeline of optimum itself."""
    return Peer("pipeline_worker.py", "optimum", {"engine": engine}, share, (f"pipeline-{engine}",))


def ours(backend: str, precision: str, share: float, every: int = 1, cache_every: int = 1) -> Peer:
    settings = {"backend": backend, "precision": precision, "every": every, "cache_every": cache_every}
    return Peer("ours_worker.py", "", settings, share)


OURS = {
    "ldm-export onnxruntime fp32": ours("onnxruntime", "fp32", 1.4),
    "ldm-export openvino fp32": ours("openvino", "fp32", 2.1),
    "ldm-export float": ours("auto", "float", 1.6),
    "ldm-export int8": ours("auto", "int8", 0.6),
    "ldm-export float, guidance each 3rd step": ours("auto", "float", 1.6, every=3),
    "ldm-export int8, guidance each 3rd step": ours("auto", "int8", 1.2, every=3),
    "ldm-export float, features of each 3rd step": ours("auto", "float", 1.8, cache_every=3),
    "ldm-export int8, features of each 3rd step": ours("auto", "int8", 0.8, cache_every=3),
    "ldm-export float, features of each 5th step": ours("auto", "float", 1.8, cache_every=5),
    "ldm-export int8, features of each 5th step": ours("auto", "int8", 0.8, cache_every=5),
    "ldm-export int8, features of each 5th step, guidance each 2nd": ours("auto", "int8", 1.4, 2, 5),
}
"""Those after "int8" save work between steps; their steps are those of the two runtimes before."""
PEERS = {
    REFERENCE: torch_peer("float32"),
    "diffusers bf16": torch_peer("bfloat16"),
    "torch.compile fp32": torch_peer("float32", True),
    "torch.compile bf16": torch_peer("bfloat16", True),
    "optimum-onnx fp32": Peer("onnxruntime_worker.py", "optimum", {}, 1.4, ("unet.onnx",)),
    "optimum-intel bf16": openvino_peer("unet.xml", 1.6),
    "optimum-intel int8": openvino_peer("unet-int8.xml", 0.6, "unet.xml"),
    **OURS,
}


def stable_diffusion_peers() -> dict[str, Peer]:
    """Return the runtimes for Stable Diffusion, for which optimum has pipelines."""
    optimum = {
        "optimum-onnx fp32": optimum_pipeline("onnxruntime", 2.2),
        "optimum-intel bf16": optimum_pipeline("openvino", 2.2),
    }
    return {**optimum, **OURS}
