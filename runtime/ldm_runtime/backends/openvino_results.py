"""Removes the int8 pairs behind convolutions, which only ONNX Runtime needs.

An int8 graph rounds the result of each quantized convolution to int8 and scales its channels back, because ONNX Runtime
computes the convolution in float otherwise (``ldm_calibration.qdq``, rule 4). OpenVINO computes it in int8 anyway and
can pass the exact sums on.
"""

from __future__ import annotations

from typing import Any

__all__ = ["keep_results"]


def keep_results(model: Any) -> int:
    """Connect each convolution's readers to its result before rounding; return the number of convolutions.

    Args:
        model: OpenVINO model of an ONNX graph. Models without such pairs stay unchanged.
    """
    kept = 0
    for rounding in model.get_ordered_ops():
        if rounding.get_type_name() != "FakeQuantize" or not _is_convolved(rounding.input_value(0).get_node()):
            continue
        restored = _restored(rounding)
        if restored is None:
            continue
        for use in list(restored.output(0).get_target_inputs()):
            use.replace_source_output(rounding.input_value(0))
        kept += 1
    return kept


def _is_convolved(node: Any) -> bool:
    """True for a convolution, and for the addition of its bias."""
    if node.get_type_name() == "Add":
        node, bias = (port.get_source_output().get_node() for port in node.inputs())
        if bias.get_type_name() not in ("Constant", "Reshape"):
            return False
    return bool(node.get_type_name() == "Convolution")


def _restored(rounding: Any) -> Any | None:
    """Return the node that turns the rounded values into floats, if all that follows is the scaling of the channels."""
    node = rounding
    for kind in ("Convert", "Convert", "Subtract", "Multiply"):
        readers = [port.get_node() for port in node.output(0).get_target_inputs()]
        if len(readers) != 1 or readers[0].get_type_name() != kind:
            return None
        node = readers[0]
    readers = [port.get_node() for port in node.output(0).get_target_inputs()]
    return node if [reader.get_type_name() for reader in readers] == ["Multiply"] else None
