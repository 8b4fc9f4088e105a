"""Engines that run one component: one module each, all behind the same ``Backend`` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from ldm_runtime.specs import ComponentSpec, TensorSpec

Feed = Mapping[str, NDArray[Any]]


class Backend(Protocol):
    """One loaded component. The constructor does the work; arrays that ``run`` returns belong to the caller."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns."""

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once. Raises SpecError on a feed that does not fit, BackendError when the engine fails."""

    def close(self) -> None:
        """Free the engine; the backend cannot run afterwards."""


@runtime_checkable
class Preparing(Protocol):
    """A backend that computes once what follows from an input that many runs share."""

    def prepare(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """What ``run`` takes in place of that input; rows are the leading axis of every array."""


class SpecBackend:
    """The first half of ``Backend``: a class that sets ``_spec`` has its inputs and outputs."""

    _spec: ComponentSpec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` returns."""
        return self._spec.outputs
