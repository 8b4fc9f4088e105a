"""ONNX Runtime as a ``device.Launcher``: one session per component, whose calls are CUDA graphs on given memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from itertools import count
from typing import Any

import numpy as np

from ldm_runtime.backends.host import first_line
from ldm_runtime.backends.memory import CudaMemory, HostMemory
from ldm_runtime.backends.onnxruntime_session import CaptureRefusedError, Opening, load_onnxruntime, open_session
from ldm_runtime.device import Region
from ldm_runtime.errors import BackendError
from ldm_runtime.loras.changes import ChangedWeight
from ldm_runtime.specs import ComponentSpec, sizes_of
from ldm_runtime.verified_file import GraphFile

__all__ = ["BoundCall", "Mode", "OnnxRuntimeLauncher"]

NOT_CAPTURED = -1
"""Id of a run that is not captured as a CUDA graph. ONNX Runtime reserves 0."""
_log = logging.getLogger(__name__)


class Mode(IntEnum):
    """How a component runs.

    FREE: One session with free dimensions, whose calls are CUDA graphs.
    FIXED: A session for each set of shapes, whose calls are CUDA graphs.
    PLAIN: One session with free dimensions; its kernels are launched one by one. The only mode on the CPU.
    """

    FREE = 0
    FIXED = 1
    PLAIN = 2


class BoundCall:
    """A session with inputs and outputs at fixed addresses.

    ONNX Runtime keeps captured graphs per thread, so the first run in another thread captures again. Capturing runs the
    component more than once; this is harmless, because no output shares memory with an input.

    Args:
        name: Name of the component, for messages.
        session: onnxruntime's session.
        tensors: Region of every input and output.
        memory: The device's memory.
        graph_id: Id of the CUDA graph, which every run but the first uses; ``NOT_CAPTURED`` for none.
    """

    def __init__(
        self,
        name: str,
        session: Any,
        tensors: Mapping[str, Region],
        memory: HostMemory | CudaMemory,
        graph_id: int = NOT_CAPTURED,
    ):
        self._name, self._session, self._memory, self._graph_id = name, session, memory, graph_id
        self._binding = session.io_binding()
        for bind, ports in (
            (self._binding.bind_input, session.get_inputs()),
            (self._binding.bind_output, session.get_outputs()),
        ):
            for port in ports:
                region = tensors[port.name]
                element, shape = np.dtype(region.dtype).type, list(region.shape)
                bind(port.name, memory.device, 0, element_type=element, shape=shape, buffer_ptr=region.address)
        self._first, self._later = _run_options(NOT_CAPTURED), _run_options(graph_id)
        self._runs = 0

    def run(self) -> None:
        """Run the component in stream order; on CUDA it may still be running when this returns.

        If a capture fails, later runs launch the kernels one by one.

        Raises:
            BackendError: onnxruntime failed, e.g. because memory ran out.
        """
        captures = self._runs == 1 and self._graph_id != NOT_CAPTURED
        try:
            self.launch()
        except BackendError as error:
            if not captures:
                raise
            _log.warning("%s: its launches cannot be captured as a CUDA graph (%s)", self._name, error)
            self._graph_id, self._later = NOT_CAPTURED, self._first
            self.launch()

    def launch(self) -> None:
        """Run the component as ``run`` does, but raise an error if a capture fails."""
        options = self._later if self._runs else self._first
        self._runs += 1
        try:
            self._session.run_with_iobinding(self._binding, options)
        except Exception as error:  # onnxruntime raises exceptions of its C++ code, which have no common class
            if isinstance(self._memory, CudaMemory):
                self._memory.cuda.end_failed_capture(self._memory.stream)
            raise BackendError(f"{self._name}: onnxruntime failed: {first_line(error)}") from None

    def close(self) -> None:
        """Free the captured graph, if this version of onnxruntime can."""
        release = getattr(self._session, "release_captured_graph", None)
        if release is not None and self._graph_id != NOT_CAPTURED and self._runs > 1:
            with suppress(Exception):  # another thread has captured it
                release(self._graph_id)
        del self._binding, self._session


class OnnxRuntimeLauncher:
    """Runs one ONNX graph on device memory. On CUDA, one session holds a CUDA graph for each set of shapes.

    If ONNX Runtime cannot capture a graph with free dimensions, the launcher tries the next ``Mode``.

    Args:
        graph: Path of the ``.onnx`` file. External weights lie beside it.
        spec: Inputs and outputs of the graph.
        memory: The device's memory.
        half: True if the graph may have float16 where the spec says float32.
        modes: Modes to try on CUDA, in this order. On the CPU the mode is PLAIN.
        threads: CPU threads of one operator. None means all cores that this process may use.
        changes: Weights that get other values than those of the graph.

    Attributes:
        spec: Inputs and outputs with the dtypes of the graph.
        mode: How it runs.

    Raises:
        BackendError: onnxruntime is not installed, the device is not available, or the graph does not load.
        ManifestError: The bundle was replaced after the graph had been verified.
    """

    def __init__(
        self,
        graph: GraphFile,
        spec: ComponentSpec,
        memory: HostMemory | CudaMemory,
        *,
        half: bool = False,
        modes: Sequence[Mode] = tuple(Mode),
        threads: int | None = None,
        changes: Sequence[ChangedWeight] = (),
    ):
        self._graph, self._memory, self._ids, self.spec = graph, memory, count(1), spec
        stream = int(memory.stream) if isinstance(memory, CudaMemory) else None
        self._opening = Opening(memory.device, threads, stream, half=half, changes=changes)
        self._modes = [Mode.PLAIN] if stream is None else list(modes)
        usual = {tensor.name: tensor.bounds("opt") for tensor in spec.inputs}
        self._usual, self._session = sizes_of(spec, usual), None
        with memory.lock:
            while self._session is None:
                try:
                    self._session, self.spec = self._open(self._usual)
                except CaptureRefusedError as error:
                    self._go_on(error)

    @property
    def mode(self) -> Mode:
        """How the component runs."""
        return self._modes[0]

    def _open(self, sizes: Mapping[str, int]) -> tuple[Any, ComponentSpec]:
        fixed = sizes if self.mode is Mode.FIXED else {}
        opening = replace(self._opening, capture=self.mode is not Mode.PLAIN, sizes=fixed)
        session, spec, _ = open_session(self._graph, self.spec, opening)
        return session, spec

    def _go_on(self, reason: BackendError) -> None:
        """Switch to the next mode; if there is none, raise ``reason``."""
        if len(self._modes) == 1:
            raise reason
        before = self._modes.pop(0)
        _log.warning(
            "%s: mode %s failed (%s); going on in mode %s", self.spec.name, before.name, reason, self.mode.name
        )
        self._session = None

    def prepare(self, tensors: Mapping[str, Region], *, repeated: bool) -> BoundCall:
        """Bind inputs and outputs; as ``device.Launcher.prepare``."""
        sizes = sizes_of(self.spec, {tensor.name: tensors[tensor.name].shape for tensor in self.spec.inputs})
        while True:
            graph_id = NOT_CAPTURED if self.mode is Mode.PLAIN else next(self._ids)
            call = BoundCall(self.spec.name, self._session_for(sizes), tensors, self._memory, graph_id)
            if not repeated or not isinstance(self._memory, CudaMemory):
                return call
            call.launch()  # on arbitrary values; an error here is not a capture error
            try:
                call.launch()
                self._memory.synchronise()
                return call
            except BackendError as error:
                self._go_on(error)

    def _session_for(self, sizes: Mapping[str, int]) -> Any:
        while True:
            try:
                if self.mode is Mode.FIXED and (self._session is None or sizes != self._usual):
                    return self._open(sizes)[0]
                if self._session is None:
                    self._session, _ = self._open(sizes)
                return self._session
            except CaptureRefusedError as error:
                self._go_on(error)

    def close(self) -> None:
        """Free the session. The last run must have finished."""
        self._session = None


def _run_options(graph_id: int) -> Any:
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
