"""The UNet for ONNX Runtime on a CPU: attention fused, and split in two graphs.

The keys and values of cross-attention are computed once per prompt, not at each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import load_to_model
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_export.graph.attention import fuse_attention
from ldm_runtime.backends.onnxruntime_keyed import KEYED, KEYS
from ldm_runtime.specs import ComponentSpec, TensorSpec

SOURCE = "context"
FORM = 1
"""Of the two graphs; counts up when this module writes others."""
FILES = {KEYS: "unet/keys.onnx", KEYED: "unet/keyed.onnx"}
"""Where the graphs lie in the bundle: beside the UNet's own, whose file of weights they refer to where it has one."""


def export_keyed(graph: Path, targets: dict[str, Path]) -> list[Path]:
    """Write the two graphs that together are the UNet's.

    Args:
        graph: the UNet's in fp32.
        targets: component → path to write; its folder exists, and need not hold the weights.

    Returns:
        The files written: none where nothing follows from the context alone, or something else than rows of numbers.
    """
    for component, target in targets.items():
        model = ir.load(graph)
        fuse_attention(model)
        _count_rows_elsewhere(model.graph)
        values = _shared(model.graph)
        if not values or not all(map(_is_rows, values)):
            return []
        _cut(model, values, component)
        if not graph.with_name(f"{graph.name}.data").exists():
            load_to_model(model)
        ir.save(model, target)
    return list(targets.values())


def keyed_specs(unet: ComponentSpec, keys: Path) -> dict[str, ComponentSpec]:
    """Component → spec, from the UNet's and the graph of the keys.

    ``unet_keys`` takes ``context`` float32 [R, T, D] and gives ``context.0``, …, each float32 [R, T, width of that
    attention]; ``keyed_unet`` takes these and what the UNet takes besides.
    """
    rows = unet.inputs[0].shape[0]
    given = {tensor.name: tensor for tensor in unet.inputs}
    made = tuple(
        TensorSpec(value.name or "", "float32", (rows, *(int(size) for size in (value.shape or ())[1:])))
        for value in ir.load(keys).graph.outputs
    )
    kept = tuple(tensor for name, tensor in given.items() if name != SOURCE)
    return {
        KEYS: ComponentSpec(KEYS, (given[SOURCE],), made),
        KEYED: ComponentSpec(KEYED, (*kept, *made), unet.outputs),
    }


def _cut(model: ir.Model, values: list[ir.Value], component: str) -> None:
    """Keep one side of ``values``: what they follow from, or what follows from them."""
    graph = model.graph
    graph.name = component
    if component == KEYS:
        graph.outputs[:] = values
        for index, value in enumerate(values):
            value.name = f"{SOURCE}.{index}"
    else:
        for index, value in enumerate(values):
            given = ir.Value(name=f"{SOURCE}.{index}", shape=value.shape, type=value.type)
            value.replace_all_uses_with(given)
            graph.inputs.append(given)
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [value for value in graph.inputs if (value.name == SOURCE) == (component == KEYS)]


def _count_rows_elsewhere(graph: ir.Graph) -> None:
    """The exporter may read the number of rows off the context: all inputs have the same."""
    context, other = (next(v for v in graph.inputs if (v.name == SOURCE) == wanted) for wanted in (True, False))
    for use in tuple(context.uses()):
        part = use.node.attributes
        if use.node.op_type == "Shape" and (part.get_int("start", 0), part.get_int("end", None)) == (0, 1):
            use.node.replace_input_with(use.idx, other)


def _is_rows(value: ir.Value) -> bool:
    """True for float32 of which only the first dimension is open."""
    shape = value.shape
    return value.dtype == ir.DataType.FLOAT and shape is not None and all(isinstance(dim, int) for dim in shape[1:])


def _shared(graph: ir.Graph) -> list[ir.Value]:
    """The float values that follow from the context alone and that something else needs, in the graph's order."""
    depends: dict[ir.Value, frozenset[str]] = {value: frozenset([value.name or ""]) for value in graph.inputs}

    def sources(values: Iterable[ir.Value | None]) -> frozenset[str]:
        return frozenset().union(*(depends.get(value, frozenset()) for value in values if value is not None))

    for node in graph:
        depends |= dict.fromkeys(node.outputs, sources(node.inputs))
    return [
        value
        for node in graph
        for value in node.outputs
        if depends[value] == {SOURCE} and any(depends[use.node.outputs[0]] != {SOURCE} for use in value.uses())
    ]
