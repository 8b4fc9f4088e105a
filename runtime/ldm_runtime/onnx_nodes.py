"""Finds nodes of an ONNX graph without the inputs that their operators need, without the package onnx.

OpenVINO's reader does not check this and crashes at a convolution without weights. ONNX Runtime checks it itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ldm_runtime.errors import ManifestError
from ldm_runtime.number_checks import shown
from ldm_runtime.onnx_external import varint

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
_WIDTHS = {1: 8, 5: 4}
"""Protobuf wire type of a fixed size -> its size in bytes."""


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
            for number, start, end in _parts(content, 0, len(content)):
                if number == _GRAPH:
                    for part, first, last in _parts(content, start, end):
                        if part == _NODE:
                            _check_node(content, first, last, graph)
        except (ValueError, IndexError) as error:
            raise ManifestError(f"{graph}: no ONNX graph ({error}); rebuild the bundle") from None


def _check_node(content: mmap.mmap, start: int, end: int, graph: Path) -> None:
    texts: dict[int, list[bytes]] = {_INPUT: [], _OPERATOR: [], _DOMAIN: []}
    for number, first, last in _parts(content, start, end):
        if number in texts:
            texts[number].append(content[first:last])
    operator = b"".join(texts[_OPERATOR][-1:]).decode("utf-8", "replace")
    if b"".join(texts[_DOMAIN][-1:]) not in (b"", b"ai.onnx") or operator in _SKIPPED:
        return
    needed = REQUIRED.get(operator, 1)
    present = sum(1 for name in texts[_INPUT][:needed] if name)
    if present < needed:
        what = f"operator {shown(operator)} has {present} inputs, expected at least {needed}"
        raise ManifestError(f"{graph}: {what}; rebuild the bundle")


def _parts(content: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield field number, start and end of each length-delimited field of a message."""
    while position < end:
        tag, position = varint(content, position)
        wire_type = tag & 7
        if wire_type == 2:
            size, start = varint(content, position)
            position = start + size
            if position > end:
                raise ValueError(f"a field of {size} bytes goes beyond its message")
            yield tag >> 3, start, position
        elif wire_type == 0:
            _, position = varint(content, position)
        elif wire_type in _WIDTHS:
            position += _WIDTHS[wire_type]
        else:
            raise ValueError(f"wire type {wire_type}")
