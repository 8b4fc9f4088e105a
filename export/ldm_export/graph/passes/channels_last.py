"""Pass ``channels_last``: convolutions read and write [B, h, w, C], the layout in which tensor cores compute.

Rules:

1. A Conv with two spatial axes, one group, explicit padding and constant weights becomes com.microsoft.NhwcConv, whose
   weights are [M, kh, kw, C].
2. A Conv with a 1 x 1 kernel, stride 1 and no padding becomes a MatMul by a [C, M] matrix and an Add of the bias.
3. A Resize with mode "nearest" becomes a Resize of channels-last data; constant scales and all sizes are permuted.
4. Transposes before and after the new node change the layout; ``move_transposes`` removes most of them.

All other convolutions are not changed.

Precondition: constants are initializers, and values have types and shapes.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import onnx_ir as ir

from ldm_export.graph.nodes import CONTRIB, constant, initializer, insert, replace, transformed
from ldm_export.graph.passes.move_transposes import TO_NCHW, TO_NHWC, nhwc
from ldm_export.graph.passes.result import PassResult

__all__ = ["channels_last"]


def channels_last(model: ir.Model) -> PassResult:
    """Rewrite in place every convolution and every nearest Resize that matches the rules of this module."""
    changes = 0
    for node in tuple(model.graph):
        if node.op_type == "Conv" and not node.domain:
            changes += _convolution(model.graph, node)
        elif node.op_type == "Resize" and not node.domain:
            changes += _resize(model.graph, node)
    if changes:
        model.opset_imports[CONTRIB] = 1
    return PassResult(model, changes)


def _convolution(graph: ir.Graph, node: ir.Node) -> bool:
    data, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if data is None or weight is None or weight.const_value is None or not weight.is_initializer():
        return False
    if weight.shape is None or len(weight.shape) != 4 or data.shape is None or result.shape is None:
        return False
    attributes = node.attributes
    if attributes.get_int("group", 1) != 1 or attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    if bias is not None and constant(bias) is None:
        return False
    name, shape = node.name or "", nhwc(result.shape)
    outputs, inputs, *kernel = (int(size) for size in weight.shape.numpy())
    moved = insert(
        node, "Transpose", [data], {"perm": TO_NHWC}, name=f"{name}/to_nhwc", like=data, shape=nhwc(data.shape)
    )
    pads, strides = attributes.get_ints("pads", (0, 0, 0, 0)), attributes.get_ints("strides", (1, 1))
    if kernel == [1, 1] and not any(chain(pads)) and tuple(strides) == (1, 1):
        matrix = transformed(graph, f"{weight.name}/matrix", [weight], lambda w: w[:, :, 0, 0].T, [inputs, outputs])
        computed = insert(node, "MatMul", [moved, matrix], name=f"{name}/MatMul", like=result, shape=shape)
        if bias is not None:
            computed = insert(node, "Add", [computed, bias], name=f"{name}/Add", like=result, shape=shape)
    else:
        last = transformed(
            graph, f"{weight.name}/nhwc", [weight], lambda w: w.transpose(0, 2, 3, 1), [outputs, *kernel, inputs]
        )
        computed = insert(
            node,
            f"{CONTRIB}.NhwcConv",
            [moved, last, *([bias] if bias is not None else [])],
            {
                "kernel_shape": kernel,
                "pads": pads,
                "strides": strides,
                "dilations": attributes.get_ints("dilations", (1, 1)),
                "group": 1,
            },
            name=f"{name}/NhwcConv",
            like=result,
            shape=shape,
        )
    back = insert(node, "Transpose", [computed], {"perm": TO_NCHW}, name=f"{name}/to_nchw", like=result)
    replace(result, back)
    return True


def _resize(graph: ir.Graph, node: ir.Node) -> bool:
    data, result = node.inputs[0], node.outputs[0]
    _, scales, sizes = (*node.inputs[1:], None, None, None)[:3]
    if data is None or data.shape is None or result.shape is None or len(data.shape) != 4:
        return False
    if node.attributes.get_string("mode", "nearest") != "nearest" or node.attributes.get("axes") is not None:
        return False
    if (scales is None) == (sizes is None) or (scales is not None and constant(scales) is None):
        return False
    name = node.name or ""
    numbers = scales if sizes is None else sizes
    assert numbers is not None
    if (array := constant(numbers)) is not None:
        permuted = initializer(graph, f"{numbers.name}/nhwc", array[list(TO_NHWC)])
    else:
        order = initializer(graph, "nhwc_order", np.array(TO_NHWC, np.int64))
        permuted = insert(node, "Gather", [numbers, order], {"axis": 0}, name=f"{name}/sizes", like=numbers)
    moved = insert(
        node, "Transpose", [data], {"perm": TO_NHWC}, name=f"{name}/to_nhwc", like=data, shape=nhwc(data.shape)
    )
    inputs = [moved, None, permuted] if sizes is None else [moved, None, None, permuted]
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    resized = insert(node, "Resize", inputs, attributes, name=f"{name}/nhwc", like=result, shape=nhwc(result.shape))
    back = insert(node, "Transpose", [resized], {"perm": TO_NCHW}, name=f"{name}/to_nchw", like=result)
    replace(result, back)
    return True
