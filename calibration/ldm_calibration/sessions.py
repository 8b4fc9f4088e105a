"""ONNX Runtime sessions of graphs that are changed in memory: weights stay in the file of the graph they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ldm_runtime.backends import SpecBackend
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import ComponentSpec, check_feed

LARGE = 1_000_000_000
"""Weights beyond this are used where they lie: no copy of them is packed for speed."""


class Session:
    """A model on the CPU; ``run`` gives its outputs by name."""

    def __init__(self, model: ir.Model, folder: Path, threads: int | None = None):
        """``folder`` holds the files of external weights."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if _weight_bytes(model) > LARGE:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.enable_cpu_mem_arena = False
        proto = ir.to_proto(model)
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises bare classes of its own
            raise BuildError(f"{model.graph.name}: onnxruntime cannot load it: {error!s:.300}") from None
        self.names = [output.name for output in self._session.get_outputs()]

    def run(self, feed: Mapping[str, NDArray[Any]], names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """The outputs ``names``, all where none are given."""
        names = list(self.names if names is None else names)
        try:
            return dict(zip(names, self._session.run(names, dict(feed)), strict=True))
        except Exception as error:
            raise BuildError(f"onnxruntime failed: {error!s:.300}") from None


class SessionBackend(SpecBackend):
    """A session as a pipeline's backend."""

    def __init__(self, session: Session, spec: ComponentSpec):
        self._session: Session | None = session
        self._spec = spec

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once."""
        assert self._session is not None
        check_feed(self._spec, feed)
        return self._session.run(feed, [tensor.name for tensor in self._spec.outputs])

    def close(self) -> None:
        """Free the session."""
        self._session = None


def files_of(graph: Path) -> list[Path]:
    """A graph's file and, where it has one, that of its external weights."""
    data = graph.with_name(f"{graph.name}.data")
    return [graph, data] if data.is_file() else [graph]


def load_graph(graph: Path) -> ir.Model:
    """An fp32 graph with its constants as initialisers; large weights stay in their file."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    model = ir.load(graph)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def _weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
