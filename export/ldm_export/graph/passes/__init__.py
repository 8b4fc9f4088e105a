"""Graph passes: rewrites of an ONNX model for one engine.

A pass is a function ``model -> PassResult``. Each pass is one module, whose docstring numbers its rules. To add a pass,
write the module and list the function under its engine in ``ENGINE_PASSES``.

``split_off`` and ``half_precision`` are not listed there, because a split returns two models, and the conversion to
half precision needs measured magnitudes of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_export.graph.passes.channels_last import channels_last
from ldm_export.graph.passes.fuse_attention import fuse_attention
from ldm_export.graph.passes.fuse_bias import fuse_bias
from ldm_export.graph.passes.fuse_group_norm import fuse_group_norm
from ldm_export.graph.passes.fuse_skip_group_norm import fuse_skip_group_norm
from ldm_export.graph.passes.fuse_skip_layer_norm import fuse_skip_layer_norm
from ldm_export.graph.passes.move_transposes import move_transposes
from ldm_export.graph.passes.result import Pass, PassResult
from ldm_runtime.bundle_layout import CPU_VARIANT, CUDA_VARIANT
from ldm_runtime.errors import BuildError

__all__ = ["ENGINE_PASSES", "Pass", "PassResult", "apply"]

ENGINE_PASSES: Mapping[str, tuple[Pass, ...]] = {
    CPU_VARIANT: (fuse_attention,),
    CUDA_VARIANT: (
        fuse_attention,
        fuse_group_norm,
        channels_last,
        move_transposes,
        fuse_skip_group_norm,
        fuse_skip_layer_norm,
        fuse_bias,
    ),
}
"""Engine variant -> passes that rewrite an exported graph for it, in the order in which they run."""


def apply(model: ir.Model, passes: Sequence[Pass]) -> PassResult:
    """Run passes in order, then remove the nodes and initializers that nothing uses.

    Args:
        model: Model with typed values. It may be rewritten in place.
        passes: Passes to run. An empty sequence only removes unused nodes and initializers.

    Returns:
        The rewritten model and the sum of the changes of all passes.

    Raises:
        BuildError: A pass failed, changed the graph's inputs or outputs, or left a node that reads an undefined value.
            The message names the pass.
    """
    changes = 0
    for rewrite in passes:
        name, before = _name(rewrite), _signature(model)
        try:
            result = rewrite(model)
        except BuildError:
            raise
        except Exception as error:
            raise BuildError(
                f"{model.graph.name}: pass {name} failed: {type(error).__name__}: {error}; "
                "report it with the model's config"
            ) from error
        model, changes = result.model, changes + result.changes
        if (after := _signature(model)) != before:
            raise BuildError(
                f"{model.graph.name}: pass {name} changed inputs or outputs: got {after}, expected {before}; "
                "correct the pass"
            )
        _check_values(model.graph, name)
    RemoveUnusedNodesPass()(model)
    return PassResult(model, changes)


def _signature(model: ir.Model) -> list[str]:
    return [f"{value.name}: {value.dtype} {value.shape}" for value in (*model.graph.inputs, *model.graph.outputs)]


def _check_values(graph: ir.Graph, name: str) -> None:
    """Postcondition of every pass: each value is computed before it is read, or is an input or an initializer."""
    known = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                raise BuildError(
                    f"{graph.name}: pass {name}: node {node.name!r} reads {value.name!r}, got a value that no earlier "
                    "node computes, expected a graph in topological order; correct the pass"
                )
        known.update(node.outputs)


def _name(rewrite: Pass) -> str:
    return getattr(rewrite, "__name__", type(rewrite).__name__)
