"""Split a UNet for feature caching: the deep features, which change slowly, and the shallow layers that read them.

DeepCache (Ma et al. 2023, arXiv:2312.00858) computes the whole UNet only at some denoising steps. The other steps reuse
the deep features of the last whole step, and compute only the first layers of the down path and the last layers of the
up path.

Rules of ``expose_deep_features``:

1. Each layer of the up path starts with a Concat of its input and a skip connection on axis 1. The layers of the last
   up block are those whose Concat has the height and width of the UNet's result.
2. The first input of the Concat of the ``layers``-th last of them becomes the output ``deep_features``; an output that
   had this name before is removed.

Rules of ``shallow_unet``, which take any graph with that output, in every precision and for every engine:

1. The output becomes an input. Nodes that read it, or a tensor of which it is a Cast or a Transpose, read the input.
2. Nodes, weights and inputs that are no longer needed are removed. Weights in an external file stay there, and the
   graph refers to them.

Postcondition: with the UNet's own deep features, the shallow graph computes the UNet's results.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_runtime.errors import BuildError
from ldm_runtime.model import DEEP_FEATURES, NOISE_PRED, SHALLOW_UNET

__all__ = ["expose_deep_features", "possible_layers", "shallow_unet"]


def expose_deep_features(model: ir.Model, layers: int) -> None:
    """Add the output ``deep_features`` float32 [batch, C, height, width] to a UNet's graph.

    A graph without skip connections to its last layers is not changed.

    Args:
        model: The graph as exported. It is changed in place.
        layers: Number of last layers of the last up block that are computed at every step; 0 adds no output.

    Raises:
        BuildError: The last up block has fewer layers.
    """
    graph = model.graph
    joins = list(_last_joins(graph))
    if not layers or not joins:
        return
    if not 1 <= layers <= len(joins):
        raise BuildError(
            f"{graph.name}: feature cache: got {layers} layers, expected 0..{len(joins)}, as many as the last up block "
            "has; give another number, or 0 for no feature cache"
        )
    for output in [value for value in graph.outputs if value.name == DEEP_FEATURES]:
        graph.outputs.remove(output)
        output.name = f"{DEEP_FEATURES}/before"
    features = joins[-layers].inputs[0]
    assert features is not None
    features.name = DEEP_FEATURES
    features.shape = ir.Shape([graph.outputs[0].shape[0], features.shape[1], *graph.outputs[0].shape[2:]])  # type: ignore[index]
    graph.outputs.append(features)


def possible_layers(model: ir.Model) -> int:
    """Most layers that ``expose_deep_features`` takes for a UNet's graph; 0 if it has no skip connections there."""
    return len(list(_last_joins(model.graph)))


def _last_joins(graph: ir.Graph) -> Iterator[ir.Node]:
    """The Concat nodes at which the layers of the last up block start, in the graph's order."""
    result = graph.outputs[0].shape
    for node in graph:
        if node.op_type != "Concat" or node.attributes.get_int("axis") != 1 or len(node.inputs) != 2:
            continue
        shapes = [value.shape for value in node.inputs if value is not None and value.producer() is not None]
        known = [shape for shape in shapes if shape is not None and len(shape) == 4]
        if len(known) == 2 and result is not None and all(shape[2:] == result[2:] for shape in known):
            yield node


def shallow_unet(model: ir.Model) -> ir.Model:
    """Rewrite in place a UNet's graph with the output ``deep_features`` to the shallow graph."""
    graph = model.graph
    output = next(value for value in graph.outputs if value.name == DEEP_FEATURES)
    graph.outputs.remove(output)
    output.name = f"{DEEP_FEATURES}/computed"
    features = ir.Value(name=DEEP_FEATURES, type=output.type, shape=output.shape)
    _read_instead(graph, output, features)
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [*(value for value in graph.inputs if value.uses()), features]
    graph.name = SHALLOW_UNET
    if [value.name for value in graph.outputs] != [NOISE_PRED] or not features.uses():
        raise BuildError(f"{graph.name}: feature cache: the result does not depend on the deep features; leave it out")
    return model


def _read_instead(graph: ir.Graph, value: ir.Value, replacement: ir.Value) -> None:
    """Rule 1: let nodes read ``replacement`` instead of ``value`` or of the tensor that ``value`` rearranges."""
    first = graph[0]
    while True:
        value.replace_all_uses_with(replacement)
        node = value.producer()
        if node is None or node.domain or node.op_type not in ("Cast", "Transpose"):
            return
        source = node.inputs[0]
        assert source is not None and source.type is not None
        if node.op_type == "Cast":
            back = ir.node("Cast", [replacement], {"to": int(source.type.dtype)})
        else:
            perm = list(node.attributes.get_ints("perm", ()))
            back = ir.node("Transpose", [replacement], {"perm": [perm.index(axis) for axis in range(len(perm))]})
        restored = back.outputs[0]
        back.name, restored.name = f"{node.name}/back", f"{source.name}/back"
        restored.type, restored.shape = source.type, source.shape
        graph.insert_before(first, back)
        value, replacement = source, restored
