"""The engine OpenVINO on the CPU: ONNX graphs compiled for each set of shapes, in bf16 if the CPU supports it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.engine import Choice, Loader, Placement, WeightChange, Wish
from ldm_runtime.backends.host import first_line, import_engine, is_installed, usable_cores
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.openvino_shapes import ShapedGraph
from ldm_runtime.backends.page_release import release_freed_memory
from ldm_runtime.backends.ports import Port, check_ports
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import files_of_graph, weights_beside
from ldm_runtime.device_loop import DeviceLoop
from ldm_runtime.errors import BackendError, LdmError, UnsupportedError
from ldm_runtime.installation import install_command
from ldm_runtime.loras.changed_files import changed_files
from ldm_runtime.loras.changes import ChangedWeight
from ldm_runtime.model import UNET
from ldm_runtime.once import once
from ldm_runtime.onnx_nodes import check_nodes
from ldm_runtime.specs import Axis, ComponentSpec, check_feed
from ldm_runtime.verified_file import GraphFile, path_of, unchanged, unwritten

__all__ = ["OpenVinoBackend", "OpenVinoEngine", "has_bf16"]

ARITHMETIC = {"fp32": "f32", "bf16": "bf16"}
"""Precision of arithmetic -> OpenVINO's name of it. Both keep the types that a graph states, e.g. int8 by Q/DQ."""
_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32", "u8": "uint8"}
"""OpenVINO's name of an element type -> dtype."""
RANK = 40
log = logging.getLogger(__name__)
EXTRA = "openvino"


