"""The scalings of a graph's tensors that measurements selected, with their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_calibration.qdq import QuantizedTensors, Scaling

__all__ = ["GraphScalings", "SourceScaling"]


@dataclass(frozen=True)
class SourceScaling:
    """The scaling of one tensor that layers read.

    Attributes:
        exponent: SmoothQuant's exponent; 0 means no smoothing.
        scaling: Threshold and factors.
    """

    exponent: float
    scaling: Scaling


@dataclass(frozen=True)
class GraphScalings:
    """The scalings of a graph.

    Attributes:
        sources: Tensor that layers read -> its scaling.
        results: Result of a convolution -> its scaling.
        output_db: Layer -> signal-to-noise ratio of its result with these scalings, in dB.
        flops: Layer of the graph -> its operations for one row.
    """

    sources: Mapping[str, SourceScaling]
    results: Mapping[str, Scaling]
    output_db: Mapping[str, float]
    flops: Mapping[str, int]

    @property
    def tensors(self) -> QuantizedTensors:
        """The scalings without the measurements."""
        return QuantizedTensors({name: source.scaling for name, source in self.sources.items()}, self.results)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "sources": {name: _source_to_json(source) for name, source in self.sources.items()},
            "results": {name: _scaling_to_json(scaling) for name, scaling in self.results.items()},
            "output_db": dict(self.output_db),
            "flops": dict(self.flops),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> GraphScalings:
        """Read the result of ``to_json``."""
        sources = {name: _source(entry) for name, entry in document["sources"].items()}
        results = {name: _scaling(entry) for name, entry in document["results"].items()}
        return cls(sources, results, document["output_db"], document["flops"])


def _scaling_to_json(scaling: Scaling) -> dict[str, Any]:
    factors = scaling.factors
    return {"threshold": scaling.threshold, "factors": None if factors is None else factors.tolist()}


def _source_to_json(source: SourceScaling) -> dict[str, Any]:
    return {"exponent": source.exponent, **_scaling_to_json(source.scaling)}


def _scaling(entry: Mapping[str, Any]) -> Scaling:
    return Scaling(entry["threshold"], None if entry["factors"] is None else np.array(entry["factors"], np.float32))


def _source(entry: Mapping[str, Any]) -> SourceScaling:
    return SourceScaling(entry["exponent"], _scaling(entry))
