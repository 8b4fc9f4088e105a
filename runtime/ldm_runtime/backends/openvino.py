"""OpenVINO on the CPU: the same ONNX graphs, compiled for each set of shapes, in bf16 where the CPU has it."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, TensorSpec, check_feed

ARITHMETIC = {"fp32": "f32", "bf16": "bf16"}
"""What OpenVINO calls a precision; what a graph says itself, int8 by Q/DQ above all, it keeps in either."""
MAX_SHAPES = 8
BUDGET = 2 * 2**30
"""Bytes of weights that compiled sets of shapes may hold together beside the first, each a copy of its own. Where one
more comes, a graph compiled for any shape takes the place of them all: about 5% slower, never compiled anew."""

log = logging.getLogger(__name__)
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoBackend:
    """Runs one ONNX graph with OpenVINO, compiled for each set of shapes when it first comes, up to MAX_SHAPES.

    Args:
        graph: path of the ``.onnx`` file; external weights lie beside it and are mapped, not read.
        spec: what the graph takes and gives.
        arithmetic: "fp32", or "bf16" for matrix work in bf16 where the CPU has it.
        threads: CPU threads; None takes the cores this process may use.
        cache: folder where compiled graphs are kept for the next process; None keeps none. It must be this graph's own.

    Raises:
        BackendError: openvino is not installed, the CPU lacks the arithmetic, or the graph does not load.
    """

    def __init__(
        self,
        graph: Path,
        spec: ComponentSpec,
        arithmetic: str = "fp32",
        threads: int | None = None,
        cache: Path | None = None,
    ):
        if arithmetic not in ARITHMETIC:
            raise BackendError(f"arithmetic: got {arithmetic!r:.40}, expected one of {', '.join(ARITHMETIC)}")
        if arithmetic == "bf16" and not has_bf16():
            raise BackendError("this CPU has no bf16 arithmetic; use precision fp32")
        self._core, self._graph, self._spec = core(), graph, spec
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
            "INFERENCE_PRECISION_HINT": ARITHMETIC[arithmetic],
        }
        if cache is not None:
            self._options["CACHE_DIR"] = str(cache)
        self._requests: dict[Shapes | None, Any] = {}
        weights = graph.stat().st_size
        if (data := graph.with_name(f"{graph.name}.data")).is_file():
            weights += data.stat().st_size
        self._kept = min(MAX_SHAPES, 1 + BUDGET // weights)
        self._model = self._read()

    def _read(self) -> Any:
        try:
            model = self._core.read_model(str(self._graph))
        except Exception as error:  # openvino raises bare RuntimeErrors of its C++ side
            raise BackendError(f"{self._spec.name}: openvino cannot load {self._graph}: {first_line(error)}") from None
        for side, given, wanted in (
            ("inputs", model.inputs, self._spec.inputs),
            ("outputs", model.outputs, self._spec.outputs),
        ):
            got, expected = {port.any_name for port in given}, {tensor.name for tensor in wanted}
            if got != expected:
                raise BackendError(
                    f"{self._graph}: {side} are {sorted(got)}, the manifest says {sorted(expected)}; rebuild"
                )
        return model

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns."""
        return self._spec.outputs

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once; the first time with new shapes, compile for them before.

        Raises:
            SpecError: the feed does not fit the spec.
            BackendError: openvino failed, e.g. out of memory.
        """
        check_feed(self._spec, feed)
        request = self._request(tuple(sorted((name, array.shape) for name, array in feed.items())))
        try:
            request.infer({name: np.ascontiguousarray(array) for name, array in feed.items()}, share_inputs=True)
            return {tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in self._spec.outputs}
        except Exception as error:  # as above
            raise BackendError(f"{self._spec.name}: openvino failed: {first_line(error)}") from None

    def _request(self, shapes: Shapes) -> Any:
        if None in self._requests:
            return self._requests[None]
        if shapes not in self._requests:
            key = shapes if len(self._requests) < self._kept else None
            if key is None:
                self._requests.clear()  # before another copy of the weights is made
            self._requests[key] = self._compiled(key)
            return self._requests[key]
        return self._requests[shapes]

    def _compiled(self, shapes: Shapes | None) -> Any:
        log.info("%s: compiling for %s", self._spec.name, "any shape" if shapes is None else dict(shapes))
        model, self._model = self._model or self._read(), None  # a model that was compiled would hold its weights
        try:
            if shapes is not None:
                model.reshape({name: list(shape) for name, shape in shapes})
            return self._core.compile_model(model, "CPU", self._options).create_infer_request()
        except Exception as error:  # as above
            raise BackendError(f"{self._spec.name}: openvino cannot compile the graph: {first_line(error)}") from None

    def close(self) -> None:
        """Free what was compiled."""
        self._requests.clear()
        self._model = None


@cache
def core() -> Any:
    """OpenVINO's core, one for all backends.

    Raises:
        BackendError: openvino is not installed, or broken.
    """
    try:
        import openvino
    except ModuleNotFoundError:
        raise BackendError('openvino is not installed; `pip install "ldm-export[openvino]"`') from None
    except ImportError as error:  # its libraries do not fit this machine
        raise BackendError(f"openvino cannot be loaded: {first_line(error)}; install it again") from None
    return openvino.Core()


def has_bf16() -> bool:
    """True where the CPU multiplies bf16 matrices itself (AVX512-BF16, AMX).

    Raises:
        BackendError: openvino is not installed.
    """
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def first_line(error: Exception) -> str:
    """The line of an engine's error that says what is wrong: C++ places and empty lines come before it."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return (told or lines or [type(error).__name__])[0][:300]
