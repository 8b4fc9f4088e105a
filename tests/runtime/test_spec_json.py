"""Specs as manifests hold them: they read back equal, and every field that cannot be used is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime.errors import LdmError
from ldm_runtime.spec_json import MAX_DIM, spec_from_json, spec_to_json
from ldm_runtime.specs import DTYPES, Axis, ComponentSpec, TensorSpec
from tests.support.json_fields import with_field

BATCH, HEIGHT = Axis("batch", 1, 1, 32), Axis("height", 2, 8, 128)
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("sample", "float32", (2 * BATCH, 4, HEIGHT)), TensorSpec("timestep", "int64", (2 * BATCH,))),
    (TensorSpec("noise_pred", "float16", (2 * BATCH, 4, 8 * HEIGHT)),),
)
DOCUMENT = {
    "axes": {"batch": [1, 1, 32], "height": [2, 8, 128]},
    "inputs": [
        {"name": "sample", "dtype": "float32", "shape": ["2*batch", 4, "height"]},
        {"name": "timestep", "dtype": "int64", "shape": ["2*batch"]},
    ],
    "outputs": [{"name": "noise_pred", "dtype": "float16", "shape": ["2*batch", 4, "8*height"]}],
    "runs": "step",
}

sizes = st.integers(1, MAX_DIM)
names = st.from_regex(r"[a-z_]{1,9}", fullmatch=True)


@st.composite
def specs(draw: st.DrawFn) -> ComponentSpec:
    bounds = draw(st.dictionaries(names, st.lists(sizes, min_size=3, max_size=3).map(sorted), min_size=1, max_size=3))
    axes = st.sampled_from([Axis(name, *values) for name, values in bounds.items()])
    dims = st.one_of(sizes, axes, st.builds(lambda axis, scale: axis * scale, axes, st.integers(1, 9999)))
    shapes = st.lists(dims, max_size=8).map(tuple)
    tensors = st.lists(st.builds(TensorSpec, st.text(max_size=5), st.sampled_from(DTYPES), shapes), min_size=1)
    return ComponentSpec("any", tuple(draw(tensors)), tuple(draw(tensors)))


def test_the_form_of_a_spec() -> None:
    assert spec_to_json(SPEC) == DOCUMENT
    assert spec_from_json("components.unet", "unet", DOCUMENT) == SPEC


@given(specs())
def test_any_spec_reads_back_equal(spec: ComponentSpec) -> None:
    document = json.loads(json.dumps(spec_to_json(spec)))
    assert spec_from_json("components.any", "any", document) == spec


BOUNDS = (3, [1, 2], [1, 2, 3, 4], [1, 1, True], [1, 1, 2.0], ["1", "1", "1"], [1, 1, MAX_DIM + 1], None)
DIMS = (0, -1, MAX_DIM + 1, 1.0, True, None, "other", "0*batch", "batch*2", "8*", "08*batch", "batch\n", "", ["batch"])
BAD: list[tuple[str, Any, str]] = [
    ("axes", ..., "components.unet.axes: got NoneType, expected an object"),
    ("axes", [["batch", 1, 1, 32]], "components.unet.axes: got list, expected an object"),
    ("axes batch", ..., "components.unet.inputs[0].shape: '2*batch' is neither a size nor one of the axes height"),
    *[
        ("axes batch", bounds, f"components.unet.axes.batch: got {bounds!r}, expected [min, opt, max]")
        for bounds in BOUNDS
    ],
    ("axes batch", [2, 1, 1], "axis batch: got 2:1:1"),
    ("axes batch", [0, 1, 1], "axis batch: got 0:1:1"),
    ("inputs", ..., "components.unet.inputs: expected a list of tensors"),
    ("inputs", [], "components.unet.inputs: expected a list of tensors"),
    ("outputs", {}, "components.unet.outputs: expected a list of tensors"),
    ("inputs 1", "timestep", "components.unet.inputs[1]: got str, expected an object"),
    ("outputs 0 name", None, "components.unet.outputs[0].name: got None, expected a text"),
    ("inputs 0 dtype", 32, "components.unet.inputs[0].dtype: got 32, expected a text"),
    ("inputs 0 dtype", ..., "components.unet.inputs[0].dtype: got None, expected a text"),
    ("inputs 0 dtype", "complex64", "tensor sample: dtype 'complex64' is none of float32"),
    ("inputs 0 shape", ..., "components.unet.inputs[0].shape: expected a list of at most 8 dimensions"),
    ("inputs 0 shape", "batch", "components.unet.inputs[0].shape: expected a list of at most 8 dimensions"),
    ("inputs 0 shape", [1] * 9, "components.unet.inputs[0].shape: expected a list of at most 8 dimensions"),
    *[("outputs 0 shape 1", dim, f"components.unet.outputs[0].shape: {dim!r} is neither a size nor") for dim in DIMS],
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path} {value!r:.20}" for path, value, _ in BAD])
def test_every_wrong_field_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(LdmError) as caught:
        spec_from_json("components.unet", "unet", with_field(DOCUMENT, path, value))
    assert message in str(caught.value)