class OpenVinoBackend(SpecBackend):
    """Runs one ONNX graph with OpenVINO; it is compiled when it first runs with a set of shapes (``openvino_shapes``).

    Args:
        graph: Path of the ``.onnx`` file. External weights lie beside it and are mapped, not read. The files are opened
            once, so that the bundle may be replaced afterwards.
        spec: Inputs and outputs of the graph.
        arithmetic: "fp32", or "bf16" for matrix products in bf16 if the CPU supports it.
        threads: CPU threads. None means all cores that this process may use.
        cache: Folder where compiled graphs are kept for the next process, used by this graph alone. None keeps none.
        changes: Weights that get other values than those of the graph.

    Raises:
        BackendError: openvino is not installed, the CPU does not support the arithmetic, or the graph does not load.
    """

    def __init__(
        self,
        graph: GraphFile,
        spec: ComponentSpec,
        arithmetic: str = "fp32",
        threads: int | None = None,
        cache: Path | None = None,
        changes: Sequence[ChangedWeight] = (),
    ):
        if arithmetic not in ARITHMETIC:
            raise BackendError(f"arithmetic: got {arithmetic!r:.40}, expected one of {', '.join(ARITHMETIC)}")
        if arithmetic == "bf16" and not has_bf16():
            raise BackendError("this CPU has no bf16 arithmetic; use precision fp32")
        self._core, self._file, self._graph, self._spec = core(), graph, path_of(graph), spec
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "INFERENCE_PRECISION_HINT": ARITHMETIC[arithmetic],
        }
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        weights = weights_beside(self._graph)
        size = (weights if weights.is_file() else self._graph).stat().st_size
        with changed_files(self._graph, changes) as file:
            self._model: Any = self._read(file)
        self._shaped = ShapedGraph(self._copy, self._core, options, size, _has_rows(spec))

    def _copy(self) -> Any:
        unwritten(self._file)
        return self._model.clone()

    def _read(self, file: Path) -> Any:
        try:
            reader = onnx_reader()
            model = reader.convert(reader.load(str(file)))
        except Exception as error:  # openvino raises a bare RuntimeError for failures of its C++ code
            raise BackendError(f"{self._spec.name}: openvino cannot load {self._graph}: {first_line(error)}") from None
        unchanged(self._file)
        for side, ports, tensors in (
            ("inputs", model.inputs, self._spec.inputs),
            ("outputs", model.outputs, self._spec.outputs),
        ):
            check_ports(self._graph, side, {port.any_name: _port(port) for port in ports}, tensors)
        return model

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the graph once. If its shapes are new, it is compiled for them first.

        Raises:
            SpecError: The feed does not fit the spec.
            BackendError: openvino failed, e.g. because memory ran out.
            ManifestError: The graph's file was written, although it is in use.
        """
        check_feed(self._spec, feed)
        try:
            request, added = self._shaped.run(
                {k: np.require(array, requirements=("C", "W")) for k, array in feed.items()}
            )
        except LdmError:
            raise
        except Exception as error:  # as in _read
            raise BackendError(f"{self._spec.name}: openvino failed: {first_line(error)}") from None
        outputs = {tensor.name: request.get_tensor(tensor.name).data for tensor in self._spec.outputs}
        return {name: (array[:-added] if added else array).copy() for name, array in outputs.items()}

    def close(self) -> None:
        """Free the compiled graphs."""
        self._model = None
        self._shaped.close()
        release_freed_memory()


def _has_rows(spec: ComponentSpec) -> bool:
    """True if the first axis of all inputs and outputs is the same free dimension."""
    firsts = [tensor.shape[0] if tensor.shape else 0 for tensor in (*spec.inputs, *spec.outputs)]
    symbols = {first.symbol if isinstance(first, Axis) else None for first in firsts}
    return len(symbols) == 1 and None not in symbols


def _port(port: Any) -> Port:
    kind, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
    return _DTYPES.get(kind, kind), shape.rank.get_length() if shape.rank.is_static else None


class OpenVinoEngine:
    """Descriptor of OpenVINO, as ``backends.engine.Engine``."""

    name = "openvino"
    extra = EXTRA

    def available(self) -> str | None:
        """None if openvino is installed, otherwise why it cannot be used."""
        return None if is_installed("openvino") else f"not installed; `{install_command(self.extra)}`"

    def choices(self, bundle: Bundle, wish: Wish) -> Iterator[Choice]:
        """Yield the CPU. OpenVINO itself rounds fp32 graphs, and the fp32 parts of int8 graphs, to bf16.

        It computes in bf16 if the CPU supports it, unless ``wish.precision`` is "fp32" or "fp16". On a CPU without
        bf16, "bf16" runs the bundle's bf16 graphs, whose tensors are rounded to bf16, with fp32 arithmetic.

        Raises:
            BackendError: openvino is not installed, or the CPU does not support the request.
        """
        if not wish.needs(RANK):
            return
        if wish.device == "cuda":
            raise UnsupportedError("openvino runs on the CPU; leave device out, or use backend onnxruntime")
        bf16, reason = has_bf16(), "the fastest installed engine for this CPU"
        if wish.precision == "bf16" and not bf16:
            if "bf16" in bundle.manifest.components[UNET].graphs:
                yield Choice(self.name, "cpu", "bf16", "fp32", RANK, reason)
                return
            raise UnsupportedError("precision: got bf16, in which this CPU does not compute; use fp32")
        if wish.precision in ("fp32", "fp16"):
            yield Choice(self.name, "cpu", wish.precision, "fp32", RANK, reason)
            return
        graph = "int8" if (wish.precision or bundle.precision) == "int8" else "fp32"
        yield Choice(self.name, "cpu", graph, "bf16" if bf16 else "fp32", RANK, reason)

    def open(self, bundle: Bundle, component: str, choice: Choice, placement: Placement) -> Loader:
        """Check a component's graph and return its loader. Each graph has a folder of its own in the cache.

        Raises:
            ManifestError: A file is not the one that was built, or there is no graph of that precision.
        """
        part = bundle.manifest.components[component]
        graph, cache = bundle.verified_graph(component, choice.graph), placement.cache
        check_nodes(graph.path)
        if cache is not None:
            cache = _writable(cache / _cache_folder(bundle, part.graphs[choice.graph]))
        return lambda: OpenVinoBackend(graph, part.spec, choice.arithmetic, placement.threads, cache)

    def open_changed(
        self, bundle: Bundle, component: str, choice: Choice, placement: Placement, change: WeightChange
    ) -> Loader | None:
        """As ``backends.engine.WeightChanger``. Compiled graphs with changed weights are not kept in the cache."""
        part, graph = bundle.manifest.components[component], bundle.verified_graph(component, choice.graph)
        changes = change(graph)
        if not changes:
            return None
        check_nodes(graph.path)
        return lambda: OpenVinoBackend(graph, part.spec, choice.arithmetic, placement.threads, changes=changes)

    def device_loop(
        self, bundle: Bundle, choice: Choice, placement: Placement, backends: Mapping[str, LazyBackend]
    ) -> DeviceLoop | None:
        """None: on the CPU the pipeline's NumPy loop runs beside the UNet."""
        return None


def _writable(folder: Path) -> Path | None:
    """Return the folder, created if necessary. If it cannot be written, log a warning and return None."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("cache: %s cannot be written (%s); compiled graphs are not kept", folder, error.strerror)
        return None


def _cache_folder(bundle: Bundle, graph: str) -> str:
    """Return a name for a graph and its weights, taken from their digests."""
    files = bundle.manifest.files
    return "-".join(files[name].sha256[:16] for name in files_of_graph(graph, files))


@once
def core() -> Any:
    """Return OpenVINO's core, which all backends share.

    Raises:
        BackendError: openvino is not installed, or its libraries cannot be loaded.
    """
    return import_engine("openvino", EXTRA).Core()


@once
def onnx_reader() -> Any:
    """Return OpenVINO's ONNX reader. The core's own ``read_model`` would try every format on an untrusted file."""
    from openvino.frontend import FrontEndManager

    return FrontEndManager().load_by_framework("onnx")


def has_bf16() -> bool:
    """True if the CPU multiplies bf16 matrices (AVX512-BF16, AMX).

    Raises:
        BackendError: openvino is not installed, or its libraries cannot be loaded.
    """
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
