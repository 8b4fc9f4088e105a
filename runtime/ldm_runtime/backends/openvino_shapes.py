"""One graph compiled by OpenVINO for the shapes that come: for each set of its own, then for any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.backends import Feed
from ldm_runtime.backends.openvino_upsample import fold_upsampling
from ldm_runtime.backends.page_release import release_mapped_files, release_mapped_pages

MAX_SHAPES = 8
BUDGET = 2 * 2**30
"""Bytes of weights that compiled sets of shapes may hold together beside the first, each a copy of its own. Where one
more comes, a graph compiled for any shape takes the place of them all: about 5% slower, never compiled anew."""
LARGE = 2**16
"""Bytes from which a constant's pages are worth giving back."""

log = logging.getLogger(__name__)
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
Ready = tuple[Any, dict[str, NDArray[Any]]]
"""A request and the inputs it has."""


class ShapedGraph:
    """Compiles a graph when it runs with shapes that are new to it.

    Args:
        read: gives the graph, a new one at each call: one that was compiled would hold its weights a second time.
        core: OpenVINO's.
        options: of the compilation.
        weights: their bytes.
    """

    def __init__(self, read: Callable[[], Any], core: Any, options: Mapping[str, Any], weights: int):
        self._read, self._core, self._options = read, core, dict(options)
        self._requests: dict[Shapes | None, Ready] = {}
        self.kept = min(MAX_SHAPES, 1 + BUDGET // weights)

    def run(self, feed: Feed) -> Any:
        """The request, run: its outputs belong to it. Raises RuntimeError, as OpenVINO does.

        Arrays are shared with the request; one that it has already, such as a prompt's keys, is not given to it again.
        """
        import openvino

        shapes = tuple(sorted((name, array.shape) for name, array in feed.items()))
        request, held = self._requests.get(None) or self._requests.get(shapes) or self._compiled(shapes)
        for name, array in feed.items():
            if held.get(name) is not array:
                request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
                held[name] = array
        request.infer()
        return request

    def _compiled(self, shapes: Shapes) -> Ready:
        key = shapes if len(self._requests) < self.kept else None
        if key is None:
            self._requests.clear()  # before another copy of the weights is made
        log.info("compiling for %s", "any shape" if key is None else dict(key))
        model = self._read()
        if key is not None:
            model.reshape({name: list(shape) for name, shape in key})
            if self._options["INFERENCE_PRECISION_HINT"] == "bf16":
                fold_upsampling(model)
        with release_mapped_pages(_weights(model)):
            compiled = self._core.compile_model(model, "CPU", self._options)
        if "CACHE_DIR" in self._options:  # from which it may have come: the file stays mapped, with weights in fp32
            release_mapped_files(Path(self._options["CACHE_DIR"]))
        self._requests[key] = compiled.create_infer_request(), {}
        return self._requests[key]

    def close(self) -> None:
        """Free what was compiled."""
        self._requests.clear()


def _weights(model: Any) -> list[NDArray[Any]]:
    """The graph's larger constants, as they lie in memory."""
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return [node.data for node in constants if node.get_byte_size() >= LARGE]
