"""OpenVINO on the CPU: the same ONNX graphs, compiled for each set of shapes, in bf16 where the CPU has it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.host import import_engine, usable_cores
from ldm_runtime.backends.openvino_cut import after_cut, before_cut, value_names
from ldm_runtime.backends.openvino_shapes import ShapedGraph
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, check_feed

ARITHMETIC = {"fp32": "f32", "bf16": "bf16"}
"""What OpenVINO calls a precision; what a graph says itself, int8 by Q/DQ above all, it keeps in either."""


class OpenVinoBackend(SpecBackend):
    """Runs one ONNX graph with OpenVINO, compiled for each set of shapes when it first comes (``openvino_shapes``).

    Args:
        graph: path of the ``.onnx`` file; external weights lie beside it and are mapped, not read.
        spec: what the graph takes and gives.
        arithmetic: "fp32", or "bf16" for matrix work in bf16 where the CPU has it.
        threads: CPU threads; None takes the cores this process may use.
        cache: folder where compiled graphs are kept for the next process; None keeps none. It must be this graph's own.
        constant: an input that stays the same over many runs: what depends on it alone is a graph of its own, which
            ``prepare`` runs once. The result is the same to the bit.

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
        constant: str | None = None,
    ):
        if arithmetic not in ARITHMETIC:
            raise BackendError(f"arithmetic: got {arithmetic!r:.40}, expected one of {', '.join(ARITHMETIC)}")
        if arithmetic == "bf16" and not has_bf16():
            raise BackendError("this CPU has no bf16 arithmetic; use precision fp32")
        self._core, self._graph, self._spec, self._constant = core(), graph, spec, constant
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "INFERENCE_PRECISION_HINT": ARITHMETIC[arithmetic],
        }
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        data = graph.with_name(f"{graph.name}.data")
        weights = (data if data.is_file() else graph).stat().st_size
        self._spare: Any = self._read()
        self._names = value_names(self._spare, constant) if constant else []
        self._main = ShapedGraph(self._take, self._core, options, weights)
        self._first: ShapedGraph | None = None
        if constant and self._names:
            self._main = ShapedGraph(lambda: after_cut(self._take(), constant), self._core, options, weights)
            self._first = ShapedGraph(lambda: before_cut(self._take(), constant), self._core, options, weights)

    def _take(self) -> Any:
        """A graph of one's own: the first that was read, then new ones."""
        model, self._spare = self._spare or self._read(), None
        return model

    def _read(self) -> Any:
        try:
            reader = onnx_reader()
            model = reader.convert(reader.load(str(self._graph)))
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

    def prepare(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Compute what ``run`` takes in place of the ``constant`` input: itself and what follows from it alone.

        Rows are the leading axis of every array.

        Raises:
            BackendError: openvino failed.
        """
        if self._first is None:
            return dict(feed)
        request = self._guarded(self._first, feed)
        values = (request.get_output_tensor(index).data.copy() for index in range(len(self._names)))
        return {**feed, **dict(zip(self._names, values, strict=True))}

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once; the first time with new shapes, compile for them before.

        Args:
            feed: the spec's inputs, and what ``prepare`` gave for the constant one or not.

        Raises:
            SpecError: the feed does not fit the spec.
            BackendError: openvino failed, e.g. out of memory.
        """
        prepared = {name: feed[name] for name in self._names if name in feed}
        plain = {name: array for name, array in feed.items() if name not in prepared}
        check_feed(self._spec, plain)
        if len(prepared) != len(self._names) and self._constant:
            prepared = self.prepare({self._constant: plain[self._constant]})
        request = self._guarded(self._main, {**plain, **prepared})
        return {tensor.name: request.get_tensor(tensor.name).data.copy() for tensor in self._spec.outputs}

    def _guarded(self, graph: ShapedGraph, feed: Feed) -> Any:
        try:
            return graph.run({name: np.require(array, requirements=("C", "W")) for name, array in feed.items()})
        except BackendError:
            raise
        except Exception as error:  # as above
            raise BackendError(f"{self._spec.name}: openvino failed: {first_line(error)}") from None

    def close(self) -> None:
        """Free what was compiled."""
        self._spare = None
        self._main.close()
        if self._first is not None:
            self._first.close()


@cache
def core() -> Any:
    """OpenVINO's core, one for all backends.

    Raises:
        BackendError: openvino is not installed, or broken.
    """
    return import_engine("openvino", 'pip install "ldm-export[openvino]"').Core()


@cache
def onnx_reader() -> Any:
    """OpenVINO's reader of ONNX alone: asked for a file, the core would try every format on a stranger's bytes."""
    from openvino.frontend import FrontEndManager

    return FrontEndManager().load_by_framework("onnx")


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
