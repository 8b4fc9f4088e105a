"""How each tensor of a graph becomes int8, as chosen by measurement; as JSON too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_calibration.qdq import Scaling


@dataclass(frozen=True)
class Choice:
    """How one tensor is quantized.

    Attributes:
        observer: where the threshold comes from.
        exponent: of the migration; 0 for none.
        scaling: threshold and factors.
        thresholds: of all observers without migration.
    """

    observer: str
    exponent: float
    scaling: Scaling
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class Choices:
    """What was chosen for a graph.

    Attributes:
        sources: tensor that layers read → choice.
        results: convolution's result → scaling.
        output_db: layer → signal-to-noise ratio of its result with this choice, in dB.
        flops: every layer of the graph → its operations for one row.
    """

    sources: Mapping[str, Choice]
    results: Mapping[str, Scaling]
    output_db: Mapping[str, float]
    flops: Mapping[str, int]

    @property
    def scalings(self) -> dict[str, Scaling]:
        """Tensor → its scaling."""
        return {name: choice.scaling for name, choice in self.sources.items()}

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "sources": {name: _choice_facts(choice) for name, choice in self.sources.items()},
            "results": {name: _scaling_facts(scaling) for name, scaling in self.results.items()},
            "output_db": dict(self.output_db),
            "flops": dict(self.flops),
        }

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Choices:
        """From what ``facts`` gave."""
        sources = {name: _choice(given) for name, given in facts["sources"].items()}
        results = {name: _scaling(given) for name, given in facts["results"].items()}
        return cls(sources, results, facts["output_db"], facts["flops"])


def _scaling_facts(scaling: Scaling) -> dict[str, Any]:
    factors = scaling.factors
    return {"threshold": scaling.threshold, "factors": None if factors is None else factors.tolist()}


def _choice_facts(choice: Choice) -> dict[str, Any]:
    facts = {"observer": choice.observer, "exponent": choice.exponent, "thresholds": dict(choice.thresholds)}
    return facts | _scaling_facts(choice.scaling)


def _scaling(given: Mapping[str, Any]) -> Scaling:
    return Scaling(given["threshold"], None if given["factors"] is None else np.array(given["factors"], np.float32))


def _choice(given: Mapping[str, Any]) -> Choice:
    return Choice(given["observer"], given["exponent"], _scaling(given), given["thresholds"])
