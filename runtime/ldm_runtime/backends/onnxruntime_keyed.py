"""The UNet in ONNX Runtime on the CPU as two graphs: cross-attention's keys and values once a prompt, and the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, check_feed

KEYS, KEYED = "unet_keys", "keyed_unet"
"""The components of a bundle that together are its UNet in fp32: from the context its keys and values, and from these,
in the context's place, the noise; the latter has attention as ONNX Runtime's own operator."""
Graph = tuple[Path, ComponentSpec]


class KeyedUNetBackend(SpecBackend):
    """Runs a UNet as the graphs of ``KEYS`` and ``KEYED``.

    Args:
        spec: of the UNet.
        keys, keyed: path and spec of each graph.
        threads: of one operator; None takes the cores this process may use.

    Raises:
        BackendError: the two do not fit together or the UNet, or as ``OnnxRuntimeBackend``.
    """

    def __init__(self, spec: ComponentSpec, keys: Graph, keyed: Graph, threads: int | None = None):
        self._spec = spec
        self._names = [tensor.name for tensor in keys[1].outputs]
        self._wanted = [tensor.name for tensor in keyed[1].inputs]
        known = {*self._names, *(tensor.name for tensor in spec.inputs)}
        if not known.issuperset(self._wanted) or keyed[1].outputs != spec.outputs:
            raise BackendError(
                f"{KEYED}: takes {', '.join(self._wanted)} and gives {', '.join(t.name for t in keyed[1].outputs)}, "
                f"which is not what {KEYS} and the UNet have; rebuild the bundle"
            )
        self._keys = OnnxRuntimeBackend(*keys, "cpu", threads)
        self._keyed = OnnxRuntimeBackend(*keyed, "cpu", threads)

    def prepare(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """The ``context`` and its keys and values, for any number of runs on the same rows.

        Raises:
            SpecError: not a context of the UNet's.
            BackendError: onnxruntime failed.
        """
        return {**feed, **self._keys.run(feed)}

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once.

        Args:
            feed: the spec's inputs, and what ``prepare`` gave for the context or not.

        Raises:
            SpecError: the feed does not fit the spec.
            BackendError: onnxruntime failed, e.g. out of memory.
        """
        check_feed(self._spec, {name: array for name, array in feed.items() if name not in self._names})
        if not all(name in feed for name in self._names):
            feed = {**feed, **self.prepare({"context": feed["context"]})}
        return self._keyed.run({name: feed[name] for name in self._wanted})

    def close(self) -> None:
        """Free both sessions."""
        self._keys.close()
        self._keyed.close()
