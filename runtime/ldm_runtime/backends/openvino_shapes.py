"""Compiles one graph with OpenVINO for the shapes it runs with: once per set of shapes, then once for any shape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed
from ldm_runtime.backends.openvino_results import keep_results
from ldm_runtime.backends.openvino_upsample import fold_upsampling
from ldm_runtime.backends.page_release import release_mapped_files, release_mapped_pages

MAX_SHAPES = 8
BUDGET = 2 * 2**30
"""Bytes of weights that compiled graphs may hold in addition to the first one; each has its own copy. When the budget
is used up, one graph is compiled for any shape: in addition to the others if memory allows it, otherwise in their
place. It runs about 1.5 times as long as a graph for fixed shapes, but is never compiled again."""
PADDING = 1.4
"""Largest ratio of a compiled graph's rows to a call's rows at which padding the call is not slower than the graph for
any shape."""
LARGE = 2**16
"""Smallest constant in bytes whose pages are released."""

__all__ = ["ShapedGraph"]

log = logging.getLogger(__name__)
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Ready = tuple[Any, dict[str, NDArray[Any]]]
"""An inference request, and the inputs that are already set on it."""


class ShapedGraph:
    """A graph that is compiled when it first runs with a set of shapes.

    Args:
        copy: Returns a new copy of the graph at each call. Copies share the mapped weights, whose pages are released.
        core: OpenVINO's core.
        options: Options of the compilation.
        weights: Size of the graph's weights in bytes.
        rows: True if the first axis of every input and output counts independent rows, so that a call may be padded to
            the rows of a graph that is already compiled.
    """

    def __init__(self, copy: Callable[[], Any], core: Any, options: Mapping[str, Any], weights: int, rows: bool):
        self._copy, self._core, self._options, self._rows = copy, core, dict(options), rows
        self._requests: dict[Shapes | None, Ready] = {}
        self.max_requests = min(MAX_SHAPES, 1 + BUDGET // weights)
        self._keeps = MAX_SHAPES * weights <= BUDGET

    def run(self, feed: Feed) -> tuple[Any, int]:
        """Run the graph.

        Returns:
            The inference request, which owns the outputs, and the number of padding rows at the end of each output.

        Arrays are shared with the request. An array that it already has, e.g. the cross-attention keys of a prompt,
        is not passed again.

        Raises:
            RuntimeError: OpenVINO failed.
        """
        import openvino

        shapes, added = _shapes(feed), 0
        if (rows := self._padded(shapes)) is not None:
            added = rows - shapes[0][1][0]
            feed = {name: _filled(array, rows) for name, array in feed.items()}
            shapes = _shapes(feed)
        request, inputs = self._requests.get(shapes) or self._requests.get(None) or self._compiled(shapes)
        for name, array in feed.items():
            if inputs.get(name) is not array:
                request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
                inputs[name] = array
        request.infer()
        return request, added

    def _padded(self, shapes: Shapes) -> int | None:
        """Number of rows to pad a call to: the smallest of a compiled graph that fits; None for no padding."""
        if not self._rows or shapes in self._requests or len(self._requests) < self.max_requests:
            return None
        rows = shapes[0][1][0]
        compiled = [
            key[0][1][0]
            for key in self._requests
            if key is not None and key == tuple((name, (key[0][1][0], *shape[1:])) for name, shape in shapes)
        ]
        return min((most for most in compiled if rows < most <= PADDING * rows), default=None)

    def _compiled(self, shapes: Shapes) -> Ready:
        key = shapes if len(self._requests) < self.max_requests else None
        if key is None and not self._keeps:
            self._requests.clear()  # frees memory before another copy of the weights is made
        log.info("compiling for %s", "any shape" if key is None else dict(key))
        model = self._copy()
        keep_results(model)
        if key is not None:
            model.reshape({name: list(shape) for name, shape in key})
            if self._options["INFERENCE_PRECISION_HINT"] == "bf16":
                fold_upsampling(model)
        with release_mapped_pages(_weights(model)):
            compiled = self._compile(model)
        if "CACHE_DIR" in self._options:  # a file of the cache stays mapped, with weights in fp32
            release_mapped_files(Path(self._options["CACHE_DIR"]))
        self._requests[key] = compiled.create_infer_request(), {}
        return self._requests[key]

    def _compile(self, model: Any) -> Any:
        """Compile a graph. If that fails with the cache, e.g. because its disk is full, compile without it."""
        try:
            return self._core.compile_model(model, "CPU", self._options)
        except RuntimeError:
            if self._options.pop("CACHE_DIR", None) is None:
                raise
            log.warning("openvino: cannot compile with the cache; compiled graphs are not kept")
            return self._core.compile_model(model, "CPU", self._options)

    def close(self) -> None:
        """Free the compiled graphs."""
        self._requests.clear()


def _shapes(feed: Feed) -> Shapes:
    return tuple(sorted((name, array.shape) for name, array in feed.items()))


def _filled(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """An array with its last row repeated, [rows, …]."""
    return np.concatenate([array, np.broadcast_to(array[-1:], (rows - len(array), *array.shape[1:]))])


def _weights(model: Any) -> list[NDArray[Any]]:
    """Return the graph's larger constants as arrays in the memory that they occupy."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return [node.data for node in constants if node.get_byte_size() >= LARGE]
