"""Shapes and dtypes of a model's components, shared by exporter, engines, runtime and server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import BackendError, SpecError

__all__ = [
    "DTYPES",
    "RUNS",
    "Axis",
    "ComponentSpec",
    "Dim",
    "TensorSpec",
    "check_feed",
    "check_result",
    "dummy_inputs",
    "dynamic_axes",
    "profile",
    "sizes_of",
]

DTYPES = ("float32", "float16", "int64", "int32", "uint8")


@dataclass(frozen=True)
class Axis:
    """A named dimension: ``scale`` × a value from ``min`` to ``max``, usually ``opt``.

    Raises:
        SpecError: not 1 ≤ min ≤ opt ≤ max, or scale < 1.
    """

    name: str
    min: int
    opt: int
    max: int
    scale: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max or self.scale < 1:
            raise SpecError(
                f"axis {self.name}: got {self.min}:{self.opt}:{self.max} times {self.scale}, "
                "expected 1 <= min <= opt <= max times at least 1; give the bounds as min:opt:max"
            )

    def __mul__(self, factor: int) -> Axis:
        """The axis ``factor`` times as long, e.g. ``latent_height * 8`` for pixels."""
        return Axis(self.name, self.min, self.opt, self.max, self.scale * factor)

    __rmul__ = __mul__

    @property
    def symbol(self) -> str:
        """Name of the dimension in a graph, e.g. ``batch`` or ``8*height``."""
        return self.name if self.scale == 1 else f"{self.scale}*{self.name}"

    def admits(self, size: int) -> bool:
        """True if the axis allows a dimension of ``size``."""
        return size % self.scale == 0 and self.min <= size // self.scale <= self.max


Dim = Axis | int


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one graph input or output; a dimension is a size or an Axis."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(f"tensor {self.name}: dtype {self.dtype!r:.40} is none of {', '.join(DTYPES)}")

    def bounds(self, which: str) -> tuple[int, ...]:
        """The shape at ``which`` of "min", "opt", "max"."""
        return tuple(getattr(dim, which) * dim.scale if isinstance(dim, Axis) else dim for dim in self.shape)

    def shape_at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for sizes as ``sizes_of`` returns them."""
        return tuple(sizes[dim.symbol] if isinstance(dim, Axis) else dim for dim in self.shape)

    def __str__(self) -> str:
        dims = ", ".join(dim.symbol if isinstance(dim, Axis) else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype} [{dims}]"


RUNS = ("request", "schedule", "step", "image")
"""How often a component runs: once per request, once per schedule of timesteps, at every step, or once per image."""


@dataclass(frozen=True)
class ComponentSpec:
    """One graph of the model: its name, inputs and outputs, and how often it runs (one of ``RUNS``)."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runs: str = "step"

    def __post_init__(self) -> None:
        if self.runs not in RUNS:
            raise SpecError(f"component {self.name}: runs: got {self.runs!r:.40}, expected one of {', '.join(RUNS)}")


def dynamic_axes(spec: ComponentSpec) -> dict[str, dict[int, str]]:
    """Tensor name → {dimension: symbol} for every dimension that is not fixed."""
    return {
        tensor.name: {i: dim.symbol for i, dim in enumerate(tensor.shape) if isinstance(dim, Axis)}
        for tensor in spec.inputs + spec.outputs
    }


def profile(spec: ComponentSpec) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return input name -> (min, opt, max) shapes of an optimization profile."""
    return {t.name: (t.bounds("min"), t.bounds("opt"), t.bounds("max")) for t in spec.inputs}


def dummy_inputs(spec: ComponentSpec, which: str = "opt", seed: int = 0) -> dict[str, NDArray[Any]]:
    """Valid random inputs at the "min", "opt" or "max" shapes: normal floats, integers 0 or 1."""
    rng = np.random.default_rng(seed)
    feed: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape, dtype = tensor.bounds(which), np.dtype(tensor.dtype)
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feed[tensor.name] = values.astype(dtype)
    return feed


