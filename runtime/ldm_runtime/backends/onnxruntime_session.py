"""ONNX Runtime sessions: options and thread policy, execution providers, and loading of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

from ldm_runtime.backends.host import first_line, import_engine, usable_cores
from ldm_runtime.backends.page_release import release_freed_memory
from ldm_runtime.backends.ports import check_ports
from ldm_runtime.errors import BackendError, LdmError
from ldm_runtime.installation import install_command
from ldm_runtime.loras.changed_files import changed_files
from ldm_runtime.loras.changes import ChangedWeight
from ldm_runtime.once import once
from ldm_runtime.specs import ComponentSpec, TensorSpec
from ldm_runtime.verified_file import GraphFile, path_of, unchanged

__all__ = [
    "EXTRA",
    "PROVIDERS",
    "CaptureRefusedError",
    "Opening",
    "load_onnxruntime",
    "open_session",
    "providers",
    "session_options",
]

EXTRA = "onnxruntime"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Device -> ONNX Runtime's execution provider."""
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}
"""ONNX Runtime's name of a tensor type -> dtype."""
_CAPTURE_REFUSED = "cannot use the graph capture feature"
"""Part of ONNX Runtime's message if a graph cannot be captured as a CUDA graph, because nodes of it run on the CPU."""


def load_onnxruntime() -> Any:
    """Import onnxruntime.

    Raises:
        BackendError: It is not installed, or its libraries cannot be loaded.
    """
    return import_engine("onnxruntime", EXTRA)


def session_options(threads: int | None = None) -> Any:
    """Return ``onnxruntime.SessionOptions`` as every session of this project uses them.

    One operator runs at a time, on all cores that this process may use. Idle threads sleep after a call, because
    other processes may need the cores. Warnings are not logged.

    Args:
        threads: Threads of one operator. None means all cores that this process may use.

    Raises:
        BackendError: onnxruntime is not installed, or its libraries cannot be loaded.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


@dataclass(frozen=True)
class Opening:
    """How a session is opened.

    Attributes:
        device: "cpu", "cuda", or "auto" for CUDA if a GPU can be used and the CPU otherwise.
        threads: As ``session_options`` takes them.
        stream: Address of the CUDA stream on which all calls run. None means a stream of the session's own.
        capture: True allows calls to be captured as CUDA graphs. The whole graph must run on the GPU.
        sizes: Symbol of a dimension -> the size to which this session fixes it.
        half: True for a graph of the variant for CUDA, which may have float16 where the spec says float32.
        changes: Weights that get other values than those of the graph.
    """

    device: str
    threads: int | None = None
    stream: int | None = None
    capture: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    half: bool = False
    changes: Sequence[ChangedWeight] = ()

    def cuda_options(self) -> dict[str, str]:
        """Options of the CUDA provider.

        Convolutions run on channels-last data, for which tensor cores are faster. A graph of the CUDA variant is
        channels-last already, and could not be captured with free dimensions if ONNX Runtime rewrote it. cuDNN selects
        kernels by its heuristic mode A, whose kernels are faster for a UNet than those of ONNX Runtime's default, mode
        B.
        """
        options = {
            "arena_extend_strategy": "kSameAsRequested",
            "prefer_nhwc": str(int(not self.half)),
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        if self.capture:
            options["enable_cuda_graph"] = "1"
        if self.stream is not None:
            options["user_compute_stream"] = str(self.stream)
        return options


class CaptureRefusedError(BackendError):
    """ONNX Runtime cannot capture a graph's calls as CUDA graphs."""


def open_session(graph: GraphFile, spec: ComponentSpec, opening: Opening) -> tuple[Any, ComponentSpec, str]:
    """Load a graph.

    Args:
        graph: Path of the ``.onnx`` file. External weights lie beside it.
        spec: Inputs and outputs of the graph.
        opening: How it is opened.

    Returns:
        The session, the spec with the session's dtypes, and the device on which it runs: "cpu" or "cuda".

    Raises:
        CaptureRefusedError: ``capture`` is True and a part of the graph does not run on the GPU.
        BackendError: onnxruntime is not installed, the device is not available, or the graph does not load.
        ManifestError: The bundle was replaced after the graph had been verified.
    """
    ort = load_onnxruntime()
    options = session_options(opening.threads)
    for symbol, size in opening.sizes.items():
        options.add_free_dimension_override_by_name(symbol, size)
    requested = providers(opening.device, ort.get_available_providers())
    if PROVIDERS["cuda"] in requested:
        _load_cuda_libraries()
    named = [(name, opening.cuda_options()) if name == PROVIDERS["cuda"] else name for name in requested]
    try:
        with changed_files(path_of(graph), opening.changes) as file:
            session = ort.InferenceSession(
                str(file),
                options,
                providers=named,
                enable_fallback=int(opening.device != "cuda"),  # it would print the reason and go on with the CPU
            )
    except LdmError:
        raise
    except Exception as error:  # onnxruntime raises exceptions of its C++ code, which have no common class
        kind = CaptureRefusedError if opening.capture and _CAPTURE_REFUSED in str(error) else BackendError
        raise kind(f"{spec.name}: onnxruntime cannot load {path_of(graph)}: {first_line(error)}") from None
    release_freed_memory()
    unchanged(graph)
    actual = "cuda" if session.get_providers()[0] == PROVIDERS["cuda"] else "cpu"
    if opening.device == "cuda" and actual != "cuda":
        raise BackendError(f"{spec.name}: onnxruntime found no CUDA device; use device='cpu' or check the driver")
    if opening.half:
        spec = _half_where_the_session_is(session, spec)
    _check_ports(session, spec, path_of(graph))
    return session, spec, actual


@once
def _load_cuda_libraries() -> None:
    """Load CUDA and cuDNN from the packages that pip installed, if this version of onnxruntime supports that.

    This happens once, because it replaces ``sys.stdout`` for a moment: two threads at a time might not restore it.
    """
    if (load := getattr(load_onnxruntime(), "preload_dlls", None)) is not None:
        with redirect_stdout(StringIO()):  # it prints the libraries that it does not find
            load(directory="")


def _half_where_the_session_is(session: Any, spec: ComponentSpec) -> ComponentSpec:
    half = {port.name for port in (*session.get_inputs(), *session.get_outputs()) if port.type == "tensor(float16)"}

    def converted(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(one, dtype="float16") if one.dtype == "float32" and one.name in half else one for one in tensors
        )

    return replace(spec, inputs=converted(spec.inputs), outputs=converted(spec.outputs))


def _check_ports(session: Any, spec: ComponentSpec, graph: Path) -> None:
    for side, ports, tensors in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        got = {
            port.name: (_DTYPES.get(port.type, port.type), len(port.shape) if port.shape else None) for port in ports
        }
        check_ports(graph, side, got, tensors)


def providers(device: str, available: Sequence[str]) -> list[str]:
    """Select execution providers from those ``available``, in order of preference.

    Raises:
        BackendError: The device is unknown, or "cuda" is asked for and there is no provider for it.
    """
    if device not in ("auto", *PROVIDERS):
        raise BackendError(f"device: got {device!r:.40}, expected auto, {' or '.join(PROVIDERS)}")
    if device == "cuda" and PROVIDERS["cuda"] not in available:
        raise BackendError(f'this onnxruntime has no CUDA provider; `{install_command("gpu")}`, or use device="cpu"')
    requested = ["cpu"] if device == "cpu" else ["cuda", "cpu"]
    return [PROVIDERS[name] for name in requested if PROVIDERS[name] in available]
