"""ONNX Runtime: on CUDA where its provider is installed and a device is present, else on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.host import import_engine, usable_cores
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, check_feed

DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CAPTURE_REFUSED = "cannot use the graph capture feature"
"""What onnxruntime says where a part of a graph falls to the CPU, so that calls cannot be CUDA graphs."""


class OnnxRuntimeBackend(SpecBackend):
    """Runs one ONNX graph with ONNX Runtime through IO binding.

    Args:
        graph: path of the ``.onnx`` file; external weights lie beside it.
        spec: what the graph takes and gives.
        device: "cpu", "cuda", or "auto" for CUDA where it works.
        threads: threads of one operator on the CPU; None takes the cores this process may use.

    Raises:
        BackendError: onnxruntime is not installed, the device is not to be had, or the graph does not load.
    """

    def __init__(self, graph: Path, spec: ComponentSpec, device: str = "auto", threads: int | None = None):
        self._spec = spec
        self._session, self.device = open_session(graph, spec, device, threads)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            SpecError: the feed does not fit the spec.
            BackendError: onnxruntime failed, e.g. out of memory.
        """
        check_feed(self._spec, feed)
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for tensor in self._spec.outputs:
            binding.bind_output(tensor.name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise BackendError(f"{self._spec.name}: onnxruntime failed: {first_line(error)}") from None
        names = [tensor.name for tensor in self._spec.outputs]
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def close(self) -> None:
        """Free the session."""
        del self._session


def open_session(
    graph: Path,
    spec: ComponentSpec,
    device: str,
    threads: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Any, str]:
    """Load a graph.

    Args:
        graph, spec, device, threads: as of ``OnnxRuntimeBackend``.
        sizes: symbol of a dimension → its only size in this session. On CUDA the session then captures its first call
            as a CUDA graph and replays it on the same memory ever after, if all of the graph runs there.

    Returns:
        The session, and "cpu" or "cuda".

    Raises:
        BackendError: as ``OnnxRuntimeBackend``.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls the cores are for others
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    for symbol, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(symbol, size)
    wanted = providers(device, ort.get_available_providers())
    tries: list[list[Any]] = [[*wanted]]
    if DEVICES["cuda"] in wanted and hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):  # where it prints what it does not find
            ort.preload_dlls(directory="")  # CUDA and cuDNN as pip installs them
    if sizes is not None and DEVICES["cuda"] in wanted:
        tries.insert(0, [(name, {"enable_cuda_graph": "1"}) if name == DEVICES["cuda"] else name for name in wanted])
    while True:
        try:
            session = ort.InferenceSession(str(graph), options, providers=tries[0])
            break
        except Exception as error:  # onnxruntime raises bare classes of its C++ side
            if len(tries) > 1 and CAPTURE_REFUSED in str(error):
                tries.pop(0)
                continue
            raise BackendError(f"{spec.name}: onnxruntime cannot load {graph}: {first_line(error)}") from None
    found = "cuda" if session.get_providers()[0] == DEVICES["cuda"] else "cpu"
    if device == "cuda" and found != "cuda":
        raise BackendError(f"{spec.name}: onnxruntime found no CUDA device; use device='cpu' or check the driver")
    _check_names(session, spec, graph)
    return session, found


def _check_names(session: Any, spec: ComponentSpec, graph: Path) -> None:
    for side, given, wanted in (
        ("inputs", session.get_inputs(), spec.inputs),
        ("outputs", session.get_outputs(), spec.outputs),
    ):
        got, expected = {arg.name for arg in given}, {tensor.name for tensor in wanted}
        if got != expected:
            raise BackendError(f"{graph}: {side} are {sorted(got)}, the manifest says {sorted(expected)}; rebuild")


def providers(device: str, available: Sequence[str]) -> list[str]:
    """The execution providers to ask for, of those ``available``, in order.

    Raises:
        BackendError: the device is unknown, or CUDA is asked for and there is no provider for it.
    """
    if device not in ("auto", *DEVICES):
        raise BackendError(f"device: got {device!r}, expected auto, {' or '.join(DEVICES)}")
    if device == "cuda" and DEVICES["cuda"] not in available:
        raise BackendError(
            'this onnxruntime has no CUDA provider; `pip install "ldm-export[gpu]"`, or use device="cpu"'
        )
    wanted = ["cpu"] if device == "cpu" else ["cuda", "cpu"]
    return [DEVICES[name] for name in wanted if DEVICES[name] in available]


def load_onnxruntime() -> Any:
    """The package.

    Raises:
        BackendError: not installed, or broken.
    """
    return import_engine("onnxruntime", 'pip install "ldm-export[onnxruntime]"')


def first_line(error: Exception) -> str:
    """What onnxruntime says, without the lines it adds."""
    return str(error).strip().partition("\n")[0][:300]
