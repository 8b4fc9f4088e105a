"""Simplifies a traced graph with onnxscript: constants are folded, and operators without effect are removed."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import slice_split_rule

__all__ = ["simplify"]

RULES = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule)
"""Rewrite rules without the one that turns two slices into a split. diffusers' models split tensors themselves, and the
search for pairs of slices takes time quadratic in the number of nodes."""
ROUNDS = 2
"""Rounds of folding and rewriting, each of which enables more of the other; as many as in onnxscript's optimizer."""


def simplify(model: ir.Model) -> None:
    """Simplify ``model`` in place without changing its results, as ``onnxscript.optimizer.optimize`` does."""
    InlinePass()(model)
    rewrite = rewriter.RewritePass(RULES)
    for _ in range(ROUNDS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True).modified
        rewritten = rewrite(model).modified
        RemoveUnusedNodesPass()(model)
        if not (folded or rewritten):
            break
    for clean in (
        RemoveUnusedOpsetsPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        OutputFixPass(),
        NameFixPass(),
    ):
        clean(model)
