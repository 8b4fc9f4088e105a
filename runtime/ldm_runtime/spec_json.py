"""A component's spec in the manifest's JSON: axes with their bounds, dimensions as numbers or like "8*height"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import require_map, require_object, require_str
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec

__all__ = ["MAX_DIM", "spec_from_json", "spec_to_json"]

MAX_DIM = 2**31 - 1
"""Largest bound of an axis and largest fixed dimension, because engines store them as int32."""
_SYMBOL = re.compile(r"(?:([1-9]\d{0,3})\*)?([a-z_]+)")


def spec_to_json(spec: ComponentSpec) -> dict[str, Any]:
    """Fields ``axes``, ``inputs``, ``outputs`` and ``runs`` as JSON values."""
    tensors = spec.inputs + spec.outputs
    axes = {dim.name: dim for tensor in tensors for dim in tensor.shape if isinstance(dim, Axis)}

    def tensor_to_json(tensor: TensorSpec) -> dict[str, Any]:
        shape = [dim.symbol if isinstance(dim, Axis) else dim for dim in tensor.shape]
        return {"name": tensor.name, "dtype": tensor.dtype, "shape": shape}

    return {
        "axes": {name: [axis.min, axis.opt, axis.max] for name, axis in axes.items()},
        "inputs": [tensor_to_json(tensor) for tensor in spec.inputs],
        "outputs": [tensor_to_json(tensor) for tensor in spec.outputs],
        "runs": spec.runs,
    }


def spec_from_json(where: str, name: str, entry: Mapping[str, Any]) -> ComponentSpec:
    """The spec of component ``name`` from its fields ``axes``, ``inputs``, ``outputs`` and ``runs``.

    Raises:
        ManifestError, SpecError: a field is missing or cannot be used; ``where`` and the field are named.
    """
    axes = require_map(f"{where}.axes", entry.get("axes"), _axis)
    inputs, outputs = (_tensors(f"{where}.{side}", entry.get(side), axes) for side in ("inputs", "outputs"))
    return ComponentSpec(name, inputs, outputs, require_str(f"{where}.runs", entry.get("runs", "step")))


def _axis(where: str, value: Any) -> Axis:
    if not isinstance(value, list) or len(value) != 3 or any(type(n) is not int or n > MAX_DIM for n in value):
        raise ManifestError(f"{where}: got {value!r:.60}, expected [min, opt, max] up to {MAX_DIM}; rebuild the bundle")
    return Axis(where.rpartition(".")[2], *value)


def _tensors(where: str, value: Any, axes: Mapping[str, Axis]) -> tuple[TensorSpec, ...]:
    if not isinstance(value, list) or not value:
        raise ManifestError(f"{where}: expected a list of tensors; rebuild the bundle")
    return tuple(_tensor(f"{where}[{i}]", entry, axes) for i, entry in enumerate(value))


def _tensor(where: str, value: Any, axes: Mapping[str, Axis]) -> TensorSpec:
    entry = require_object(where, value)
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > 8:
        raise ManifestError(f"{where}.shape: expected a list of at most 8 dimensions; rebuild the bundle")
    dims = tuple(_dim(where, dim, axes) for dim in shape)
    return TensorSpec(
        require_str(f"{where}.name", entry.get("name")), require_str(f"{where}.dtype", entry.get("dtype")), dims
    )


def _dim(where: str, dim: Any, axes: Mapping[str, Axis]) -> Dim:
    if type(dim) is int and 1 <= dim <= MAX_DIM:
        return dim
    match = _SYMBOL.fullmatch(dim) if isinstance(dim, str) else None
    if match is None or match[2] not in axes:
        raise ManifestError(f"{where}.shape: {dim!r:.40} is neither a size nor one of the axes {', '.join(axes)}")
    return axes[match[2]] * int(match[1] or 1)
