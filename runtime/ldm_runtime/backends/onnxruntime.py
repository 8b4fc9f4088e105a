"""ONNX Runtime: on CUDA where its provider is installed and a device is present, else on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, TensorSpec, check_feed

DEVICES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
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
        try:
            import onnxruntime as ort
        except ImportError:
            raise BackendError(
                'onnxruntime is not installed; `pip install "ldm-export[onnxruntime]"` (or [gpu] for CUDA)'
            ) from None
        self._spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        wanted = providers(device, ort.get_available_providers())
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=wanted)
        except Exception as error:  # onnxruntime raises bare classes of its C++ side
            raise BackendError(f"{spec.name}: onnxruntime cannot load {graph}: {_first_line(error)}") from None
        self.device = "cuda" if self._session.get_providers()[0] == DEVICES["cuda"] else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise BackendError(f"{spec.name}: onnxruntime found no CUDA device; use device='cpu' or check the driver")
        self._check_names(graph)

    def _check_names(self, graph: Path) -> None:
        for side, given, wanted in (
            ("inputs", self._session.get_inputs(), self._spec.inputs),
            ("outputs", self._session.get_outputs(), self._spec.outputs),
        ):
            got, expected = {arg.name for arg in given}, {tensor.name for tensor in wanted}
            if got != expected:
                raise BackendError(f"{graph}: {side} are {sorted(got)}, the manifest says {sorted(expected)}; rebuild")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns."""
        return self._spec.outputs

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
            raise BackendError(f"{self._spec.name}: onnxruntime failed: {_first_line(error)}") from None
        names = [tensor.name for tensor in self._spec.outputs]
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def close(self) -> None:
        """Free the session."""
        del self._session


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
