"""Engines that run the components of a model, one module for each engine.

``Backend`` is one loaded component. ``backends.engine.Engine`` is the interface of an engine, and
``backends.registry.BACKENDS`` lists the engines of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = ["Backend", "Feed", "SpecBackend"]

Feed = Mapping[str, NDArray[Any]]
"""Input name -> array, as the component's spec describes it."""


class Backend(Protocol):
    """One loaded component. The constructor loads it. Arrays that ``run`` returns belong to the caller."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Tensors that ``run`` takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Tensors that ``run`` returns."""

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the component once and return output name -> array.

        Raises:
            SpecError: The feed does not fit the component's spec.
            BackendError: The engine failed.
        """

    def close(self) -> None:
        """Free the engine. The backend cannot run afterwards."""


class SpecBackend:
    """Provides ``inputs`` and ``outputs`` of a ``Backend`` from the attribute ``_spec``, which subclasses set.

    It limits no call; a backend whose memory is short overrides ``most_rows``.
    """

    _spec: ComponentSpec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Tensors that ``run`` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Tensors that ``run`` returns."""
        return self._spec.outputs

    def most_rows(self, feed: Feed) -> int | None:
        """Number of rows of such inputs that fit into the free GPU memory in one call; None if there is no limit."""
        return None
