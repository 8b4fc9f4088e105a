"""Finds nodes of an ONNX graph without the inputs that their operators need, without the package onnx.

OpenVINO's reader does not check this and crashes at a convolution without weights. ONNX Runtime checks it itself.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ldm_runtime.errors import ManifestError
from ldm_runtime.number_checks import shown
from ldm_runtime.protobuf_fields import fields

__all__ = ["REQUIRED", "check_nodes"]

_BY_COUNT = {
    0: "Constant Optional OptionalHasElement RandomNormal RandomUniform SequenceEmpty",
    2: (
        "Add AffineGrid And BitShift BitwiseAnd BitwiseOr BitwiseXor CastLike CausalConvWithState CenterCropPad "
        "Compress Conv ConvInteger ConvTranspose CumProd CumSum DequantizeLinear Div Equal Expand Gather "
        "GatherElements GatherND Gemm Greater GreaterOrEqual GridSample LayerNormalization Less LessOrEqual Loop "
        "MatMul MatMulInteger MaxRoiPool MaxUnpool Mod Mul NegativeLogLikelihoodLoss NonMaxSuppression Or PRelu "
        "Pow QuantizeLinear RMSNormalization ReverseSequence STFT SequenceAt SequenceInsert "
        "SoftmaxCrossEntropyLoss StringConcat Sub SwiGLU TensorScatter Tile Xor"
    ),
    3: (
        "Attention Col2Im DeformConv GRU GroupNormalization InstanceNormalization LSTM LinearAttention OneHot RNN "
        "Range RoiAlign RotaryEmbedding Scatter ScatterElements ScatterND Where"
    ),
    5: "BatchNormalization MelWeightMatrix",
    8: "QLinearConv QLinearMatMul",
}
REQUIRED = {operator: count for count, operators in _BY_COUNT.items() for operator in operators.split()}
"""ONNX operator -> number of inputs that every version of the standard requires; one for operators not listed."""
_SKIPPED = {"Loop", "Scan"}
"""Operators whose first inputs may be omitted, which is written as an empty name."""
_GRAPH, _NODE, _INPUT, _OPERATOR, _DOMAIN = 7, 1, 1, 4, 7


def check_nodes(graph: Path) -> None:
    """Check that every node of a graph has its required inputs; nodes of subgraphs and functions are not checked.

    Args:
        graph: An ONNX file.

    Raises:
        ManifestError: A node lacks an input, or the file is not a protobuf message.
        OSError: The file cannot be read.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            for number, start, end in fields(content, 0, len(content)):
                if number == _GRAPH and end >= 0:
                    for part, first, last in fields(content, start, end):
                        if part == _NODE and last >= 0:
                            _check_node(content, first, last, graph)
        except (ValueError, IndexError) as error:
            raise ManifestError(f"{graph}: no ONNX graph ({error}); rebuild the bundle") from None


def _check_node(content: mmap.mmap, start: int, end: int, graph: Path) -> None:
    texts: dict[int, list[bytes]] = {_INPUT: [], _OPERATOR: [], _DOMAIN: []}
    for number, first, last in fields(content, start, end):
        if number in texts and last >= 0:
            texts[number].append(content[first:last])
    operator = b"".join(texts[_OPERATOR][-1:]).decode("utf-8", "replace")
    if b"".join(texts[_DOMAIN][-1:]) not in (b"", b"ai.onnx") or operator in _SKIPPED:
        return
    needed = REQUIRED.get(operator, 1)
    present = sum(1 for name in texts[_INPUT][:needed] if name)
    if present < needed:
        what = f"operator {shown(operator)} has {present} inputs, expected at least {needed}"
        raise ManifestError(f"{graph}: {what}; rebuild the bundle")