def sizes_of(spec: ComponentSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return symbol → size of each free dimension of inputs and outputs, for inputs of these shapes.

    Raises:
        SpecError: The shapes do not fit the spec.
    """
    values: dict[str, int] = {}
    for tensor in spec.inputs:
        shape = shapes[tensor.name]
        where = f"{spec.name}: input {tensor}: got {list(shape)}"
        if len(shape) != len(tensor.shape):
            raise SpecError(f"{where}, expected another rank")
        for dim, size in zip(tensor.shape, shape, strict=True):
            fits = dim.admits(size) if isinstance(dim, Axis) else dim == size
            if not fits or (
                isinstance(dim, Axis) and values.setdefault(dim.name, size // dim.scale) * dim.scale != size
            ):
                raise SpecError(f"{where}, expected sizes within the bounds that agree with the other inputs")
    dims = [dim for tensor in spec.inputs + spec.outputs for dim in tensor.shape if isinstance(dim, Axis)]
    return {dim.symbol: values[dim.name] * dim.scale for dim in dims}


def check_feed(spec: ComponentSpec, feed: Mapping[str, NDArray[Any]]) -> None:
    """Check names, dtypes and shapes, and that axes of the same name have the same size.

    Raises:
        SpecError: names the component, the tensor, what was given and what is expected.
    """
    expected, names = {t.name for t in spec.inputs}, set(feed)
    if expected != names:
        raise SpecError(f"{spec.name}: got inputs {sorted(names)}, expected {sorted(expected)}")
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in spec.inputs:
        array = feed[tensor.name]
        if wrong := _misfit(tensor, array, sizes):
            got = f"{spec.name}: input {tensor}: got {array.dtype} {list(array.shape)}"
            raise SpecError(f"{got}, {wrong}")


def _misfit(tensor: TensorSpec, array: NDArray[Any], sizes: dict[str, tuple[int, str]]) -> str | None:
    """Return why an input does not fit, or None; add the sizes of its axes to ``sizes``."""
    if array.dtype != tensor.dtype or array.ndim != len(tensor.shape):
        return "expected another dtype or rank; convert it with astype or reshape"
    for dim, size in zip(tensor.shape, array.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                return f"expected {dim} where {size} stands"
            continue
        if not dim.admits(size):
            return f"{dim.symbol} must lie in {dim.min * dim.scale}..{dim.max * dim.scale} in steps of {dim.scale}"
        value, first = sizes.setdefault(dim.name, (size // dim.scale, tensor.name))
        if value != size // dim.scale:
            return f"{dim.name} is {value} in {first} and {size // dim.scale} here; they must agree"
    return None


def check_result(spec: ComponentSpec, feed: Mapping[str, NDArray[Any]], result: Mapping[str, Any]) -> None:
    """Check that an engine returned every output with the dtype and shape that the spec gives for this feed.

    A graph is untrusted, and engines do not compare its outputs with the manifest. The check takes a few microseconds.

    Args:
        spec: Inputs and outputs of the component.
        feed: Inputs of the run; they have passed ``check_feed``.
        result: Output name -> array that the engine returned.

    Raises:
        BackendError: Names the component, the output, what was returned and what is expected.
    """
    sizes = {
        dim.name: size // dim.scale
        for tensor in spec.inputs
        for dim, size in zip(tensor.shape, feed[tensor.name].shape, strict=True)
        if isinstance(dim, Axis)
    }
    for tensor in spec.outputs:
        array = result.get(tensor.name)
        if isinstance(array, np.ndarray) and array.dtype == tensor.dtype and array.ndim == len(tensor.shape):
            if all(map(_fits, tensor.shape, array.shape, [sizes] * array.ndim)):
                continue
            got = str(list(array.shape))
        else:
            got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        known = {name: sizes[name] for name in sorted(sizes)}
        raise BackendError(
            f"{spec.name}: output {tensor}: the engine returned {got} for {known or 'this input'}; the graph is not "
            "what the manifest says, rebuild the bundle"
        )


def _fits(dim: Dim, size: int, sizes: Mapping[str, int]) -> bool:
    if not isinstance(dim, Axis):
        return size == dim
    return size == sizes[dim.name] * dim.scale if dim.name in sizes else dim.admits(size)
