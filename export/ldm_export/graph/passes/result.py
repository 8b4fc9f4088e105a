"""The type of a graph pass and of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Pass", "PassResult"]


@dataclass(frozen=True)
class PassResult:
    """Result of one pass or of several passes.

    Attributes:
        model: The rewritten model. A pass may rewrite its argument in place and return it.
        changes: Number of places of the graph that were rewritten. 0 means that the graph is unchanged.
    """

    model: ir.Model
    changes: int


Pass = Callable[[ir.Model], PassResult]
"""A graph rewrite. It keeps the names, types and order of the graph's inputs and outputs."""
