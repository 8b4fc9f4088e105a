"""What a backend takes and gives, said once for all that run a component of a known spec."""

from __future__ import annotations

from ldm_runtime.specs import ComponentSpec, TensorSpec


class Described:
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
