"""Shape facts: what derives from an axis agrees with itself, and a feed that does not fit is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.errors import LdmError, SpecError
from ldm_runtime.specs import (
    DTYPES,
    Axis,
    ComponentSpec,
    TensorSpec,
    check_feed,
    dummy_inputs,
    dynamic_axes,
    profile,
)

BATCH, HEIGHT, WIDTH = Axis("batch", 1, 2, 4), Axis("height", 2, 4, 8), Axis("width", 2, 4, 8)
SPEC = ComponentSpec(
    "decoder",
    (
        TensorSpec("latents", "float32", (BATCH, 4, HEIGHT, WIDTH)),
        TensorSpec("mask", "uint8", (BATCH, 1, HEIGHT * 8, 8 * WIDTH)),
        TensorSpec("tokens", "int64", (2 * BATCH, 7)),
    ),
    (TensorSpec("image", "float32", (BATCH, 3, 8 * HEIGHT, 8 * WIDTH)),),
)


@st.composite
def axes(draw: st.DrawFn, name: str) -> Axis:
    low, opt, high = sorted(draw(st.lists(st.integers(1, 3), min_size=3, max_size=3)))
    return Axis(name, low, opt, high, draw(st.integers(1, 3)))


@st.composite
def specs(draw: st.DrawFn) -> ComponentSpec:
    """Two inputs and an output over the same axes, each scaled differently in each place."""
    symbols = [draw(axes(name)) for name in ("batch", "height")]
    dim = st.one_of(
        st.integers(1, 5), st.builds(lambda axis, by: axis * by, st.sampled_from(symbols), st.integers(1, 2))
    )
    shape = st.lists(dim, max_size=4).map(tuple)
    tensors = [TensorSpec(name, draw(st.sampled_from(DTYPES)), draw(shape)) for name in ("x", "y", "out")]
    return ComponentSpec("any", tuple(tensors[:2]), tuple(tensors[2:]))


@given(axes("n"), st.integers(1, 9), st.integers(-5, 2000))
def test_a_scaled_axis_admits_the_scaled_sizes(axis: Axis, factor: int, size: int) -> None:
    assert (axis * factor).admits(size * factor) == axis.admits(size)
    assert not (axis * (2 * factor)).admits(2 * factor * size + 1)
    assert axis * factor == factor * axis
    assert (axis * factor).symbol == f"{axis.scale * factor}*n" if axis.scale * factor > 1 else "n"


@given(axes("n"))
def test_an_axis_admits_its_bounds_and_nothing_beyond(axis: Axis) -> None:
    admitted = [size for size in range(-10, 60) if axis.admits(size)]
    assert admitted == [value * axis.scale for value in range(axis.min, axis.max + 1)]


@pytest.mark.parametrize(
    "bounds", [(0, 1, 2), (-1, 1, 2), (2, 1, 3), (1, 3, 2), (3, 2, 1), (1, 1, 1, 0), (1, 1, 1, -8)]
)
def test_bounds_out_of_order_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"^axis height: got .*expected 1 <= min <= opt <= max") as caught:
        Axis("height", *bounds)
    assert ":".join(map(str, bounds[:3])) in str(caught.value)


def test_an_axis_cannot_be_scaled_away() -> None:
    with pytest.raises(SpecError, match="axis batch: got 1:2:4 times 0"):
        BATCH * 0


@pytest.mark.parametrize("dtype", ["float64", "bool", "", "Float32", "bfloat16"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(SpecError, match=f"tensor x: dtype '{dtype}' is none of float32, float16"):
        TensorSpec("x", dtype, ())


def test_a_spec_as_exporter_engine_and_reader_take_it() -> None:
    assert SPEC.inputs[0].bounds("opt") == (2, 4, 4, 4)
    assert dynamic_axes(SPEC) == {
        "latents": {0: "batch", 2: "height", 3: "width"},
        "mask": {0: "batch", 2: "8*height", 3: "8*width"},
        "tokens": {0: "2*batch"},
        "image": {0: "batch", 2: "8*height", 3: "8*width"},
    }
    assert profile(SPEC) == {
        "latents": ((1, 4, 2, 2), (2, 4, 4, 4), (4, 4, 8, 8)),
        "mask": ((1, 1, 16, 16), (2, 1, 32, 32), (4, 1, 64, 64)),
        "tokens": ((2, 7), (4, 7), (8, 7)),
    }
    assert str(SPEC.outputs[0]) == "image: float32 [batch, 3, 8*height, 8*width]"
    assert str(TensorSpec("scalar", "int32", ())) == "scalar: int32 []"


@given(specs(), st.sampled_from(["min", "opt", "max"]), st.integers(0, 9))
def test_dummy_inputs_pass_the_check_at_every_bound(spec: ComponentSpec, which: str, seed: int) -> None:
    feed = dummy_inputs(spec, which, seed)
    check_feed(spec, feed)
    place = ("min", "opt", "max").index(which)
    assert {name: array.shape for name, array in feed.items()} == {name: p[place] for name, p in profile(spec).items()}
    again = dummy_inputs(spec, which, seed)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    for tensor in spec.inputs:
        if np.dtype(tensor.dtype).kind in "iu":
            assert set(np.unique(feed[tensor.name])) <= {0, 1}


@given(specs())
def test_profiles_never_fall_and_dynamic_axes_are_what_varies(spec: ComponentSpec) -> None:
    for name, (low, opt, high) in profile(spec).items():
        assert all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True))
        fixed = set(range(len(low))) - set(dynamic_axes(spec)[name])
        assert all(low[i] == high[i] for i in fixed)


def feed(**changes: Any) -> dict[str, np.ndarray]:
    """A fitting feed, with arrays replaced (None takes one away)."""
    arrays = {**dummy_inputs(SPEC), **changes}
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, "got inputs ['latents', 'tokens'], expected ['latents', 'mask', 'tokens']"),
        ({"extra": np.zeros(1)}, "got inputs ['extra', 'latents', 'mask', 'tokens'], expected ['latents', 'mask',"),
        ({"latents": np.zeros((2, 4, 4, 4))}, "input latents: float32 [batch, 4, height, width]: got float64 [2, 4, 4"),
        ({"latents": np.zeros((2, 4, 4, 4), ">f4")}, "input latents: float32 [batch, 4, height, width]: got >f4"),
        ({"latents": np.zeros((2, 4, 4), np.float32)}, "got float32 [2, 4, 4], expected another dtype or rank"),
        ({"tokens": np.zeros((4, 7), np.int32)}, "input tokens: int64 [2*batch, 7]: got int32 [4, 7]"),
        ({"latents": np.zeros((2, 3, 4, 4), np.float32)}, "got float32 [2, 3, 4, 4], expected 4 where 3 stands"),
        ({"latents": np.zeros((2, 4, 9, 4), np.float32)}, "[2, 4, 9, 4], height must lie in 2..8 in steps of 1"),
        ({"latents": np.zeros((0, 4, 4, 4), np.float32)}, "[0, 4, 4, 4], batch must lie in 1..4 in steps of 1"),
        ({"mask": np.zeros((2, 1, 33, 32), np.uint8)}, "8*height must lie in 16..64 in steps of 8"),
        ({"tokens": np.zeros((10, 7), np.int64)}, "2*batch must lie in 2..8 in steps of 2"),
        ({"mask": np.zeros((2, 1, 32, 40), np.uint8)}, "width is 4 in latents and 5 here; they must agree"),
        ({"tokens": np.zeros((2, 7), np.int64)}, "batch is 2 in latents and 1 here; they must agree"),
    ],
)
def test_a_feed_that_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    check_feed(SPEC, feed())
    with pytest.raises(SpecError) as caught:
        check_feed(SPEC, feed(**changes))
    assert str(caught.value).startswith("decoder: ")
    assert message in str(caught.value)


@given(specs(), st.data())
def test_one_wrong_size_is_refused_and_its_tensor_named(spec: ComponentSpec, data: st.DataObject) -> None:
    arrays = dummy_inputs(spec, "max")
    ranked = [tensor for tensor in spec.inputs if tensor.shape]
    if not ranked:
        return
    tensor = data.draw(st.sampled_from(ranked))
    place = data.draw(st.integers(0, len(tensor.shape) - 1))
    shape = list(arrays[tensor.name].shape)
    shape[place] += data.draw(st.integers(1, 3))  # beyond a fixed size, beyond an axis's max
    arrays[tensor.name] = np.zeros(shape, tensor.dtype)
    with pytest.raises(SpecError) as caught:
        check_feed(spec, arrays)
    assert str(caught.value).startswith(f"any: input {tensor}: got {tensor.dtype} {shape}")


def test_specs_are_values() -> None:
    assert replace(SPEC) == SPEC and hash(replace(SPEC)) == hash(SPEC)
    assert issubclass(SpecError, LdmError) and issubclass(SpecError, ValueError)
