"""Which engine runs a bundle, on which of its graphs, computing in which precision: as asked, or the fastest here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ldm_runtime.backends.engine_match import MODULES
from ldm_runtime.backends.onnxruntime import DEVICES, load_onnxruntime
from ldm_runtime.backends.openvino import has_bf16
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError
from ldm_runtime.manifest import COMPONENTS

BACKENDS = ("auto", "onnxruntime", "openvino", "tensorrt")

SMALL = 100 * 10**6
"""Bytes of a UNet in fp32 below which one picture is there sooner with ONNX Runtime: OpenVINO draws it faster, but
compiles longer than that before. With 22 MB, 0.6 s against 1.4 s from start to end; with more a guess."""


@dataclass(frozen=True)
class Choice:
    """What runs a bundle.

    Attributes:
        backend: "onnxruntime", "openvino" or "tensorrt".
        device: of onnxruntime: "auto", "cpu" or "cuda".
        graph: the precision whose graphs are run: "fp32", "fp16", "bf16" or "int8".
        arithmetic: what sums and products are computed in, where the graph leaves it to the engine.
        reason: why, in a few words.
    """

    backend: str
    device: str
    graph: str
    arithmetic: str
    reason: str

    def facts(self) -> dict[str, str]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.backend}, {self.graph} graphs computed in {self.arithmetic}: {self.reason}"


def choose(
    bundle: Bundle,
    backend: str = "auto",
    precision: str | None = None,
    device: str = "auto",
    *,
    once: bool = False,
) -> Choice:
    """Decide what runs a bundle; nothing of it is loaded.

    "auto" takes, of what is installed and has what it needs here: TensorRT with an engine in the bundle, ONNX Runtime
    on CUDA, OpenVINO, ONNX Runtime on the CPU; for a small model that is run ``once``, the latter before OpenVINO.
    OpenVINO computes in bf16 where the CPU does, unless ``precision`` is "fp32"; the others in their graphs' precision.

    Raises:
        BackendError: the backend is unknown or not installed, or the CPU lacks what was asked for.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend: got {backend!r:.40}, expected one of {', '.join(BACKENDS)}")
    if backend == "openvino" and device == "cuda":
        raise BackendError("openvino runs on the CPU; leave device out, or use backend onnxruntime")
    graph = precision or bundle.precision
    if backend == "openvino":
        return _openvino(bundle, precision, "as asked")
    if backend != "auto":
        return Choice(backend, device, graph, graph, "as asked")
    for choice in _candidates(bundle, graph, precision, device, once):
        return choice
    raise BackendError('no engine is installed; `pip install "ldm-export[openvino]"` (or [onnxruntime], [gpu])')


def runs_on_cuda(choice: Choice) -> bool:
    """True where ONNX Runtime will run on a GPU: it was asked for, or it is there."""
    return choice.device == "cuda" or (choice.device == "auto" and _has_gpu() and _has_cuda_provider())


def _candidates(bundle: Bundle, graph: str, precision: str | None, device: str, once: bool) -> Iterator[Choice]:
    if device in ("auto", "cuda"):
        if _has_engines(bundle, graph) and _has_gpu():
            yield Choice("tensorrt", device, graph, graph, "the bundle has engines and there is a GPU")
        if find_spec("onnxruntime") and (device == "cuda" or (_has_gpu() and _has_cuda_provider())):
            yield Choice("onnxruntime", device, graph, graph, "it has a CUDA provider")
    if device in ("auto", "cpu"):
        exact = precision in (None, "fp32") and graph != "int8"
        if once and exact and find_spec("onnxruntime") and _is_small(bundle):
            yield Choice("onnxruntime", "cpu", "fp32", "fp32", "the soonest done with one picture of so small a model")
        if find_spec("openvino") and (precision != "bf16" or has_bf16()):
            yield _openvino(bundle, precision, "the fastest installed for this CPU")
        if find_spec("onnxruntime"):
            yield Choice("onnxruntime", "cpu", graph, graph, "openvino, which is faster, is not installed")


def _openvino(bundle: Bundle, precision: str | None, reason: str) -> Choice:
    """OpenVINO rounds fp32 graphs to bf16 by itself; what is not quantised in int8 graphs likewise."""
    asked = precision or bundle.precision
    if precision == "bf16" and not has_bf16():
        raise BackendError("precision: got bf16, in which this CPU does not compute; use fp32")
    if precision in ("fp32", "fp16"):
        return Choice("openvino", "cpu", precision, "fp32", reason)
    return Choice("openvino", "cpu", "int8" if asked == "int8" else "fp32", "bf16" if has_bf16() else "fp32", reason)


def _is_small(bundle: Bundle) -> bool:
    name, files = bundle.manifest.components["unet"].graphs.get("fp32", ""), bundle.manifest.files
    return 0 < sum(files[part].size for part in (name, f"{name}.data") if part in files) < SMALL


def _has_engines(bundle: Bundle, precision: str) -> bool:
    engines = [[e for e in bundle.manifest.components[name].engines if e.precision == precision] for name in COMPONENTS]
    return all(engines) and find_spec(MODULES.get(engines[0][0].package, "none")) is not None


def _has_gpu() -> bool:
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def _has_cuda_provider() -> bool:
    return DEVICES["cuda"] in load_onnxruntime().get_available_providers()
