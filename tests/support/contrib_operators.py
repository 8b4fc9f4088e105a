"""ONNX Runtime's own operators for onnx's reference evaluator, written from their specification.

The specification is docs/ContribOperators.md of ONNX Runtime. Tests compare those that ONNX Runtime has on the CPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv import _conv_implementation

Array = NDArray[Any]
_erf = np.vectorize(math.erf, otypes=[np.float32])


class _Contrib(OpRun):  # type: ignore[misc]
    op_domain = "com.microsoft"


class NhwcConv(_Contrib):
    """Convolution of [B, h, w, C] by weights [M, kh, kw, C]."""

    def _run(self, x, w, b=None, **options):  # type: ignore[no-untyped-def]
        names = ("dilations", "group", "kernel_shape", "pads", "strides")
        values = [options[name] for name in names]
        y = _conv_implementation(
            x.transpose(0, 3, 1, 2).astype(np.float32),
            w.transpose(0, 3, 1, 2).astype(np.float32),
            None if b is None else b.astype(np.float32),
            "NOTSET",
            *values,
        )
        return (y.transpose(0, 2, 3, 1).astype(x.dtype),)


class GroupNorm(_Contrib):
    """Group normalization of [B, h, w, C] with statistics in float32, and SiLU if ``activation`` is 1."""

    def _run(self, x, gamma, beta, **options):  # type: ignore[no-untyped-def]
        return (_group_norm(x, gamma, beta, **options),)


class SkipGroupNorm(_Contrib):
    """Group normalization of x + skip + bias; the second result is that sum."""

    def _run(self, x, gamma, beta, skip, bias=None, **options):  # type: ignore[no-untyped-def]
        skip = skip[:, None, None, :] if skip.ndim == 2 else skip
        total = x + skip + (0 if bias is None else bias)
        total = total.astype(x.dtype)
        normal = _group_norm(total, gamma, beta, **options)
        return (normal, total)


def _group_norm(
    x: Array, gamma: Array, beta: Array, activation: int, channels_last: int, epsilon: float, groups: int
) -> Array:
    assert channels_last == 1 and gamma.dtype == beta.dtype == np.float32
    batch, height, width, channels = x.shape
    assert channels % (2 * groups) == 0  # the CUDA kernel's limit
    data = x.astype(np.float32).reshape(batch, height * width, groups, channels // groups)
    mean = data.mean((1, 3), keepdims=True)
    variance = data.var((1, 3), keepdims=True)
    normal = ((data - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
    return (normal / (1 + np.exp(-normal)) if activation else normal).astype(x.dtype)


class SkipLayerNormalization(_Contrib):
    """Layer normalization of x + skip + bias; the fourth result is that sum."""

    def _run(self, x, skip, gamma, beta=None, bias=None, epsilon=1e-12):  # type: ignore[no-untyped-def]
        total = (x + skip + (0 if bias is None else bias)).astype(x.dtype)
        data = total.astype(np.float32)
        mean, variance = data.mean(-1, keepdims=True), data.var(-1, keepdims=True)
        normal = (data - mean) / np.sqrt(variance + epsilon) * gamma + (0 if beta is None else beta)
        return (normal.astype(x.dtype), mean, 1 / np.sqrt(variance + epsilon), total)


class BiasAdd(_Contrib):
    """x + bias + skip of [B, T, C]."""

    def _run(self, x, bias, skip):  # type: ignore[no-untyped-def]
        assert x.ndim == skip.ndim == 3 and x.shape == skip.shape
        return ((x + bias + skip).astype(x.dtype),)


class BiasSplitGelu(_Contrib):
    """(left + bias) * Gelu(right + bias) of the two halves of the last axis."""

    def _run(self, x, bias):  # type: ignore[no-untyped-def]
        assert x.shape[-1] in (2560, 5120, 6144, 10240, 12288)
        left, right = np.split((x + bias).astype(np.float32), 2, axis=-1)
        return ((left * right * 0.5 * (_erf(right / np.sqrt(2)) + 1)).astype(x.dtype),)


class MultiHeadAttention(_Contrib):
    """Attention of [B, T, heads * width], or of queries, keys and values packed as [B, T, heads, 3, width]."""

    def _run(self, query, key=None, value=None, num_heads=1, scale=None, **_):  # type: ignore[no-untyped-def]
        if query.ndim == 5:
            assert key is None and value is None and query.shape[2:4] == (num_heads, 3)
            parts = [query[:, :, :, index].transpose(0, 2, 1, 3) for index in range(3)]
        else:
            parts = [part.reshape(*part.shape[:2], num_heads, -1).transpose(0, 2, 1, 3) for part in (query, key, value)]
        q, k, v = (part.astype(np.float32) for part in parts)
        scores = q @ k.swapaxes(-1, -2) * (scale or 1 / np.sqrt(q.shape[-1]))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = weights / weights.sum(-1, keepdims=True) @ v
        batch, heads, tokens, width = attended.shape
        return (attended.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * width).astype(query.dtype),)


class Resize(OpRun):  # type: ignore[misc]
    """Nearest upsampling. onnx's own evaluator fails on an input that is left out."""

    def _run(self, x, roi=None, scales=None, sizes=None, **options):  # type: ignore[no-untyped-def]
        assert options["mode"] == "nearest" and options["coordinate_transformation_mode"] == "asymmetric"
        assert options["nearest_mode"] == "floor"
        known = sizes is not None and np.size(sizes)
        target = sizes if known else [math.floor(size * scale) for size, scale in zip(x.shape, scales, strict=True)]
        for axis, size in enumerate(target):
            x = np.take(x, np.arange(size) * x.shape[axis] // size, axis)
        return (x,)


OPERATORS = [
    Resize,
    NhwcConv,
    GroupNorm,
    SkipGroupNorm,
    SkipLayerNormalization,
    BiasAdd,
    BiasSplitGelu,
    MultiHeadAttention,
]


def evaluate(model: onnx.ModelProto | Path, feed: dict[str, Array]) -> dict[str, Array]:
    """Output name -> array, as onnx's reference evaluator and these operators compute it."""
    proto = onnx.load(model) if isinstance(model, Path) else model
    # The reference evaluator reads a node's attributes from its schema; these operators have none, so give all.
    evaluator = ReferenceEvaluator(proto, new_ops=OPERATORS)
    return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))
